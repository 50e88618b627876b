// Random messages between ranks by the CUDA kernel of edges, run on the CPU, against loops over bytes. The ranks run in
// any order in which no kernel would wait. Arguments: seed, cases.

#include "shift/edges.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <vector>

#include "compare.h"

using namespace tsm_jit;

namespace {

constexpr int64_t kSlotBytes = 1024, kSlots = 2;

// A box of a tensor with random strides, whose elements do not overlap.
struct Box {
  int64_t size[kEdgeDims], stride[kEdgeDims], begin, bytes, extent;

  Box(int64_t element, int64_t most_bytes) : begin(between(0, 3) * element), bytes(element) {
    std::fill(size, size + kEdgeDims, 1);
    size[kEdgeDims - 1] = element;
    for (int i = 0; i < 6; ++i) {
      int64_t& factor = size[between(kEdgeDims - 4, kEdgeDims - 1)];
      const int64_t more = between(1, 3);
      if (bytes * more > most_bytes) continue;
      factor *= more;
      bytes *= more;
    }
    // The run of bytes is innermost; the other dimensions lie in any order in the tensor.
    int order[kEdgeDims - 1];
    std::iota(order, order + kEdgeDims - 1, 0);
    std::shuffle(order, order + kEdgeDims - 1, generator);
    stride[kEdgeDims - 1] = 1;
    extent = size[kEdgeDims - 1] + between(0, 2) * element;
    for (const int d : order) {
      stride[d] = extent;
      extent = extent * size[d] + (one_in(3) ? element : 0);
    }
    extent += begin;
  }
  int64_t offset(int64_t i) const {
    int64_t at = begin;
    for (int d = kEdgeDims - 1; d >= 0; i /= size[d--]) at += i % size[d] * stride[d];
    return at;
  }
  bool has_size_of(const Box& other) const { return std::equal(size, size + kEdgeDims, other.size); }
};

// What one rank sends to another in each round: parts one after another, and where they lie on both sides.
struct Message {
  std::vector<std::pair<Box, Box>> parts;  // at the sender and at the receiver
};

bool agrees_with_loops() {
  const int64_t ranks = between(2, 4), element = 1 << between(0, 4), rounds = between(1, 7);
  std::vector<std::vector<Message>> messages(ranks, std::vector<Message>(ranks));
  std::vector<int64_t> extent(ranks);  // of the tensors that a rank receives
  int64_t most_sent = 0;
  for (int64_t from = 0; from < ranks; ++from) {
    for (int64_t to = 0; to < ranks; ++to) {
      for (int64_t left = kSlotBytes; left > element && !one_in(3);) {
        const Box sent(element, std::min<int64_t>(left, 300));
        Box received = sent;
        do received = Box(element, std::min<int64_t>(left, 300));
        while (!received.has_size_of(sent));
        received.begin += extent[to];
        extent[to] += received.extent;
        messages[from][to].parts.emplace_back(sent, received);
        left -= sent.bytes;
        most_sent = std::max(most_sent, sent.extent);
      }
    }
  }
  std::vector<Memory> mailboxes(ranks, Memory(ranks * kSlots * kSlotBytes));  // of each receiver, by sender
  std::vector<std::vector<uint32_t>> signals(ranks, std::vector<uint32_t>(ranks));
  std::vector<std::vector<uint64_t>> counters(ranks, std::vector<uint64_t>(2 * ranks));  // sent and received
  // Messages may be counted beyond 32 bits.
  const uint32_t begin = one_in(2) ? 0 : static_cast<uint32_t>(-3);
  for (int64_t a = 0; a < ranks; ++a) {
    for (int64_t b = 0; b < ranks; ++b) {
      signals[a][b] = begin;
      for (int64_t direction : {0, 1}) std::memcpy(&counters[a][2 * b + direction], &begin, sizeof begin);
    }
  }
  // The tensors that a rank sends in each round, and those that it receives.
  std::vector<std::vector<Memory>> sent(ranks), received(ranks), expected(ranks);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    for (int64_t round = 0; round < rounds; ++round) {
      sent[rank].emplace_back(most_sent);
      received[rank].emplace_back(extent[rank]);
    }
    expected[rank] = received[rank];
  }
  const auto run = [&](int64_t rank, int64_t round, bool sends) {
    std::vector<EdgePart> parts;
    for (int64_t peer = 0; peer < ranks; ++peer) {
      if (peer == rank) continue;
      const int64_t from = sends ? rank : peer, to = sends ? peer : rank;
      const Message& message = messages[from][to];
      EdgePart part{};
      part.mailbox = reinterpret_cast<int64_t>(mailboxes[to].at(from * kSlots * kSlotBytes));
      part.signal = reinterpret_cast<int64_t>(&signals[to][from]);
      part.counter = reinterpret_cast<int64_t>(&counters[rank][2 * peer + (sends ? 0 : 1)]);
      part.n_parts = std::max<int64_t>(1, message.parts.size());
      if (message.parts.empty()) parts.push_back(part);
      for (const auto& [at_sender, at_receiver] : message.parts) {
        const Box& box = sends ? at_sender : at_receiver;
        part.tensor_begin = box.begin;
        part.bytes = box.bytes;
        std::copy(box.size, box.size + kEdgeDims, part.size);
        std::copy(box.stride, box.stride + kEdgeDims, part.stride);
        parts.push_back(part);
        part.message_begin += box.bytes;
      }
    }
    Memory& tensor = (sends ? sent : received)[rank][round];
    move_edges_cuda(parts.data(), parts.size(), tensor.at(0), sends, kSlotBytes, 1000, nullptr);
  };
  // Any order of the ranks in which each message has been sent before it is received.
  std::vector<int64_t> steps(ranks);  // two in each round: send, receive
  for (int64_t left = 2 * rounds * ranks; left > 0;) {
    const int64_t rank = between(0, ranks - 1), round = steps[rank] / 2;
    const bool sends = steps[rank] % 2 == 0;
    const bool has_arrived = *std::min_element(steps.begin(), steps.end()) > 2 * round;
    if (round == rounds || (!sends && !has_arrived)) continue;
    run(rank, round, sends);
    ++steps[rank];
    --left;
  }
  for (int64_t rank = 0; rank < ranks; ++rank) {
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t from = 0; from < ranks; ++from) {
        if (from == rank) continue;
        for (const auto& [at_sender, at_receiver] : messages[from][rank].parts) {
          for (int64_t i = 0; i < at_sender.bytes; ++i) {
            *expected[rank][round].at(at_receiver.offset(i)) = *sent[from][round].at(at_sender.offset(i));
          }
        }
      }
      if (!(received[rank][round] == expected[rank][round])) {
        std::printf("rank %d of %d, round %d of %d, %d-byte elements\n", (int)rank, (int)ranks, (int)round, (int)rounds,
                    (int)element);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main(int, char** arguments) { return run_cases(arguments, agrees_with_loops); }
