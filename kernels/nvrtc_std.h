// What the CUDA sources use of the standard library, for NVRTC, which has none: it takes this for <cstdint> and the
// others.
#ifndef TSM_JIT_NVRTC_STD_H
#define TSM_JIT_NVRTC_STD_H

// The types that they are on the host, which are part of a kernel's name.
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

// Of these only host code calls, which is read and not compiled.
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
