// A few rows times a weight, as decoding makes them. A library packs the weight for every product, which takes as long as a
// product of 64 rows; here it is read where it stands, unless its rows fall on the same sets of a cache.
#pragma once

#include "gemm.h"

namespace bpo {

constexpr int64_t kWeightRows = 96 / kRows * kRows;  // of a block, whose chunk stays in L2
constexpr int64_t kGroup = 16;                       // panels whose sums stay in L2

// out = x weight^T + bias. A number is the sum of its chunks, each one chain over k: it depends on no other row, and errors
// grow with the length of a chunk.
template <class Op_, class Number_>
struct Linear {
  using Op = Op_;
  using Number = Number_;
  using Word = typename Op::Word;

  const Number *x, *weight;  // [num_rows, width], [num_out, width]
  const float* bias;         // [num_out] or null
  float* out;                // [num_rows, num_out]
  int64_t num_rows, width, num_out;

  int64_t num_panels() const { return (num_rows + kPanel - 1) / kPanel; }
  int64_t row_words() const { return (width + Op::kPack - 1) / Op::kPack; }
  int64_t panel_size() const { return row_words() * kPanel; }
};

// Rows of x -> a panel [words of a row][kPanel]; lanes past the last row are zero.
template <class A>
void pack_panel(const A& a, int64_t p, typename A::Word* panel) {
  const int64_t count = std::min<int64_t>(kPanel, a.num_rows - p * kPanel);
  const auto* rows = a.x + p * kPanel * a.width;
  const bool standing = stand_as_words<typename A::Op>(rows, a.width, a.width);
  const auto room = make_array<typename A::Word>(standing ? 0 : count * a.row_words());
  if (count < kPanel) std::fill_n(panel, a.panel_size(), typename A::Word{});
  const auto words = word_rows<typename A::Op>(rows, a.width, count, a.width, room.get());
  transpose(words.data, words.stride, count, a.row_words(), panel, kPanel);
}

// The columns [begin, end) of the output; `begin` is a whole tile of the weight.
template <class A>
void linear_columns(const A& a, const typename A::Word* panels, int64_t begin, int64_t end) {
  using Op = typename A::Op;
  using Word = typename A::Word;
  // words of a row behind one visit to a tile: a panel's are half of L1 at most, and errors grow with a chain
  constexpr int64_t kChunk = std::min(4096 / kPanel, 256 / Op::kPack);
  constexpr int64_t kBlock = kWeightRows * kPanel;
  thread_local const Buffer sums_room = make_buffer(kGroup * kBlock);
  thread_local const Array<Word> left_room = make_array<Word>((kWeightRows + kRows) * kChunk);
  float* sums = sums_room.get();
  Word *left = left_room.get(), *room = left + kWeightRows * kChunk;
  const int64_t num_panels = a.num_panels(), words = a.row_words();
  const bool standing = rows_stand<Op>(a.weight, a.width, num_panels);
  for (int64_t first = begin; first < end; first += kWeightRows) {
    const int64_t rows = std::min(kWeightRows, end - first), whole = standing ? rows / kRows * kRows : 0;
    const auto* weight = a.weight + first * a.width;
    for (int64_t group = 0; group < num_panels; group += kGroup) {
      const int64_t last = std::min(group + kGroup, num_panels);
      for (int64_t k = 0; k < words; k += kChunk) {
        const int64_t depth = std::min(kChunk, words - k), from = k * Op::kPack;
        pack_along<Op>(weight + whole * a.width + from, a.width, rows - whole, std::min(depth * Op::kPack, a.width - from),
                       room, left);
        for (int64_t p = group; p < last; ++p) {
          const Word* b = panels + p * a.panel_size() + k * kPanel;
          float* c = sums + (p - group) * kBlock;
          for (int64_t v = 0; v < rows; v += kRows, c += kRows * kPanel) {
            if (v < whole)
              tile_of_rows<Op>(reinterpret_cast<const Word*>(weight) + v * words + k, words, b, depth, c, kPanel, k > 0,
                               p == group);
            else
              tile<Op>(left + (v - whole) * depth, b, depth, c, kPanel, k > 0);
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
