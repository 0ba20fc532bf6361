// The numbers a product reads. A word is 32 bits: one float, or two bfloat16 that are neighbors along the summed dimension.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

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

// To nearest, ties to even; NaN stays NaN.
inline BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline BFloat16 to_bfloat16(BFloat16 x) { return x; }

inline void assign(float& out, float x) { out = x; }
inline void assign(BFloat16& out, float x) { out = to_bfloat16(x); }

// Exact products of floats, summed in float.
struct Floats {
  using Word = float;
  using Number = float;  // what E is kept as
  static constexpr int kPack = 1;

  static Vec multiply_add(Vec sum, Word a, const Word* b) { return sum + a * load(b); }
  template <class T>
  static Word word(T first, T) {
    return to_float(first);
  }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs, summed in float: one instruction does twice the work of a float multiply-add.
struct Pairs {
  using Word = uint32_t;
  using Number = BFloat16;
  static constexpr int kPack = 2;

  static Vec multiply_add(Vec sum, Word a, const Word* b) {
    const __m512i left = _mm512_set1_epi32(static_cast<int>(a)), right = _mm512_loadu_si512(b);
    return static_cast<Vec>(
        _mm512_dpbf16_ps(static_cast<__m512>(sum), reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right)));
  }
  template <class T>
  static Word word(T first, T second) {
    return to_bfloat16(first).bits | static_cast<Word>(to_bfloat16(second).bits) << 16;
  }
};
#endif

}  // namespace bpo
