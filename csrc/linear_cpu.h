// A few rows times a weight, as decoding makes them. A library packs the weight for every product, which takes as long as a
// product of 64 rows; here it is read where it stands, unless its rows fall on the same sets of a cache.
#pragma once

#include "gemm.h"

namespace bpo {

// Numbers of a row behind one visit to a tile: a panel's are half of L1 at most, and errors grow with a chain.
constexpr int64_t kChunk = std::min(4096 / kPanel, 256);
constexpr int64_t kWeightRows = 96 / kRows * kRows;  // of a block, whose chunk stays in L2
constexpr int64_t kGroup = 16;                       // panels whose sums stay in L2

// out = x weight^T + bias. A number is the sum of its chunks, each one chain over k: it depends on no other row, and errors
// grow with the length of a chunk.
struct Linear {
  const float *x, *weight, *bias;  // [num_rows, width], [num_out, width], [num_out] or null
  float* out;                      // [num_rows, num_out]
  int64_t num_rows, width, num_out;

  int64_t num_panels() const { return (num_rows + kPanel - 1) / kPanel; }
  int64_t panel_size() const { return width * kPanel; }
};

// Rows [count, width] -> a panel [width][kPanel]; lanes past `count` are zero.
inline void pack_panel(const float* rows, int64_t count, int64_t width, float* panel) {
  if (count < kPanel) std::fill_n(panel, width * kPanel, 0.0f);
  transpose(rows, width, std::min<int64_t>(count, kPanel), width, panel, kPanel);
}

// The columns [begin, end) of the output; `begin` is a whole tile of the weight.
inline void linear_columns(const Linear& a, const float* panels, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = kWeightRows * kPanel;
  thread_local const Buffer room = make_buffer(kGroup * kBlock + kWeightRows * kChunk);
  float *sums = room.get(), *left = sums + kGroup * kBlock;
  const int64_t num_panels = a.num_panels();
  const bool standing = rows_stand<Floats>(a.weight, a.width, num_panels);
  for (int64_t first = begin; first < end; first += kWeightRows) {
    const int64_t rows = std::min(kWeightRows, end - first), whole = standing ? rows / kRows * kRows : 0;
    for (int64_t group = 0; group < num_panels; group += kGroup) {
      const int64_t last = std::min(group + kGroup, num_panels);
      for (int64_t k = 0; k < a.width; k += kChunk) {
        const int64_t depth = std::min(kChunk, a.width - k);
        const float* from = a.weight + first * a.width + k;
        for (int64_t v = whole; v < rows; v += kRows)
          pack_left(from + v * a.width, a.width, static_cast<int>(std::min<int64_t>(kRows, rows - v)), depth,
                    left + (v - whole) * depth);
        for (int64_t p = group; p < last; ++p) {
          const float* b = panels + p * a.panel_size() + k * kPanel;
          float* c = sums + (p - group) * kBlock;
          for (int64_t v = 0; v < rows; v += kRows, c += kRows * kPanel) {
            if (v < whole)
              tile_of_rows<Floats>(from + v * a.width, a.width, b, depth, c, kPanel, k > 0, p == group);
            else
              tile<Floats>(left + (v - whole) * depth, b, depth, c, kPanel, k > 0);
          }
        }
      }
      for (int64_t p = group; p < last; ++p) {
        float* c = sums + (p - group) * kBlock;
        for (int64_t v = 0; a.bias && v < rows; ++v)
          for (int64_t i = 0; i < kPanel; ++i) c[v * kPanel + i] += a.bias[first + v];
        const int64_t row = p * kPanel, count = std::min<int64_t>(kPanel, a.num_rows - row);
        transpose(c, kPanel, rows, count, a.out + row * a.num_out + first, a.num_out);
      }
    }
  }
}

}  // namespace bpo
