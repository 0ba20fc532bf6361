// One micro-kernel for the three products of the head, and the packing that feeds it.
//
// A tile is kRows x kPanel. Its left operand has kRows neighbors at every k and is broadcast; its right operand is a panel
// [k][kPanel] whose lanes are tokens (logits, dX) or hidden units (dW); k counts words (words.h). Every number is a sum of chains
// of fused multiply-adds over k in rising order, so a row's result does not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "words.h"

namespace bpo {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class W>
using Array = std::unique_ptr<W[], Free>;
using Buffer = Array<float>;

template <class W>
Array<W> make_array(int64_t count) {
  void* p = std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(W), 64));
  if (p == nullptr) throw std::bad_alloc();
  return Array<W>(static_cast<W*>(p));
}
inline Buffer make_buffer(int64_t count) { return make_array<float>(count); }

// The sums of one tile, in registers.
template <class Op>
struct Tile {
  Vec sums[kRows][2] = {};

  // One step along k: `a` has kRows words, so far apart.
  void add(const typename Op::Word* a, int64_t apart, const typename Op::Word* b) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      sums[i][0] = Op::multiply_add(sums[i][0], a[i * apart], b);
      sums[i][1] = Op::multiply_add(sums[i][1], a[i * apart], b + kLanes);
    }
  }
  void write(float* c, int64_t ldc, bool accumulate) {
    if (accumulate) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
        for (int half = 0; half < 2; ++half) sums[i][half] += load(c + i * ldc + half * kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      for (int half = 0; half < 2; ++half) store(c + i * ldc + half * kLanes, sums[i][half]);
  }
};

// C [kRows][kPanel] (+)= A^T B, `depth` words deep.
template <class Op>
void tile(const typename Op::Word* a, const typename Op::Word* b, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  Tile<Op> t;
  for (int64_t k = 0; k < depth; ++k) t.add(a + k * kRows, 1, b + k * kPanel);
  t.write(c, ldc, accumulate);
}

// The same from a left operand in parts [kRows][kWords] that lie `from` words past parts[p]; k runs along their rows, part by
// part. What the tile below needs of them is asked for on the way.
template <class Op, int64_t kWords>
void tile_of_parts(const typename Op::Word* const* parts, int64_t count, int64_t from, const typename Op::Word* b, float* c,
                   int64_t ldc, bool accumulate) {
  constexpr int64_t kLine = 64 / sizeof(typename Op::Word);
  static_assert(kRows * kWords <= kWords * kLine);
  Tile<Op> t;
  for (int64_t p = 0; p < count; ++p) {
    const auto* a = parts[p] + from;
    for (int64_t k = 0; k < kWords; ++k, b += kPanel) {
      __builtin_prefetch(a + kRows * kWords + k * kLine);
      t.add(a + k, kWords, b);
    }
  }
  t.write(c, ldc, accumulate);
}

// The same from rows of words where they stand, `stride` apart; k runs along them. What the tile below needs of them is asked
// for on the way, if `ahead`.
template <class Op>
void tile_of_rows(const typename Op::Word* rows, int64_t stride, const typename Op::Word* b, int64_t depth, float* c, int64_t ldc,
                  bool accumulate, bool ahead) {
  constexpr int64_t kLine = 64 / sizeof(typename Op::Word);
  Tile<Op> t;
  const auto* next = rows + kRows * stride;
  for (int64_t k = 0; k < depth; ++k) {
    if (ahead && k % kLine < kRows) __builtin_prefetch(next + k % kLine * stride + k / kLine * kLine);
    t.add(rows + k, stride, b + k * kPanel);
  }
  t.write(c, ldc, accumulate);
}

// A tile's sums wait in memory or L3: asked for while the tile before is at work, they are there when their turn comes.
inline void prefetch_tile(const float* c, int64_t ldc, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + kPanel - 1, 1);
  }
}

// Words of a row of `width` numbers when k runs along it; a last odd number is paired with 0.
template <class Op, class T>
void read_words(const T* row, int64_t width, typename Op::Word* out) {
  const int64_t whole = width / Op::kPack;
  for (int64_t k = 0; k < whole; ++k) out[k] = Op::word(row[k * Op::kPack], row[k * Op::kPack + Op::kPack - 1]);
  if (whole * Op::kPack < width) out[whole] = Op::word(row[width - 1], T{});
}

