// The CPU operators of bpo_fast_kernels on PyTorch's stable ABI. Arguments are checked in Python.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "adamw_cpu.h"
#include "attention_cpu.h"
#include "head_dw_cpu.h"
#include "linear_cpu.h"
#include "trunk_cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class H>
H make_head(const Tensor& hidden, const Tensor& weight, const int64_t* targets, double scale, double softcap) {
  using T = typename H::Number;
  return {static_cast<const T*>(hidden.const_data_ptr()),
          static_cast<const T*>(weight.const_data_ptr()),
          targets,
          hidden.size(0),
          weight.size(1),
          weight.size(0),
          static_cast<float>(scale),
          static_cast<float>(softcap)};
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
float* floats(const Tensor& t) { return data<float>(t); }
const int32_t* bounds_in(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }
const int64_t* ints(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }

template <class H>
struct Type {
  using type = H;
};

// Calls f with the type of head for the inputs' element type; `narrow` asks for products of bfloat16 in the gradients, and
// in the logits where the inputs are bfloat16.
template <class F>
void dispatch(const Tensor& t, bool narrow, const F& f) {
  using bpo::Floats;
#if defined(__AVX512BF16__)
  using bpo::Pairs;
  if (narrow && t.scalar_type() == ScalarType::BFloat16) return f(Type<bpo::Head<bpo::BFloat16, Pairs, Pairs>>{});
  if (narrow && t.scalar_type() == ScalarType::Float) return f(Type<bpo::Head<float, Floats, Pairs>>{});
#endif
  STD_TORCH_CHECK(!narrow, "no bfloat16 products on this processor for this element type");
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(Type<bpo::Head<float, Floats, Floats>>{});
    case ScalarType::BFloat16:
      return f(Type<bpo::Head<bpo::BFloat16, Floats, Floats>>{});
    case ScalarType::Half:
      return f(Type<bpo::Head<bpo::Float16, Floats, Floats>>{});
    default:
      STD_TORCH_CHECK(false, "this element type has no native kernel");
  }
}

// E in `kept` but for its first panels, which lie in `inside`, a [V, H] tensor.
template <class H>
bpo::Store<H> make_store(const H& head, const Tensor& kept, const std::optional<Tensor>& inside) {
  using Kept = typename H::Kept;
  const int64_t row_bytes = inside ? inside->size(1) * inside->element_size() : 0;
  Kept* in = inside ? data<Kept>(*inside) : nullptr;
  return {head, in, data<Kept>(kept), head.num_panels() - kept.size(0), row_bytes};
}

// Calls f with the address of dW, which is float or bfloat16.
template <class F>
void with_sums(const Tensor& dw, const F& f) {
  if (dw.scalar_type() == ScalarType::BFloat16) return f(data<bpo::BFloat16>(dw));
  f(floats(dw));
}

void score(Tensor hidden, Tensor weight, Tensor targets, double scale, double softcap, bool narrow, Tensor stats,
           std::optional<Tensor> unit_dx, std::optional<Tensor> kept, std::optional<Tensor> inside) {
  dispatch(hidden, narrow, [&](auto type) {
    using H = typename decltype(type)::type;
    const auto head = make_head<H>(hidden, weight, ints(targets), scale, softcap);
    float* dx = unit_dx ? floats(*unit_dx) : nullptr;
    const auto e = kept ? std::optional(make_store(head, *kept, inside)) : std::nullopt;
    const bpo::Stats out(floats(stats), head.num_rows);
    torch::stable::parallel_for(0, head.num_panels(), 1, [&](int64_t begin, int64_t end) {
      bpo::score_panels(head, begin, end, out, dx, e ? &*e : nullptr);
    });
  });
}

void kept_dx(Tensor kept, std::optional<Tensor> inside, Tensor weight, Tensor targets, bool narrow, Tensor factor, Tensor push,
             Tensor dx) {
  dispatch(weight, narrow, [&](auto type) {
    using H = typename decltype(type)::type;
    const auto head = make_head<H>(dx, weight, ints(targets), 1.0, 0.0);
    const auto e = make_store(head, kept, inside);
    torch::stable::parallel_for(0, head.num_panels(), 1, [&](int64_t begin, int64_t end) {
      bpo::kept_dx_panels(head, e, floats(factor), floats(push), begin, end, floats(dx));
    });
  });
}

