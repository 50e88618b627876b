// Random residual blocks by the CUDA kernels, run on the CPU, against the CPU kernels and the naive kernels: the same
// numbers everywhere, and close ones where they are added in another order. Arguments: seed, cases.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "compare.h"
#include "residual/add_relu_backward.h"
#include "residual/add_relu_backward_naive.cuh"
#include "residual/batch_norm_stats.h"
#include "residual/batch_norm_stats_naive.cuh"
#include "residual/norm_add_relu.h"
#include "residual/norm_add_relu_naive.cuh"
#include "residual/norm_grads.h"
#include "residual/norm_grads_naive.cuh"
#include "residual/norm_relu_backward.h"
#include "residual/norm_relu_backward_naive.cuh"
#include "residual/norm_relu_max_pool.h"
#include "residual/norm_relu_max_pool_naive.cuh"

using namespace tsm_jit;

namespace {

// Integers up to kLargest make every sum in these tests exact, in any order and in every dtype. A gradient is a sum of
// at most 2 * 21 of them, and bfloat16 holds integers up to 256.
constexpr int64_t kLargest = 5, kMaxFrames = 20;

// What an output holds before a kernel writes it: by each of them. So an element that a kernel does
// not write differs.
constexpr int kCpuPoison = 0x5a, kCudaPoison = 0xa5, kNaivePoison = 0x99;

// Two NaN are the same, and so are 0 and -0: the backward on the CPU adds to 0, so that -0 becomes 0.
bool same(double a, double b) { return a == b || (a != a && b != b); }

template <class Element>
class Case {
  using storage_t = typename Element::storage_t;
  using acc_t = typename Element::acc_t;

  // On the heap with the exact size, so that AddressSanitizer finds every access outside of it. Empty: null.
  struct Tensor {
    std::vector<storage_t> numbers;
    int64_t skipped = 0;  // before the first one, which then does not lie at 16 bytes
    storage_t* data() { return numbers.empty() ? nullptr : numbers.data() + skipped; }
    bool operator==(const Tensor& other) const {
      const auto equal = [](storage_t a, storage_t b) { return same(Element::to_acc(a), Element::to_acc(b)); };
      return std::equal(numbers.begin() + skipped, numbers.end(), other.numbers.begin() + other.skipped,
                        other.numbers.end(), equal);
    }
    bool has_bytes_of(const Tensor& other) const {
      return numbers.empty() ||
             std::memcmp(numbers.data(), other.numbers.data(), numbers.size() * sizeof(storage_t)) == 0;
    }
  };

 public:
  explicit Case(DType dtype) {
    Shift& s = r_.shift;
    const bool channels_last = one_in(2), aligned = one_in(2);
    r_.dtype = dtype;
    r_.channel_numel = channels_last ? 1 : between(1, 9);
    s.clips = between(1, 3);
    s.frames = between(1, one_in(6) ? kMaxFrames : 6);
    s.outer_size = channels_last ? between(1, one_in(6) ? 70 : 9) : 1;
    s.n_segment_shifted = static_cast<int32_t>(one_in(3) ? between(1, s.frames) : s.frames);
    s.padding = static_cast<Padding>(between(0, 3));
    const int64_t multiple = aligned ? 16 / static_cast<int64_t>(sizeof(storage_t)) : 1;
    const int64_t n_groups = one_in(10) ? between(1, 32) : between(1, 5), widest = one_in(10) ? 30 : 3;
    while (static_cast<int64_t>(groups_.size()) < n_groups) {
      channels_ += between(1, widest) * multiple;
      const int64_t furthest = one_in(4) ? s.n_segment_shifted : std::min(s.n_segment_shifted, 3);
      int64_t offset = one_in(4) ? 0 : between(-furthest, furthest);
      if (s.padding == Padding::circular) offset %= s.n_segment_shifted;
      const int64_t end = channels_ * r_.channel_numel * static_cast<int64_t>(sizeof(storage_t));
      groups_.push_back({s.inner_bytes, end, static_cast<int32_t>(offset)});
      boundary_begin_.push_back(r_.boundary_inner_bytes);
      if (s.padding != Padding::circular) r_.boundary_inner_bytes += std::abs(offset) * (end - s.inner_bytes);
      s.inner_bytes = end;
    }
    s.groups = groups_.data();
    s.n_groups = static_cast<int32_t>(groups_.size());
    r_.boundary_begin = boundary_begin_.data();
    for (size_t g = 0; g < groups_.size(); ++g) {
      const int64_t group = groups_[g].end - groups_[g].begin, channel = r_.channel_numel * sizeof(storage_t);
      for (int64_t begin = 0; begin < group; begin += channel) {
        naive_offset_.push_back(groups_[g].offset);
        naive_begin_.push_back((boundary_begin_[g] + begin) / static_cast<int64_t>(sizeof(storage_t)));
        naive_frame_.push_back(group / static_cast<int64_t>(sizeof(storage_t)));
      }
    }
  }

