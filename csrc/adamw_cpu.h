// AdamW a block of 256 elements at a time, with moments of float32 or of 8 bits; adamw_moments.py says what their codes mean.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "words.h"

namespace bpo {

constexpr int64_t kStepBlock = 256;

// `rest` is 1 - beta, `kept` what weight decay leaves of a weight.
struct AdamW {
  float grad_scale, lr, beta1, rest1, beta2, rest2, eps, kept, correction1, correction2;

  // A weight after its step.
  float step(float weight, float first, float second) const {
    const float size = (std::sqrt(second / correction2) + eps) * correction1;
    return weight * kept - lr * first / size;
  }
};

// `num` weights; `rounded` gets them as bfloat16, unless it is null.
template <class G>
struct Weights {
  float* weight;
  const G* grad;
  BFloat16* rounded;
  int64_t num;

  // The block from `at`, past its end zeros.
  void gradient(int64_t at, float grad_scale, float (&out)[kStepBlock]) const {
    for (int64_t i = 0; i < kStepBlock; i += kLanes) {
      store(out + i, load_some(grad + at + i, std::clamp<int64_t>(num - at - i, 0, kLanes)) / grad_scale);
    }
  }
  void round(int64_t at, int64_t size) const {
    if (!rounded) return;
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t lanes = std::min<int64_t>(size - i, kLanes);
      store_some(rounded + at + i, load_some(weight + at + i, lanes), lanes);
    }
  }
};

struct Moments {
  float *first, *second;
};

struct CodedMoments {
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
  for (int64_t i = 0; i < kStepBlock; i += kLanes) {
    const Vec v = load(x + i), size = v < 0.0f ? -v : v;
    most = size > most ? size : most;
  }
  float out = 0.0f;
  for (int i = 0; i < kLanes; ++i) out = std::max(out, most[i]);
  return out;
}

// Rounded, ties to even, as those of torch.round. A NaN has the code 0: what a cast makes of it depends on the compiler and
// the processor.
inline int8_t code(float x) { return static_cast<int8_t>(x == x ? (x + 12582912.0f) - 12582912.0f : 0.0f); }

inline void step_block(float* __restrict w, float* __restrict m, float* __restrict v, const float* __restrict g, int64_t size,
                       const AdamW& form) {
  for (int64_t i = 0; i < size; ++i) {
    m[i] = m[i] * form.beta1 + g[i] * form.rest1;
    v[i] = v[i] * form.beta2 + form.rest2 * g[i] * g[i];
    w[i] = form.step(w[i], m[i], v[i]);
  }
}

template <class G>
void adamw(Weights<G> weights, Moments moments, const AdamW& form, int64_t begin, int64_t end) {
  alignas(64) float g[kStepBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * kStepBlock, size = std::min(kStepBlock, weights.num - at);
    weights.gradient(at, form.grad_scale, g);
    step_block(weights.weight + at, moments.first + at, moments.second + at, g, size, form);
    weights.round(at, size);
  }
}

template <class G>
void adamw_8bit(Weights<G> weights, CodedMoments moments, const AdamW& form, int64_t begin, int64_t end) {
  constexpr float kSmallest = 1.17549435e-38f;
  alignas(64) float g[kStepBlock], m[kStepBlock], v[kStepBlock];
  for (int64_t block = begin; block < end; ++block) {
    const int64_t at = block * kStepBlock, size = std::min(kStepBlock, weights.num - at);
    int8_t *first = moments.first + at, *second = moments.second + at;
    const float first_scale = moments.first_scale[block], second_scale = moments.second_scale[block];
    weights.gradient(at, form.grad_scale, g);
    for (int64_t i = 0; i < kStepBlock; ++i) {
      const float a = static_cast<float>(first[i]) / 127.0f, b = static_cast<float>(second[i]) / 127.0f;
      m[i] = a * a * a * first_scale * form.beta1 + g[i] * form.rest1;
      v[i] = b * b * (b * b) * second_scale * form.beta2 + form.rest2 * g[i] * g[i];
    }
    float* w = weights.weight + at;
    for (int64_t i = 0; i < size; ++i) w[i] = form.step(w[i], m[i], v[i]);
    weights.round(at, size);
    const float most = largest(m), most_squared = largest(v);
    moments.first_scale[block] = most;
    moments.second_scale[block] = most_squared;
    const float floor = std::max(most, kSmallest), floor_squared = std::max(most_squared, kSmallest);
    for (int64_t i = 0; i < kStepBlock; ++i) {
      const float share = cube_root(std::fabs(m[i]) / floor) * 127.0f;
      first[i] = code(m[i] < 0.0f ? -share : share);
      second[i] = code(std::sqrt(std::sqrt(v[i] / floor_squared)) * 127.0f);
    }
  }
}

}  // namespace bpo
