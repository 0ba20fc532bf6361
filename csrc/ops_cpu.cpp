// The CPU operators of bpo_fast_kernels on PyTorch's stable ABI. Arguments are checked in Python.

#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "head_dw_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
bpo::Head<T> make_head(const Tensor& hidden, const Tensor& weight, const int64_t* targets, double scale, double softcap) {
  return {static_cast<const T*>(hidden.const_data_ptr()),
          static_cast<const T*>(weight.const_data_ptr()),
          targets,
          hidden.size(0),
          weight.size(1),
          weight.size(0),
          static_cast<float>(scale),
          static_cast<float>(softcap)};
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const int64_t* ints(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

// Calls f with a value of the tensor's element type.
template <class F>
void dispatch(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bpo::BFloat16{});
#if defined(__FLT16_MAX__)
    case ScalarType::Half:
      return f(_Float16{});
#endif
    default:
      STD_TORCH_CHECK(false, "this element type has no native kernel");
  }
}

void score(Tensor hidden, Tensor weight, Tensor targets, double scale, double softcap, Tensor stats,
           std::optional<Tensor> unit_dx, std::optional<Tensor> kept) {
  dispatch(hidden, [&](auto zero) {
    const auto head = make_head<decltype(zero)>(hidden, weight, ints(targets), scale, softcap);
    float* dx = unit_dx ? floats(*unit_dx) : nullptr;
    float* e = kept ? floats(*kept) : nullptr;
    const bpo::Stats out(floats(stats), head.num_rows);
    torch::stable::parallel_for(0, head.num_panels(), 1, [&](int64_t begin, int64_t end) {
      bpo::score_panels(head, begin, end, out, dx, e);
    });
  });
}

void kept_dx(Tensor kept, Tensor weight, Tensor factor, Tensor dx) {
  dispatch(weight, [&](auto zero) {
    const auto head = make_head<decltype(zero)>(dx, weight, nullptr, 1.0, 0.0);
    torch::stable::parallel_for(0, head.num_panels(), 1, [&](int64_t begin, int64_t end) {
      bpo::kept_dx_panels(head, floats(kept), floats(factor), begin, end, floats(dx));
    });
  });
}

// Rows of the live panels times their factor, as the right operand of dW.
template <class T>
bpo::Buffer scaled_tokens(const bpo::Head<T>& head, const float* factor, const std::vector<int64_t>& live) {
  const int64_t rows = live.size() * bpo::kPanel;
  bpo::Buffer out = bpo::make_buffer(rows * bpo::round_up(head.width, bpo::kPanel));
  std::vector<T> gathered(rows * head.width);
  std::vector<float> factors(rows, 0.0f);
  for (size_t i = 0; i < live.size(); ++i) {
    const int64_t from = live[i] * bpo::kPanel, count = std::min<int64_t>(bpo::kPanel, head.num_rows - from);
    std::copy_n(head.hidden + from * head.width, count * head.width, gathered.data() + i * bpo::kPanel * head.width);
    std::copy_n(factor + from, count, factors.data() + i * bpo::kPanel);
  }
  bpo::pack_scaled(gathered.data(), factors.data(), rows, head.width, out.get());
  return out;
}

void kept_dw(Tensor kept, Tensor hidden, Tensor factor, Tensor dw) {
  dispatch(hidden, [&](auto zero) {
    using T = decltype(zero);
    auto head = make_head<T>(hidden, dw, nullptr, 1.0, 0.0);
    std::vector<int64_t> live;
    for (int64_t p = 0; p < head.num_panels(); ++p)
      for (int64_t row = p * bpo::kPanel; row < std::min((p + 1) * bpo::kPanel, head.num_rows); ++row)
        if (floats(factor)[row] != 0) {
          live.push_back(p);
          break;
        }
    if (live.empty()) return;
    const bpo::Buffer x = scaled_tokens(head, floats(factor), live);
    const int64_t blocks = (head.vocab + head.block() - 1) / head.block();
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      bpo::kept_dw_blocks(head, floats(kept), live, x.get(), begin, end, floats(dw));
    });
  });
}

void recompute_dw(Tensor hidden, Tensor weight, Tensor targets, double scale, double softcap, Tensor shift, Tensor factor,
                  Tensor push, Tensor dw) {
  dispatch(hidden, [&](auto zero) {
    const auto head = make_head<decltype(zero)>(hidden, weight, ints(targets), scale, softcap);
    const int64_t count = head.num_panels();
    std::vector<int64_t> live(count);
    std::vector<bpo::Panel> panels(count);
    bpo::Buffer tokens = bpo::make_buffer(count * head.width * bpo::kPanel);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t row = p * bpo::kPanel, lanes = std::min<int64_t>(bpo::kPanel, head.num_rows - row);
      live[p] = p;
      bpo::pack_tokens(head.hidden + row * head.width, lanes, head.width, tokens.get() + row * head.width);
      bpo::start_panel(head, p, panels[p]);
      std::copy_n(floats(shift) + row, lanes, panels[p].shift);
    }
    const bpo::Buffer x = scaled_tokens(head, floats(factor), live);
    const int64_t blocks = (head.vocab + head.block() - 1) / head.block();
    torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      bpo::recompute_dw_blocks(head, panels, tokens.get(), x.get(), begin, end, floats(dw));
    });
    bpo::push_targets(head, panels, floats(push), floats(dw));
  });
}

int64_t panel_lanes() { return bpo::kPanel; }
int64_t tile_rows() { return bpo::kRows; }

}  // namespace

STABLE_TORCH_LIBRARY(bpo_fast_cpu, m) {
  m.def(
      "score(Tensor hidden, Tensor weight, Tensor targets, float scale, float softcap, Tensor(a!) stats, "
      "Tensor(b!)? unit_dx, Tensor(c!)? kept) -> ()");
  m.def("kept_dx(Tensor kept, Tensor weight, Tensor factor, Tensor(a!) dx) -> ()");
  m.def("kept_dw(Tensor kept, Tensor hidden, Tensor factor, Tensor(a!) dw) -> ()");
  m.def(
      "recompute_dw(Tensor hidden, Tensor weight, Tensor targets, float scale, float softcap, Tensor shift, Tensor factor, "
      "Tensor push, Tensor(a!) dw) -> ()");
  m.def("panel_lanes() -> int");
  m.def("tile_rows() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(bpo_fast_cpu, CPU, m) {
  m.impl("score", TORCH_BOX(&score));
  m.impl("kept_dx", TORCH_BOX(&kept_dx));
  m.impl("kept_dw", TORCH_BOX(&kept_dw));
  m.impl("recompute_dw", TORCH_BOX(&recompute_dw));
}

STABLE_TORCH_LIBRARY_IMPL(bpo_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("panel_lanes", TORCH_BOX(&panel_lanes));
  m.impl("tile_rows", TORCH_BOX(&tile_rows));
}