  bool is_right() {
    return passes("forward", forward()) && passes("backward", backward()) &&
           (r_.channel_numel != 1 || (passes("pool", pool()) && passes("statistics", statistics()) &&
                                      passes("backward of a ReLU", backward_of_relu())));
  }

 private:
  bool passes(const char* what, bool right) const {
    const Shift& s = r_.shift;
    if (right) return true;
    std::printf("%s of type %d, %lld clips of %lld frames (%d shifted), outer %lld, inner %lld, padding %d:", what,
                (int)r_.dtype, (long long)s.clips, (long long)s.frames, s.n_segment_shifted, (long long)s.outer_size,
                (long long)r_.channel_numel, (int)s.padding);
    for (const ChannelGroup& group : groups_)
      std::printf(" %lld: %d", (long long)(group.end - group.begin), group.offset);
    std::printf("\n");
    return false;
  }

  int64_t rows() const { return r_.shift.clips * r_.shift.frames * r_.shift.outer_size; }

  Tensor of_bytes(int64_t bytes) const {
    const int64_t size = bytes / static_cast<int64_t>(sizeof(storage_t)), skipped = size > 0 && one_in(20) ? 1 : 0;
    return {std::vector<storage_t>(size + skipped), skipped};
  }
  Tensor activations() const { return of_bytes(rows() * r_.shift.inner_bytes); }
  Tensor boundary() const { return of_bytes(r_.shift.clips * r_.shift.outer_size * r_.boundary_inner_bytes); }
  static Tensor poisoned(Tensor tensor, int poison) {
    for (storage_t& number : tensor.numbers) std::memset(&number, poison, sizeof number);
    return tensor;
  }
  Tensor numbers(Tensor tensor, bool integers, bool special) const {
    constexpr auto infinity = std::numeric_limits<acc_t>::infinity();
    constexpr acc_t specials[] = {std::numeric_limits<acc_t>::quiet_NaN(), infinity, -infinity, -acc_t{0}};
    for (storage_t& number : tensor.numbers) {
      const acc_t value = integers ? static_cast<acc_t>(between(-kLargest, kLargest)) : any();
      number = Element::from_acc(special && one_in(50) ? specials[between(0, 3)] : value);
    }
    return tensor;
  }
  static acc_t any() { return static_cast<acc_t>(between(-4000, 4000)) / 1003; }

  using Parts = std::vector<std::vector<uint8_t>>;

  // Sets `norm` to a random norm, or to none. `norm` points into the returned arrays.
  Parts random_norm(Norm& norm) const {
    if (one_in(2)) return {};
    norm.is_float32 = one_in(2);
    norm.epsilon = 1e-5;
    const size_t size = norm.is_float32 ? sizeof(float) : sizeof(storage_t);
    Parts parts(4, std::vector<uint8_t>(channels_ * size));
    for (std::vector<uint8_t>& part : parts) {
      for (int64_t c = 0; c < channels_; ++c) {
        const acc_t value = &part == &parts[1] ? std::abs(any()) : any();  // a variance
        const auto as_float = static_cast<float>(value);
        const storage_t stored = Element::from_acc(value);
        std::memcpy(&part[c * size], norm.is_float32 ? static_cast<const void*>(&as_float) : &stored, size);
      }
    }
    norm.mean = parts[0].data();
    norm.variance = parts[1].data();
    norm.weight = parts[2].data();
    norm.bias = parts[3].data();
    return parts;
  }

