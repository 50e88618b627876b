// Random ends of residual blocks by the CUDA kernels, run on the CPU, and by the CPU kernels: the same numbers
// everywhere. Sums and statistics by channel, which only CUDA makes, against those made here. Arguments: seed, cases.
#include "residual_shift.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "compare.h"
#include "element.h"

using namespace tsm_jit;

namespace {

// Numbers that every sum here is exact of, in any order and in every type: integers of which at most 2 * 21 are added
// to a gradient, less than the 256 that bfloat16 counts to.
constexpr int64_t kLargest = 5, kMaxFrames = 20;

// What an output holds before a kernel writes it: by the CPU, by CUDA. What neither writes is not the same.
constexpr int kCpuPoison = 0x5a, kCudaPoison = 0xa5;

// Both NaN is the same, and so are both zeros: the backward on the CPU adds to 0, which makes 0 of -0 and -0.
bool same(double a, double b) { return a == b || (a != a && b != b); }

template <class Element>
class Case {
  using Stored = typename Element::Stored;
  using Wide = typename Element::Wide;

  // On the heap at the exact size, so that AddressSanitizer finds what is touched beside it. Empty: null.
  struct Tensor {
    std::vector<Stored> numbers;
    int64_t skipped = 0;  // before the first one, which then does not lie at 16 bytes
    Stored* data() { return numbers.empty() ? nullptr : numbers.data() + skipped; }
    bool operator==(const Tensor& other) const {
      const auto equal = [](Stored a, Stored b) { return same(Element::widen(a), Element::widen(b)); };
      return std::equal(numbers.begin() + skipped, numbers.end(), other.numbers.begin() + other.skipped,
                        other.numbers.end(), equal);
    }
    bool has_bytes_of(const Tensor& other) const {
      return numbers.empty() || std::memcmp(numbers.data(), other.numbers.data(), numbers.size() * sizeof(Stored)) == 0;
    }
  };

 public:
  explicit Case(Sum type) {
    Shift& s = r_.shift;
    const bool channels_last = one_in(2), aligned = one_in(2);
    r_.type = type;
    r_.inner = channels_last ? 1 : between(1, 9);
    s.clips = between(1, 3);
    s.frames = between(1, one_in(6) ? kMaxFrames : 6);
    s.outer = channels_last ? between(1, one_in(6) ? 70 : 9) : 1;
    s.n_segment_shifted = static_cast<int32_t>(one_in(3) ? between(1, s.frames) : s.frames);
    s.padding = static_cast<Padding>(between(0, 3));
    const int64_t multiple = aligned ? 16 / static_cast<int64_t>(sizeof(Stored)) : 1;
    const int64_t n_groups = one_in(10) ? between(1, 32) : between(1, 5), widest = one_in(10) ? 30 : 3;
    while (static_cast<int64_t>(groups_.size()) < n_groups) {
      channels_ += between(1, widest) * multiple;
      const int64_t furthest = one_in(4) ? s.n_segment_shifted : std::min(s.n_segment_shifted, 3);
      int64_t offset = one_in(4) ? 0 : between(-furthest, furthest);
      if (s.padding == Padding::circular) offset %= s.n_segment_shifted;
      const int64_t end = channels_ * r_.inner * static_cast<int64_t>(sizeof(Stored));
      groups_.push_back({s.run, end, static_cast<int32_t>(offset)});
      unread_begin_.push_back(r_.unread_run);
      if (s.padding != Padding::circular) r_.unread_run += std::abs(offset) * (end - s.run);
      s.run = end;
    }
    s.groups = groups_.data();
    s.n_groups = static_cast<int32_t>(groups_.size());
    r_.unread_begin = unread_begin_.data();
  }

  bool is_right() {
    return told("forward", forward()) && told("backward", backward()) &&
           (r_.inner != 1 || (told("pool", pool()) && told("statistics", statistics()) &&
                              told("backward of a ReLU", backward_of_relu())));
  }

