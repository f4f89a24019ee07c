#include "lane.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "divisor.h"

namespace dodoco {

class Lane::Turn {
 public:
  explicit Turn(Lane* lane) : lane_(lane) {
    while (lane_->busy_.exchange(true, std::memory_order_acquire)) sched_yield();
  }
  ~Turn() { lane_->busy_.store(false, std::memory_order_release); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  Lane* lane_;
};

Lane::Lane(std::vector<Layer> layers, RingWriter ring, Traffic traffic, void* recording)
    : layers_(std::move(layers)), ring_(ring), traffic_(traffic) {
  std::uint32_t largest = 1;
  for (const Layer& layer : layers_) largest = std::max(largest, layer.num_experts);
  histogram_.assign(largest + 2, 0);
  scratch_.assign(std::size_t{largest} * kScratchPerExpert, 0);
  control_.magic = kControlMagic;
  control_.recording = reinterpret_cast<std::uintptr_t>(recording);
  control_.enabled = 1;
  set_record_every(&control_, 1);
  control_.num_valid = -1;
}

void Lane::close() {
  if (!alive_.load(std::memory_order_relaxed)) return;
  const Turn turn(this);
  alive_.store(false, std::memory_order_relaxed);
}

// What every pass has in common; count_pass(layer, num_valid, &totals) fills histogram_.
template <typename CountPass>
RecordResult Lane::record_pass(std::uint64_t layer_index, bool recomputed, CountPass count_pass) {
  if (!alive_.load(std::memory_order_relaxed)) return RecordResult::kIgnored;
  if (layer_index >= layers_.size()) return RecordResult::kBadSite;
  const Turn turn(this);
  if (!alive_.load(std::memory_order_relaxed)) return RecordResult::kIgnored;
  Layer& layer = layers_[layer_index];
  if (recomputed) {
    layer.board.add_recomputed();
    return RecordResult::kIgnored;
  }
  // Passes that record nothing advance the iteration too, or ranks drift apart.
  if (static_cast<std::int64_t>(layer_index) <= last_layer_) ++iteration_;
  last_layer_ = static_cast<std::int64_t>(layer_index);
  if (control_.enabled == 0) return RecordResult::kIgnored;
  layer.board.prefetch();
  ring_.prefetch();

  PassTotals totals;
  const RecordResult counted = count_pass(layer, control_.num_valid, &totals);
  if (counted != RecordResult::kRecorded) return counted;

  const bool recorded = control_.record_every <= 1 || iteration_ % control_.record_every == 0;
  const std::uint64_t now = monotonic_ns();
  PassStatistics stats;
  if (recorded) stats = pass_statistics(histogram_.data(), layer.num_experts, scratch_.data());
  layer.board.add_pass(totals, histogram_.data(), stats, recorded, now);
  if (recorded) {
    std::uint32_t words[kSlotWords];
    words[kRouteType] = static_cast<std::uint32_t>(RecordType::kRoute) | 1u << 8;
    words[kRouteLayer] = static_cast<std::uint32_t>(layer_index) | control_.microbatch << 16;
    words[kRouteIterationLow] = static_cast<std::uint32_t>(iteration_);
    words[kRouteIterationHigh] = static_cast<std::uint32_t>(iteration_ >> 32);
    words[kRouteTimeLow] = static_cast<std::uint32_t>(now);
    words[kRouteTimeHigh] = static_cast<std::uint32_t>(now >> 32);
    words[kRouteTokens] = static_cast<std::uint32_t>(totals.tokens);
    words[kRouteAssignments] = stats.assignments;
    words[kRouteMaxCount] = stats.max_count;
    words[kRouteGiniLow] = static_cast<std::uint32_t>(stats.gini_numerator);
    words[kRouteGiniHigh] = static_cast<std::uint32_t>(stats.gini_numerator >> 32);
    words[kRoutePadded] = static_cast<std::uint32_t>(totals.padded);
    words[kRouteInvalid] = static_cast<std::uint32_t>(totals.invalid);
    words[kRouteDropped] = static_cast<std::uint32_t>(totals.capacity_dropped);
    words[kRouteUnused] = stats.unused_experts;
    words[kRouteMapVersion] = control_.map_version;
    ring_.push(words);
  }
  std::fill_n(histogram_.begin(), layer.num_experts + 2, 0);
  return RecordResult::kRecorded;
}

namespace {

std::int64_t valid_rows(std::int64_t rows, std::int64_t num_valid) {
  return num_valid < 0 ? rows : std::min(rows, num_valid);
}

// A pass's numbers are 32-bit in the ring.
bool fits(std::int64_t rows, std::int64_t columns) {
  return columns == 0 || rows <= static_cast<std::int64_t>(UINT32_MAX) / columns;
}

}  // namespace

RecordResult Lane::record(std::uint64_t layer_index, const IdTensor& ids, bool recomputed) {
  return record_pass(
      layer_index, recomputed, [&](const Layer& layer, std::int64_t num_valid, PassTotals* totals) {
        if (ids.rows < 0 || ids.k < 0 || ids.k > layer.num_experts) return RecordResult::kBadShape;
        if (!fits(ids.rows, ids.k)) return RecordResult::kTooLarge;
        const std::int64_t rows = valid_rows(ids.rows, num_valid);
        const std::uint32_t experts = layer.num_experts;
        std::uint32_t* histogram = histogram_.data();
        const auto count = [&](const auto* data) {
          return count_ids(data, rows, ids.k, ids.row_stride, ids.slot_stride, experts, histogram);
        };
        switch (ids.type) {
          case IdType::kInt16:
            totals->tokens = count(static_cast<const std::int16_t*>(ids.data));
            break;
          case IdType::kInt32:
            totals->tokens = count(static_cast<const std::int32_t*>(ids.data));
            break;
          case IdType::kInt64:
            totals->tokens = count(static_cast<const std::int64_t*>(ids.data));
            break;
        }
        const auto slots = static_cast<std::uint64_t>(ids.rows * ids.k);
        const auto beyond = static_cast<std::uint64_t>((ids.rows - rows) * ids.k);
        totals->padded = beyond + histogram[experts];
        totals->invalid = histogram[experts + 1];
        totals->assignments = slots - totals->padded - totals->invalid;
        return RecordResult::kRecorded;
      });
}

RecordResult Lane::record(std::uint64_t layer_index, const MapTensor& map, bool recomputed) {
  return record_pass(
      layer_index, recomputed, [&](const Layer& layer, std::int64_t num_valid, PassTotals* totals) {
        const std::uint32_t experts = layer.num_experts;
        const std::int64_t columns =
            map.packed ? (std::int64_t{experts} + 7) / 8 : std::int64_t{experts};
        if (map.rows < 0 || map.columns != columns) return RecordResult::kBadShape;
        if (!fits(map.rows, experts)) return RecordResult::kTooLarge;
        const std::int64_t rows = valid_rows(map.rows, num_valid);
        std::uint32_t* histogram = histogram_.data();
        totals->capacity_dropped =
            map.packed ? count_bit_map(map.data, rows, map.row_stride, map.column_stride, experts,
                                       layer.top_k, histogram, &totals->invalid)
                       : count_byte_map(map.data, rows, map.row_stride, map.column_stride, experts,
                                        layer.top_k, histogram);
        totals->tokens = static_cast<std::uint64_t>(rows);
        totals->padded = static_cast<std::uint64_t>(map.rows - rows) * layer.top_k;
        for (std::uint32_t e = 0; e < experts; ++e) totals->assignments += histogram[e];
        return RecordResult::kRecorded;
      });
}

RecordResult check_transfer(const Transfer& t, std::uint32_t num_ranks, std::uint64_t num_slots) {
  const std::uint32_t type = t.type & 0xFF;
  if (type != static_cast<std::uint32_t>(RecordType::kDispatch) &&
      type != static_cast<std::uint32_t>(RecordType::kCombine))
    return RecordResult::kBadSite;
  if (t.sent.size != num_ranks || t.received.size != num_ranks) return RecordResult::kBadShape;
  if (t.experts.size > UINT16_MAX) return RecordResult::kTooLarge;
  // A record that took more than half of the ring could hardly ever be read.
  const std::uint32_t slots = transfer_slots(2 * num_ranks + t.experts.size);
  return slots > kMaxRecordSlots || slots > num_slots / 2 ? RecordResult::kTooLarge
                                                          : RecordResult::kRecorded;
}

RecordResult Lane::record(const Transfer& transfer, std::int64_t* iteration) {
  if (!alive_.load(std::memory_order_relaxed)) return RecordResult::kIgnored;
  if (traffic_.blocks == nullptr || transfer.layer >= layers_.size()) return RecordResult::kBadSite;
  const RecordResult checked = check_transfer(transfer, traffic_.num_ranks, ring_.num_slots());
  if (checked != RecordResult::kRecorded) return checked;
  const Turn turn(this);
  if (!alive_.load(std::memory_order_relaxed)) return RecordResult::kIgnored;
  const std::uint64_t block =
      traffic_block(transfer.layer, transfer.type) * traffic_block_words(traffic_.num_ranks);
  LaneState state{iteration_, last_layer_, load_word(&ring_.header()->head), transfers_, {}};
  const TransferPlace place{&control_,
                            &state,
                            reinterpret_cast<std::uint64_t*>(ring_.header()),
                            traffic_.blocks + block,
                            traffic_.blocks + block,
                            ring_.log2_slots()};
  Alone alone;
  const std::int64_t recorded = write_transfer(place, transfer, 0, 1, alone);
  iteration_ = state.iteration;
  last_layer_ = state.last_layer;
  transfers_ = state.transfers;
  if (iteration != nullptr) *iteration = recorded;
  return recorded < 0 ? RecordResult::kIgnored : RecordResult::kRecorded;
}

thread_local LaneChoice::OfThread LaneChoice::of_thread_{};

LaneChoice::LaneChoice(const void* usual, void* chosen) {
  static std::atomic<std::uint64_t> last_id{0};
  OfThread& choices = of_thread_;
  if (choices.count == std::size(choices.entries))
    throw std::length_error("a thread may choose at most 16 lanes at a time: leave one first");
  id_ = ++last_id;
  choices.entries[choices.count++] = {usual, chosen, id_};
}

LaneChoice::~LaneChoice() {
  // Not always the latest one: Python's context managers may end in any order.
  OfThread& choices = of_thread_;
  Entry* end = choices.entries + choices.count;
  Entry* kept = std::remove_if(choices.entries, end, [&](const Entry& e) { return e.id == id_; });
  choices.count -= static_cast<std::uint32_t>(end - kept);
}

namespace {

template <typename Tensor>
RecordResult at_site(const void* address, const Tensor& tensor, bool recomputed) {
  const Site* site = static_cast<const Site*>(address);
  const std::uint64_t magic = load_word(&site->magic);
  if (magic != kSiteMagic) return magic == 0 ? RecordResult::kIgnored : RecordResult::kBadSite;
  if (site->self != reinterpret_cast<std::uintptr_t>(address)) return RecordResult::kCopiedSite;
  auto* lane = reinterpret_cast<Lane*>(site->lane);
  if (void* chosen = LaneChoice::instead_of(lane)) lane = static_cast<Lane*>(chosen);
  return lane->record(site->layer, tensor, recomputed);
}

}  // namespace

RecordResult record_at_site(const void* site, const IdTensor& ids, bool recomputed) {
  return at_site(site, ids, recomputed);
}

RecordResult record_at_site(const void* site, const MapTensor& map, bool recomputed) {
  return at_site(site, map, recomputed);
}

}  // namespace dodoco