  NaiveShape naive_shape() const {
    const Shift& s = r_.shift;
    return {s.clips,
            s.frames,
            s.outer_size,
            channels_,
            r_.channel_numel,
            naive_offset_.data(),
            s.n_segment_shifted,
            s.padding,
            naive_begin_.data(),
            naive_frame_.data(),
            r_.boundary_inner_bytes / static_cast<int64_t>(sizeof(storage_t))};
  }
  static NaiveStream<Element> unshifted(Tensor& x) { return {x.data(), nullptr, false}; }
  static NaiveStream<Element> shifted(Tensor& x, Tensor& boundary) { return {x.data(), boundary.data(), true}; }

  // The parts of a norm as numbers of acc_t.
  struct NaiveParts {
    std::vector<acc_t> parts[4];
    double epsilon = 0;

    NaiveParts(const Norm& norm, const Parts& bytes) : epsilon(norm.epsilon) {
      for (size_t i = 0; i < bytes.size(); ++i) {
        const size_t size = norm.is_float32 ? sizeof(float) : sizeof(storage_t), count = bytes[i].size() / size;
        for (size_t c = 0; c < count; ++c) {
          float as_float;
          storage_t stored;
          std::memcpy(norm.is_float32 ? static_cast<void*>(&as_float) : &stored, &bytes[i][c * size], size);
          parts[i].push_back(norm.is_float32 ? as_float : Element::to_acc(stored));
        }
      }
    }
    NaiveNorm<acc_t> norm() const {
      if (parts[0].empty()) return {};
      return {parts[0].data(), parts[1].data(), parts[2].data(), parts[3].data(), epsilon};
    }
  };

  bool forward() {
    NormAddRelu f{};
    const bool special = one_in(4), adds = !one_in(6);
    f.identity_is_shifted = adds && one_in(2);
    f.out_is_shifted = adds && one_in(2);
    f.relu = !one_in(3);
    Tensor z = numbers(activations(), false, special);
    Tensor identity = adds ? numbers(activations(), false, special) : Tensor{};
    Tensor boundary_in = f.identity_is_shifted ? numbers(boundary(), false, special) : Tensor{};
    const Parts z_parts = random_norm(f.z_norm);
    const Parts identity_parts = adds && !f.identity_is_shifted ? random_norm(f.identity_norm) : Parts{};
    const bool into_z = !(f.out_is_shifted && r_.shift.padding == Padding::circular) && one_in(3);
    const bool into_identity = !into_z && adds && f.out_is_shifted == f.identity_is_shifted && one_in(3);
    const Tensor new_out = activations(), new_boundary = f.out_is_shifted ? boundary() : Tensor{};
    Tensor plain;
    if (adds && f.out_is_shifted && !into_z && r_.channel_numel == 1 && one_in(2)) {
      f.step = static_cast<int32_t>(between(1, 3));
      do f.width = static_cast<int32_t>(between(1, r_.shift.outer_size));
      while (r_.shift.outer_size % f.width != 0);
      const int64_t pixels = rounded_up(f.width, f.step) * rounded_up(r_.shift.outer_size / f.width, f.step);
      plain = of_bytes(r_.shift.clips * r_.shift.frames * pixels * r_.shift.inner_bytes);
    }

    const auto outputs = [&](int poison, bool on_cuda, auto kernel) {
      const bool in_z = into_z && (on_cuda || !f.out_is_shifted);  // the CPU shifts no z in place
      Tensor out = in_z ? z : into_identity ? identity : poisoned(new_out, poison);
      Tensor boundary_out = into_identity ? boundary_in : poisoned(new_boundary, poison);
      f.z = in_z ? out.data() : z.data();
      f.identity = into_identity ? out.data() : identity.data();
      f.boundary = into_identity ? boundary_out.data() : boundary_in.data();
      f.out = out.data();
      f.boundary_out = boundary_out.data();
      Tensor plain_out = poisoned(plain, poison);
      f.unshifted = plain_out.data();
      kernel();
      return std::vector<Tensor>{out, boundary_out, plain_out};
    };
    const auto expected =
        outputs(kCpuPoison, false, [&] { norm_add_relu_cpu(r_, f, 0, r_.shift.clips * r_.shift.frames); });
    const Tensor old[] = {z, identity, boundary_in};
    const Parts old_z_parts = z_parts, old_identity_parts = identity_parts;
    const char* error = nullptr;
    const auto actual = outputs(kCudaPoison, true, [&] { error = norm_add_relu_cuda(r_, f, nullptr); });
    Tensor out = poisoned(activations(), kNaivePoison), boundary_out = poisoned(new_boundary, kNaivePoison);
    run_naive(norm_add_relu_naive<Element>, naive_shape().numel(),
              f.out_is_shifted ? shifted(out, boundary_out) : unshifted(out), unshifted(z),
              NaiveParts(f.z_norm, z_parts).norm(),
              f.identity_is_shifted ? shifted(identity, boundary_in) : unshifted(identity),
              NaiveParts(f.identity_norm, identity_parts).norm(), naive_shape(), f.relu);
    if (!(out == expected[0]) || !(boundary_out == expected[1])) return false;
    return error == nullptr && actual == expected && z.has_bytes_of(old[0]) && identity.has_bytes_of(old[1]) &&
           boundary_in.has_bytes_of(old[2]) && z_parts == old_z_parts && identity_parts == old_identity_parts;
  }