typedef uint32_t Quad __attribute__((vector_size(16)));

// Lanes of a (0 to 3) and of b (4 to 7).
template <int... lanes>
Quad shuffle(Quad a, Quad b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, lanes...);
#else
  return __builtin_shuffle(a, b, Quad{lanes...});
#endif
}

// Four rows of words at `src` -> their transpose at `dst`, whose rows are `apart`.
template <class W>
void transpose4(const W* src, int64_t stride, W* dst, int64_t apart = kRows) {
  Quad r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], src + i * stride, sizeof(Quad));
  const Quad a = shuffle<0, 4, 1, 5>(r[0], r[1]), b = shuffle<0, 4, 1, 5>(r[2], r[3]);
  const Quad c = shuffle<2, 6, 3, 7>(r[0], r[1]), d = shuffle<2, 6, 3, 7>(r[2], r[3]);
  const Quad out[4] = {shuffle<0, 1, 4, 5>(a, b), shuffle<2, 3, 6, 7>(a, b), shuffle<0, 1, 4, 5>(c, d),
                       shuffle<2, 3, 6, 7>(c, d)};
  for (int k = 0; k < 4; ++k) std::memcpy(dst + k * apart, &out[k], sizeof(Quad));
}

// [rows][columns], `stride` apart -> its transpose, `apart`.
template <class W>
void transpose(const W* src, int64_t stride, int64_t rows, int64_t columns, W* dst, int64_t apart) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) transpose4(src + i * stride + j, stride, dst + j * apart + i, apart);
    for (; j < columns; ++j)
      for (int64_t k = i; k < i + 4; ++k) dst[j * apart + k] = src[k * stride + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) dst[j * apart + i] = src[i * stride + j];
}

// Words [rows][depth], `stride` apart -> one tile [depth][kRows], the left operand when k runs along a row; rows past the
// end are zero.
template <class W>
void pack_left(const W* src, int64_t stride, int rows, int64_t depth, W* dst) {
  const auto four = [&](int i) {
    const W* block = src + i * stride;
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) transpose4(block + k, stride, dst + k * kRows + i);
    for (; k < depth; ++k)
      for (int j = 0; j < 4; ++j) dst[k * kRows + i + j] = block[j * stride + k];
  };
  for (int i = 0; i + 4 <= rows; i += 4) four(i);
  int done = rows / 4 * 4;
  if (done > 0 && done < rows) {  // the last four rows, some of them for the second time
    four(rows - 4);
    done = rows;
  }
  for (int i = done; i < kRows; ++i)
    for (int64_t k = 0; k < depth; ++k) dst[k * kRows + i] = i < rows ? src[i * stride + k] : W{};
}

// Rows of numbers, `stride` apart, as words: where they stand or, if they do not stand as words, in `room` for so many rows.
template <class W>
struct WordRows {
  const W* data;
  int64_t stride;
};
template <class Op, class T>
bool stand_as_words(const T* src, int64_t stride, int64_t width) {
  const bool whole = width % Op::kPack == 0 && stride % Op::kPack == 0;
  return std::is_same_v<T, typename Op::Number> && whole && reinterpret_cast<uintptr_t>(src) % sizeof(typename Op::Word) == 0;
}
template <class Op, class T>
WordRows<typename Op::Word> word_rows(const T* src, int64_t stride, int64_t rows, int64_t width, typename Op::Word* room) {
  using Word = typename Op::Word;
  if (stand_as_words<Op>(src, stride, width)) return {reinterpret_cast<const Word*>(src), stride / Op::kPack};
  const int64_t depth = (width + Op::kPack - 1) / Op::kPack;
  for (int64_t i = 0; i < rows; ++i) read_words<Op>(src + i * stride, width, room + i * depth);
  return {room, depth};
}

