// dW on the CPU: dW[v] += sum over rows of E[row, v] * factor[row] * hidden[row].
//
// Threads own runs of the vocabulary, so every number of dW has one writer and one order of summation.
#pragma once

#include "head_cpu.h"

namespace bpo {

constexpr int64_t kDepth = 320;  // words of E behind one visit to a tile of dW

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

// Where one thread makes the left operand of dW and, for gradients that are not float, sums a block.
template <class H, class Out>
struct BlockSums {
  using Word = typename H::Grads::Word;
  static constexpr bool kInPlace = std::is_same_v<Out, float>;
  Array<Word> packed;
  Buffer sums;

  explicit BlockSums(const H& head)
      : packed(make_array<Word>(head.block() * kDepth)), sums(make_buffer(kInPlace ? 0 : head.block() * head.width)) {}

  float* begin(Out* dw, int64_t count) {
    if constexpr (kInPlace) return dw;
    std::fill_n(sums.get(), count, 0.0f);
    return sums.get();
  }
  void end(Out* dw, int64_t count) {
    if constexpr (!kInPlace)
      for (int64_t i = 0; i < count; ++i) assign(dw[i], to_float(dw[i]) + sums[i]);
  }
  // A panel's E rows [rows][kPanel] -> its steps of [rows / kRows][depth][kRows].
  void pack(const typename H::Kept* e, int64_t rows, int64_t depth, int64_t panel) {
    const auto* words = reinterpret_cast<const Word*>(e);
    for (int64_t v = 0; v < rows; v += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, rows - v));
      Word* out = packed.get() + v * depth + panel * kPanelWords<H> * kRows;
      pack_left(words + v * kPanelWords<H>, kPanelWords<H>, count, kPanelWords<H>, out);
    }
  }
};

// dW rows [0, rows) += the product of `depth` words: `e` is [rows / kRows][depth][kRows], `x` is
// [width / kPanel][x_depth][kPanel] and starts at its first word.
template <class H>
void add_dw(const typename H::Grads::Word* e, int64_t rows, int64_t depth, const typename H::Grads::Word* x, int64_t x_depth,
            int64_t width, float* dw) {
  using Op = typename H::Grads;
  float edge[kRows * kPanel];
  for (int64_t h = 0; h < width; h += kPanel) {
    const auto* panel = x + h * x_depth;
    for (int64_t v = 0; v < rows; v += kRows) {
      const int64_t high = std::min<int64_t>(kRows, rows - v), wide = std::min<int64_t>(kPanel, width - h);
      float* c = dw + v * width + h;
      if (v + kRows < rows) prefetch_tile(c + kRows * width, width, std::min<int64_t>(kRows, rows - v - kRows));
      if (high == kRows && wide == kPanel) {
        tile<Op>(e + v * depth, panel, depth, c, width, true);
        continue;
      }
      tile<Op>(e + v * depth, panel, depth, edge, kPanel, false);
      for (int64_t i = 0; i < high; ++i)
        for (int64_t j = 0; j < wide; ++j) c[i * width + j] += edge[i * kPanel + j];
    }
  }
}

// Vocabulary blocks [begin, end) of dW from kept E. `live` lists the panels with a factor that is not 0, `x` holds them as
// scaled_tokens does.
template <class H, class Out>
void kept_dw_blocks(const H& head, const typename H::Kept* kept, const std::vector<int64_t>& live,
                    const typename H::Grads::Word* x, int64_t begin, int64_t end, Out* dw) {
  const int64_t step = head.block(), count = live.size(), per_visit = kDepth / kPanelWords<H>;
  BlockSums<H, Out> sums(head);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    float* out = sums.begin(dw + first * head.width, rows * head.width);
    for (int64_t from = 0; from < count; from += per_visit) {
      const int64_t panels = std::min(per_visit, count - from), depth = panels * kPanelWords<H>;
      for (int64_t i = 0; i < panels; ++i)
        sums.pack(kept + (live[from + i] * head.padded_vocab() + first) * kPanel, rows, depth, i);
      add_dw<H>(sums.packed.get(), rows, depth, x + from * kPanelWords<H> * kPanel, count * kPanelWords<H>, head.width, out);
    }
    sums.end(dw + first * head.width, rows * head.width);
  }
}

// E of a block gets its targets' entries.
template <class H>
void fill_targets(const H& head, const Panel& panel, const float* miss_sums, int64_t first, int64_t rows, float* e) {
  for (int lane = 0; lane < kPanel; ++lane) {
    const int64_t v = panel.target[lane] - first;
    if (v >= 0 && v < rows) e[v * kPanel + lane] = -miss_sums[lane] * target_slope(head, panel.target_logit[lane]);
  }
}

// The same from the statistics alone: logits again, E from the settled shift, and `miss_sums` [T], S' of every row, for the
// targets' entries. `tokens` are the unscaled panels that the logits come from.
template <class H, class Out>
void recompute_dw_blocks(const H& head, const std::vector<Panel>& panels, const float* miss_sums,
                         const typename H::Logits::Word* tokens, const typename H::Grads::Word* x, int64_t begin, int64_t end,
                         Out* dw) {
  const int64_t step = head.block(), count = panels.size(), per_visit = kDepth / kPanelWords<H>;
  BlockSums<H, Out> sums(head);
  Block<H> scratch(head, true, false);
  auto kept = make_array<typename H::Kept>(step * kPanel);
  float* z = scratch.logits.get();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    float* out = sums.begin(dw + first * head.width, rows * head.width);
    scratch.pack_logits(head, first, rows);
    for (int64_t from = 0; from < count; from += per_visit) {
      const int64_t visit = std::min(per_visit, count - from), depth = visit * kPanelWords<H>;
      for (int64_t i = 0; i < visit; ++i) {
        scratch.multiply(head, tokens + (from + i) * head.row_words() * kPanel, rows);
        Panel local = panels[from + i];
        exp_block(head, z, first, rows, local);
        fill_targets(head, local, miss_sums + (from + i) * kPanel, first, rows, z);
        for (int64_t j = 0; j < rows * kPanel; ++j) assign(kept[j], z[j]);
        sums.pack(kept.get(), rows, depth, i);
      }
      add_dw<H>(sums.packed.get(), rows, depth, x + from * kPanelWords<H> * kPanel, count * kPanelWords<H>, head.width, out);
    }
    sums.end(dw + first * head.width, rows * head.width);
  }
}

}  // namespace bpo
