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
template <class H, class Out>
struct BlockSums {
  using Op = typename H::Grads;
  using Word = typename Op::Word;
  static constexpr bool kInPlace = std::is_same_v<Out, float>;
  static constexpr int64_t kVisit = kDepth / kPanelWords<H>;  // panels
  const typename Op::Word* x;  // of scaled_tokens
  const Pushes<H>& pushes;
  int64_t width, count;
  bool fresh;
  Array<Word> packed;  // E of a block, [visit][rows / kRows][words of the visit][kRows]
  Buffer sums;         // of a block, where dW is not float

  BlockSums(const H& head, const Word* scaled, const Pushes<H>& targets, int64_t panels, int64_t max_rows, bool first)
      : x(scaled),
        pushes(targets),
        width(head.width),
        count(panels),
        fresh(first),
        packed(make_array<Word>(round_up(max_rows, kRows) * panels * kPanelWords<H>)),
        sums(make_buffer(kInPlace ? 0 : max_rows * head.width)) {}

  int64_t visit_panels(int64_t from) const { return std::min(kVisit, count - from); }

  // E of panel i, rows `stride` apart -> the steps in `packed` of the tile at row v of a block of so many rows.
  void pack(const typename H::Kept* e, int64_t stride, int64_t v, int64_t rows, int64_t i) {
    const int64_t from = i / kVisit * kVisit, depth = visit_panels(from) * kPanelWords<H>;
    Word* out = packed.get() + (from * round_up(rows, kRows) + (i - from) * kRows) * kPanelWords<H> + v * depth;
    const int high = static_cast<int>(std::min<int64_t>(kRows, rows - v));
    pack_left(reinterpret_cast<const Word*>(e), stride / Op::kPack, high, kPanelWords<H>, out);
  }

  // dW rows [first, first + rows), which are at `dw`, (+)= the product of all panels and the pushes.
  void add(int64_t first, int64_t rows, Out* dw) {
    float* to = nullptr;
    if constexpr (kInPlace) to = dw;
    else to = sums.get();
    if (count == 0 && (fresh || !kInPlace)) std::fill_n(to, rows * width, 0.0f);
    for (int64_t from = 0; from < count; from += visit_panels(from)) {
      const int64_t depth = visit_panels(from) * kPanelWords<H>;
      const Word* e = packed.get() + from * round_up(rows, kRows) * kPanelWords<H>;
      add_visit(e, rows, depth, x + from * kPanelWords<H> * kPanel, to, from > 0 || (kInPlace && !fresh));
    }
    pushes.add(first, rows, to);
    if constexpr (!kInPlace)
      for (int64_t i = 0; i < rows * width; ++i) assign(dw[i], fresh ? to[i] : to_float(dw[i]) + to[i]);
  }

  // The product of `depth` words: `e` is [rows / kRows][depth][kRows], `right` the first word of the visit in x.
  void add_visit(const Word* e, int64_t rows, int64_t depth, const Word* right, float* to, bool accumulate) {
    float edge[kRows * kPanel];
    for (int64_t h = 0; h < width; h += kPanel) {
      const auto* panel = right + h * count * kPanelWords<H>;
      for (int64_t v = 0; v < rows; v += kRows) {
        const int64_t high = std::min<int64_t>(kRows, rows - v), wide = std::min<int64_t>(kPanel, width - h);
        float* c = to + v * width + h;
        if (v + kRows < rows) prefetch_tile(c + kRows * width, width, std::min<int64_t>(kRows, rows - v - kRows));
        if (high == kRows && wide == kPanel) {
          tile<Op>(e + v * depth, panel, depth, c, width, accumulate);
          continue;
        }
        tile<Op>(e + v * depth, panel, depth, edge, kPanel, false);
        for (int64_t i = 0; i < high; ++i)
          for (int64_t j = 0; j < wide; ++j) c[i * width + j] = edge[i * kPanel + j] + (accumulate ? c[i * width + j] : 0.0f);
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

// Vocabulary blocks [begin, end) of dW from kept E, which may lie in dW itself: a block is packed before it is summed.
// `live` lists the panels with a factor that is not 0, `x` holds them as scaled_tokens does.
template <class H, class Out>
void kept_dw_blocks(const H& head, const Store<H>& kept, const std::vector<int64_t>& live, const typename H::Grads::Word* x,
                    const Pushes<H>& pushes, bool fresh, int64_t begin, int64_t end, Out* dw) {
  const int64_t count = live.size(), step = dw_block<H>(count);
  BlockSums<H, Out> sums(head, x, pushes, count, step, fresh);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    for (int64_t v = 0; v < rows; v += kRows)  // along the rows of dW, where E lies in order
      for (int64_t i = 0; i < count; ++i) sums.pack(kept.at(live[i], first + v), kept.stride(live[i]), v, rows, i);
    sums.add(first, rows, dw + first * head.width);
  }
}

// The same from the statistics alone: logits again, and E from the settled shift. `tokens` are the unscaled panels that the
// logits come from.
template <class H, class Out>
void recompute_dw_blocks(const H& head, const std::vector<Panel>& panels, const typename H::Logits::Word* tokens,
                         const typename H::Grads::Word* x, const Pushes<H>& pushes, bool fresh, int64_t begin, int64_t end,
                         Out* dw) {
  const int64_t step = recompute_block(head), count = panels.size();
  BlockSums<H, Out> sums(head, x, pushes, count, step, fresh);
  Block<H> scratch(head, true, false);
  auto kept = make_array<typename H::Kept>(step * kPanel);
  float* z = scratch.logits.get();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    scratch.pack_logits(head, first, rows);
    for (int64_t i = 0; i < count; ++i) {
      scratch.multiply(head, tokens + i * head.row_words() * kPanel, rows);
      Panel local = panels[i];
      exp_block(head, z, first, rows, local);
      for (int64_t j = 0; j < rows * kPanel; ++j) assign(kept[j], z[j]);
      for (int64_t v = 0; v < rows; v += kRows) sums.pack(kept.get() + v * kPanel, kPanel, v, rows, i);
    }
    sums.add(first, rows, dw + first * head.width);
  }
}

}  // namespace bpo