void kept_dw(Tensor kept, std::optional<Tensor> inside, Tensor hidden, Tensor targets, bool narrow, Tensor factor, Tensor push,
             bool fresh, Tensor dw) {
  dispatch(hidden, narrow, [&](auto type) {
    using H = typename decltype(type)::type;
    const auto head = make_head<H>(hidden, dw, ints(targets), 1.0, 0.0);
    const auto live = bpo::live_panels(head, floats(factor), 0, head.num_panels());
    const bpo::Pushes<H> pushes(head, floats(push));
    if (live.empty() && pushes.rows.empty() && !fresh) return;
    const auto x = bpo::scaled_tokens(head, floats(factor), live);
    const auto e = make_store(head, kept, inside);
    const int64_t step = bpo::dw_block<H>(live.size()), blocks = (head.vocab + step - 1) / step;
    with_sums(dw, [&](auto* out) {
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        bpo::kept_dw_blocks(head, e, live, x.get(), pushes, fresh, begin, end, out);
      });
    });
  });
}

// [T, block] logits of the vocabulary block `blocks[t]` of row t; -inf past the end of the vocabulary.
void block_logits(Tensor hidden, Tensor weight, double scale, double softcap, bool narrow, Tensor blocks, Tensor logits) {
  dispatch(hidden, narrow, [&](auto type) {
    const auto head = make_head<typename decltype(type)::type>(hidden, weight, nullptr, scale, softcap);
    torch::stable::parallel_for(0, head.num_rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = ints(blocks)[row] * head.block(), count = std::min(head.block(), head.vocab - first);
        float* out = floats(logits) + row * head.block();
        for (int64_t v = 0; v < count; ++v) out[v] = bpo::one_logit(head, row, first + v);
        std::fill(out + count, out + head.block(), -std::numeric_limits<float>::infinity());
      }
    });
  });
}

// All panels of tokens, packed.
template <class H>
bpo::Array<typename H::Logits::Word> packed_tokens(const H& head) {
  using Token = typename H::Logits::Word;
  const int64_t panel_words = head.row_words() * bpo::kPanel;
  auto tokens = bpo::make_array<Token>(head.num_panels() * panel_words);
  const auto line = bpo::make_array<Token>(head.row_words());
  for (int64_t p = 0; p < head.num_panels(); ++p) {
    const int64_t row = p * bpo::kPanel;
    bpo::pack_tokens<typename H::Logits>(head.hidden + row * head.width, head.num_rows - row, head.width, line.get(),
                                         tokens.get() + p * panel_words);
  }
  return tokens;
}

// Tokens of a vocabulary block of block_masses and block_logits.
int64_t mass_block(Tensor hidden, Tensor weight, bool narrow) {
  int64_t rows = 0;
  dispatch(hidden, narrow, [&](auto type) {
    rows = make_head<typename decltype(type)::type>(hidden, weight, nullptr, 1.0, 0.0).block();
  });
  return rows;
}

void block_masses(Tensor hidden, Tensor weight, double scale, double softcap, bool narrow, Tensor tops, Tensor sums) {
  dispatch(hidden, narrow, [&](auto type) {
    const auto head = make_head<typename decltype(type)::type>(hidden, weight, nullptr, scale, softcap);
    const auto tokens = packed_tokens(head);
    torch::stable::parallel_for(0, tops.size(0), 1, [&](int64_t begin, int64_t end) {
      bpo::block_masses(head, tokens.get(), begin, end, floats(tops), floats(sums));
    });
  });
}

