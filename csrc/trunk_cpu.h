// RMS norms and gated activations of float or bfloat16, a row at a time, in float. Rows are `stride` numbers apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "words.h"

namespace bpo {

template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  T* row(int64_t r) const { return data + r * stride; }
};

// Calls f(offset, lanes) over a row: whole vectors, then what is left of it in a vector padded by zeros.
template <class F>
inline void over_row(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, kLanes);
  if (i < width) f(i, static_cast<int>(width - i));
}

inline float sum(Vec v) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// `twice`: x is rounded to T before it meets the weight.
template <class T>
void rms_norm(Matrix<T> x, const T* weight, float eps, float offset, bool twice, int64_t width, int64_t begin, int64_t end,
              Matrix<T> out, float* scales) {
  for (int64_t r = begin; r < end; ++r) {
    const T* in = x.row(r);
    Vec squares{};
    over_row(width, [&](int64_t i, int lanes) {
      const Vec v = load_some(in + i, lanes);
      squares += v * v;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
    scales[r] = scale;
    over_row(width, [&](int64_t i, int lanes) {
      const Vec unit = load_some(in + i, lanes) * scale;
      store_some(out.row(r) + i, (twice ? rounded_to<T>(unit) : unit) * (load_some(weight + i, lanes) + offset), lanes);
    });
  }
}

// `dweight` gets the sum over these rows of dout * x * scale on top, unless it is null.
template <class T>
void rms_norm_backward(Matrix<T> dout, Matrix<T> x, const T* weight, const float* scales, float offset, int64_t width,
                       int64_t begin, int64_t end, Matrix<T> dx, float* dweight) {
  for (int64_t r = begin; r < end; ++r) {
    const T *in = x.row(r), *grad = dout.row(r);
    const float scale = scales[r];
    Vec products{};
    over_row(width, [&](int64_t i, int lanes) {
      const Vec toward = load_some(grad + i, lanes) * load_some(in + i, lanes) * scale;
      products += toward * (load_some(weight + i, lanes) + offset);
      if (dweight) store_some(dweight + i, load_some(dweight + i, lanes) + toward, lanes);
    });
    const float mean = sum(products) / static_cast<float>(width) * scale;
    over_row(width, [&](int64_t i, int lanes) {
      const Vec g = load_some(grad + i, lanes) * (load_some(weight + i, lanes) + offset);
      store_some(dx.row(r) + i, (g - load_some(in + i, lanes) * mean) * scale, lanes);
    });
  }
}

// x sigmoid(t(x)) and its slope: t is x for silu, twice the argument of tanh for its approximation of gelu.
template <bool kSilu>
struct Activation {
  Vec value, slope;
  explicit Activation(Vec x) {
    constexpr float kTwice = 1.5957691216057308f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)
    // the gate of gelu is open or shut past 16
    const Vec near = kSilu ? x : (x < -16.0f ? splat(-16.0f) : (x > 16.0f ? splat(16.0f) : x));
    const Vec t = kSilu ? x : kTwice * near * (1.0f + kCubic * near * near);
    const Vec gate = t < -87.0f ? Vec{} : 1.0f / (1.0f + exp(-t));  // exp ends at e^88, which 1e38 would outweigh
    value = x * gate;
    const Vec steep = kSilu ? splat(1.0f) : kTwice * (1.0f + 3.0f * kCubic * near * near);
    slope = gate * (1.0f + near * (1.0f - gate) * steep);
  }
};

template <bool kSilu, class T>
void gated(Matrix<T> gate, Matrix<T> up, int64_t width, int64_t begin, int64_t end, Matrix<T> out) {
  for (int64_t r = begin; r < end; ++r) {
    over_row(width, [&](int64_t i, int lanes) {
      const Activation<kSilu> a(load_some(gate.row(r) + i, lanes));
      store_some(out.row(r) + i, rounded_to<T>(a.value) * load_some(up.row(r) + i, lanes), lanes);
    });
  }
}

template <bool kSilu, class T>
void gated_backward(Matrix<T> dout, Matrix<T> gate, Matrix<T> up, int64_t width, int64_t begin, int64_t end, Matrix<T> dgate,
                    Matrix<T> dup) {
  for (int64_t r = begin; r < end; ++r) {
    over_row(width, [&](int64_t i, int lanes) {
      const Activation<kSilu> a(load_some(gate.row(r) + i, lanes));
      const Vec grad = load_some(dout.row(r) + i, lanes);
      store_some(dgate.row(r) + i, grad * load_some(up.row(r) + i, lanes) * a.slope, lanes);
      store_some(dup.row(r) + i, grad * rounded_to<T>(a.value), lanes);
    });
  }
}

}  // namespace bpo