 private:
  bool told(const char* what, bool right) const {
    const Shift& s = r_.shift;
    if (right) return true;
    std::printf("%s of type %d, %lld clips of %lld frames (%d shifted), outer %lld, inner %lld, padding %d:", what,
                (int)r_.type, (long long)s.clips, (long long)s.frames, s.n_segment_shifted, (long long)s.outer,
                (long long)r_.inner, (int)s.padding);
    for (const Group& group : groups_) std::printf(" %lld: %d", (long long)(group.end - group.begin), group.offset);
    std::printf("\n");
    return false;
  }

  int64_t rows() const { return r_.shift.clips * r_.shift.frames * r_.shift.outer; }

  Tensor of_bytes(int64_t bytes) const {
    const int64_t size = bytes / static_cast<int64_t>(sizeof(Stored)), skipped = size > 0 && one_in(20) ? 1 : 0;
    return {std::vector<Stored>(size + skipped), skipped};
  }
  Tensor activations() const { return of_bytes(rows() * r_.shift.run); }
  Tensor unread() const { return of_bytes(r_.shift.clips * r_.shift.outer * r_.unread_run); }
  static Tensor poisoned(Tensor tensor, int poison) {
    for (Stored& number : tensor.numbers) std::memset(&number, poison, sizeof number);
    return tensor;
  }
  Tensor numbers(Tensor tensor, bool integers, bool special) const {
    constexpr auto infinity = std::numeric_limits<Wide>::infinity();
    constexpr Wide specials[] = {std::numeric_limits<Wide>::quiet_NaN(), infinity, -infinity, -Wide{0}};
    for (Stored& number : tensor.numbers) {
      const Wide value = integers ? static_cast<Wide>(between(-kLargest, kLargest)) : any();
      number = Element::narrow(special && one_in(50) ? specials[between(0, 3)] : value);
    }
    return tensor;
  }
  static Wide any() { return static_cast<Wide>(between(-4000, 4000)) / 1003; }

  using Parts = std::vector<std::vector<uint8_t>>;

  // A norm, or none; it points to what is returned.
  Parts random_norm(Norm& norm) const {
    if (one_in(2)) return {};
    norm.in_float = one_in(2);
    norm.epsilon = 1e-5;
    const size_t size = norm.in_float ? sizeof(float) : sizeof(Stored);
    Parts parts(4, std::vector<uint8_t>(channels_ * size));
    for (std::vector<uint8_t>& part : parts) {
      for (int64_t c = 0; c < channels_; ++c) {
        const Wide value = &part == &parts[1] ? std::abs(any()) : any();  // a variance
        const auto in_float = static_cast<float>(value);
        const Stored stored = Element::narrow(value);
        std::memcpy(&part[c * size], norm.in_float ? static_cast<const void*>(&in_float) : &stored, size);
      }
    }
    norm.mean = parts[0].data();
    norm.variance = parts[1].data();
    norm.weight = parts[2].data();
    norm.bias = parts[3].data();
    return parts;
  }