  static int64_t rounded_up(int64_t size, int64_t step) { return (size + step - 1) / step; }

  bool pool() {
    NormReluMaxPool p{};
    p.height = static_cast<int32_t>(between(1, 7));
    p.width = static_cast<int32_t>(between(1, 7));
    const int64_t outer = r_.shift.outer_size, frames = r_.shift.clips * r_.shift.frames;
    r_.shift.outer_size = rounded_up(p.height, 2) * rounded_up(p.width, 2);
    const Tensor z = numbers(of_bytes(frames * p.height * p.width * r_.shift.inner_bytes), false, one_in(4)), old = z;
    const Parts parts = random_norm(p.z_norm), old_parts = parts;
    const bool is_shifted = one_in(2);
    const Tensor tensors[] = {!is_shifted || one_in(2) ? activations() : Tensor{},
                              is_shifted ? activations() : Tensor{}, is_shifted ? boundary() : Tensor{}};
    p.z = const_cast<Tensor&>(z).data();
    const auto outputs = [&](int poison, auto kernel) {
      std::vector<Tensor> out;
      for (const Tensor& each : tensors) out.push_back(poisoned(each, poison));
      p.unshifted = out[0].data();
      p.out = out[1].data();
      p.boundary_out = out[2].data();
      kernel();
      return out;
    };
    const auto expected = outputs(kCpuPoison, [&] { norm_relu_max_pool_cpu(r_, p, 0, frames); });
    const char* error = nullptr;
    const auto actual = outputs(kCudaPoison, [&] { error = norm_relu_max_pool_cuda(r_, p, nullptr); });
    std::vector<Tensor> naive;
    for (const Tensor& each : tensors) naive.push_back(poisoned(each, kNaivePoison));
    const NaiveParts norm(p.z_norm, parts);
    const auto run = [&](NaiveStream<Element> out) {
      if (out.data == nullptr) return;
      run_naive(norm_relu_max_pool_naive<Element>, naive_shape().numel(), out, static_cast<const storage_t*>(p.z),
                norm.norm(), naive_shape(), p.height, p.width);
    };
    run(unshifted(naive[0]));
    run(shifted(naive[1], naive[2]));
    r_.shift.outer_size = outer;
    if (!(naive == expected)) return false;
    return error == nullptr && actual == expected && z.has_bytes_of(old) && parts == old_parts;
  }

