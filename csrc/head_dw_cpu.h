// dW on the CPU: dW[v] += sum over rows of E[row, v] * factor[row] * hidden[row], and of push[row] * hidden[row] over the
// rows whose target is v. These terms never are bfloat16: where few of them make up dW, as with targets of tiny
// probability, the errors of rounding E, of rounding the factors and of the result would not average out.
//
// Threads own runs of the vocabulary, so every number of dW has one writer and one order of summation.
#pragma once

#include "head_cpu.h"

namespace bpo {

constexpr int64_t kDepth = 1024;  // words of E behind one visit to a tile of dW; at 320 reading its sums takes 5% more time

template <class H>
constexpr int64_t kPanelWords = kPanel / H::Grads::kPack;

// Panels of token rows times their factor, [width / kPanel][panels * kPanelWords][kPanel]: the right operand of dW.
template <class H>
Array<typename H::Grads::Word> scaled_tokens(const H& head, const float* factor, const std::vector<int64_t>& panels) {
  const int64_t depth = panels.size() * kPanelWords<H>;
  auto out = make_array<typename H::Grads::Word>(depth * round_up(head.width, kPanel));
  for (size_t i = 0; i < panels.size(); ++i) {
    const int64_t row = panels[i] * kPanel;
    pack_scaled<typename H::Grads>(head.hidden + row * head.width, factor + row, head.num_rows - row, head.width, depth,
                                   out.get() + i * kPanelWords<H> * kPanel);
  }
  return out;
}

// The rows that push their target's row of dW, by target and then by row.
template <class H>
struct Pushes {
  const H& head;
  const float* push;
  std::vector<int64_t> rows;

  Pushes(const H& h, const float* by_row) : head(h), push(by_row) {
    for (int64_t row = 0; row < h.num_rows; ++row)
      if (push[row] != 0) rows.push_back(row);
    const auto before = [&](int64_t a, int64_t b) { return h.targets[a] < h.targets[b]; };
    std::stable_sort(rows.begin(), rows.end(), before);
  }

  // Adds to the rows [first, first + count) of dW, which are at `to`.
  void add(int64_t first, int64_t count, float* to) const {
    const auto below = [&](int64_t row, int64_t v) { return head.targets[row] < v; };
    auto at = std::lower_bound(rows.begin(), rows.end(), first, below);
    for (; at != rows.end() && head.targets[*at] < first + count; ++at) {
      const auto* x = head.hidden + *at * head.width;
      float* out = to + (head.targets[*at] - first) * head.width;
      for (int64_t h = 0; h < head.width; ++h) out[h] += push[*at] * to_float(x[h]);
    }
  }
};

// What one thread needs to sum blocks of the vocabulary. `fresh`: dW holds nothing yet, its first sums are written over it.
//
// E of the first panels is packed here, that of the others is read where it lies: rows of one panel are neighbors there.
template <class H, class Out>
struct BlockSums {
  using Op = typename H::Grads;
  using Word = typename Op::Word;
  static constexpr bool kInPlace = std::is_same_v<Out, float>;
  static constexpr int64_t kVisit = kDepth / kPanelWords<H>;  // panels
  const Word* x;  // of scaled_tokens
  const Pushes<H>& pushes;
  int64_t width, count, num_packed;
  bool fresh;
  Array<Word> packed;  // E of a block, [visit][rows / kRows][words of the visit][kRows]
  Buffer sums;         // of a block, where dW is not float

  BlockSums(const H& head, const Word* scaled, const Pushes<H>& targets, int64_t panels, int64_t panels_packed,
            int64_t max_rows, bool first)
      : x(scaled),
        pushes(targets),
        width(head.width),
        count(panels),
        num_packed(panels_packed),
        fresh(first),
        packed(make_array<Word>(round_up(max_rows, kRows) * panels_packed * kPanelWords<H>)),
        sums(make_buffer(kInPlace ? 0 : max_rows * head.width)) {}

  // E of panel i, rows `stride` apart -> the steps in `packed` of the tile at row v of a block of so many rows.
  void pack(const typename H::Kept* e, int64_t stride, int64_t v, int64_t rows, int64_t i) {
    const int64_t from = i / kVisit * kVisit, depth = std::min(kVisit, num_packed - from) * kPanelWords<H>;
    Word* out = packed.get() + (from * round_up(rows, kRows) + (i - from) * kRows) * kPanelWords<H> + v * depth;
    const int high = static_cast<int>(std::min<int64_t>(kRows, rows - v));
    pack_left(reinterpret_cast<const Word*>(e), stride / Op::kPack, high, kPanelWords<H>, out);
  }

