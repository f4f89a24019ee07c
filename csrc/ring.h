// The ring: fixed-size records of the latest passes, one writer, any number of readers.
//
// The writer never waits and never fences. Each word of a slot carries the epoch of its lap, so a
// reader that finds the exact epoch in all words has the whole record, in whatever order the stores
// became visible.
#pragma once

#include <cstdint>

#include "format.h"
#include "words.h"

namespace dodoco {

inline std::uint32_t ring_epoch(std::uint64_t position, std::uint64_t num_slots) {
  return static_cast<std::uint32_t>(position / num_slots + 1);
}

class RingWriter {
 public:
  RingWriter() = default;
  RingWriter(RingHeader* header, std::uint64_t num_slots)
      : header_(header),
        slots_(reinterpret_cast<std::uint64_t*>(header + 1)),
        num_slots_(num_slots) {}

  // Writes one record. Caller: the ring's only writer. Input: kSlotWords values.
  void push(const std::uint32_t (&values)[kSlotWords]) {
    const std::uint64_t head = load_word(&header_->head);
    const std::uint64_t epoch = static_cast<std::uint64_t>(ring_epoch(head, num_slots_)) << 32;
    std::uint64_t* slot = slots_ + (head & (num_slots_ - 1)) * kSlotWords;
    for (std::uint32_t i = 0; i < kSlotWords; ++i) store_word(slot + i, epoch | values[i]);
    store_word(&header_->head, head + 1);
  }

  // Asks for the slot that push() will write next.
  void prefetch() const {
    const std::uint64_t* slot =
        slots_ + (load_word(&header_->head) & (num_slots_ - 1)) * kSlotWords;
    __builtin_prefetch(slot, 1);
    __builtin_prefetch(slot + 8, 1);
  }

 private:
  RingHeader* header_ = nullptr;
  std::uint64_t* slots_ = nullptr;
  std::uint64_t num_slots_ = 0;  // a power of two
};

enum class SlotRead { kWhole, kNotYet, kLapped };

// Copies the record at `position` out of a ring that may be moving. Thread-safe; never blocks.
inline SlotRead read_slot(const std::uint64_t* slots, std::uint64_t num_slots,
                          std::uint64_t position, std::uint32_t (&values)[kSlotWords]) {
  const std::uint64_t* slot = slots + (position & (num_slots - 1)) * kSlotWords;
  const std::uint32_t expected = ring_epoch(position, num_slots);
  SlotRead result = SlotRead::kWhole;
  for (std::uint32_t i = 0; i < kSlotWords; ++i) {
    const std::uint64_t word = load_word(slot + i);
    const std::uint32_t epoch = static_cast<std::uint32_t>(word >> 32);
    if (epoch != expected) {
      // Wrapping difference: later laps are "ahead" even past 2^32.
      if (static_cast<std::int32_t>(epoch - expected) > 0) return SlotRead::kLapped;
      result = SlotRead::kNotYet;
    }
    values[i] = static_cast<std::uint32_t>(word);
  }
  return result;
}

}  // namespace dodoco
