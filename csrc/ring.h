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

// 1 in the first lap; after 2^32 - 1 laps it is 1 again. 0 always means "never written".
inline std::uint32_t lap_epoch(std::uint64_t lap) {
  return static_cast<std::uint32_t>(lap % kEpochs + 1);
}

inline std::uint32_t ring_epoch(std::uint64_t position, std::uint64_t num_slots) {
  return lap_epoch(position / num_slots);
}

class RingWriter {
 public:
  RingWriter() = default;
  RingWriter(RingHeader* header, std::uint64_t num_slots)
      : header_(header),
        slots_(reinterpret_cast<std::uint64_t*>(header + 1)),
        num_slots_(num_slots),
        log2_slots_(static_cast<std::uint32_t>(__builtin_ctzll(num_slots))) {}

  // Writes one record. Caller: the ring's only writer. Input: kSlotWords values.
  void push(const std::uint32_t (&values)[kSlotWords]) {
    const std::uint64_t head = load_word(&header_->head);
    const std::uint64_t epoch = std::uint64_t{lap_epoch(head >> log2_slots_)} << 32;
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

  // For records of several slots.
  RingHeader* header() const { return header_; }
  std::uint64_t num_slots() const { return num_slots_; }
  std::uint32_t log2_slots() const { return log2_slots_; }

 private:
  RingHeader* header_ = nullptr;
  std::uint64_t* slots_ = nullptr;
  std::uint64_t num_slots_ = 0;  // a power of two
  std::uint32_t log2_slots_ = 0;
};

enum class SlotRead { kWhole, kNotYet, kLapped };

// Copies `num_words` words (perhaps moving) if they are those of the lap with epoch `expected`.
// Thread-safe; never blocks.
inline SlotRead read_words(const std::uint64_t* words, std::uint64_t num_words,
                           std::uint32_t expected, std::uint32_t* values) {
  SlotRead result = SlotRead::kWhole;
  for (std::uint64_t i = 0; i < num_words; ++i) {
    const std::uint64_t word = load_word(words + i);
    const auto epoch = static_cast<std::uint32_t>(word >> 32);
    if (epoch != expected) {
      const std::uint32_t ahead =
          epoch >= expected ? epoch - expected : epoch + (kEpochs - expected);
      if (epoch != 0 && ahead < kEpochs / 2) return SlotRead::kLapped;
      result = SlotRead::kNotYet;
    }
    values[i] = static_cast<std::uint32_t>(word);
  }
  return result;
}

// The record that a slot of the ring holds.
inline SlotRead read_slot(const std::uint64_t* slot, std::uint32_t expected,
                          std::uint32_t (&values)[kSlotWords]) {
  return read_words(slot, kSlotWords, expected, values);
}

}  // namespace dodoco