  // dW rows [first, first + rows), which are at `dw`, (+)= the product of all panels and the pushes; `lying` has the places
  // of row `first` in the panels that are not packed.
  void add(int64_t first, int64_t rows, const Word* const* lying, Out* dw) {
    float* to = nullptr;
    if constexpr (kInPlace) to = dw;
    else to = sums.get();
    if (count == 0 && (fresh || !kInPlace)) std::fill_n(to, rows * width, 0.0f);
    const auto accumulate = [&](int64_t from) { return from > 0 || (kInPlace && !fresh); };
    for (int64_t from = 0; from < num_packed; from += kVisit) {
      const int64_t depth = std::min(kVisit, num_packed - from) * kPanelWords<H>;
      const Word* e = packed.get() + from * round_up(rows, kRows) * kPanelWords<H>;
      add_visit(rows, from, to, accumulate(from), [&](int64_t v, const Word* panel, float* c, int64_t ldc, bool more) {
        tile<Op>(e + v * depth, panel, depth, c, ldc, more);
      });
    }
    for (int64_t from = num_packed; from < count; from += kVisit) {
      const int64_t panels = std::min(kVisit, count - from);
      const Word* const* parts = lying + from - num_packed;
      add_visit(rows, from, to, accumulate(from), [&](int64_t v, const Word* panel, float* c, int64_t ldc, bool more) {
        tile_of_parts<Op, kPanelWords<H>>(parts, panels, v * kPanelWords<H>, panel, c, ldc, more);
      });
    }
    pushes.add(first, rows, to);
    if constexpr (!kInPlace)
      for (int64_t i = 0; i < rows * width; ++i) assign(dw[i], fresh ? to[i] : to_float(dw[i]) + to[i]);
  }

  // The tiles of a visit to the panels from `from` on: product(row, right operand, sums, their pitch, whether to add).
  template <class F>
  void add_visit(int64_t rows, int64_t from, float* to, bool accumulate, const F& product) {
    float edge[kRows * kPanel] = {};
    for (int64_t h = 0; h < width; h += kPanel) {
      const auto* panel = x + (h * count + from * kPanel) * kPanelWords<H>;
      for (int64_t v = 0; v < rows; v += kRows) {
        const int64_t high = std::min<int64_t>(kRows, rows - v), wide = std::min<int64_t>(kPanel, width - h);
        float* c = to + v * width + h;
        if (v + kRows < rows) prefetch_tile(c + kRows * width, width, std::min<int64_t>(kRows, rows - v - kRows));
        if (high == kRows && wide == kPanel) {
          product(v, panel, c, width, accumulate);
          continue;
        }
        for (int64_t i = 0; accumulate && i < high; ++i) std::copy_n(c + i * width, wide, edge + i * kPanel);
        product(v, panel, edge, kPanel, accumulate);
        for (int64_t i = 0; i < high; ++i) std::copy_n(edge + i * kPanel, wide, c + i * width);
      }
    }
  }
};

// Rows of a block of dW: what is packed of the E of so many panels stays in L2.
template <class H>
int64_t dw_block(int64_t panels) {
  const int64_t row_bytes = std::max<int64_t>(panels, 1) * kPanelWords<H> * sizeof(typename H::Grads::Word);
  return std::clamp<int64_t>(kPackBytes / row_bytes / kRows * kRows, kRows, kMaxBlock / kRows * kRows);
}
template <class H>
int64_t recompute_block(const H& head) {
  return std::min(head.block(), dw_block<H>(head.num_panels()));
}

// Vocabulary blocks [begin, end) of dW from kept E. What of it lies in dW itself is packed before the block is summed.
// `live` lists the panels with a factor that is not 0, `x` holds them as scaled_tokens does.
template <class H, class Out>
void kept_dw_blocks(const H& head, const Store<H>& kept, const std::vector<int64_t>& live, const typename H::Grads::Word* x,
                    const Pushes<H>& pushes, bool fresh, int64_t begin, int64_t end, Out* dw) {
  const int64_t count = live.size(), step = dw_block<H>(count);
  const auto beside = std::lower_bound(live.begin(), live.end(), kept.num_inside);
  const int64_t num_packed = beside - live.begin();
  BlockSums<H, Out> sums(head, x, pushes, count, num_packed, step, fresh);
  std::vector<const typename H::Grads::Word*> lying(count - num_packed);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    for (int64_t v = 0; v < rows; v += kRows)  // along the rows of dW, where E lies in order
      for (int64_t i = 0; i < num_packed; ++i) sums.pack(kept.at(live[i], first + v), kept.stride(live[i]), v, rows, i);
    for (size_t i = 0; i < lying.size(); ++i)
      lying[i] = reinterpret_cast<const typename H::Grads::Word*>(kept.at(beside[i], first));
    sums.add(first, rows, lying.data(), dw + first * head.width);
  }
}

// The same from the statistics alone: logits again, and E from the settled shift. `tokens` are the unscaled panels that the
// logits come from.
template <class H, class Out>
void recompute_dw_blocks(const H& head, const std::vector<Panel>& panels, const typename H::Logits::Word* tokens,
                         const typename H::Grads::Word* x, const Pushes<H>& pushes, bool fresh, int64_t begin, int64_t end,
                         Out* dw) {
  const int64_t step = recompute_block(head), count = panels.size();
  BlockSums<H, Out> sums(head, x, pushes, count, 0, step, fresh);
  Block<H> scratch(head, count, false);
  auto kept = make_array<typename H::Kept>(count * step * kPanel);
  std::vector<const typename H::Grads::Word*> lying(count);
  for (int64_t i = 0; i < count; ++i) lying[i] = reinterpret_cast<const typename H::Grads::Word*>(&kept[i * step * kPanel]);
  float* z = scratch.logits.get();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    scratch.pack_logits(head, first, rows);
    for (int64_t i = 0; i < count; ++i) {
      scratch.multiply(head, tokens + i * head.row_words() * kPanel, rows, i == 0);
      Panel local = panels[i];
      exp_block(head, z, first, rows, local);
      for (int64_t j = 0; j < rows * kPanel; ++j) assign(kept[i * step * kPanel + j], z[j]);
    }
    sums.add(first, rows, lying.data(), dw + first * head.width);
  }
}

}  // namespace bpo
