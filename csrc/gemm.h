// One micro-kernel for the three products of the head, and the packing that feeds it.
//
// A tile is kRows x kPanel. Its left operand has kRows neighbors at every k and is broadcast; its right operand is a panel
// [k][kPanel] whose lanes are tokens (logits, dX) or hidden units (dW). Every number is one chain of fused multiply-adds over k in
// rising order, so a row's result does not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace bpo {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
#if defined(__FLT16_MAX__)
inline float to_float(_Float16 x) { return static_cast<float>(x); }
#endif

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

inline Buffer make_buffer(int64_t count) {
  void* p = std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(float), 64));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

// C [kRows][kPanel] (+)= A^T B; the rows of A are `lda` apart.
inline void tile(const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc, bool accumulate) {
  Vec acc[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    acc[i][0] = accumulate ? load(c + i * ldc) : Vec{};
    acc[i][1] = accumulate ? load(c + i * ldc + kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] += a[i] * b0;
      acc[i][1] += a[i] * b1;
    }
    a += lda;
    b += kPanel;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(c + i * ldc, acc[i][0]);
    store(c + i * ldc + kLanes, acc[i][1]);
  }
}

// Columns a staged row takes: zeros fill the last tile, and rows do not start on the same cache set (4,096 bytes apart
// for a width of 1,024 floats, which would leave one set of the first-level cache to a whole column).
inline int64_t staged_stride(int64_t width) { return round_up(width + kRows, 16) + 16; }

// Rows [rows, width] of the head -> float [rows][stride], the left operand as it stands when k runs down the rows.
template <class T>
void stage_rows(const T* src, int64_t rows, int64_t width, float* dst) {
  const int64_t stride = staged_stride(width);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < width; ++k) dst[r * stride + k] = to_float(src[r * width + k]);
    std::fill_n(dst + r * stride + width, stride - width, 0.0f);
  }
}

typedef float Quad __attribute__((vector_size(16)));

// Four rows at `src` -> their transpose at `dst`, whose rows are kRows apart.
inline void transpose4(const float* src, int64_t stride, float* dst) {
  Quad r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], src + i * stride, sizeof(Quad));
  const Quad a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const Quad c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  const Quad out[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                       __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (int k = 0; k < 4; ++k) std::memcpy(dst + k * kRows, &out[k], sizeof(Quad));
}

// Staged rows -> [rows / kRows][width][kRows], the left operand when k runs along a row. Rows past the end are zero.
inline void pack_rows(const float* src, int64_t rows, int64_t width, float* dst) {
  const int64_t stride = staged_stride(width);
  for (int64_t r = 0; r < rows; r += kRows, dst += width * kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, rows - r));
    int i = 0;
    for (; i + 4 <= count; i += 4) {
      const float* block = src + (r + i) * stride;
      int64_t k = 0;
      for (; k + 4 <= width; k += 4) transpose4(block + k, stride, dst + k * kRows + i);
      for (; k < width; ++k)
        for (int j = 0; j < 4; ++j) dst[k * kRows + i + j] = block[j * stride + k];
    }
    for (; i < kRows; ++i) {
      const float* row = src + (r + i) * stride;
      for (int64_t k = 0; k < width; ++k) dst[k * kRows + i] = i < count ? row[k] : 0.0f;
    }
  }
}

// Token rows [count, width] -> one panel [width][kPanel]; lanes past `count` are zero.
template <class T>
void pack_tokens(const T* src, int64_t count, int64_t width, float* dst) {
  for (int lane = 0; lane < kPanel; ++lane) {
    const bool live = lane < count;
    const T* row = src + (live ? lane : 0) * width;
    for (int64_t k = 0; k < width; ++k) dst[k * kPanel + lane] = live ? to_float(row[k]) : 0.0f;
  }
}

// Token rows [rows, width] times a factor a row -> [width / kPanel][rows][kPanel].
template <class T>
void pack_scaled(const T* src, const float* factor, int64_t rows, int64_t width, float* dst) {
  for (int64_t h = 0; h < width; h += kPanel, dst += rows * kPanel) {
    const int count = static_cast<int>(std::min<int64_t>(kPanel, width - h));
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = src + r * width + h;
      for (int i = 0; i < kPanel; ++i) dst[r * kPanel + i] = i < count ? to_float(row[i]) * factor[r] : 0.0f;
    }
  }
}

}  // namespace bpo
