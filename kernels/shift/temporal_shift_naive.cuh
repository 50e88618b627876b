// Naive temporal shift and its adjoint: read these first. Tests compare temporal_shift.cuh with them.
//
//     out[n, t, o, c] = in[n, t + offset(c), o, c]
//
// Tensors   in, out: [clips, frames, outer_size, channels, channel_numel], contiguous, out of place
// Grid      one thread per element of out
#pragma once

#include "core/naive.cuh"

namespace tsm_jit {

// T: any type of the size of an element, as bytes only move.
template <class T>
__global__ void temporal_shift_naive(T* out, const T* in, NaiveShape s) {
  const int64_t i = naive_index();
  if (i >= s.numel()) return;
  const NaiveIndex at(s, i);
  const int32_t n = s.n_segment_shifted;
  const int32_t source = at.t < n ? source_frame(at.t, s.offset[at.channel], n, s.padding) : at.t;
  out[i] = source == kNoFrame ? T{} : in[i + (source - at.t) * s.frame_numel()];
}

// grad_in[s] is the sum of grad[t] over all frames t that read frame s.
template <class Element>
__global__ void temporal_shift_backward_naive(typename Element::storage_t* grad_in,
                                              const typename Element::storage_t* grad, NaiveShape s) {
  const int64_t i = naive_index();
  if (i >= s.numel()) return;
  const NaiveIndex at(s, i);
  const int32_t n = s.n_segment_shifted;
  typename Element::acc_t sum = 0;
  for (int32_t t = 0; t < s.frames; ++t) {
    const int32_t source = t < n ? source_frame(t, s.offset[at.channel], n, s.padding) : t;
    if (source == at.t) sum += Element::to_acc(grad[i + (t - at.t) * s.frame_numel()]);
  }
  grad_in[i] = Element::from_acc(sum);
}

}  // namespace tsm_jit
