// One micro-kernel for the three products of the head, and the packing that feeds it.
//
// A tile is kRows x kPanel. Its left operand is packed [k][kRows] and broadcast; its right operand is a panel [k][kPanel]
// whose lanes are tokens (logits, dX) or hidden units (dW). Every number is one chain of fused multiply-adds over k in
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

// C [kRows][kPanel] (+)= A^T B.
inline void tile(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, bool accumulate) {
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
    a += kRows;
    b += kPanel;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(c + i * ldc, acc[i][0]);
    store(c + i * ldc + kLanes, acc[i][1]);
  }
}

// Rows [rows, width] -> [rows / kRows][width][kRows]: the left operand when k runs along a row.
template <class T>
void pack_rows(const T* src, int64_t rows, int64_t width, float* dst) {
  for (int64_t r = 0; r < rows; r += kRows, dst += width * kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, rows - r));
    for (int i = 0; i < kRows; ++i) {
      const T* row = src + (r + std::min(i, count - 1)) * width;
      const float keep = i < count ? 1.0f : 0.0f;
      for (int64_t k = 0; k < width; ++k) dst[k * kRows + i] = keep == 0.0f ? 0.0f : to_float(row[k]);
    }
  }
}

// Rows [rows, width] -> [width / kRows][rows][kRows]: the left operand when k runs down the rows.
template <class T>
void pack_columns(const T* src, int64_t rows, int64_t width, float* dst) {
  for (int64_t c = 0; c < width; c += kRows, dst += rows * kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, width - c));
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = src + r * width + c;
      for (int i = 0; i < kRows; ++i) dst[r * kRows + i] = i < count ? to_float(row[i]) : 0.0f;
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
