// A lane: one writer's control block, scratch, board section and ring, and the passes it records.
#pragma once

#include <sched.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "board.h"
#include "capture.h"
#include "format.h"
#include "ring.h"
#include "route_stats.h"

namespace dodoco {

enum class IdType { kInt16, kInt32, kInt64 };

struct IdTensor {  // [rows, k]; strides in elements
  const void* data;
  IdType type;
  std::int64_t rows, k, row_stride, slot_stride;
};

struct MapTensor {  // [rows, columns] bytes; columns = num_experts, or ceil(num_experts / 8) if
                    // packed
  const std::uint8_t* data;
  bool packed;
  std::int64_t rows, columns, row_stride, column_stride;
};

enum class RecordResult : int {
  kRecorded = 0,
  kIgnored = 1,      // detached, disabled, or a forked child
  kCopiedSite = -1,  // a copy of a site tensor: nothing was recorded
  kBadShape = -2,
  kTooLarge = -3,
  kBadSite = -4,
  kNoLane = -5,       // more streams at the same time than device lanes
  kDeviceError = -6,  // the driver refused the launch
};

inline std::uint64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1000000000u +
         static_cast<std::uint64_t>(now.tv_nsec);
}

// Whether a transfer fits a group of `num_ranks` and a ring of `num_slots`.
RecordResult check_transfer(const Transfer& transfer, std::uint32_t num_ranks,
                            std::uint64_t num_slots);

class Lane {
 public:
  struct Layer {
    BoardWriter board;
    std::uint32_t num_experts;
    std::uint32_t top_k;
  };

  // Blocks of a traffic section that belongs to the lane; none where no group was named.
  struct Traffic {
    std::uint64_t* blocks = nullptr;
    std::uint32_t num_ranks = 0;
  };

  Lane(std::vector<Layer> layers, RingWriter ring, Traffic traffic, void* recording);

  ControlBlock* control() { return &control_; }

  // Records one pass of `layer`. Thread-safe: threads that share a lane take turns.
  RecordResult record(std::uint64_t layer, const IdTensor& ids, bool recomputed);
  RecordResult record(std::uint64_t layer, const MapTensor& map, bool recomputed);

  // Records a transfer; its iteration goes to `iteration` where it is not null. Thread-safe.
  RecordResult record(const Transfer& transfer, std::int64_t* iteration);

  // After this, every record() is ignored; returns once none is under way.
  void close();

  // For the child of a fork, where other threads (and their locks) no longer exist.
  void abandon() { alive_.store(false, std::memory_order_relaxed); }

 private:
  class Turn;
  template <typename CountPass>
  RecordResult record_pass(std::uint64_t layer, bool recomputed, CountPass count_pass);

  ControlBlock control_{};
  std::atomic<bool> alive_{true};
  std::atomic<bool> busy_{false};
  std::vector<Layer> layers_;
  RingWriter ring_;
  Traffic traffic_;
  std::uint64_t iteration_ = 0;
  std::int64_t last_layer_ = -1;
  std::uint64_t transfers_ = 0;
  std::vector<std::uint32_t> histogram_;  // all zero between passes
  std::vector<std::uint32_t> scratch_;
};

// Sends what the thread that makes it records through the lane `chosen`, in place of what `usual`
// stands for: the lane that sites name, or a device's lanes. For as long as it lives: threads that
// run one model at the same time each get a lane of their own. Choices for several recordings may
// hold at once. One that is destroyed in another thread stays with the first until that ends.
class LaneChoice {
 public:
  // Throws std::length_error where a thread has too many at once.
  LaneChoice(const void* usual, void* chosen);
  ~LaneChoice();
  LaneChoice(const LaneChoice&) = delete;
  LaneChoice& operator=(const LaneChoice&) = delete;

  // What this thread's passes go to in place of `usual`; null where it chose nothing.
  static void* instead_of(const void* usual) {
    const OfThread& choices = of_thread_;
    for (std::uint32_t i = choices.count; i-- > 0;)
      if (choices.entries[i].usual == usual) return choices.entries[i].chosen;
    return nullptr;
  }

 private:
  struct Entry {
    const void* usual;
    void* chosen;
    std::uint64_t id;
  };
  struct OfThread {  // by value: nothing in it can dangle, as lanes are never freed
    std::uint32_t count;
    Entry entries[16];
  };
  static thread_local OfThread of_thread_;
  std::uint64_t id_;
};

// The entry points of the ops: resolve a site (the address of a Site) and record through its lane.
RecordResult record_at_site(const void* site, const IdTensor& ids, bool recomputed);
RecordResult record_at_site(const void* site, const MapTensor& map, bool recomputed);

}  // namespace dodoco
