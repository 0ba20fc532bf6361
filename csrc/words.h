// The numbers a product reads. A word is 32 bits: one float, or two bfloat16 that are neighbors along the summed dimension.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "simd.h"

namespace bpo {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
inline float to_float(Float16 x) {
  const uint32_t size = x.bits & 0x7fffu;
  float out = static_cast<float>(size) * 0x1p-24f;  // of a subnormal
  uint32_t bits;
  std::memcpy(&bits, &out, sizeof(bits));
  if (size >= 0x0400) bits = (size << 13) + (112u << 23);  // from a bias of 15 to one of 127
  if (size >= 0x7c00) bits |= 0x7f800000;                  // infinities and NaN
  bits |= (x.bits & 0x8000u) << 16;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

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

typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

inline Vec load(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof(halves));
  const UVec bits = __builtin_convertvector(halves, UVec) << 16;
  Vec out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// As to_bfloat16, but the instruction takes what is below 2^-126 for 0.
inline Halves to_halves(Vec v) {
  Halves halves;
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(static_cast<__m512>(v));
  std::memcpy(&halves, &rounded, sizeof(halves));
#else
  UVec bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const UVec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  halves = __builtin_convertvector(v != v ? bits >> 16 | 0x40 : rounded, Halves);
#endif
  return halves;
}

inline void store(BFloat16* p, Vec v) {
  const Halves halves = to_halves(v);
  std::memcpy(p, &halves, sizeof(halves));
}

// The first `count` lanes; the others are zero.
template <class T>
Vec load_some(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  T some[kLanes] = {};
  std::memcpy(some, p, count * sizeof(T));
  return load(some);
}

template <class T>
void store_some(T* p, Vec v, int64_t count) {
  if (count == kLanes) return store(p, v);
  T some[kLanes];
  store(some, v);
  std::memcpy(p, some, count * sizeof(T));
}

// To the type of a tensor and back.
template <class T>
Vec rounded_to(Vec v) {
  if constexpr (std::is_same_v<T, float>) return v;
  T some[kLanes];
  store(some, v);
  return load(some);
}

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
  // Words of one row's kPanel numbers, neighbors along the row.
  static void along(Word* out, Vec low, Vec high) {
    store(out, low);
    store(out + kLanes, high);
  }
  // Words of kPack rows, neighbors across them, lane by lane.
  static void across(Word* out, const Vec (&rows)[1]) { store(out, rows[0]); }
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
  static void along(Word* out, Vec low, Vec high) {
    const __m512bh words = _mm512_cvtne2ps_pbh(static_cast<__m512>(high), static_cast<__m512>(low));
    std::memcpy(out, &words, sizeof(words));
  }
  static void across(Word* out, const Vec (&rows)[2]) {
    const UVec low = __builtin_convertvector(to_halves(rows[0]), UVec);
    const UVec words = low | __builtin_convertvector(to_halves(rows[1]), UVec) << 16;
    std::memcpy(out, &words, sizeof(words));
  }
};
#endif

}  // namespace bpo
