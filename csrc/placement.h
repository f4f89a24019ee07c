// Writes the placement section: where each expert lies, at each change.
//
// An entry is read as a slot of the ring is: each word carries the epoch of its lap, so a reader
// that finds the exact epoch in all of them has the whole entry. A writer that is killed in one
// takes the entry that it was overwriting with it, and no other.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "format.h"

namespace dodoco {

struct LayerPlacement {
  std::uint32_t layer;
  std::uint32_t num_ranks;
  std::vector<std::uint32_t> slots;  // logical expert | rank << 16, or kEmptySlot
};

struct PlacementShape {
  std::uint64_t num_slots, kept, entry_bytes;

  std::uint64_t block_bytes() const { return sizeof(PlacementHead) + kept * entry_bytes; }
  std::uint64_t section_bytes(std::uint64_t num_layers) const {
    return sizeof(PlacementHeader) + num_layers * block_bytes();
  }
};

// Throws std::invalid_argument where there can be no such section.
PlacementShape placement_shape(const std::vector<LayerEntry>& layers, std::uint64_t num_slots,
                               std::uint64_t kept);

class PlacementWriter {
 public:
  using CountsOf = std::function<void(std::uint64_t layer, std::uint64_t* counts)>;

  // `section`: zeros of shape.section_bytes(), which stay mapped until close().
  void open(std::uint8_t* section, const std::vector<LayerEntry>& layers, PlacementShape shape);

  // Throws std::invalid_argument where record() could not write them.
  void check(const std::vector<LayerPlacement>& layers) const;

  // Writes an entry for each of `layers` and returns their version; -1 once closed. `iteration`
  // and `counts_of` (what was counted of a layer so far, [num_experts]) are asked while close()
  // waits. Thread-safe.
  std::int64_t record(const std::vector<LayerPlacement>& layers,
                      const std::function<std::uint64_t()>& iteration, const CountsOf& counts_of);

  // After this, every record() is ignored; returns once none is under way.
  void close();

 private:
  void write(const LayerPlacement& placement, std::uint32_t version, std::uint64_t now_ns,
             std::uint64_t iteration, const std::vector<std::uint64_t>& counts);

  std::mutex mutex_;
  PlacementHeader* header_ = nullptr;
  PlacementShape shape_{};
  std::vector<std::uint32_t> num_experts_;
};

}  // namespace dodoco
