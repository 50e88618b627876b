// The naive kernels as C functions, for tests/kernels/test_naive_kernels.py. All pointers are on the GPU.
// Launches are on the default stream.
#include "residual/add_relu_backward_naive.cuh"
#include "residual/batch_norm_stats_naive.cuh"
#include "residual/norm_add_relu_naive.cuh"
#include "residual/norm_grads_naive.cuh"
#include "residual/norm_relu_backward_naive.cuh"
#include "residual/norm_relu_max_pool_naive.cuh"
#include "shift/temporal_shift_naive.cuh"

using namespace tsm_jit;

// Not in an unnamed namespace: nvcc would then not export the functions that take these types.
namespace naive {

// As ctypes passes them; NaiveStream and NaiveNorm of any element type.
struct Stream {
  void *data, *boundary;
  int32_t is_shifted;

  template <class Element>
  NaiveStream<Element> of() const {
    using T = typename Element::storage_t;
    return {static_cast<T*>(data), static_cast<T*>(boundary), is_shifted != 0};
  }
};

struct Norm4 {
  const void *mean, *variance, *weight, *bias;
  double epsilon;

  template <class acc_t>
  NaiveNorm<acc_t> of() const {
    return {static_cast<const acc_t*>(mean), static_cast<const acc_t*>(variance), static_cast<const acc_t*>(weight),
            static_cast<const acc_t*>(bias), epsilon};
  }
};

template <class... Parameters, class... Arguments>
const char* run(void (*kernel)(Parameters...), int64_t threads, const Arguments&... arguments) {
  return launch(kernel, dim3(static_cast<uint32_t>((threads + 127) / 128)), dim3(128), 0, nullptr, arguments...);
}

// Returns f(element of `dtype`).
template <class F>
const char* with_dtype(int32_t dtype, F f) {
  return dispatch_dtype(static_cast<DType>(dtype), f);
}

}  // namespace naive

using namespace naive;

// Each returns null or an error message. `dtype` is DType.
extern "C" {

const char* temporal_shift(int32_t element_bytes, void* out, const void* in, NaiveShape s) {
  const auto start = [&](auto value) {
    using T = decltype(value);
    return run(temporal_shift_naive<T>, s.numel(), static_cast<T*>(out), static_cast<const T*>(in), s);
  };
  switch (element_bytes) {
    case 1: return start(uint8_t{});
    case 2: return start(uint16_t{});
    case 4: return start(uint32_t{});
    case 8: return start(uint64_t{});
    default: return start(uint4{});
  }
}

const char* temporal_shift_backward(int32_t dtype, void* grad_in, const void* grad, NaiveShape s) {
  return with_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename Element::storage_t;
    return run(temporal_shift_backward_naive<Element>, s.numel(), static_cast<T*>(grad_in), static_cast<const T*>(grad),
               s);
  });
}

const char* norm_add_relu(int32_t dtype, Stream out, Stream z, Norm4 z_norm, Stream identity, Norm4 identity_norm,
                          NaiveShape s, int32_t relu) {
  return with_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    using acc_t = typename Element::acc_t;
    return run(norm_add_relu_naive<Element>, s.numel(), out.of<Element>(), z.of<Element>(), z_norm.of<acc_t>(),
               identity.of<Element>(), identity_norm.of<acc_t>(), s, relu != 0);
  });
}

const char* norm_relu_max_pool(int32_t dtype, Stream out, const void* z, Norm4 norm, NaiveShape s, int32_t height,
                               int32_t width) {
  return with_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename Element::storage_t;
    return run(norm_relu_max_pool_naive<Element>, s.numel(), out.of<Element>(), static_cast<const T*>(z),
               norm.of<typename Element::acc_t>(), s, height, width);
  });
}

const char* add_relu_backward(int32_t dtype, Stream grad, Stream grad_shifted, Stream out, Stream grad_a, Stream grad_b,
                              NaiveShape s) {
  return with_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    return run(add_relu_backward_naive<Element>, s.numel(), grad.of<Element>(), grad_shifted.of<Element>(),
               out.of<Element>(), grad_a.of<Element>(), grad_b.of<Element>(), s);
  });
}

const char* norm_relu_backward(int32_t dtype, void* out, void* masked, const void* grad, const void* z, Norm4 norm,
                               Norm4 batch_norm, int64_t rows, int64_t channels) {
  return with_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename Element::storage_t;
    using acc_t = typename Element::acc_t;
    return run(norm_relu_backward_naive<Element>, rows * channels, static_cast<T*>(out), static_cast<T*>(masked),
               static_cast<const T*>(grad), static_cast<const T*>(z), norm.of<acc_t>(), batch_norm.of<acc_t>(), rows,
               channels);
  });
}

const char* batch_norm_stats(int32_t dtype, double* mean, double* variance, const void* x, int64_t rows,
                             int64_t channels) {
  return with_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename Element::storage_t;
    return run(batch_norm_stats_naive<Element>, channels, mean, variance, static_cast<const T*>(x), rows, channels);
  });
}

const char* channel_sums(int32_t dtype, double* sums, const void* grad, const void* normed, const void* mean,
                         int64_t rows, int64_t channels) {
  return with_dtype(dtype, [&](auto element) {
    using Element = decltype(element);
    using T = typename Element::storage_t;
    using acc_t = typename Element::acc_t;
    return run(channel_sums_naive<Element>, channels, sums, static_cast<const T*>(grad), static_cast<const T*>(normed),
               static_cast<const acc_t*>(mean), rows, channels);
  });
}

// `sums` is [1, 1 + kNorms, channels] of float64; the others are float64, too.
const char* norm_grads(double* grads, const double* sums, const double* variance, const double* weight, double epsilon,
                       int64_t count, int64_t channels) {
  return run(norm_grads_naive<double>, channels, grads, sums, variance, weight, epsilon, 0, 1, count, channels);
}

}  // extern "C"
