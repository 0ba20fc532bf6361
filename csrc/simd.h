// Vector types of the widest instruction set the compiler was told of, and exp and tanh on them.
#pragma once

#include <cstdint>
#include <cstring>

namespace bpo {

// kRows x 2 accumulators + 2 loads + 1 broadcast fill the register file: 31 of 32 with AVX-512, 15 of 16 without. ARM has
// 32 too; compilers broadcast several words ahead there.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 14;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRows = 6;
#elif defined(__aarch64__)
constexpr int kLanes = 4;
constexpr int kRows = 8;
#else
constexpr int kLanes = 4;
constexpr int kRows = 6;
#endif
constexpr int kPanel = 2 * kLanes;
static_assert(kRows <= kPanel);  // room for a panel's rows holds a tile's

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline Vec splat(float x) { return Vec{} + x; }

// exp to about one unit in the last place on [-87, 88]: exact 0 below, e^88 above, NaN through. Range reduction to
// |r| <= ln2 / 2 and the polynomial of Cephes expf.
inline Vec exp(Vec x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  const Vec clamped = x < -87.0f ? splat(-87.0f) : (x > 88.0f ? splat(88.0f) : x);
  const Vec shifted = clamped * 1.44269504088896341f + kMagic;
  const Vec n = shifted - kMagic;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IVec bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const IVec power = (bits << 23) + 0x3f800000;  // the magic's own bits leave through the top
  Vec scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < -87.0f ? Vec{} : p * scale;
}

// tanh to about one unit in the last place: the polynomial of Cephes tanhf near 0, where 1 - 2 / (e^2x + 1) cancels.
inline Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec near = p * square * x + x;
  return square < 0.390625f ? near : 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
}

// cap * tanh(x / cap); a cap of 0 is none.
inline Vec capped(Vec x, float cap) { return cap > 0.0f ? tanh(x * (1.0f / cap)) * cap : x; }

}  // namespace bpo
