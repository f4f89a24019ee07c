// One execution of an AlltoAll: what is written about it, by a thread of the host or the threads of
// one block on a device. The same code runs in both.
#pragma once

#include <cstdint>

#include "format.h"

#ifdef __CUDACC__
#define DODOCO_BOTH __host__ __device__
// To count the rounds of a loop that is shared by threads, a compiler would divide.
#define DODOCO_ROLLED _Pragma("unroll 1")
#else
#define DODOCO_BOTH
#define DODOCO_ROLLED
#endif

namespace dodoco {

// Integers where they lie: in a list of the host's, in a tensor of a device, or among the arguments
// of a launch. Of wide ones the low half counts: no message has 2^32 rows.
struct Counts {
  const void* data;
  std::int64_t stride;  // elements
  std::uint32_t size;
  std::uint32_t is_wide;  // 8 bytes each, not 4

  DODOCO_BOTH std::uint32_t at(std::uint32_t index) const {
    const std::int64_t place = index * stride;
    return is_wide != 0 ? static_cast<std::uint32_t>(static_cast<const std::uint64_t*>(data)[place])
                        : static_cast<const std::uint32_t*>(data)[place];
  }
};

struct Transfer {
  Counts sent, received, experts;  // [ranks], [ranks], [local experts or 0]
  std::int64_t iteration;          // negative: the lane's
  std::uint64_t begin_ns, end_ns;  // on a device: read there
  std::uint32_t type;              // RecordType and kFlag...
  std::uint32_t layer;
  std::uint32_t bytes_per_row;
  std::uint32_t advances;    // forward dispatches start iterations, as passes do elsewhere
  std::uint32_t begin_slot;  // on a device: of DeviceLane::begins
  std::uint32_t reserved;
};

// Counts of the host's as arguments of a launch: a captured graph keeps them.
struct Constants {
  static constexpr std::uint32_t kMost = 896;  // with the rest within the 4 KB of all architectures
  std::uint32_t values[kMost];
};

constexpr std::uint32_t kMostThreads = 256;  // of the block that writes a transfer

// Where a lane keeps what is written. On the host, totals and board are one.
struct TransferPlace {
  const ControlBlock* control;
  LaneState* state;
  std::uint64_t* ring;    // RingHeader
  std::uint64_t* totals;  // the traffic block, in the memory of whoever writes
  std::uint64_t* board;   // the traffic block in the recording
  std::uint32_t log2_slots;
};

namespace capture {

DODOCO_BOTH inline std::uint64_t load(const std::uint64_t* word) {
#ifdef __CUDA_ARCH__
  return *static_cast<const volatile std::uint64_t*>(word);
#else
  return __atomic_load_n(word, __ATOMIC_RELAXED);
#endif
}

DODOCO_BOTH inline void store(std::uint64_t* word, std::uint64_t value) {
#ifdef __CUDA_ARCH__
  *static_cast<volatile std::uint64_t*>(word) = value;
#else
  __atomic_store_n(word, value, __ATOMIC_RELAXED);
#endif
}

DODOCO_BOTH inline void add(const TransferPlace& place, std::uint32_t word, std::uint64_t amount) {
  const std::uint64_t value = load(place.totals + word) + amount;
  store(place.totals + word, value);
  if (place.board != place.totals) store(place.board + word, value);
}

DODOCO_BOTH inline std::uint32_t count_at(const Transfer& t, std::uint32_t index) {
  if (index < t.sent.size) return t.sent.at(index);
  index -= t.sent.size;
  return index < t.received.size ? t.received.at(index) : t.experts.at(index - t.received.size);
}

// The word of a record's slots that count `index` goes to.
DODOCO_BOTH inline std::uint64_t place_of_count(std::uint32_t index) {
  if (index < kCountsInFirstSlot) return kTransferCounts + index;
  const std::uint32_t behind = index - kCountsInFirstSlot;
  return std::uint64_t{kSlotWords} * (1 + behind / kCountsInNextSlots) + 1 +
         behind % kCountsInNextSlots;
}

constexpr std::uint32_t kRingHeaderWords = sizeof(RingHeader) / 8;

class SlotWriter {  // words of the record at `head`, which may run over the ring's end
 public:
  DODOCO_BOTH SlotWriter(std::uint64_t* ring, std::uint64_t head, std::uint32_t log2_slots)
      : slots_(ring + kRingHeaderWords), head_(head), log2_slots_(log2_slots) {}