  bool backward() {
    AddReluBackward b{};
    b.out_is_shifted = one_in(2);
    const bool special = one_in(4), to_shifted = one_in(2), sums = r_.channel_numel == 1 && one_in(2);
    // CUDA adds grad_a and grad_b of a padding frame first, then adds their sum to the rest. Sums per channel are of
    // gradients before they are rounded. With integers neither matters.
    const bool integers = sums || (b.out_is_shifted && r_.shift.padding != Padding::zeros);
    const bool has_normed[kNorms] = {sums && one_in(2), sums && one_in(2)};
    enum { kOut, kBoundaryOut, kA, kB, kBoundary, kNormed, kInputs = kNormed + kNorms };
    std::vector<Tensor> in(kInputs);
    in[kOut] = numbers(activations(), false, special);
    if (b.out_is_shifted) in[kBoundaryOut] = numbers(boundary(), false, special);
    if (!one_in(4)) in[kA] = numbers(activations(), integers, special);
    if (!one_in(4)) in[kB] = numbers(activations(), integers, special);
    if (b.out_is_shifted && !one_in(4)) in[kBoundary] = numbers(boundary(), integers, special);
    std::vector<acc_t> means[kNorms];
    for (int32_t n = 0; n < kNorms; ++n) {
      if (!has_normed[n]) continue;
      in[kNormed + n] = numbers(activations(), true, special);
      for (int64_t c = 0; c < channels_; ++c) means[n].push_back(static_cast<acc_t>(between(-kLargest, kLargest)));
      b.normed[n] = in[kNormed + n].data();
      b.mean[n] = means[n].data();
    }
    b.out = in[kOut].data();
    b.boundary_out = in[kBoundaryOut].data();
    b.grad_a = in[kA].data();
    b.grad_b = in[kB].data();
    b.grad_boundary = in[kBoundary].data();
    b.slices = static_cast<int32_t>(between(1, 6));
    const Tensor new_grads[] = {activations(), to_shifted ? activations() : Tensor{},
                                to_shifted ? boundary() : Tensor{}};

    bool plain = true;
    const auto outputs = [&](int poison, auto kernel) {
      std::vector<Tensor> out;
      for (const Tensor& grad : new_grads) out.push_back(poisoned(grad, poison));
      b.grad = plain ? out[0].data() : nullptr;
      b.grad_shifted = out[1].data();
      b.grad_boundary_in = out[2].data();
      kernel();
      return out;
    };
    const auto on_cpu = [&] { add_relu_backward_cpu(r_, b, 0, r_.shift.clips * r_.shift.frames); };
    auto expected = outputs(kCpuPoison, on_cpu);
    const std::vector<Tensor> old = in;
    const std::vector<acc_t> old_means[] = {means[0], means[1]};
    std::vector<acc_t> slices(sums ? b.slices * (1 + kNorms) * channels_ : 0, acc_t{12345678});
    b.sums = sums ? slices.data() : nullptr;
    const char* error = nullptr;
    const auto on_cuda = [&] { error = add_relu_backward_cuda(r_, b, nullptr); };
    const auto actual = outputs(kCudaPoison, on_cuda);
    bool right = error == nullptr && actual == expected && means[0] == old_means[0] && means[1] == old_means[1];
    if (to_shifted) {  // only in the shifted layout
      plain = false;
      for (const auto& out : {outputs(kCpuPoison, on_cpu), outputs(kCudaPoison, on_cuda)}) {
        right &= error == nullptr && out[1] == expected[1] && out[2] == expected[2];
      }
    }
    std::vector<Tensor> naive;
    for (const Tensor& grad : new_grads) naive.push_back(poisoned(grad, kNaivePoison));
    Tensor none;
    const auto as_out = [&](Tensor& x, Tensor& boundary) {
      return b.out_is_shifted ? shifted(x, boundary) : unshifted(x);
    };
    run_naive(add_relu_backward_naive<Element>, naive_shape().numel(), unshifted(naive[0]),
              to_shifted ? shifted(naive[1], naive[2]) : unshifted(none), as_out(in[kOut], in[kBoundaryOut]),
              as_out(in[kA], in[kBoundary]), as_out(in[kB], none), naive_shape());
    right &= naive == expected;
    for (int i = 0; i < kInputs; ++i) right &= in[i].has_bytes_of(old[i]);

    for (int32_t n = 0; sums && n < kNorms; ++n) {
      if (has_normed[n]) right &= sums_are_right(slices, b.slices, 1 + n, naive[0], in[kNormed + n], means[n]);
    }
    return right && (!sums || norm_gradients(r_.dtype, slices, b.slices));
  }