  bool forward() {
    ResidualForward f{};
    const bool special = one_in(4), adds = !one_in(6);
    f.identity_is_shifted = adds && one_in(2);
    f.out_is_shifted = adds && one_in(2);
    f.relu = !one_in(3);
    Tensor z = numbers(activations(), false, special);
    Tensor identity = adds ? numbers(activations(), false, special) : Tensor{};
    Tensor unread_in = f.identity_is_shifted ? numbers(unread(), false, special) : Tensor{};
    const Parts z_parts = random_norm(f.z_norm);
    const Parts identity_parts = adds && !f.identity_is_shifted ? random_norm(f.identity_norm) : Parts{};
    const bool into_z = !(f.out_is_shifted && r_.shift.padding == Padding::circular) && one_in(3);
    const bool into_identity = !into_z && adds && f.out_is_shifted == f.identity_is_shifted && one_in(3);
    const Tensor new_out = activations(), new_unread = f.out_is_shifted ? unread() : Tensor{};
    Tensor plain;
    if (adds && f.out_is_shifted && !into_z && r_.inner == 1 && one_in(2)) {
      f.step = static_cast<int32_t>(between(1, 3));
      do f.width = static_cast<int32_t>(between(1, r_.shift.outer));
      while (r_.shift.outer % f.width != 0);
      const int64_t pixels = rounded_up(f.width, f.step) * rounded_up(r_.shift.outer / f.width, f.step);
      plain = of_bytes(r_.shift.clips * r_.shift.frames * pixels * r_.shift.run);
    }

    const auto outputs = [&](int poison, bool on_cuda, auto kernel) {
      const bool in_z = into_z && (on_cuda || !f.out_is_shifted);  // the CPU shifts no z in place
      Tensor out = in_z ? z : into_identity ? identity : poisoned(new_out, poison);
      Tensor unread_out = into_identity ? unread_in : poisoned(new_unread, poison);
      f.z = in_z ? out.data() : z.data();
      f.identity = into_identity ? out.data() : identity.data();
      f.unread = into_identity ? unread_out.data() : unread_in.data();
      f.out = out.data();
      f.unread_out = unread_out.data();
      Tensor plain_out = poisoned(plain, poison);
      f.plain = plain_out.data();
      kernel();
      return std::vector<Tensor>{out, unread_out, plain_out};
    };
    const auto expected =
        outputs(kCpuPoison, false, [&] { residual_forward_cpu(r_, f, 0, r_.shift.clips * r_.shift.frames); });
    const Tensor old[] = {z, identity, unread_in};
    const Parts old_z_parts = z_parts, old_identity_parts = identity_parts;
    const char* error = nullptr;
    const auto actual = outputs(kCudaPoison, true, [&] { error = residual_forward_cuda(r_, f, nullptr); });
    return error == nullptr && actual == expected && z.has_bytes_of(old[0]) && identity.has_bytes_of(old[1]) &&
           unread_in.has_bytes_of(old[2]) && z_parts == old_z_parts && identity_parts == old_identity_parts;
  }

  static int64_t rounded_up(int64_t size, int64_t step) { return (size + step - 1) / step; }

  bool pool() {
    ResidualPool p{};
    p.height = static_cast<int32_t>(between(1, 7));
    p.width = static_cast<int32_t>(between(1, 7));
    const int64_t outer = r_.shift.outer, frames = r_.shift.clips * r_.shift.frames;
    r_.shift.outer = rounded_up(p.height, 2) * rounded_up(p.width, 2);
    const Tensor z = numbers(of_bytes(frames * p.height * p.width * r_.shift.run), false, one_in(4)), old = z;
    const Parts parts = random_norm(p.z_norm), old_parts = parts;
    const bool shifted = one_in(2);
    const Tensor made[] = {!shifted || one_in(2) ? activations() : Tensor{}, shifted ? activations() : Tensor{},
                           shifted ? unread() : Tensor{}};
    p.z = const_cast<Tensor&>(z).data();
    const auto outputs = [&](int poison, auto kernel) {
      std::vector<Tensor> out;
      for (const Tensor& each : made) out.push_back(poisoned(each, poison));
      p.plain = out[0].data();
      p.out = out[1].data();
      p.unread_out = out[2].data();
      kernel();
      return out;
    };
    const auto expected = outputs(kCpuPoison, [&] { residual_pool_cpu(r_, p, 0, frames); });
    const char* error = nullptr;
    const auto actual = outputs(kCudaPoison, [&] { error = residual_pool_cuda(r_, p, nullptr); });
    r_.shift.outer = outer;
    return error == nullptr && actual == expected && z.has_bytes_of(old) && parts == old_parts;
  }