void recompute_dw(Tensor hidden, Tensor weight, Tensor targets, double scale, double softcap, bool narrow, Tensor shift,
                  Tensor factor, Tensor push, bool fresh, Tensor dw) {
  dispatch(hidden, narrow, [&](auto type) {
    using H = typename decltype(type)::type;
    const auto head = make_head<H>(hidden, weight, ints(targets), scale, softcap);
    const int64_t count = head.num_panels();
    std::vector<int64_t> all(count);
    std::vector<bpo::Panel> panels(count);
    const auto tokens = packed_tokens(head);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t row = p * bpo::kPanel, lanes = std::min<int64_t>(bpo::kPanel, head.num_rows - row);
      all[p] = p;
      bpo::start_panel(head, p, panels[p]);
      std::copy_n(floats(shift) + row, lanes, panels[p].shift);
    }
    const auto x = bpo::scaled_tokens(head, floats(factor), all);
    const bpo::Pushes<H> pushes(head, floats(push));
    const int64_t step = bpo::recompute_block(head), blocks = (head.vocab + step - 1) / step;
    with_sums(dw, [&](auto* out) {
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        bpo::recompute_dw_blocks(head, panels, tokens.get(), x.get(), pushes, fresh, begin, end, out);
      });
    });
  });
}

// Calls f with a zero of the element type of a tensor between the products of a trunk.
template <class F>
void with_type(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(bpo::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "this element type has no native kernel");
  }
}

template <class T>
bpo::Heads<T> heads(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

template <class A>
A make_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bounds, const Tensor& firsts, double scale,
                 double softcap, int64_t window) {
  using T = typename A::Number;
  return {heads<T>(q),
          heads<T>(k),
          heads<T>(v),
          q.size(0),
          q.size(1),
          k.size(1),
          q.size(2),
          q.size(3),
          bounds_in(bounds),
          bounds_in(firsts),
          firsts.size(0) - 1,
          static_cast<float>(scale),
          static_cast<float>(softcap),
          window};
}

// Calls f with the type of `Operator` for the inputs' element type: products are of bfloat16 where tensors are and the processor
// has them.
template <template <class, class> class Operator, class F>
void with_products(const Tensor& t, const F& f) {
  with_type(t, [&](auto zero) {
    using T = decltype(zero);
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bpo::BFloat16>) return f(Type<Operator<bpo::Pairs, T>>{});
#endif
    f(Type<Operator<bpo::Floats, T>>{});
  });
}

// Every tensor's last dimension is contiguous; `shifts` is [2, M, heads, S].
void attend(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor firsts, double scale, double softcap, int64_t window,
            Tensor out, Tensor shifts) {
  with_products<bpo::PackedAttention>(q, [&](auto type) {
    using A = typename decltype(type)::type;
    const auto a = make_attention<A>(q, k, v, bounds, firsts, scale, softcap, window);
    const auto to = heads<typename A::Number>(out);
    float* tops = floats(shifts);
    torch::stable::parallel_for(0, a.num_tasks(), 1, [&](int64_t begin, int64_t end) {
      bpo::attend(a, begin, end, to, tops, tops + shifts.stride(0));
    });
  });
}

void attend_backward(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor firsts, double scale, double softcap, int64_t window,
                     Tensor out, Tensor shifts, Tensor dout, Tensor dq, Tensor dk, Tensor dv) {
  with_products<bpo::PackedAttention>(q, [&](auto type) {
    using A = typename decltype(type)::type;
    using T = typename A::Number;
    const auto a = make_attention<A>(q, k, v, bounds, firsts, scale, softcap, window);
    const float* tops = floats(shifts);
    torch::stable::parallel_for(0, a.num_tasks(), 1, [&](int64_t begin, int64_t end) {
      bpo::attend_backward(a, begin, end, heads<T>(out), tops, tops + shifts.stride(0), heads<T>(dout), heads<T>(dq),
                           heads<T>(dk), heads<T>(dv));
    });
  });
}

