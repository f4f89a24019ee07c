// Reading the placement section, while its writer may go on.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "placement.h"
#include "recording_reader.h"
#include "ring.h"
#include "words.h"

namespace dodoco {
namespace {

// False: no entry that a writer could have written.
bool decode(const std::vector<std::uint32_t>& v, std::uint64_t num_experts, std::uint64_t num_slots,
            std::uint64_t clock_offset_ns, PlacementRecord* record) {
  const auto wide = [&](std::uint64_t low, std::uint64_t high) {
    return v[low] | std::uint64_t{v[high]} << 32;
  };
  record->version = v[kPlacementVersion];
  record->num_ranks = v[kPlacementRanks];
  record->time_ns = wide(kPlacementTimeLow, kPlacementTimeHigh) + clock_offset_ns;
  record->iteration = wide(kPlacementIterationLow, kPlacementIterationHigh);
  if (record->num_ranks < 1 || record->num_ranks > kMaxRanks) return false;
  record->counts.resize(num_experts);
  for (std::uint64_t e = 0; e < num_experts; ++e)
    record->counts[e] = wide(kPlacementCounts + e, kPlacementCounts + num_experts + e);
  const auto first = v.begin() + static_cast<std::ptrdiff_t>(kPlacementCounts + 2 * num_experts);
  record->slots.assign(first, first + static_cast<std::ptrdiff_t>(num_slots));
  return std::all_of(record->slots.begin(), record->slots.end(), [&](std::uint32_t slot) {
    return slot == kEmptySlot || ((slot & 0xFFFF) < num_experts && slot >> 16 < record->num_ranks);
  });
}

}  // namespace

void RecordingReader::check_placement(const Section* section) {
  if (section == nullptr) return;
  if (section->bytes < sizeof(PlacementHeader))
    fail(Problem::kDamaged, "is damaged: impossible placement");
  PlacementHeader h;
  copy(section->offset, sizeof(h), &h);
  std::uint64_t widest = 0;
  for (const LayerEntry& layer : layers_)
    widest = std::max<std::uint64_t>(widest, layer.num_experts);
  const bool sized = h.num_slots >= 1 && h.num_slots <= kMaxSlots && h.kept >= 2 &&
                     h.kept <= kMaxKept && h.entry_bytes % 8 == 0 &&
                     h.entry_bytes >= placement_entry_words(widest, h.num_slots) * 8 &&
                     h.entry_bytes <= kMaxFileBytes;
  const PlacementShape shape{h.num_slots, h.kept, h.entry_bytes};
  if (!sized || section->count != layers_.size() || section->stride % 8 != 0 ||
      section->stride < shape.block_bytes() || section->stride > kMaxFileBytes ||
      section->stride * section->count > section->bytes - sizeof(h)) {
    fail(Problem::kDamaged, "is damaged: impossible placement");
  }
  placement_ = h;
  placement_offset_ = section->offset;
  placement_stride_ = section->stride;
}

std::uint64_t RecordingReader::placements_recorded() const {
  if (placement_.kept == 0) return 0;
  std::uint64_t recorded;
  copy(placement_offset_ + offsetof(PlacementHeader, recorded), sizeof(recorded), &recorded);
  return load_published(&recorded);  // heads that are read from now on are at least as new
}

PlacementRead RecordingReader::read_placements(std::uint32_t layer) const {
  PlacementRead result{};
  const std::uint64_t num_experts = layers_.at(layer).num_experts;
  if (placement_.kept == 0) return result;
  const std::uint64_t block =
      placement_offset_ + sizeof(PlacementHeader) + layer * placement_stride_;
  std::vector<std::uint64_t> words(placement_entry_words(num_experts, placement_.num_slots));
  std::vector<std::uint32_t> values(words.size());
  const auto read = [&](std::uint64_t n, PlacementRecord* record) {
    copy(block + sizeof(PlacementHead) + n % placement_.kept * placement_.entry_bytes,
         words.size() * 8, words.data());
    const std::uint32_t epoch = ring_epoch(n, placement_.kept);
    const auto whole = [&](std::uint64_t count) {
      return read_words(words.data(), count, epoch, values.data()) == SlotRead::kWhole;
    };
    return whole(kPlacementCounts) && values[kPlacementSlots] <= placement_.num_slots &&
           whole(placement_entry_words(num_experts, values[kPlacementSlots])) &&
           decode(values, num_experts, values[kPlacementSlots], clock_offset_ns_, record);
  };
  // A writer that is faster than we are may overwrite what was the latest one: then once more.
  constexpr int kAttempts = 8;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    std::uint64_t head, head_after;
    copy(block, sizeof(head), &head);
    head = load_published(&head);
    const std::uint64_t least = head - std::min(head, placement_.kept);
    bool latest = false;
    result = {{}, least};
    for (std::uint64_t n = least; n < head; ++n) {
      PlacementRecord record;
      latest = read(n, &record);
      if (latest)
        result.entries.push_back(std::move(record));
      else
        ++result.lost;
    }
    copy(block, sizeof(head_after), &head_after);
    if (latest || head_after == head) break;
  }
  return result;
}

}  // namespace dodoco
