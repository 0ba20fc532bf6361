// AdamW with moments of 8 bits, a block of 256 elements at a time; adamw_8bit.py says what the codes mean.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "simd.h"

namespace bpo {

constexpr int64_t kCodeBlock = 256;

// `rest` is 1 - beta, `kept` what weight decay leaves of a weight.
struct AdamW {
  float grad_scale, lr, rest1, beta2, rest2, eps, kept, correction1, correction2;
};

struct Moments {
  int8_t *first, *second;
  float *first_scale, *second_scale;
};

// Of [0, 1], to a few units in the last place: a third of the exponent and three steps of Newton's.
inline float cube_root(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits = static_cast<int32_t>(static_cast<float>(bits) * (1.0f / 3.0f)) + 709921077;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  for (int i = 0; i < 3; ++i) y = (2.0f * y + x / (y * y)) * (1.0f / 3.0f);
  return y;
}

inline float largest(const float* x) {
  Vec most{};
  for (int64_t i = 0; i < kCodeBlock; i += kLanes) {
    const Vec v = load(x + i), size = v < 0.0f ? -v : v;
    most = size > most ? size : most;
  }
  float out = 0.0f;
  for (int i = 0; i < kLanes; ++i) out = std::max(out, most[i]);
  return out;
}

// Ties go to even, as those of torch.round.
inline float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline void adamw_8bit(float* weight, const float* grad, Moments moments, const AdamW& form, int64_t num, int64_t begin,
                       int64_t end) {
  constexpr float kSmallest = 1.17549435e-38f;
  alignas(64) float g[kCodeBlock], m[kCodeBlock], v[kCodeBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * kCodeBlock, size = std::min(kCodeBlock, num - at);
    int8_t *first = moments.first + at, *second = moments.second + at;
    const float first_scale = moments.first_scale[block], second_scale = moments.second_scale[block];
    std::fill(g + size, g + kCodeBlock, 0.0f);
    for (int64_t i = 0; i < size; ++i) g[i] = grad[at + i] / form.grad_scale;
    for (int64_t i = 0; i < kCodeBlock; ++i) {
      const float a = static_cast<float>(first[i]) / 127.0f, b = static_cast<float>(second[i]) / 127.0f;
      const float was = a * a * a * first_scale;
      m[i] = was + (g[i] - was) * form.rest1;
      v[i] = b * b * (b * b) * second_scale * form.beta2 + form.rest2 * g[i] * g[i];
    }
    float* w = weight + at;
    for (int64_t i = 0; i < size; ++i) {
      const float step_size = (std::sqrt(v[i] / form.correction2) + form.eps) * form.correction1;
      w[i] = w[i] * form.kept - form.lr * m[i] / step_size;
    }
    const float most = largest(m), most_squared = largest(v);
    moments.first_scale[block] = most;
    moments.second_scale[block] = most_squared;
    const float floor = std::max(most, kSmallest), floor_squared = std::max(most_squared, kSmallest);
    for (int64_t i = 0; i < kCodeBlock; ++i) {
      const float code = rounded(cube_root(std::fabs(m[i]) / floor) * 127.0f);
      first[i] = static_cast<int8_t>(m[i] < 0.0f ? -code : code);
      second[i] = static_cast<int8_t>(rounded(std::sqrt(std::sqrt(v[i] / floor_squared)) * 127.0f));
    }
  }
}

}  // namespace bpo