// `prompts` [B] int64 names the prompt of each row.
void attend_decoded(Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor bounds, Tensor prompts, Tensor k, Tensor v, double scale,
                    double softcap, Tensor out) {
  const int64_t num_prompts = bounds.size(0) - 1, num_rows = q.size(0);
  const int32_t* ends = bounds_in(bounds);
  std::vector<int64_t> firsts(num_prompts + 1), rows(num_rows);
  for (int64_t b = 0; b < num_rows; ++b) ++firsts[ints(prompts)[b] + 1];
  int64_t longest = 0;
  for (int64_t p = 0; p < num_prompts; ++p) {
    longest = std::max<int64_t>(longest, ends[p + 1] - ends[p]);
    firsts[p + 1] += firsts[p];
  }
  std::vector<int64_t> next(firsts);
  for (int64_t b = 0; b < num_rows; ++b) rows[next[ints(prompts)[b]]++] = b;
  with_type(q, [&](auto zero) {
    using T = decltype(zero);
    const bpo::DecodedRows<T> a = {heads<T>(q),
                                   heads<T>(out),
                                   heads<T>(prompt_k),
                                   heads<T>(prompt_v),
                                   heads<T>(k),
                                   heads<T>(v),
                                   q.size(1),
                                   k.size(1),
                                   k.size(2),
                                   q.size(3),
                                   ends,
                                   rows.data(),
                                   firsts.data(),
                                   static_cast<float>(scale),
                                   static_cast<float>(softcap)};
    torch::stable::parallel_for(0, num_prompts * a.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
      bpo::attend_decoded(a, begin, end, longest);
    });
  });
}

// Contiguous, x and weight of one type, the others float; `panels` has room for x in whole panels.
void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor panels, Tensor out) {
  with_products<bpo::Linear>(x, [&](auto type) {
    using A = typename decltype(type)::type;
    using T = typename A::Number;
    const A a = {data<T>(x), data<T>(weight), bias ? floats(*bias) : nullptr, floats(out), x.size(0), x.size(1), weight.size(0)};
    auto* words = data<typename A::Word>(panels);
    torch::stable::parallel_for(0, a.num_panels(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) bpo::pack_panel(a, p, words + p * a.panel_size());
    });
    const int64_t tiles = (a.num_out + bpo::kRows - 1) / bpo::kRows;
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      bpo::linear_columns(a, words, begin * bpo::kRows, std::min(end * bpo::kRows, a.num_out));
    });
  });
}

template <class T>
bpo::Matrix<T> matrix(const Tensor& t) {
  return {data<T>(t), t.stride(0)};
}

// Calls f on ranges of rows of so many numbers, in threads where there is work for them.
template <class F>
void over_rows(const Tensor& rows, const F& f) {
  torch::stable::parallel_for(0, rows.size(0), std::max<int64_t>(1, 32768 / std::max<int64_t>(1, rows.size(1))), f);
}

void rms_norm(Tensor x, Tensor weight, double eps, double offset, bool twice, Tensor out, Tensor scales) {
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    over_rows(x, [&](int64_t begin, int64_t end) {
      bpo::rms_norm(matrix<T>(x), data<T>(weight), eps, offset, twice, x.size(1), begin, end, matrix<T>(out), floats(scales));
    });
  });
}

// The weight's gradient, float, is summed in parts whose number does not depend on that of the threads.
void rms_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor scales, double offset, Tensor dx,
                       std::optional<Tensor> dweight) {
  const int64_t num_rows = x.size(0), width = x.size(1), parts = std::min<int64_t>(num_rows, 32);
  std::vector<float> sums(dweight ? parts * width : 0);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, parts, num_rows * width < 32768 ? parts : 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        bpo::rms_norm_backward(matrix<T>(dout), matrix<T>(x), data<T>(weight), floats(scales), offset, width,
                               num_rows * part / parts, num_rows * (part + 1) / parts, matrix<T>(dx),
                               dweight ? sums.data() + part * width : nullptr);
      }
    });
  });
  for (int64_t part = 0; dweight && part < parts; ++part) {
    for (int64_t i = 0; i < width; ++i) floats(*dweight)[i] += sums[part * width + i];
  }
}

void gated(Tensor gate, Tensor up, bool silu, Tensor out) {
  with_type(gate, [&](auto zero) {
    using T = decltype(zero);
    const auto run = silu ? bpo::gated<true, T> : bpo::gated<false, T>;
    over_rows(gate, [&](int64_t begin, int64_t end) {
      run(matrix<T>(gate), matrix<T>(up), gate.size(1), begin, end, matrix<T>(out));
    });
  });
}