  // Do the slices add up to sum(grad) in row 0 and to sum(grad * (normed - mean)) in `row`?
  bool sums_are_right(const std::vector<acc_t>& slices, int32_t n_slices, int32_t row, Tensor& grad, Tensor& normed,
                      const std::vector<acc_t>& mean) const {
    std::vector<double> expected(2 * channels_), actual(2 * channels_);
    run_naive(channel_sums_naive<Element>, channels_, expected.data(), static_cast<const storage_t*>(grad.data()),
              static_cast<const storage_t*>(normed.data()), mean.data(), rows(), channels_);
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t slice = 0; slice < n_slices; ++slice) {
        actual[c] += slices[slice * (1 + kNorms) * channels_ + c];
        actual[channels_ + c] += slices[(slice * (1 + kNorms) + row) * channels_ + c];
      }
    }
    return std::equal(actual.begin(), actual.end(), expected.begin(), same);
  }

  bool backward_of_relu() {
    NormReluBackward b{};
    const bool special = one_in(4), adds = !one_in(3), in_place = one_in(2);
    Tensor grad = numbers(activations(), true, special), z = numbers(activations(), true, special);
    std::vector<acc_t> zeros(channels_),
        parts[6];  // mean, variance, weight and bias, and weight and bias of batch_norm
    for (std::vector<acc_t>& part : parts) {
      for (int64_t c = 0; c < channels_; ++c) part.push_back(&part == &parts[1] ? std::abs(any()) : any());
    }
    for (acc_t& mean : parts[0]) mean = static_cast<acc_t>(between(-kLargest, kLargest));
    const auto norm = [&](const std::vector<acc_t>& mean, const std::vector<acc_t>& weight,
                          const std::vector<acc_t>& bias) {
      return Norm{mean.data(), parts[1].data(), weight.data(), bias.data(), sizeof(acc_t) == sizeof(float), 1e-5};
    };
    b.norm = norm(parts[0], parts[2], parts[3]);
    if (adds) b.batch_norm = norm(parts[0], parts[4], parts[5]);

    // On the CPU: the ReLU, the masked gradient, and the sum of both terms as a norm_add_relu without ReLU.
    const int64_t frames = r_.shift.clips * r_.shift.frames;
    Tensor relu = activations(), masked = grad, expected = activations();
    NormAddRelu f{};
    f.z = z.data();
    f.z_norm = b.norm;
    f.relu = true;
    f.out = relu.data();
    norm_add_relu_cpu(r_, f, 0, frames);
    const int64_t count = rows() * channels_;
    for (int64_t at = 0; at < count; ++at) {
      if (Element::to_acc(relu.data()[at]) <= 0) masked.data()[at] = storage_t{};
    }
    f = {};
    f.z = adds ? z.data() : masked.data();
    f.z_norm = adds ? b.batch_norm : norm(zeros, parts[2], zeros);
    if (adds) {
      f.identity = masked.data();
      f.identity_norm = norm(zeros, parts[2], zeros);
    }
    f.out = expected.data();
    norm_add_relu_cpu(r_, f, 0, frames);

    const Tensor old_grad = grad, old_z = z;
    const std::vector<std::vector<acc_t>> old_parts(parts, parts + 6);
    b.slices = static_cast<int32_t>(between(1, 6));
    std::vector<acc_t> slices(b.slices * (1 + kNorms) * channels_, acc_t{12345678});
    b.grad = grad.data();
    b.z = z.data();
    b.sums = slices.data();
    bool right = norm_relu_grad_sums_cuda(r_, b, nullptr) == nullptr && grad.has_bytes_of(old_grad);
    Tensor naive_out = poisoned(activations(), kNaivePoison), naive_masked = naive_out;
    const auto naive_norm = [](const Norm& norm) {
      const auto part = [](const void* data) { return static_cast<const acc_t*>(data); };
      return NaiveNorm<acc_t>{part(norm.mean), part(norm.variance), part(norm.weight), part(norm.bias), norm.epsilon};
    };
    run_naive(norm_relu_backward_naive<Element>, count, naive_out.data(), naive_masked.data(),
              static_cast<const storage_t*>(grad.data()), static_cast<const storage_t*>(z.data()), naive_norm(b.norm),
              naive_norm(b.batch_norm), rows(), channels_);
    right = right && naive_masked == masked && naive_out == expected;
    right = right && sums_are_right(slices, b.slices, 1, naive_masked, z, parts[0]);
    Tensor out = in_place ? grad : poisoned(activations(), kCudaPoison);
    if (in_place) b.grad = out.data();
    b.out = out.data();
    right = right && norm_relu_backward_cuda(r_, b, nullptr) == nullptr && out == expected;
    return right && grad.has_bytes_of(old_grad) && z.has_bytes_of(old_z) &&
           std::equal(old_parts.begin(), old_parts.end(), parts);
  }

  bool norm_gradients(DType dtype, const std::vector<acc_t>& sums, int32_t slices) {
    NormGrads n{};
    const acc_t untouched = 12345678;
    std::vector<acc_t> variance[kNorms], weight[kNorms], grads((1 + 4 * kNorms) * channels_, untouched);
    for (int32_t k = 0; k < kNorms; ++k) {
      if (one_in(3)) continue;
      for (int64_t c = 0; c < channels_; ++c) {
        variance[k].push_back(static_cast<acc_t>(between(1, 9)));
        weight[k].push_back(static_cast<acc_t>(between(-9, 9)));
      }
      n.variance[k] = variance[k].data();
      n.weight[k] = weight[k].data();
      n.epsilon[k] = one_in(2) ? 0.5 : 0;
    }
    n.sums = sums.data();
    n.slices = slices;
    n.count = between(1, 100);
    n.grads = grads.data();
    bool right = norm_grads_cuda(dtype, channels_, n, nullptr) == nullptr;
    for (int64_t c = 0; c < channels_; ++c) right &= grads[c] == 0;
    for (int32_t k = 0; k < kNorms; ++k) {
      std::vector<double> expected(4 * channels_, untouched);
      if (!variance[k].empty()) {
        run_naive(norm_grads_naive<acc_t>, channels_, expected.data(), sums.data(), variance[k].data(),
                  weight[k].data(), n.epsilon[k], k, slices, n.count, channels_);
      }
      for (int64_t i = 0; i < 4 * channels_; ++i) {
        const double actual = grads[(1 + 4 * k) * channels_ + i], close = 16 * std::numeric_limits<acc_t>::epsilon();
        right &= same(actual, expected[i]) || std::abs(actual - expected[i]) <= close * std::abs(expected[i]);
      }
    }
    return right;
  }

  bool statistics() {
    BatchNormStats c{};
    Tensor x = numbers(activations(), one_in(2), false);
    if (one_in(8))
      x.data()[between(0, rows() * channels_ - 1)] = Element::from_acc(std::numeric_limits<acc_t>::quiet_NaN());
    const Tensor old = x;
    c.slices = static_cast<int32_t>(between(1, one_in(4) ? 40 : 6));
    c.momentum = one_in(4) ? 1 : 0.1;
    std::vector<acc_t> sums(c.slices * 2 * channels_), mean(channels_, acc_t{12345678}), variance = mean, running[2];
    for (std::vector<acc_t>& each : running) {
      for (int64_t k = 0; k < channels_; ++k) each.push_back(any());
    }
    const std::vector<acc_t> before[] = {running[0], running[1]};
    c.x = x.data();
    c.sums = sums.data();
    c.mean = mean.data();
    c.variance = variance.data();
    c.running_mean = running[0].data();
    c.running_variance = running[1].data();
    int64_t batches = 41;
    c.num_batches_tracked = &batches;
    bool right = batch_norm_stats_cuda(r_, c, nullptr) == nullptr && x.has_bytes_of(old) && batches == 42;
    std::vector<double> means(channels_), variances(channels_);
    run_naive(batch_norm_stats_naive<Element>, channels_, means.data(), variances.data(),
              static_cast<const storage_t*>(x.data()), rows(), channels_);
    for (int64_t k = 0; right && k < channels_; ++k) {
      const double count = static_cast<double>(rows());
      const double unbiased = variances[k] * count / std::max(count - 1, 1.0);
      // Numbers are at most 10 from the first row, so a rounding is of at most 100, the square of that. Roundings go
      // either way: those of some thousand additions come to less than 100 in one direction.
      const auto near = [&](double actual, double number) {
        return same(actual, number) || std::abs(actual - number) < 100 * 100 * std::numeric_limits<acc_t>::epsilon();
      };
      const auto follow = [&](double from, double to) { return from + c.momentum * (to - from); };
      right = near(mean[k], means[k]) && near(variance[k], variances[k]) && !(variance[k] < 0) &&
              near(running[0][k], follow(before[0][k], means[k])) &&
              near(running[1][k], follow(before[1][k], unbiased));
    }
    return right;
  }

  ResidualStream r_{};
  int64_t channels_ = 0;
  std::vector<ChannelGroup> groups_;
  std::vector<int64_t> boundary_begin_;
  std::vector<int32_t> naive_offset_;  // per channel, as the two below
  std::vector<int64_t> naive_begin_, naive_frame_;
};

bool is_right() {
  switch (between(0, 3)) {
    case 0: return Case<Float16>(DType::float16).is_right();
    case 1: return Case<BFloat16>(DType::bfloat16).is_right();
    case 2: return Case<Float32>(DType::float32).is_right();
    default: return Case<Float64>(DType::float64).is_right();
  }
}

}  // namespace

int main(int, char** arguments) { return run_cases(arguments, is_right); }
