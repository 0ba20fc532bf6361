// A CUDA device made of host memory: enough of one for a CPU build of PyTorch to run what is written for a GPU.
//
// Its tensors are of device cuda:0 and dispatch key CUDA. An operator without a device-independent kernel runs the
// CPU's kernel on the same bytes, but refuses what a GPU would refuse: an operand left on the CPU, more memory than
// there is, and, when told so, whatever makes the host wait for the device. It must be loaded before PyTorch is.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <set>
#include <string>

namespace {

const c10::Device kGpu(c10::DeviceType::CUDA, 0);
const c10::Device kHost(c10::DeviceType::CPU);

std::atomic<int64_t> live_bytes{0}, peak_bytes{0}, limit_bytes{int64_t{16} << 30};
std::atomic<int64_t> waits_mode{0};  // 0: allowed, 1: warned of, 2: refused

void take(int64_t bytes) {
  TORCH_CHECK_WITH(OutOfMemoryError, live_bytes + bytes <= limit_bytes, "CUDA out of memory. Tried to allocate ", bytes,
                   " bytes on the stand-in of ", limit_bytes.load());
  int64_t now = live_bytes += bytes, peak = peak_bytes;
  while (now > peak && !peak_bytes.compare_exchange_weak(peak, now)) {
  }
}

int64_t rounded(size_t bytes) { return (static_cast<int64_t>(bytes) + 511) / 512 * 512; }

struct Block {
  void* data;
  int64_t bytes;
  at::Tensor owner;  // of memory that a CPU kernel allocated
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  live_bytes -= block->bytes;
  if (!block->owner.defined()) std::free(block->data);
  delete block;
}

struct GpuAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, kGpu};
    take(rounded(bytes));
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, 512, bytes) == 0, "the host has no ", bytes, " bytes left");
    return {data, new Block{data, rounded(bytes), {}}, &release, kGpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

GpuAllocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Device getDevice() const override { return kGpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct GpuGenerator final : c10::GeneratorImpl {
  at::Generator host;
  explicit GpuGenerator(at::Generator from)
      : GeneratorImpl(kGpu, c10::DispatchKeySet(c10::DispatchKey::CUDA)), host(std::move(from)) {}
  static c10::DeviceType device_type() { return c10::DeviceType::CUDA; }
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  GpuGenerator* clone_impl() const override { return new GpuGenerator(host.clone()); }
};

const at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<GpuGenerator>(at::detail::createCPUGenerator(0));
  return generator;
}

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<GpuGenerator>(at::detail::createCPUGenerator());
  }
  c10::Device getDeviceFromPtr(void*) const override { return kGpu; }
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

}  // namespace

namespace at {
using CUDAHooks = ::Hooks;
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

namespace {

// A tensor of `storage` with the type, sizes and strides of `shape`.
template <class... Kind>
at::Tensor tensor_of(const c10::Storage& storage, c10::DispatchKeySet keys, const at::Tensor& shape, Kind... kind) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(kind..., c10::Storage(storage), keys, shape.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(shape.sizes(), shape.strides(), shape.storage_offset());
  if (shape.is_conj()) made._set_conj(true);
  if (shape.is_neg()) made._set_neg(true);
  return made;
}

const c10::DispatchKeySet kGpuKeys(c10::DispatchKey::CUDA), kHostKeys(c10::DispatchKey::CPU);

// The same bytes as a tensor of the CPU.
at::Tensor on_host(const at::Tensor& tensor) {
  auto& storage = tensor.storage();
  c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(),
                    c10::DataPtr(storage.mutable_data(), kHost), c10::GetAllocator(c10::DeviceType::CPU), true);
  return tensor_of(host, kHostKeys, tensor);
}

// What a CPU kernel made, as a tensor of the device; the memory stays where it is.
at::Tensor on_gpu(const at::Tensor& tensor) {
  auto bytes = tensor.storage().nbytes();
  take(rounded(bytes));
  auto* block = new Block{nullptr, rounded(bytes), tensor};
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                       c10::DataPtr(tensor.storage().mutable_data(), block, &release, kGpu), &allocator, true);
  return tensor_of(storage, kGpuKeys, tensor);
}

void host_waits(const std::string& what) {
  TORCH_CHECK(waits_mode < 2, "called a synchronizing CUDA operation: ", what);
  if (waits_mode == 1) TORCH_WARN("called a synchronizing CUDA operation: ", what);
}