  bool backward() {
    ResidualBackward b{};
    b.out_is_shifted = one_in(2);
    const bool special = one_in(4), to_shifted = one_in(2), sums = r_.inner == 1 && one_in(2);
    // CUDA adds both gradients of a frame that padding read before it adds them to the others; and sums by channel are
    // of what has not been rounded yet.
    const bool integers = sums || (b.out_is_shifted && r_.shift.padding != Padding::zeros);
    const bool has_normed[kNorms] = {sums && one_in(2), sums && one_in(2)};
    enum { kOut, kUnreadOut, kA, kB, kUnread, kNormed, kInputs = kNormed + kNorms };
    std::vector<Tensor> in(kInputs);
    in[kOut] = numbers(activations(), false, special);
    if (b.out_is_shifted) in[kUnreadOut] = numbers(unread(), false, special);
    if (!one_in(4)) in[kA] = numbers(activations(), integers, special);
    if (!one_in(4)) in[kB] = numbers(activations(), integers, special);
    if (b.out_is_shifted && !one_in(4)) in[kUnread] = numbers(unread(), integers, special);
    std::vector<Wide> means[kNorms];
    for (int32_t n = 0; n < kNorms; ++n) {
      if (!has_normed[n]) continue;
      in[kNormed + n] = numbers(activations(), true, special);
      for (int64_t c = 0; c < channels_; ++c) means[n].push_back(static_cast<Wide>(between(-kLargest, kLargest)));
      b.normed[n] = in[kNormed + n].data();
      b.mean[n] = means[n].data();
    }
    b.out = in[kOut].data();
    b.unread_out = in[kUnreadOut].data();
    b.grad_a = in[kA].data();
    b.grad_b = in[kB].data();
    b.grad_unread = in[kUnread].data();
    b.slices = static_cast<int32_t>(between(1, 6));
    const Tensor new_grads[] = {activations(), to_shifted ? activations() : Tensor{}, to_shifted ? unread() : Tensor{}};

    bool plain = true;
    const auto outputs = [&](int poison, auto kernel) {
      std::vector<Tensor> out;
      for (const Tensor& grad : new_grads) out.push_back(poisoned(grad, poison));
      b.grad = plain ? out[0].data() : nullptr;
      b.grad_shifted = out[1].data();
      b.grad_unread_in = out[2].data();
      kernel();
      return out;
    };
    const auto on_cpu = [&] { residual_backward_cpu(r_, b, 0, r_.shift.clips * r_.shift.frames); };
    auto expected = outputs(kCpuPoison, on_cpu);
    const std::vector<Tensor> old = in;
    const std::vector<Wide> old_means[] = {means[0], means[1]};
    std::vector<Wide> slices(sums ? b.slices * (1 + kNorms) * channels_ : 0, Wide{12345678});
    b.sums = sums ? slices.data() : nullptr;
    const char* error = nullptr;
    const auto on_cuda = [&] { error = residual_backward_cuda(r_, b, nullptr); };
    const auto actual = outputs(kCudaPoison, on_cuda);
    bool right = error == nullptr && actual == expected && means[0] == old_means[0] && means[1] == old_means[1];
    if (to_shifted) {  // in shifted form alone
      plain = false;
      for (const auto& out : {outputs(kCpuPoison, on_cpu), outputs(kCudaPoison, on_cuda)}) {
        right &= error == nullptr && out[1] == expected[1] && out[2] == expected[2];
      }
    }
    for (int i = 0; i < kInputs; ++i) right &= in[i].has_bytes_of(old[i]);

    for (int32_t sum = 0; sums && sum < 1 + kNorms; ++sum) {
      if (sum > 0 && !has_normed[sum - 1]) continue;  // of no norm: nobody's
      for (int64_t c = 0; right && c < channels_; ++c) {
        double made = 0, total = 0;
        for (int64_t slice = 0; slice < b.slices; ++slice) made += slices[(slice * (1 + kNorms) + sum) * channels_ + c];
        for (int64_t row = 0; row < rows(); ++row) {
          const int64_t at = row * channels_ + c;
          const double grad = Element::widen(expected[0].data()[at]);
          total += sum == 0 ? grad : grad * (Element::widen(in[kNormed + sum - 1].data()[at]) - means[sum - 1][c]);
        }
        right = same(made, total);
      }
    }
    return right && (!sums || norm_gradients(r_.type, slices, b.slices));
  }