void gated_backward(Tensor dout, Tensor gate, Tensor up, bool silu, Tensor dgate, Tensor dup) {
  with_type(gate, [&](auto zero) {
    using T = decltype(zero);
    const auto run = silu ? bpo::gated_backward<true, T> : bpo::gated_backward<false, T>;
    over_rows(gate, [&](int64_t begin, int64_t end) {
      run(matrix<T>(dout), matrix<T>(gate), matrix<T>(up), gate.size(1), begin, end, matrix<T>(dgate), matrix<T>(dup));
    });
  });
}

bpo::AdamW adamw_form(double grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                      double correction1, double correction2) {
  return {static_cast<float>(grad_scale),  static_cast<float>(lr),    static_cast<float>(beta1),
          static_cast<float>(1.0 - beta1), static_cast<float>(beta2), static_cast<float>(1.0 - beta2),
          static_cast<float>(eps),         static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(correction1), static_cast<float>(correction2)};
}

// Calls f with the weights that a step is of and with ranges of their blocks, in threads where there is work for them.
template <class F>
void over_weights(const Tensor& weight, const Tensor& grad, const std::optional<Tensor>& rounded, const F& f) {
  with_type(grad, [&](auto zero) {
    using G = decltype(zero);
    const bpo::Weights<G> weights{floats(weight), static_cast<const G*>(grad.const_data_ptr()),
                                  rounded ? data<bpo::BFloat16>(*rounded) : nullptr, weight.numel()};
    torch::stable::parallel_for(0, (weights.num + bpo::kStepBlock - 1) / bpo::kStepBlock, 64,
                                [&](int64_t begin, int64_t end) { f(weights, begin, end); });
  });
}

// `rounded` is bfloat16.
void adamw(Tensor weight, Tensor grad, std::optional<Tensor> rounded, Tensor first, Tensor second, double grad_scale, double lr,
           double beta1, double beta2, double eps, double weight_decay, double correction1, double correction2) {
  const auto form = adamw_form(grad_scale, lr, beta1, beta2, eps, weight_decay, correction1, correction2);
  const bpo::Moments moments{floats(first), floats(second)};
  over_weights(weight, grad, rounded, [&](const auto& weights, int64_t begin, int64_t end) {
    bpo::adamw(weights, moments, form, begin, end);
  });
}

void adamw_8bit(Tensor weight, Tensor grad, std::optional<Tensor> rounded, Tensor first, Tensor first_scale, Tensor second,
                Tensor second_scale, double grad_scale, double lr, double beta1, double beta2, double eps, double weight_decay,
                double correction1, double correction2) {
  const auto form = adamw_form(grad_scale, lr, beta1, beta2, eps, weight_decay, correction1, correction2);
  const bpo::CodedMoments moments{data<int8_t>(first), data<int8_t>(second), floats(first_scale), floats(second_scale)};
  over_weights(weight, grad, rounded, [&](const auto& weights, int64_t begin, int64_t end) {
    bpo::adamw_8bit(weights, moments, form, begin, end);
  });
}

// Asks the system for pages of 2 MiB behind memory not touched yet: faults of 4 KiB cost 0.5 ms a MiB here.
void use_large_pages(Tensor memory) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t from = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t to = (begin + memory.numel() * memory.element_size()) / kPage * kPage;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
}

bool has_pairs() {
#if defined(__AVX512BF16__)
  return true;
#else
  return false;
#endif
}
int64_t panel_lanes() { return bpo::kPanel; }
int64_t tile_rows() { return bpo::kRows; }

}  // namespace