// Rows, `stride` apart -> [rows / kRows][words of a row][kRows]: the left operand when k runs along a row. `room` is scratch
// of kRows rows of words.
template <class Op, class T>
void pack_along(const T* src, int64_t stride, int64_t rows, int64_t width, typename Op::Word* room, typename Op::Word* dst) {
  const int64_t depth = (width + Op::kPack - 1) / Op::kPack;
  for (int64_t r = 0; r < rows; r += kRows, dst += depth * kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, rows - r));
    const auto words = word_rows<Op>(src + r * stride, stride, count, width, room);
    pack_left(words.data, words.stride, count, depth, dst);
  }
}

// Whether products with so many panels read rows of words where they stand, which spares a pass over them. Not where rows of a
// tile fall on the same sets of a first cache (8 ways of 4 KiB), as do rows of 4 KiB: a second panel would miss them.
template <class Op, class T>
bool rows_stand(const T* rows, int64_t width, int64_t panels) {
  int on_set[64] = {}, most = 0;
  for (int64_t i = 0; i < kRows; ++i) {
    const int64_t line = i * width * static_cast<int64_t>(sizeof(T)) / 64;
    most = std::max(most, ++on_set[line % 64]);
  }
  return (panels == 1 || most < 8) && stand_as_words<Op>(rows, width, width);
}

constexpr int64_t kLines = 4;

// Rows of the head -> [width / kRows][words of a column][kRows]: the left operand of dX. `lines` is scratch of kLines times
// round_up(width, kRows) words: a line that was written just now would be read while its stores are still in flight.
template <class Op, class T>
void pack_across(const T* src, int64_t rows, int64_t width, typename Op::Word* lines, typename Op::Word* dst) {
  const int64_t depth = (rows + Op::kPack - 1) / Op::kPack, padded = round_up(width, kRows);
  for (int64_t from = 0; from < depth; from += kLines) {
    const int64_t count = std::min(kLines, depth - from);
    for (int64_t k = 0; k < count; ++k) {
      const T* first = src + (from + k) * Op::kPack * width;
      typename Op::Word* line = lines + k * padded;
      if ((from + k + 1) * Op::kPack <= rows)
        for (int64_t h = 0; h < width; ++h) line[h] = Op::word(first[h], first[(Op::kPack - 1) * width + h]);
      else
        for (int64_t h = 0; h < width; ++h) line[h] = Op::word(first[h], T{});
      std::fill(line + width, line + padded, typename Op::Word{});
    }
    for (int64_t h = 0; h < padded; h += kRows)
      for (int64_t k = 0; k < count; ++k)
        std::memcpy(dst + (h / kRows * depth + from + k) * kRows, lines + k * padded + h, kRows * sizeof(*lines));
  }
}

// Token rows [count, width] -> one panel [words of a row][kPanel], the right operand of the logits; lanes past `count` are
// zero. `line` is scratch of one row's words.
template <class Op, class T>
void pack_tokens(const T* src, int64_t count, int64_t width, typename Op::Word* line, typename Op::Word* dst) {
  const int64_t depth = (width + Op::kPack - 1) / Op::kPack;
  for (int lane = 0; lane < kPanel; ++lane) {
    if (lane < count)
      read_words<Op>(src + lane * width, width, line);
    else
      std::fill_n(line, depth, typename Op::Word{});
    for (int64_t k = 0; k < depth; ++k) dst[k * kPanel + lane] = line[k];
  }
}

// A panel of token rows [count, width] times a factor a row -> its part of [width / kPanel][depth][kPanel], the right
// operand of dW; `dst` is the place of its first word.
template <class Op, class T>
void pack_scaled(const T* src, const float* factor, int64_t count, int64_t width, int64_t depth, typename Op::Word* dst) {
  const auto number = [&](int64_t row, int64_t h) {
    return row < count && h < width ? to_float(src[row * width + h]) * factor[row] : 0.0f;
  };
  for (int64_t h = 0; h < width; h += kPanel, dst += depth * kPanel)
    for (int64_t k = 0; k < kPanel / Op::kPack; ++k)
      for (int i = 0; i < kPanel; ++i)
        dst[k * kPanel + i] = Op::word(number(k * Op::kPack, h + i), number(k * Op::kPack + Op::kPack - 1, h + i));
}

}  // namespace bpo