  bool backward_of_relu() {
    ReluOfNormBackward b{};
    const bool special = one_in(4), adds = !one_in(3), in_place = one_in(2);
    Tensor grad = numbers(activations(), true, special), z = numbers(activations(), true, special);
    std::vector<Wide> zeros(channels_), parts[6];  // mean, variance, weight and bias, and the last two of `beside`
    for (std::vector<Wide>& part : parts) {
      for (int64_t c = 0; c < channels_; ++c) part.push_back(&part == &parts[1] ? std::abs(any()) : any());
    }
    for (Wide& mean : parts[0]) mean = static_cast<Wide>(between(-kLargest, kLargest));
    const auto norm = [&](const std::vector<Wide>& mean, const std::vector<Wide>& weight,
                          const std::vector<Wide>& bias) {
      return Norm{mean.data(), parts[1].data(), weight.data(), bias.data(), sizeof(Wide) == sizeof(float), 1e-5};
    };
    b.norm = norm(parts[0], parts[2], parts[3]);
    if (adds) b.beside = norm(parts[0], parts[4], parts[5]);

    // The ReLU, what it masks, and of that and z the sum that ends a block.
    const int64_t frames = r_.shift.clips * r_.shift.frames;
    Tensor relu = activations(), masked = grad, expected = activations();
    ResidualForward f{};
    f.z = z.data();
    f.z_norm = b.norm;
    f.relu = true;
    f.out = relu.data();
    residual_forward_cpu(r_, f, 0, frames);
    const int64_t count = rows() * channels_;
    for (int64_t at = 0; at < count; ++at) {
      if (Element::widen(relu.data()[at]) <= 0) masked.data()[at] = Stored{};
    }
    f = {};
    f.z = adds ? z.data() : masked.data();
    f.z_norm = adds ? b.beside : norm(zeros, parts[2], zeros);
    if (adds) {
      f.identity = masked.data();
      f.identity_norm = norm(zeros, parts[2], zeros);
    }
    f.out = expected.data();
    residual_forward_cpu(r_, f, 0, frames);

    const Tensor old_grad = grad, old_z = z;
    const std::vector<std::vector<Wide>> old_parts(parts, parts + 6);
    b.slices = static_cast<int32_t>(between(1, 6));
    std::vector<Wide> slices(b.slices * (1 + kNorms) * channels_, Wide{12345678});
    b.grad = grad.data();
    b.z = z.data();
    b.sums = slices.data();
    bool right = relu_of_norm_sums_cuda(r_, b, nullptr) == nullptr && grad.has_bytes_of(old_grad);
    for (int64_t c = 0; right && c < channels_; ++c) {
      double made[2] = {}, total[2] = {};
      for (int64_t slice = 0; slice < b.slices; ++slice) {
        for (int64_t k = 0; k < 2; ++k) made[k] += slices[(slice * (1 + kNorms) + k) * channels_ + c];
      }
      for (int64_t at = c; at < count; at += channels_) {
        const double of = Element::widen(masked.data()[at]);
        total[0] += of;
        total[1] += of * (Element::widen(z.data()[at]) - parts[0][c]);
      }
      right = same(made[0], total[0]) && same(made[1], total[1]);
    }
    Tensor out = in_place ? grad : poisoned(activations(), kCudaPoison);
    if (in_place) b.grad = out.data();
    b.out = out.data();
    right = right && relu_of_norm_backward_cuda(r_, b, nullptr) == nullptr && out == expected;
    return right && grad.has_bytes_of(old_grad) && z.has_bytes_of(old_z) &&
           std::equal(old_parts.begin(), old_parts.end(), parts);
  }

