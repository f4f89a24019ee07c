#include "placement.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "lane.h"
#include "ring.h"
#include "words.h"

namespace dodoco {

PlacementShape placement_shape(const std::vector<LayerEntry>& layers, std::uint64_t num_slots,
                               std::uint64_t kept) {
  if (num_slots < 1 || num_slots > kMaxSlots) {
    throw std::invalid_argument(std::to_string(num_slots) +
                                " physical experts of a layer; give 1 to " +
                                std::to_string(kMaxSlots));
  }
  if (kept < 2 || kept > kMaxKept) {  // one would be lost to a kill in the middle of the next
    throw std::invalid_argument(std::to_string(kept) + " placements kept of a layer; give 2 to " +
                                std::to_string(kMaxKept));
  }
  std::uint64_t widest = 0;
  for (const LayerEntry& layer : layers)
    widest = std::max<std::uint64_t>(widest, layer.num_experts);
  return {num_slots, kept, placement_entry_words(widest, num_slots) * 8};
}

void PlacementWriter::open(std::uint8_t* section, const std::vector<LayerEntry>& layers,
                           PlacementShape shape) {
  header_ = reinterpret_cast<PlacementHeader*>(section);
  shape_ = shape;
  *header_ = {shape.num_slots, shape.kept, shape.entry_bytes, 0, {}};
  for (const LayerEntry& layer : layers) num_experts_.push_back(layer.num_experts);
}

void PlacementWriter::check(const std::vector<LayerPlacement>& layers) const {
  if (num_experts_.empty()) {
    throw std::invalid_argument(
        "this recording has no room for placements: create it with placements=");
  }
  for (const LayerPlacement& each : layers) {
    if (each.layer >= num_experts_.size())
      throw std::invalid_argument("no layer " + std::to_string(each.layer) + " in this recording");
    const std::string where = "layer " + std::to_string(each.layer);
    if (each.num_ranks < 1 || each.num_ranks > kMaxRanks) {
      throw std::invalid_argument(where + " lies on " + std::to_string(each.num_ranks) +
                                  " ranks; give 1 to " + std::to_string(kMaxRanks));
    }
    if (each.slots.size() > shape_.num_slots) {
      throw std::invalid_argument(where + " has " + std::to_string(each.slots.size()) +
                                  " physical experts; this recording has room for " +
                                  std::to_string(shape_.num_slots));
    }
    for (const std::uint32_t slot : each.slots) {
      const std::uint32_t expert = slot & 0xFFFF, rank = slot >> 16;
      if (slot == kEmptySlot || (expert < num_experts_[each.layer] && rank < each.num_ranks))
        continue;
      throw std::invalid_argument(where + " has expert " + std::to_string(expert) + " on rank " +
                                  std::to_string(rank) + "; there are " +
                                  std::to_string(num_experts_[each.layer]) + " experts and " +
                                  std::to_string(each.num_ranks) + " ranks");
    }
  }
}

std::int64_t PlacementWriter::record(const std::vector<LayerPlacement>& layers,
                                     const std::function<std::uint64_t()>& iteration,
                                     const CountsOf& counts_of) {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (header_ == nullptr) return -1;
  const std::uint64_t recorded = load_word(&header_->recorded);
  const auto version = static_cast<std::uint32_t>(recorded);
  const std::uint64_t now_ns = monotonic_ns(), latest = iteration();
  std::vector<std::uint64_t> counts;
  for (const LayerPlacement& each : layers) {
    counts.resize(num_experts_[each.layer]);
    counts_of(each.layer, counts.data());
    write(each, version, now_ns, latest, counts);
  }
  publish_word(&header_->recorded, recorded + 1);
  return version;
}

void PlacementWriter::write(const LayerPlacement& placement, std::uint32_t version,
                            std::uint64_t now_ns, std::uint64_t iteration,
                            const std::vector<std::uint64_t>& counts) {
  auto* block =
      reinterpret_cast<std::uint8_t*>(header_ + 1) + placement.layer * shape_.block_bytes();
  auto* head_of = reinterpret_cast<PlacementHead*>(block);
  const std::uint64_t head = load_word(&head_of->head);
  auto* words = reinterpret_cast<std::uint64_t*>(block + sizeof(PlacementHead) +
                                                 head % shape_.kept * shape_.entry_bytes);
  const std::uint64_t epoch = std::uint64_t{ring_epoch(head, shape_.kept)} << 32;
  const auto put = [&](std::uint64_t word, std::uint64_t value) {
    store_word(words + word, epoch | (value & 0xFFFFFFFF));
  };
  put(kPlacementVersion, version);
  put(kPlacementTimeLow, now_ns);
  put(kPlacementTimeHigh, now_ns >> 32);
  put(kPlacementIterationLow, iteration);
  put(kPlacementIterationHigh, iteration >> 32);
  put(kPlacementRanks, placement.num_ranks);
  put(kPlacementSlots, placement.slots.size());
  put(kPlacementSlots + 1, 0);
  const std::uint64_t num_experts = counts.size();
  for (std::uint64_t e = 0; e < num_experts; ++e) {
    put(kPlacementCounts + e, counts[e]);
    put(kPlacementCounts + num_experts + e, counts[e] >> 32);
  }
  for (std::uint64_t i = 0; i < placement.slots.size(); ++i)
    put(kPlacementCounts + 2 * num_experts + i, placement.slots[i]);
  publish_word(&head_of->head, head + 1);
}

void PlacementWriter::close() {
  const std::lock_guard<std::mutex> guard(mutex_);
  header_ = nullptr;
}

}  // namespace dodoco
