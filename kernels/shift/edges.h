// The edges of clips whose frames are split over GPUs: messages that one GPU writes into the memory of another.
//
// For the messages of one rank to another, the receiver has a mailbox of two slots and a signal. Each of the two counts
// these messages in its own memory:
//
//     send       message k = counter + 1: writes slot k % 2 of the receiver, then sets its signal to k
//     receive    message k = counter + 1: waits until the signal is at least k, then reads slot k % 2
//
// The counters are in device memory, so replays of CUDA graphs count, too. tsm_jit/ops/exchange.py says why two slots
// are enough.
#pragma once

#include <cstdint>

namespace tsm_jit {

constexpr int32_t kEdgeDims = 8;

// A part of a message: a box of a tensor, whose bytes lie in the message one after another. All distances are in bytes.
// A row of a tensor of int64 in Python. Each message has at least one part, which may be empty.
struct EdgePart {
  int64_t mailbox, signal, counter;  // addresses
  int64_t n_parts;                   // of this message
  int64_t message_begin, tensor_begin, bytes;
  int64_t size[kEdgeDims], stride[kEdgeDims];  // the outermost first; the last dimension is a contiguous run of bytes
};

// Sends or receives messages of the tensor, on `stream` (a cudaStream_t) of the current device. Waits `milliseconds`
// for a signal, then stops with an error of CUDA. Returns null or an error message.
const char* move_edges_cuda(const EdgePart* parts, int64_t n_parts, void* tensor, bool sends, int64_t slot_bytes,
                            int64_t milliseconds, void* stream);

}  // namespace tsm_jit