  bool norm_gradients(Sum type, const std::vector<Wide>& sums, int32_t slices) {
    NormGradients n{};
    const Wide untouched = 12345678;
    std::vector<Wide> variance[kNorms], weight[kNorms], made((1 + 4 * kNorms) * channels_, untouched);
    for (int32_t k = 0; k < kNorms; ++k) {
      if (one_in(3)) continue;
      for (int64_t c = 0; c < channels_; ++c) {
        variance[k].push_back(static_cast<Wide>(between(1, 9)));
        weight[k].push_back(static_cast<Wide>(between(-9, 9)));
      }
      n.variance[k] = variance[k].data();
      n.weight[k] = weight[k].data();
      n.epsilon[k] = one_in(2) ? 0.5 : 0;
    }
    n.sums = sums.data();
    n.slices = slices;
    n.count = between(1, 100);
    n.made = made.data();
    bool right = norm_gradients_cuda(type, channels_, n, nullptr) == nullptr;
    for (int64_t c = 0; right && c < channels_; ++c) {
      double total[1 + kNorms] = {};
      for (int64_t slice = 0; slice < slices; ++slice) {
        for (int32_t k = 0; k < 1 + kNorms; ++k) total[k] += sums[(slice * (1 + kNorms) + k) * channels_ + c];
      }
      right = made[c] == 0;
      for (int32_t k = 0; right && k < kNorms; ++k) {
        const Wide* const of = made.data() + (1 + 4 * k) * channels_ + c;
        if (variance[k].empty()) {
          for (int32_t row = 0; row < 4; ++row) right &= of[row * channels_] == untouched;
          continue;
        }
        const double deviation = 1 / std::sqrt(variance[k][c] + n.epsilon[k]);
        const double factor = -weight[k][c] * deviation / static_cast<double>(n.count);
        const double of_weight = total[1 + k] * deviation,
                     expected[] = {of_weight, total[0], factor * of_weight, factor * total[0]};
        for (int32_t row = 0; row < 4; ++row) {
          const double actual = of[row * channels_], close = 16 * std::numeric_limits<Wide>::epsilon();
          right &= same(actual, expected[row]) || std::abs(actual - expected[row]) <= close * std::abs(expected[row]);
        }
      }
    }
    return right;
  }

  bool statistics() {
    ChannelStatistics c{};
    Tensor x = numbers(activations(), one_in(2), false);
    if (one_in(8))
      x.data()[between(0, rows() * channels_ - 1)] = Element::narrow(std::numeric_limits<Wide>::quiet_NaN());
    const Tensor old = x;
    c.slices = static_cast<int32_t>(between(1, one_in(4) ? 40 : 6));
    c.momentum = one_in(4) ? 1 : 0.1;
    std::vector<Wide> sums(c.slices * 2 * channels_), mean(channels_, Wide{12345678}), variance = mean, running[2];
    for (std::vector<Wide>& each : running) {
      for (int64_t k = 0; k < channels_; ++k) each.push_back(any());
    }
    const std::vector<Wide> before[] = {running[0], running[1]};
    c.x = x.data();
    c.sums = sums.data();
    c.mean = mean.data();
    c.variance = variance.data();
    c.running_mean = running[0].data();
    c.running_variance = running[1].data();
    int64_t batches = 41;
    c.batches = &batches;
    bool right = channel_statistics_cuda(r_, c, nullptr) == nullptr && x.has_bytes_of(old) && batches == 42;
    for (int64_t k = 0; right && k < channels_; ++k) {
      const double count = static_cast<double>(rows());
      double sum = 0, squares = 0;
      const auto for_each_row = [&](auto visit) {
        for (int64_t row = 0; row < rows(); ++row) visit(double{Element::widen(x.data()[row * channels_ + k])});
      };
      for_each_row([&](double number) { sum += number; });
      for_each_row([&](double number) { squares += (number - sum / count) * (number - sum / count); });
      const double unbiased = squares / std::max(count - 1, 1.0);
      // Numbers are at most 10 from the first row, so a rounding is of at most 100, the square of that. Roundings go
      // either way: those of some thousand additions come to less than 100 in one direction.
      const auto near = [&](double actual, double number) {
        return same(actual, number) || std::abs(actual - number) < 100 * 100 * std::numeric_limits<Wide>::epsilon();
      };
      const auto follow = [&](double from, double to) { return from + c.momentum * (to - from); };
      right = near(mean[k], sum / count) && near(variance[k], squares / count) && !(variance[k] < 0) &&
              near(running[0][k], follow(before[0][k], sum / count)) &&
              near(running[1][k], follow(before[1][k], unbiased));
    }
    return right;
  }

  Residual r_{};
  int64_t channels_ = 0;
  std::vector<Group> groups_;
  std::vector<int64_t> unread_begin_;
};

bool is_right() {
  switch (between(0, 3)) {
    case 0: return Case<Float16>(Sum::float16).is_right();
    case 1: return Case<BFloat16>(Sum::bfloat16).is_right();
    case 2: return Case<Native<float>>(Sum::float32).is_right();
    default: return Case<Native<double>>(Sum::float64).is_right();
  }
}

}  // namespace

int main(int, char** arguments) { return run_cases(arguments, is_right); }