bool may_mix(const std::string& name) {
  static const std::set<std::string> names{"aten::copy_", "aten::_copy_from", "aten::_to_copy", "aten::set_",
    "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  return names.count(name) > 0;
}

bool waits(const std::string& name) {
  static const std::set<std::string> names{"aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero.out",
    "aten::unique_consecutive", "aten::masked_select", "aten::masked_select.out", "aten::equal", "aten::unique_dim", "aten::_unique2",
    "aten::is_nonzero", "aten::bincount", "aten::one_hot"};
  return names.count(name) > 0;
}

struct Translation {
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs;  // device's, host's
  bool any_gpu = false;
  at::Tensor left_on_host;

  at::Tensor operator()(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      if (tensor.dim() > 0 && tensor.device().is_cpu()) left_on_host = tensor;
      return tensor;
    }
    any_gpu = true;
    for (auto& [gpu, host] : pairs)
      if (gpu.is_same(tensor)) return host;
    pairs.emplace_back(tensor, on_host(tensor));
    return pairs.back().second;
  }

  // The device's tensor of what a kernel returned.
  at::Tensor back(const at::Tensor& result) {
    if (!result.defined() || result.is_cuda()) return result;
    for (auto& [gpu, host] : pairs)
      if (host.is_same(result)) return gpu;
    for (auto& [gpu, host] : pairs)
      if (result.storage().is_alias_of(host.storage())) return tensor_of(gpu.storage(), gpu.key_set(), result, c10::TensorImpl::VIEW);
    return on_gpu(result);
  }

  // Outputs that a kernel gave another size have other memory.
  void settle() {
    for (auto& [gpu, host] : pairs) {
      if (host.storage().data() != gpu.storage().data())
        gpu.unsafeGetTensorImpl()->set_storage_keep_dtype(on_gpu(host).storage());
      gpu.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.operator_name().overload_name.empty()
      ? schema.name() : schema.name() + "." + schema.overload_name();
  if (waits(name)) host_waits(name);
  const auto num_args = schema.arguments().size();
  const auto given = torch::jit::last(*stack, num_args);
  if (name == "aten::repeat_interleave.Tensor" && given[1].isNone()) host_waits(name);
  if (num_args > 1 && given[1].isOptionalTensorList())  // index, index_put_ and their like
    for (const std::optional<at::Tensor>& index : given[1].toOptionalTensorVector())
      if (index && index->defined() && (index->scalar_type() == at::kBool || index->is_cpu())) host_waits(name);
  Translation translate;
  for (size_t i = 0; i < num_args; ++i) {
    auto& arg = (*stack)[stack->size() - num_args + i];
    if (arg.isTensor()) {
      arg = translate(arg.toTensor());
    } else if (arg.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : arg.toTensorVector()) list.push_back(translate(tensor));
      arg = std::move(list);
    } else if (arg.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : arg.toOptionalTensorVector())
        list.push_back(tensor ? std::optional<at::Tensor>(translate(*tensor)) : std::nullopt);
      arg = std::move(list);
    } else if (arg.isDevice()) {
      if (arg.toDevice().is_cuda()) arg = kHost;
    } else if (arg.isGenerator() && arg.toGenerator().device().is_cuda()) {
      arg = static_cast<GpuGenerator*>(arg.toGenerator().unsafeGetGeneratorImpl())->host;
    } else if (arg.isNone() && schema.arguments()[i].type()->str() == "Generator?") {
      arg = static_cast<GpuGenerator*>(default_generator().unsafeGetGeneratorImpl())->host;
    }
  }
  const bool mixed = translate.any_gpu && translate.left_on_host.defined();
  TORCH_CHECK(!mixed || may_mix(schema.name()), "Expected all tensors to be on the same device: ", name,
              " got one of shape ", translate.left_on_host.defined() ? translate.left_on_host.sizes() : c10::IntArrayRef{},
              " on the CPU");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  translate.settle();
  const auto num_returns = schema.returns().size();
  for (size_t i = 0; i < num_returns; ++i) {
    auto& result = (*stack)[stack->size() - num_returns + i];
    if (result.isTensor()) {
      result = translate.back(result.toTensor());
    } else if (result.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : result.toTensorVector()) list.push_back(translate.back(tensor));
      result = std::move(list);
    }
  }
}

at::Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  auto meta = at::empty_strided(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                at::TensorOptions().dtype(dtype).device(at::kMeta));
  auto bytes = at::detail::computeStorageNbytes(meta.sizes(), meta.strides(), meta.element_size());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, allocator.allocate(bytes), &allocator, true);
  return tensor_of(storage, kGpuKeys, meta);
}

at::Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  auto meta = at::empty(C10_AS_INTARRAYREF_SLOW(sizes), at::TensorOptions().dtype(dtype).device(at::kMeta), format);
  return empty_strided(meta.sym_sizes(), meta.sym_strides(), dtype, {}, {}, {});
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef sizes,
                        c10::SymIntArrayRef strides) {
  TORCH_CHECK(source.device() == kGpu, "set_: a storage of ", source.device(), " for a tensor of ", kGpu);
  auto s = C10_AS_INTARRAYREF_SLOW(sizes);
  std::vector<int64_t> dense(s.size(), 1);
  for (int64_t i = static_cast<int64_t>(s.size()) - 2; i >= 0; --i) dense[i] = dense[i + 1] * std::max<int64_t>(s[i + 1], 1);
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  auto st = C10_AS_INTARRAYREF_SLOW(strides);
  impl->set_sizes_and_strides(s, strides.size() == s.size() ? st : c10::IntArrayRef(dense), offset.expect_int());
  return self;
}

