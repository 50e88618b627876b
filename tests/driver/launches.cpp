// Launches of every kernel, in every way that the host code chooses between them; nothing is computed.
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "driver.h"
#include "residual_shift.h"
#include "temporal_shift.h"

using namespace tsm_jit;

namespace {

void* const kStream = reinterpret_cast<void*>(7);

// Addresses, which nothing reads, of what is aligned to `unit` bytes and no more.
void* address(int64_t unit) { return reinterpret_cast<void*>((int64_t{1} << 20) + unit); }

const char* shift(Sum sum, int64_t unit, int64_t frames) {
  const Group groups[] = {{0, 64 * unit, 1}, {64 * unit, 256 * unit, 0}};
  Shift s{};
  s.clips = 1;
  s.frames = frames;
  s.outer = 1;
  s.run = 256 * unit;
  s.n_segment_shifted = static_cast<int32_t>(frames);
  s.padding = sum == Sum::none ? Padding::circular : Padding::keep;
  s.sum = sum;
  s.groups = groups;
  s.n_groups = 2;
  s.src = s.dst = {frames * s.run, s.run, s.run};
  void* const data = address(unit);
  return shift_cuda(s, data, data, kStream);
}

const char* residual(Sum type, int64_t unit, int32_t norms) {
  const Group groups[] = {{0, 1024, 1}};
  const int64_t unread_begin[] = {0};
  Residual r{};
  r.shift.clips = 1;
  r.shift.frames = 4;
  r.shift.outer = 9;
  r.shift.run = 1024;
  r.shift.n_segment_shifted = 4;
  r.shift.groups = groups;
  r.shift.n_groups = 1;
  r.type = type;
  r.inner = 1;
  r.unread_begin = unread_begin;
  r.unread_run = 1024;
  ResidualForward f{};
  f.z = f.out = address(unit);
  if (const char* error = residual_forward_cuda(r, f, kStream)) return error;
  f.identity = address(unit);
  if (const char* error = residual_forward_cuda(r, f, kStream)) return error;
  f.out_is_shifted = true;  // in place of z, so in order
  if (const char* error = residual_forward_cuda(r, f, kStream)) return error;
  ResidualPool p{};
  p.z = p.plain = address(unit);
  p.height = p.width = 6;
  if (const char* error = residual_pool_cuda(r, p, kStream)) return error;
  ResidualBackward b{};
  b.out = b.grad = address(unit);
  for (int32_t n = 0; n < norms; ++n) b.normed[n] = address(unit);
  if (const char* error = residual_backward_cuda(r, b, kStream)) return error;
  ReluOfNormBackward relu{};
  relu.grad = relu.z = relu.out = address(unit);
  relu.slices = 2;
  if (const char* error = relu_of_norm_sums_cuda(r, relu, kStream)) return error;
  if (const char* error = relu_of_norm_backward_cuda(r, relu, kStream)) return error;
  ChannelStatistics c{};
  c.x = address(unit);
  c.slices = 2;
  if (const char* error = channel_statistics_cuda(r, c, kStream)) return error;
  return norm_gradients_cuda(type, 1024, NormGradients{}, kStream);
}

}  // namespace

extern "C" {

const char* use(int32_t device) { return use_device(device); }

const char* one() { return shift(Sum::none, 16, 8); }

const char* all() {
  const std::pair<Sum, std::vector<int64_t>> units[] = {{Sum::none, {1, 2, 4, 8, 16}},
                                                        {Sum::float16, {2, 16}},
                                                        {Sum::bfloat16, {2, 16}},
                                                        {Sum::float32, {4, 16}},
                                                        {Sum::float64, {8, 16}}};
  for (const auto& [type, widths] : units) {
    for (const int64_t unit : widths) {
      for (const int64_t frames : {8, 4000}) {  // the latter have no room in shared memory
        if (const char* error = shift(type, unit, frames)) return error;
      }
      for (int32_t norms = 0; norms <= kNorms && type != Sum::none; ++norms) {
        if (const char* error = residual(type, unit, norms)) return error;
      }
    }
  }
  return nullptr;
}

// Threads that begin at once, each with a context to get. How many had no error.
int at_once(int count) {
  std::atomic<int> waiting{count}, right{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&] {
      for (--waiting; waiting > 0;) {
      }
      right += use_device(0) == nullptr && one() == nullptr;
    });
  }
  for (std::thread& thread : threads) thread.join();
  return right;
}

}  // extern "C"