  DODOCO_BOTH void put(std::uint64_t word, std::uint32_t value) const {
    const std::uint64_t slot = head_ + word / kSlotWords;
    const std::uint64_t epoch = (slot >> log2_slots_) % kEpochs + 1;
    const std::uint64_t mask = (std::uint64_t{1} << log2_slots_) - 1;
    store(slots_ + (slot & mask) * kSlotWords + word % kSlotWords, epoch << 32 | value);
  }

 private:
  std::uint64_t* slots_;
  std::uint64_t head_;
  std::uint32_t log2_slots_;
};

DODOCO_BOTH inline void put_header(const SlotWriter& slots, const Transfer& t,
                                   std::uint64_t iteration, std::uint32_t num_slots,
                                   std::uint64_t sequence, const ControlBlock& control) {
  slots.put(kTransferType, t.type | num_slots << 8);
  slots.put(kTransferLayer, t.layer | control.microbatch << 16);
  slots.put(kTransferIterationLow, static_cast<std::uint32_t>(iteration));
  slots.put(kTransferIterationHigh, static_cast<std::uint32_t>(iteration >> 32));
  slots.put(kTransferBeginLow, static_cast<std::uint32_t>(t.begin_ns));
  slots.put(kTransferBeginHigh, static_cast<std::uint32_t>(t.begin_ns >> 32));
  slots.put(kTransferEndLow, static_cast<std::uint32_t>(t.end_ns));
  slots.put(kTransferEndHigh, static_cast<std::uint32_t>(t.end_ns >> 32));
  slots.put(kTransferBytesPerRow, t.bytes_per_row);
  slots.put(kTransferSizes, t.sent.size | t.experts.size << 16);
  slots.put(kTransferSequence, static_cast<std::uint32_t>(sequence));
  slots.put(kTransferMapVersion, control.map_version);
  slots.put(kTransferReserved, 0);
}

// The totals that no rank has for itself.
DODOCO_BOTH inline void add_totals(const TransferPlace& place, const Transfer& t,
                                   std::uint64_t sent, std::uint64_t received) {
  const bool backward = (t.type & kFlagBackward) != 0, again = (t.type & kFlagRecompute) != 0;
  if (backward) {
    add(place, kBackward, 1);
  } else if (again) {
    add(place, kRecomputedTransfers, 1);
  } else {
    add(place, kForward, 1);
    add(place, kSentRows, sent);
    add(place, kReceivedRows, received);
  }
  add(place, kSentBytes, sent * t.bytes_per_row);
  add(place, kReceivedBytes, received * t.bytes_per_row);
  if ((t.type & kFlagUntimed) != 0) {
    add(place, kUntimed, 1);
  } else if (t.end_ns > t.begin_ns) {
    add(place, kDurationNs, t.end_ns - t.begin_ns);
  }
  store(place.totals + kLastEndMonotonicNs, t.end_ns);
  if (place.board != place.totals) store(place.board + kLastEndMonotonicNs, t.end_ns);
}

}  // namespace capture

// A team of one: a thread of the host.
struct Alone {
  std::uint64_t sums[2];
  DODOCO_BOTH void meet() const {}
  DODOCO_BOTH std::uint64_t* sums_of(std::uint32_t) { return sums; }
};

// Writes one transfer. Caller: threads 0 to num_threads - 1 of the lane's only writer. Their team
// has a meet() that none of them leaves before all have come, and for each thread two words,
// sums_of(thread), that all can read. Sizes must fit the group, the record the ring. Returns the
// iteration recorded, or -1 where nothing was.
template <typename Team>
DODOCO_BOTH std::int64_t write_transfer(const TransferPlace& place, const Transfer& t,
                                        std::uint32_t thread, std::uint32_t num_threads,
                                        Team& team) {
  using namespace capture;
  const ControlBlock& control = *place.control;
  // Cleared once detached: a graph that is replayed later must not touch what is gone.
  if (control.magic != kControlMagic) return -1;
  const bool counted = control.enabled != 0;
  const std::uint64_t mask = control.every_mask, inverse = control.every_inverse,
                      limit = control.every_limit;
  const std::uint64_t last_iteration = place.state->iteration;
  const std::int64_t last_layer = place.state->last_layer;
  const std::uint64_t head = place.state->head;
  const std::uint64_t sequence = place.state->transfers;
  team.meet();  // all have read what thread 0 is about to change

  const bool forward = (t.type & (kFlagBackward | kFlagRecompute)) == 0;
  const bool is_dispatch = (t.type & 0xFF) == static_cast<std::uint32_t>(RecordType::kDispatch);
  std::uint64_t iteration = last_iteration;
  if (t.advances != 0 && forward && is_dispatch) {
    if (static_cast<std::int64_t>(t.layer) <= last_layer) ++iteration;
    if (thread == 0) {
      place.state->iteration = iteration;
      place.state->last_layer = t.layer;
    }
  }
  if (t.iteration >= 0) iteration = static_cast<std::uint64_t>(t.iteration);
  if (!counted) return -1;

  if (thread == 0) add(place, kStartedTransfers, 1);
  const bool recorded = (iteration & mask) == 0 && iteration * inverse <= limit;
  const std::uint32_t num_rows = t.sent.size + t.received.size;
  const std::uint32_t num_counts = num_rows + t.experts.size;
  const std::uint32_t num_slots = transfer_slots(num_counts);
  const SlotWriter slots(place.ring, head, place.log2_slots);
  std::uint64_t sent = 0, received = 0;
  DODOCO_ROLLED
  for (std::uint32_t i = thread; i < num_counts; i += num_threads) {
    const std::uint32_t count = count_at(t, i);
    if (recorded) slots.put(place_of_count(i), count);
    if (i < t.sent.size) sent += count;
    if (i >= t.sent.size && i < num_rows) received += count;
    if (forward && i < num_rows) add(place, kTrafficWords + i, count);
  }
  team.sums_of(thread)[0] = sent;
  team.sums_of(thread)[1] = received;
  if (recorded) {
    DODOCO_ROLLED
    for (std::uint32_t i = num_counts + thread;; i += num_threads) {  // to the end of the last slot
      const std::uint64_t word = place_of_count(i);
      if (word >= std::uint64_t{num_slots} * kSlotWords) break;
      slots.put(word, 0);
    }
    DODOCO_ROLLED
    for (std::uint32_t i = 1 + thread; i < num_slots; i += num_threads) {
      slots.put(std::uint64_t{i} * kSlotWords,
                static_cast<std::uint32_t>(RecordType::kContinuation) | num_slots << 8);
    }
  }
  team.meet();
  if (thread != 0) return static_cast<std::int64_t>(iteration);
  DODOCO_ROLLED
  for (std::uint32_t other = 1; other < num_threads; ++other) {
    sent += team.sums_of(other)[0];
    received += team.sums_of(other)[1];
  }
  add_totals(place, t, sent, received);
  place.state->transfers = sequence + 1;
  if (recorded) {
    put_header(slots, t, iteration, num_slots, sequence, control);
    place.state->head = head + num_slots;
    store(place.ring, head + num_slots);
  }
  add(place, kTransfers, 1);
  return static_cast<std::int64_t>(iteration);
}

// --- Kernels, as a device runs them; `device_ns` is what its clock shows.
// -------------------------

DODOCO_BOTH inline std::uint64_t on_hosts_clock(const ControlBlock& control,
                                                std::uint64_t device_ns) {
  return device_ns + static_cast<std::uint64_t>(control.clock_offset_ns);
}

DODOCO_BOTH inline void begin_transfer(DeviceLane* lane, std::uint32_t slot,
                                       std::uint64_t device_ns) {
  if (lane->control.magic != kControlMagic) return;
  lane->begins[slot] = on_hosts_clock(lane->control, device_ns);
}

// Counts without an address are among the constants, one behind the other.
DODOCO_BOTH inline void find_constants(Transfer* transfer, const Constants& constants) {
  const std::uint32_t* next = constants.values;
  for (Counts* counts : {&transfer->sent, &transfer->received, &transfer->experts}) {
    if (counts->data != nullptr || counts->size == 0) continue;
    *counts = {next, 1, counts->size, 0};
    next += counts->size;
  }
}

template <typename Team>
DODOCO_BOTH void end_transfer(DeviceLane* lane, std::uint64_t* totals, std::uint64_t* board,
                              Transfer transfer, std::uint64_t device_ns, std::uint32_t thread,
                              std::uint32_t num_threads, Team& team) {
  const ControlBlock& control = lane->control;
  if (control.magic != kControlMagic) return;
  transfer.end_ns = on_hosts_clock(control, device_ns);
  if (transfer.begin_slot < kTransfersAtOnce) transfer.begin_ns = lane->begins[transfer.begin_slot];
  const TransferPlace place{&control, &lane->state, reinterpret_cast<std::uint64_t*>(control.ring),
                            totals,   board,        static_cast<std::uint32_t>(control.log2_slots)};
  write_transfer(place, transfer, thread, num_threads, team);
}

}  // namespace dodoco
