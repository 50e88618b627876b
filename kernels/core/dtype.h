// Element types: how each is stored, the type in which it is added, and the dispatch on a runtime dtype.
//
// CPU and CUDA produce the same bits, except for the payload of a NaN that a sum produces.
#pragma once

#include <cstring>

#include "core/common.h"

namespace tsm_jit {

// `none`: the kernel only moves bytes, so the element type does not matter.
enum class DType : int32_t { none, float16, bfloat16, float32, float64 };

template <class To, class From>
TSM_HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes the type, never the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Each element type has
//   storage_t           how one element lies in memory
//   acc_t               the type of sums and of all arithmetic
//   to_acc(storage_t)   exact
//   from_acc(acc_t)     rounds once, to nearest even
//   from_acc(low, high) two 16-bit elements as they lie in memory

// float and double are added as they are.
template <class T>
struct Native {
  using storage_t = T;
  using acc_t = T;
  TSM_HOST_DEVICE static T to_acc(T x) { return x; }
  TSM_HOST_DEVICE static T from_acc(T x) { return x; }
};
using Float32 = Native<float>;
using Float64 = Native<double>;

struct BFloat16 {
  using storage_t = uint16_t;
  using acc_t = float;
  TSM_HOST_DEVICE static float to_acc(uint16_t x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }
  TSM_HOST_DEVICE static uint16_t from_acc(float x) {
#if __CUDA_ARCH__ >= 800
    uint16_t rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return rounded;
#endif
    const uint32_t bits = bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  TSM_HOST_DEVICE static uint32_t from_acc(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
    return from_acc(low) | static_cast<uint32_t>(from_acc(high)) << 16;
  }
};

struct Float16 {
  using storage_t = uint16_t;
  using acc_t = float;
  TSM_HOST_DEVICE static float to_acc(uint16_t x) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x));
    return value;
#endif
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 0x3ff;
    if (exponent == 31) return bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
    return bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  }
  TSM_HOST_DEVICE static uint16_t from_acc(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
    return rounded;
#endif
    const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;                      // 65520 and more round to infinity
    } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5, whose last bit is 2^-24, rounds it
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    } else {
      half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
  }
  TSM_HOST_DEVICE static uint32_t from_acc(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
    return from_acc(low) | static_cast<uint32_t>(from_acc(high)) << 16;
  }
};

inline int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::none: return 1;
    case DType::float16:
    case DType::bfloat16: return 2;
    case DType::float32: return 4;
    default: return 8;
  }
}

// Returns f(Float16{}), f(BFloat16{}), f(Float32{}) or f(Float64{}). `dtype` must not be `none`.
template <class F>
auto dispatch_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float16: return f(Float16{});
    case DType::bfloat16: return f(BFloat16{});
    case DType::float32: return f(Float32{});
    default: return f(Float64{});
  }
}

}  // namespace tsm_jit
