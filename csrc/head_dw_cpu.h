// dW on the CPU: dW[v] += sum over rows of E[row, v] * factor[row] * hidden[row].
//
// Threads own runs of the vocabulary, so every number of dW has one writer and one order of summation.
#pragma once

#include "head_cpu.h"

namespace bpo {

constexpr int64_t kDepth = 8;  // panels of E behind one visit to a tile of dW

// dW rows [first, first + rows) += the product of `depth` tokens: `e` is packed [rows / kRows][depth][kRows], `x` is
// [width / kPanel][x_rows][kPanel] and starts at its first token.
inline void add_dw(const float* e, int64_t rows, int64_t depth, const float* x, int64_t x_rows, int64_t width, float* dw) {
  float edge[kRows * kPanel];
  for (int64_t h = 0; h < width; h += kPanel) {
    const float* panel = x + h * x_rows;
    for (int64_t v = 0; v < rows; v += kRows) {
      const int64_t high = std::min<int64_t>(kRows, rows - v), wide = std::min<int64_t>(kPanel, width - h);
      float* c = dw + v * width + h;
      if (high == kRows && wide == kPanel) {
        tile(e + v * depth, kRows, panel, depth, c, width, true);
        continue;
      }
      tile(e + v * depth, kRows, panel, depth, edge, kPanel, false);
      for (int64_t i = 0; i < high; ++i)
        for (int64_t j = 0; j < wide; ++j) c[i * width + j] += edge[i * kPanel + j];
    }
  }
}

// A panel's E rows [rows][kPanel] -> its kPanel steps of the packed operand [rows / kRows][depth][kRows].
inline void pack_e(const float* e, int64_t rows, int64_t depth, float* dst) {
  for (int64_t v = 0; v < rows; v += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, rows - v));
    int i = 0;
    for (; i + 4 <= count; i += 4)
      for (int lane = 0; lane < kPanel; lane += 4)
        transpose4(e + (v + i) * kPanel + lane, kPanel, dst + v * depth + lane * kRows + i);
    for (; i < kRows; ++i)
      for (int lane = 0; lane < kPanel; ++lane)
        dst[v * depth + lane * kRows + i] = i < count ? e[(v + i) * kPanel + lane] : 0.0f;
  }
}

// Vocabulary blocks [begin, end) of dW from kept E. `live` lists the panels with a factor that is not 0, `x` holds their
// rows times the factor, [width / kPanel][live panels * kPanel][kPanel].
template <class T>
void kept_dw_blocks(const Head<T>& head, const float* kept, const std::vector<int64_t>& live, const float* x, int64_t begin,
                    int64_t end, float* dw) {
  const int64_t step = head.block(), count = live.size();
  Buffer packed = make_buffer(step * kDepth * kPanel);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    for (int64_t from = 0; from < count; from += kDepth) {
      const int64_t depth = std::min(kDepth, count - from) * kPanel;
      for (int64_t i = 0; i * kPanel < depth; ++i) {
        const float* e = kept + (live[from + i] * head.padded_vocab() + first) * kPanel;
        pack_e(e, rows, depth, packed.get() + i * kPanel * kRows);
      }
      add_dw(packed.get(), rows, depth, x + from * kPanel * kPanel, count * kPanel, head.width, dw + first * head.width);
    }
  }
}

// The same from the statistics alone: logits again, E from the settled shift. `tokens` are the unscaled panels
// [panel][width][kPanel] that the logits come from; the target's term is added by push_targets.
template <class T>
void recompute_dw_blocks(const Head<T>& head, std::vector<Panel>& panels, const float* tokens, const float* x, int64_t begin,
                         int64_t end, float* dw) {
  const int64_t step = head.block(), count = panels.size();
  Buffer staged = make_buffer(step * staged_stride(head.width)), pack = make_buffer(step * head.width);
  Buffer z = make_buffer(step * kPanel), packed = make_buffer(step * kDepth * kPanel);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * step, rows = std::min(step, head.vocab - first);
    stage_rows(head.weight + first * head.width, rows, head.width, staged.get());
    pack_rows(staged.get(), rows, head.width, pack.get());
    for (int64_t from = 0; from < count; from += kDepth) {
      const int64_t depth = std::min(kDepth, count - from) * kPanel;
      for (int64_t i = 0; i * kPanel < depth; ++i) {
        for (int64_t v = 0; v < rows; v += kRows)
          tile(pack.get() + v * head.width, kRows, tokens + (from + i) * head.width * kPanel, head.width, z.get() + v * kPanel,
               kPanel, false);
        Panel local = panels[from + i];
        exp_block(head, z.get(), first, rows, local);
        pack_e(z.get(), rows, depth, packed.get() + i * kPanel * kRows);
      }
      add_dw(packed.get(), rows, depth, x + from * kPanel * kPanel, count * kPanel, head.width, dw + first * head.width);
    }
  }
}

// The targets' terms: dW[y] += push * slope * hidden for every row, one after the other.
template <class T>
void push_targets(const Head<T>& head, const std::vector<Panel>& panels, const float* push, float* dw) {
  for (int64_t row = 0; row < head.num_rows; ++row) {
    const float factor = push[row] * target_slope(head, panels[row / kPanel].target_logit[row % kPanel]);
    float* out = dw + head.targets[row] * head.width;
    for (int64_t h = 0; h < head.width; ++h) out[h] += factor * to_float(head.hidden[row * head.width + h]);
  }
}

}  // namespace bpo
