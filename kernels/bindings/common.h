// What all bindings share: errors, new tensors and their strides, memory layouts, the current CUDA stream.
//
// The bindings use torch's stable ABI, so one library runs on all versions from PyTorch 2.10 on. The operators'
// schemas, fakes and autograd are in Python. Public functions have validated their arguments; the checks here repeat
// what memory safety needs, for callers of torch.ops.
#pragma once

#include <torch/headeronly/util/shim_utils.h>
#if __has_include(<torch/csrc/stable/macros.h>)
#include <torch/csrc/stable/macros.h>
#endif

#include <cstdint>

// The headers below use these macros of PyTorch in each operator. They format an error with a C++ stream. Streams crash
// if libstdc++ is linked statically into this library, as some compilers do.
namespace tsm_jit {
inline void check(int32_t error, const char* action);
}
#undef TORCH_ERROR_CODE_CHECK
#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)        \
  if ((call) != 0) {                        \
    ::tsm_jit::check(1, "run an operator"); \
  }

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#ifdef TSM_JIT_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#endif

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/common.h"
#include "core/dtype.h"

namespace tsm_jit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// --- errors ----------------------------------------------------------------------------------------------------------

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error("tsm_jit: " + message); }

// Fails with PyTorch's error message. Before PyTorch 2.13 there is no message, only "PyTorch could not <action>".
inline void check(int32_t error, const char* action) {
  if (error == 0) return;
  const char* message = nullptr;
#ifdef TORCH_DYNAMIC_VERSION_CALL_2_13_0
  message = TORCH_DYNAMIC_VERSION_CALL_2_13_0(torch_exception_get_what_without_backtrace,
                                              torch::stable::detail::torch_shim_bc_const_char_ptr);
#endif
  fail(std::string("PyTorch could not ") + action + (message == nullptr ? "" : std::string(": ") + message));
}

// --- properties of tensors -------------------------------------------------------------------------------------------

inline const void* data(const OptionalTensor& x) { return x ? x->const_data_ptr() : nullptr; }
inline void* mutable_data(const OptionalTensor& x) { return x ? x->mutable_data_ptr() : nullptr; }

// The element type in which kernels compute with values of a type. Complex numbers are added as pairs.
inline DType to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Float:
    case ScalarType::ComplexFloat: return DType::float32;
    case ScalarType::Double:
    case ScalarType::ComplexDouble: return DType::float64;
    default:
      fail("grad must be of 16-bit, 32-bit or 64-bit floating point or complex: the adjoint of this padding adds");
  }
}

// The type of sums and of the mean, variance, weight and bias of a norm: float64 for float64, else float32.
inline ScalarType acc_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_type_and_device(const Tensor& x, const Tensor& y) {
  return x.scalar_type() == y.scalar_type() && x.get_device_index() == y.get_device_index();
}

// Is x a contiguous tensor of `numel` values of acc_type(like), on its device?
inline bool is_acc_tensor(const Tensor& x, const Tensor& like, int64_t numel) {
  return x.is_contiguous() && x.scalar_type() == acc_type(like) && x.numel() == numel &&
         x.get_device_index() == like.get_device_index();
}

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

// Do the strides of x leave no gap and share no element, so that a new tensor may have the same?
inline bool is_dense(const Tensor& x) {
  int64_t expected = 1;  // stride of the next dimension, from the innermost one on
  uint64_t seen = 0;
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t dim = x.dim();
  if (dim > 64) return false;
  for (int64_t n_seen = 0; n_seen < dim; ++n_seen) {
    int64_t d = 0;
    while (d < dim && ((seen >> d & 1) != 0 || (sizes[d] != 1 && strides[d] != expected))) ++d;
    if (d == dim) return false;
    seen |= uint64_t{1} << d;
    expected *= sizes[d];
  }
  return true;
}

// The strides that torch.empty gives a contiguous or channels_last tensor, also an empty one.
inline std::vector<int64_t> strides_for(const std::vector<int64_t>& sizes, bool channels_last) {
  channels_last = channels_last && sizes.size() > 1;
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  const auto next = [&](size_t d) {
    strides[d] = stride;
    stride *= channels_last ? sizes[d] : std::max<int64_t>(sizes[d], 1);
  };
  if (channels_last) next(1);
  for (size_t d = sizes.size(); d-- > 0;) {
    if (d != 1 || !channels_last) next(d);
  }
  return strides;
}

// Is x contiguous or channels_last, and of these sizes?
inline bool has_layout(const Tensor& x, const std::vector<int64_t>& sizes, bool channels_last) {
  const std::vector<int64_t> strides = strides_for(sizes, channels_last);
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; fits && d < sizes.size(); ++d) {
    fits = x.size(d) == sizes[d] && (sizes[d] == 1 || x.stride(d) == strides[d]);
  }
  return fits;
}

