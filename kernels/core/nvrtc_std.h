// NVRTC has no C++ standard library. This file defines the parts that the CUDA sources use. The build gives it to NVRTC
// for <cstdint>, <algorithm> and the other headers.
#ifndef TSM_JIT_NVRTC_STD_H
#define TSM_JIT_NVRTC_STD_H

// The same types as on the host, as they are part of a kernel's mangled name.
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

namespace std {

template <bool kFirst, class First, class Second>
struct conditional {
  using type = First;
};
template <class First, class Second>
struct conditional<false, First, Second> {
  using type = Second;
};
template <bool kFirst, class First, class Second>
using conditional_t = typename conditional<kFirst, First, Second>::type;

// Called by host code only, which NVRTC reads but does not compile.
int abs(int);
template <class T>
T min(T, T);
template <class T>
T min(initializer_list<T>);
template <class T>
T max(T, T);
template <class T>
T clamp(T, T, T);

}  // namespace std

#endif
