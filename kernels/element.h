// The element types an adjoint may add: how each is stored, and the type it is added in. The same bits on CPU and CUDA,
// but for the payload of a NaN that a sum makes.
#pragma once

#include <cstring>

#include "temporal_shift.h"

namespace tsm_jit {

template <class To, class From>
TSM_HOST_DEVICE inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as changes the type, never the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// float and double are added as they are.
template <class T>
struct Native {
  using Stored = T;
  using Wide = T;
  TSM_HOST_DEVICE static T widen(T x) { return x; }
  TSM_HOST_DEVICE static T narrow(T x) { return x; }
};

// The 16-bit types are added in float and rounded once, to nearest even.
struct BFloat16 {
  using Stored = uint16_t;
  using Wide = float;
  TSM_HOST_DEVICE static float widen(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }
  TSM_HOST_DEVICE static uint16_t narrow(float x) {
#if __CUDA_ARCH__ >= 800
    uint16_t narrowed;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed) : "f"(x));
    return narrowed;
#endif
    const uint32_t bits = bits_as<uint32_t>(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // NaN
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  // Two as they lie in memory.
  TSM_HOST_DEVICE static uint32_t narrow(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
    return narrow(low) | static_cast<uint32_t>(narrow(high)) << 16;
  }
};

struct Float16 {
  using Stored = uint16_t;
  using Wide = float;
  TSM_HOST_DEVICE static float widen(uint16_t x) {
#if defined(__CUDA_ARCH__)
    float widened;
    asm("cvt.f32.f16 %0, %1;" : "=f"(widened) : "h"(x));
    return widened;
#endif
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = (x >> 10) & 31, mantissa = x & 0x3ff;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) return bits_as<float>(sign | bits_as<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
    return bits_as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  }
  TSM_HOST_DEVICE static uint16_t narrow(float x) {
#if defined(__CUDA_ARCH__)
    uint16_t narrowed;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed) : "f"(x));
    return narrowed;
#endif
    const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;                      // 65520 and more round to infinity
    } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5, whose last bit is 2^-24, rounds it
      half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
    } else {
      half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
  }
  TSM_HOST_DEVICE static uint32_t narrow(float low, float high) {
#if __CUDA_ARCH__ >= 800
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
    return narrow(low) | static_cast<uint32_t>(narrow(high)) << 16;
  }
};

}  // namespace tsm_jit