// --- new tensors -----------------------------------------------------------------------------------------------------

inline int32_t dtype_code(const Tensor& x) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  return code;
}

inline int32_t dtype_code(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

// A new tensor on the device of `like`. torch.empty is looked up by name at every call, which takes longer than a small
// shift.
inline Tensor new_strided(const Tensor& like, int32_t dtype, int64_t dim, const int64_t* sizes,
                          const int64_t* strides) {
  AtenTensorHandle out = nullptr;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  check(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, like.get_device_index(), &out),
        "make a tensor");
  return Tensor(out);
}

// Asks the system for huge pages. The C library maps large blocks anew for each tensor. At their first write the system
// provides the pages, which takes four times as long as a shift if they are small.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kMappedAnew = int64_t{32} << 20;  // glibc: DEFAULT_MMAP_THRESHOLD_MAX
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  if (bytes < kMappedAnew) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data), begin = ceil_div(address, kPage) * kPage;
  madvise(reinterpret_cast<void*>(begin), (address + bytes) / kPage * kPage - begin, MADV_HUGEPAGE);
#endif
}

// torch.empty_like.
inline Tensor new_like(const Tensor& x) {
  if (x.numel() == 0 || !is_dense(x)) return torch::stable::empty_like(x);
  Tensor out = new_strided(x, dtype_code(x), x.dim(), x.sizes().data(), x.strides().data());
  if (x.is_cpu()) advise_huge_pages(out.mutable_data_ptr(), x.numel() * x.element_size());
  return out;
}

inline Tensor new_contiguous(const Tensor& like, ScalarType type, const std::vector<int64_t>& sizes) {
  return new_strided(like, dtype_code(type), sizes.size(), sizes.data(), strides_for(sizes, false).data());
}

// A new tensor of the dtype and memory format of x.
inline Tensor new_with_sizes(const Tensor& x, const std::vector<int64_t>& sizes) {
  const std::vector<int64_t> strides = strides_for(sizes, !x.is_contiguous());
  return new_strided(x, dtype_code(x), sizes.size(), sizes.data(), strides.data());
}

inline Tensor new_empty(const Tensor& x) { return new_with_sizes(x, {0}); }

// x, or a copy of it that is contiguous or channels_last.
inline Tensor with_layout(const Tensor& x, bool channels_last) {
  const std::vector<int64_t> sizes = sizes_of(x);
  if (x.numel() == 0 || has_layout(x, sizes, channels_last)) return x;
  const std::vector<int64_t> strides = strides_for(sizes, channels_last);
  Tensor copy = new_strided(x, dtype_code(x), sizes.size(), sizes.data(), strides.data());
  torch::stable::copy_(copy, x);
  return copy;
}

// x, or a copy of it in the memory format of `like`.
inline OptionalTensor with_layout_of(const Tensor& like, const OptionalTensor& x) {
  return x ? OptionalTensor(with_layout(*x, !like.is_contiguous())) : x;
}

// The address of row k of a contiguous [rows, channels].
inline const void* row_data(const Tensor& rows, int64_t k) {
  return static_cast<const char*>(rows.const_data_ptr()) + k * rows.size(1) * rows.element_size();
}

// Row k of a contiguous [rows, channels]: a view, or a copy if the view is not aligned to 16 bytes. Compilers expect
// this alignment of results.
inline Tensor row_of(const Tensor& rows, int64_t k) {
  const int64_t channels = rows.size(1), stride = 1;
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(rows.get(), 1, &channels, &stride, k * channels, &out));
  const Tensor row(out);
  return channels * rows.element_size() % 16 == 0 ? row : torch::stable::clone(row);
}

// --- launches --------------------------------------------------------------------------------------------------------

constexpr int64_t kBytesPerThread = 64 * 1024;  // less work is not worth waking a CPU thread

// Runs run(first_task, last_task) on CPU threads.
template <class Run>
void run_on_cpu(int64_t tasks, int64_t bytes_per_task, Run run) {
  const int64_t grain = std::max<int64_t>(1, kBytesPerThread / std::max<int64_t>(1, bytes_per_task));
  torch::stable::parallel_for(0, tasks, grain, run);
}

#ifdef TSM_JIT_CUDA
// Calls launch(stream) with the current stream of the device of x. Fails if it returns an error message.
template <class Launch>
void run_on_cuda(const Tensor& x, Launch launch) {
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = launch(stream);
  if (error != nullptr) fail(std::string("the launch of a kernel failed: ") + error);
}
#endif

}  // namespace tsm_jit