at::Tensor& set_source(at::Tensor& self, at::Storage source) {
  auto length = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, source, 0, {c10::SymInt(length)}, {c10::SymInt(1)});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  auto meta = at::empty(C10_AS_INTARRAYREF_SLOW(sizes), self.options().device(at::kMeta), format);
  auto needed = at::detail::computeStorageNbytes(meta.sizes(), meta.strides(), self.element_size(), self.storage_offset());
  if (needed > self.storage().nbytes()) {
    auto data = allocator.allocate(needed);
    if (self.storage().nbytes()) std::memcpy(data.get(), self.storage().data(), self.storage().nbytes());
    auto* storage = self.storage().unsafeGetStorageImpl();
    storage->set_data_ptr(std::move(data));
    storage->set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
  return self;
}

at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  const bool crosses = self.device() != source.device();
  if (crosses && !non_blocking) host_waits("a copy between the host and the device");
  if (crosses && non_blocking && source.is_cuda()) host_waits("nothing, but the host may read this copy too early");
  auto to = self.is_cuda() ? on_host(self) : self;
  to.copy_(source.is_cuda() ? on_host(source) : source);
  return self;
}

int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double,
                         bool, std::optional<double>, bool) {
  return 0;  // plain math
}

void check_out_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  TORCH_CHECK(a.is_cuda() && b.is_cuda(), "Expected all tensors to be on the same device");
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && (dtype == a.scalar_type() || (dtype == at::kFloat &&
    (a.scalar_type() == at::kBFloat16 || a.scalar_type() == at::kHalf))), "out_dtype must be float32 for half inputs");
}

at::Tensor mm_dtype(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  check_out_dtype(a, b, dtype);
  return on_gpu(at::mm(on_host(a).to(dtype), on_host(b).to(dtype)));
}

at::Tensor host_addmm(const at::Tensor& to, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                      const at::Scalar& beta, const at::Scalar& alpha) {
  check_out_dtype(a, b, dtype);
  TORCH_CHECK(to.scalar_type() == dtype || to.scalar_type() == a.scalar_type(), "self dtype must match out_dtype or mat1");
  return at::addmm(on_host(to).to(dtype), on_host(a).to(dtype), on_host(b).to(dtype), beta, alpha);
}

at::Tensor addmm_dtype(const at::Tensor& to, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                       const at::Scalar& beta, const at::Scalar& alpha) {
  return on_gpu(host_addmm(to, a, b, dtype, beta, alpha));
}

template <at::Tensor (*call)(const at::Tensor&, int64_t, bool)>
at::Tensor softmax(const at::Tensor& self, int64_t dim, bool half_to_float) {
  TORCH_CHECK(!half_to_float || self.scalar_type() != at::kFloat, "conversion is supported for Half and BFloat16 only");
  return on_gpu(call(half_to_float ? on_host(self).to(at::kFloat) : on_host(self), dim, false));
}

at::Tensor& mm_dtype_out(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype, at::Tensor& out) {
  return out.copy_(mm_dtype(a, b, dtype));
}

// as cuBLAS adds, with no memory of the device beside `out`
at::Tensor& addmm_dtype_out(const at::Tensor& to, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                            const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  TORCH_CHECK(out.scalar_type() == dtype, "out_dtype must be that of out");
  on_host(out).copy_(host_addmm(to, a, b, dtype, beta, alpha));
  return out;
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &resize);
  m.impl("copy_", &copy);
  m.impl("mm.dtype", &mm_dtype);
  m.impl("addmm.dtype", &addmm_dtype);
  m.impl("mm.dtype_out", &mm_dtype_out);
  m.impl("addmm.dtype_out", &addmm_dtype_out);
  m.impl("_softmax", &softmax<&at::_softmax>);
  m.impl("_log_softmax", &softmax<&at::_log_softmax>);
  m.impl("_fused_sdp_choice", &fused_sdp_choice);
}

TORCH_LIBRARY(stand_in, m) {
  m.def("live() -> int", []() -> int64_t { return live_bytes; });
  m.def("peak() -> int", []() -> int64_t { return peak_bytes; });
  m.def("reset_peak() -> ()", []() { peak_bytes = live_bytes.load(); });
  m.def("seed(int seed) -> ()", [](int64_t seed) {
    auto generator = default_generator();
    generator.set_current_seed(seed);
  });
  m.def("rng_state() -> Tensor", []() { return default_generator().get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const at::Tensor& state) {
    auto generator = default_generator();
    generator.set_state(state);
  });
  m.def("limit() -> int", []() -> int64_t { return limit_bytes; });
  m.def("set_limit(int bytes) -> ()", [](int64_t bytes) { limit_bytes = bytes; });
  m.def("set_waits(int mode) -> ()", [](int64_t mode) { waits_mode = mode; });
}

struct AtStart {
  AtStart() { c10::SetAllocator(c10::DeviceType::CUDA, &allocator); }
} at_start;

}  // namespace
