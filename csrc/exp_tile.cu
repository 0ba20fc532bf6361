// The tile pass on CUDA: raw float32 products of a vocabulary tile -> E in place, row sums and shifts. The Triton twin is
// exp_tile_kernel in triton_passes.py; notation as in rows.py.
//
// One block a row. A thread holds its share of the row in registers between the only read and the only write, with two
// block-wide reductions between them, so E may lie over its own logits.

#include <optional>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kPerThread = 16;
constexpr int kMaxWidth = kThreads * kPerThread;  // 4,096 columns, TILE_COLS in torch_backend.py

struct Args {
  const float* z;
  const int64_t* targets;
  const float* shift;
  float* new_shift;
  float* miss_sum;
  float* factor;
  const float* gain;  // of the rows of E; null: 1
  int64_t first, stride_z, stride_e;
  int width;
  float scale, softcap, slack;  // softcap 0: none
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};

// The same value in every thread; the order of the reduction is fixed.
template <class Op>
__device__ float reduce(float value, Op op, float* shared) {
  for (int offset = 16; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(0xffffffff, value, offset));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
  for (int i = 1; i < kThreads / 32; ++i) value = op(value, shared[i]);
  return value;
}

__device__ void put(float* p, float x) { *p = x; }
__device__ void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// z and e may be the same bytes: neither is __restrict__.
template <class T>
__global__ void __launch_bounds__(kThreads) exp_tile_kernel(Args a, T* e) {
  __shared__ float shared[kThreads / 32];
  const int64_t row = blockIdx.x;
  const int64_t target = a.targets[row] - a.first;
  const float* z = a.z + row * a.stride_z;
  const bool capped = a.softcap > 0;
  float logit[kPerThread], slope[kPerThread];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int col = threadIdx.x + i * kThreads;
    float x = col < a.width ? z[col] : 0.0f;
    slope[i] = 1.0f;
    if (capped) {
      const float t = tanhf(x / a.softcap);
      slope[i] = 1.0f - t * t;
      x = t * a.softcap;
    }
    logit[i] = col < a.width && col != target ? x * a.scale : -INFINITY;
    top = fmaxf(top, logit[i]);
  }
  top = reduce(top, Max{}, shared);
  const float old = a.shift[row];
  const float shift = top > old + a.slack ? top : old;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    logit[i] = expf(logit[i] - shift);
    sum += logit[i];
  }
  sum = reduce(sum, Sum{}, shared);
  const float gain = a.gain == nullptr ? 1.0f : a.gain[row];
  if (threadIdx.x == 0) {
    const float shrink = expf(old - shift);
    a.miss_sum[row] = a.miss_sum[row] * shrink + sum;
    a.new_shift[row] = shift;
    a.factor[row] = shrink;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int col = threadIdx.x + i * kThreads;
    if (col >= a.width) break;
    put(e + row * a.stride_e + col, logit[i] * slope[i] * gain);
  }
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void exp_tile(Tensor z, Tensor e, Tensor targets, Tensor shift, Tensor new_shift, Tensor miss_sum, Tensor factor,
              std::optional<Tensor> gain, int64_t first, double scale, double softcap, double slack) {
  STD_TORCH_CHECK(z.size(1) <= kMaxWidth, "exp_tile: the tile is wider than a block of threads can hold");
  const Args args{floats(z),
                  static_cast<const int64_t*>(targets.const_data_ptr()),
                  floats(shift),
                  floats(new_shift),
                  floats(miss_sum),
                  floats(factor),
                  gain ? floats(*gain) : nullptr,
                  first,
                  z.stride(0),
                  e.stride(0),
                  static_cast<int>(z.size(1)),
                  static_cast<float>(scale),
                  static_cast<float>(softcap),
                  static_cast<float>(slack)};
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(z.get_device_index(), &stream));
  const auto blocks = static_cast<unsigned>(z.size(0));
  if (blocks == 0) return;
  if (e.scalar_type() == ScalarType::BFloat16) {
    auto* out = static_cast<__nv_bfloat16*>(e.mutable_data_ptr());
    exp_tile_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, out);
  } else {
    exp_tile_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, floats(e));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY(bpo_fast_cuda, m) {
  m.def(
      "exp_tile(Tensor z, Tensor(a!) e, Tensor targets, Tensor shift, Tensor(b!) new_shift, Tensor(c!) miss_sum, "
      "Tensor(d!) factor, Tensor? gain, int first, float scale, float softcap, float slack) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bpo_fast_cuda, CUDA, m) { m.impl("exp_tile", TORCH_BOX(&exp_tile)); }