STABLE_TORCH_LIBRARY(bpo_fast_cpu, m) {
  m.def(
      "score(Tensor hidden, Tensor weight, Tensor targets, float scale, float softcap, bool narrow, Tensor(a!) stats, "
      "Tensor(b!)? unit_dx, Tensor(c!)? kept, Tensor(d!)? inside) -> ()");
  m.def(
      "kept_dx(Tensor kept, Tensor? inside, Tensor weight, Tensor targets, bool narrow, Tensor factor, Tensor push, "
      "Tensor(a!) dx) -> ()");
  m.def(
      "kept_dw(Tensor kept, Tensor? inside, Tensor hidden, Tensor targets, bool narrow, Tensor factor, Tensor push, "
      "bool fresh, Tensor(a!) dw) -> ()");
  m.def("use_large_pages(Tensor(a!) memory) -> ()");
  m.def(
      "recompute_dw(Tensor hidden, Tensor weight, Tensor targets, float scale, float softcap, bool narrow, Tensor shift, "
      "Tensor factor, Tensor push, bool fresh, Tensor(a!) dw) -> ()");
  m.def(
      "block_masses(Tensor hidden, Tensor weight, float scale, float softcap, bool narrow, Tensor(a!) tops, Tensor(b!) sums) "
      "-> ()");
  m.def(
      "block_logits(Tensor hidden, Tensor weight, float scale, float softcap, bool narrow, Tensor blocks, Tensor(a!) logits) "
      "-> ()");
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor firsts, float scale, float softcap, int window, "
      "Tensor(a!) out, Tensor(b!) shifts) -> ()");
  m.def(
      "attend_backward(Tensor q, Tensor k, Tensor v, Tensor bounds, Tensor firsts, float scale, float softcap, int window, "
      "Tensor out, Tensor shifts, Tensor dout, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def(
      "attend_decoded(Tensor q, Tensor prompt_k, Tensor prompt_v, Tensor bounds, Tensor prompts, Tensor k, Tensor v, "
      "float scale, float softcap, Tensor(a!) out) -> ()");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) panels, Tensor(b!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset, bool twice, Tensor(a!) out, Tensor(b!) scales) -> ()");
  m.def(
      "rms_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor scales, float offset, Tensor(a!) dx, "
      "Tensor(b!)? dweight) -> ()");
  m.def("gated(Tensor gate, Tensor up, bool silu, Tensor(a!) out) -> ()");
  m.def("gated_backward(Tensor dout, Tensor gate, Tensor up, bool silu, Tensor(a!) dgate, Tensor(b!) dup) -> ()");
  m.def(
      "adamw(Tensor(a!) weight, Tensor grad, Tensor(b!)? rounded, Tensor(c!) first, Tensor(d!) second, float grad_scale, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, float correction1, float correction2) -> ()");
  m.def(
      "adamw_8bit(Tensor(a!) weight, Tensor grad, Tensor(b!)? rounded, Tensor(c!) first, Tensor(d!) first_scale, "
      "Tensor(e!) second, Tensor(f!) second_scale, float grad_scale, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, float correction1, float correction2) -> ()");
  m.def("mass_block(Tensor hidden, Tensor weight, bool narrow) -> int");
  m.def("has_pairs() -> bool");
  m.def("panel_lanes() -> int");
  m.def("tile_rows() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(bpo_fast_cpu, CPU, m) {
  m.impl("score", TORCH_BOX(&score));
  m.impl("kept_dx", TORCH_BOX(&kept_dx));
  m.impl("kept_dw", TORCH_BOX(&kept_dw));
  m.impl("recompute_dw", TORCH_BOX(&recompute_dw));
  m.impl("block_masses", TORCH_BOX(&block_masses));
  m.impl("block_logits", TORCH_BOX(&block_logits));
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_backward", TORCH_BOX(&attend_backward));
  m.impl("attend_decoded", TORCH_BOX(&attend_decoded));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("gated_backward", TORCH_BOX(&gated_backward));
  m.impl("adamw", TORCH_BOX(&adamw));
  m.impl("adamw_8bit", TORCH_BOX(&adamw_8bit));
  m.impl("mass_block", TORCH_BOX(&mass_block));
  m.impl("use_large_pages", TORCH_BOX(&use_large_pages));
}

STABLE_TORCH_LIBRARY_IMPL(bpo_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("has_pairs", TORCH_BOX(&has_pairs));
  m.impl("panel_lanes", TORCH_BOX(&panel_lanes));
  m.impl("tile_rows", TORCH_BOX(&tile_rows));
}
