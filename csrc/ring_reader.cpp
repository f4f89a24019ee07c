// Reading the ring of a lane: records of one slot and of several, while their writer goes on.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "capture.h"
#include "recording_reader.h"
#include "ring.h"

namespace dodoco {
namespace {

constexpr std::uint64_t kSlotsPerRead = 512;

// Words of the file as a copy: aligned as they are there, so that the kernel copies them whole.
struct alignas(64) SlotBuffer {
  std::uint64_t words[kSlotsPerRead * kSlotWords];
};

RouteRecord decode_route(const std::uint32_t (&v)[kSlotWords], std::uint32_t lane,
                         std::uint64_t clock_offset_ns) {
  const auto wide = [&](int low, int high) { return v[low] | std::uint64_t{v[high]} << 32; };
  RouteRecord r{};
  r.iteration = wide(kRouteIterationLow, kRouteIterationHigh);
  r.time_ns = wide(kRouteTimeLow, kRouteTimeHigh) + clock_offset_ns;
  r.gini_numerator = wide(kRouteGiniLow, kRouteGiniHigh);
  r.layer = v[kRouteLayer] & 0xFFFF;
  r.microbatch = v[kRouteLayer] >> 16;
  r.tokens = v[kRouteTokens];
  r.assignments = v[kRouteAssignments];
  r.max_count = v[kRouteMaxCount];
  r.padded = v[kRoutePadded];
  r.invalid = v[kRouteInvalid];
  r.capacity_dropped = v[kRouteDropped];
  r.unused_experts = v[kRouteUnused];
  r.map_version = v[kRouteMapVersion];
  r.type = static_cast<std::uint8_t>(v[kRouteType]);
  r.lane = static_cast<std::uint8_t>(lane);
  r.direction = (v[kRouteType] & kFlagBackward) != 0;
  r.recompute = (v[kRouteType] & kFlagRecompute) != 0;
  return r;
}

// A record of several slots, as far as it has been read.
struct Partial {
  std::vector<std::uint32_t> words;  // of all its slots
  std::uint64_t start = 0;           // its position
  std::uint32_t slots = 0;           // read so far
  std::uint32_t expected = 0;        // slots of the whole record

  void begin(std::uint64_t position, const std::uint32_t (&values)[kSlotWords]) {
    start = position;
    slots = 0;
    expected = values[kTransferType] >> 8 & 0xFF;
    words.clear();
    add(values);
  }
  void add(const std::uint32_t (&values)[kSlotWords]) {
    words.insert(words.end(), values, values + kSlotWords);
    ++slots;
  }
  bool is_whole() const { return slots != 0 && slots >= expected; }
  std::uint32_t drop() { return std::exchange(slots, 0); }
};

// False: not a transfer of a group of `group_size`.
bool decode_transfer(const Partial& record, std::uint32_t group_size, std::uint32_t lane,
                     std::uint64_t clock_offset_ns, RingRead* result) {
  const std::uint32_t* v = record.words.data();
  const std::uint32_t ranks = v[kTransferSizes] & 0xFFFF, experts = v[kTransferSizes] >> 16;
  if (ranks != group_size || transfer_slots(2 * ranks + experts) != record.expected) return false;
  const auto wide = [&](int low, int high) { return v[low] | std::uint64_t{v[high]} << 32; };
  TransferRecord r{};
  r.iteration = wide(kTransferIterationLow, kTransferIterationHigh);
  r.begin_ns = wide(kTransferBeginLow, kTransferBeginHigh) + clock_offset_ns;
  r.end_ns = wide(kTransferEndLow, kTransferEndHigh) + clock_offset_ns;
  r.layer = v[kTransferLayer] & 0xFFFF;
  r.microbatch = v[kTransferLayer] >> 16;
  r.bytes_per_row = v[kTransferBytesPerRow];
  r.sequence = v[kTransferSequence];
  r.num_experts = experts;
  r.map_version = v[kTransferMapVersion];
  r.type = static_cast<std::uint8_t>(v[kTransferType]);
  r.lane = static_cast<std::uint8_t>(lane);
  r.direction = (v[kTransferType] & kFlagBackward) != 0;
  r.recompute = (v[kTransferType] & kFlagRecompute) != 0;
  r.timed = (v[kTransferType] & kFlagUntimed) == 0;
  r.unit = (v[kTransferType] & kFlagTokens) != 0;
  result->transfers.push_back(r);
  for (std::uint32_t i = 0; i < 2 * ranks + experts; ++i)
    result->counts.push_back(v[capture::place_of_count(i)]);
  return true;
}

bool is_transfer(std::uint32_t type) {
  return type == static_cast<std::uint32_t>(RecordType::kDispatch) ||
         type == static_cast<std::uint32_t>(RecordType::kCombine);
}

}  // namespace

RingRead RecordingReader::read_ring(std::uint32_t lane, std::uint64_t position,
                                    std::uint64_t limit) const {
  const Ring ring = rings_.at(lane);
  RingRead result{};
  result.next = position;
  std::uint64_t head = this->head(lane);
  result.records.reserve(std::min({head > position ? head - position : 0, ring.num_slots, limit}));
  const std::unique_ptr<SlotBuffer> buffer(new SlotBuffer);  // not cleared
  bool orphaned = false;
  Partial partial;
  const auto num_read = [&] { return result.records.size() + result.transfers.size(); };
  // A writer that is faster than we are could keep us here: a ring's worth is enough for one call.
  std::uint64_t budget = ring.num_slots;
  while (result.next < head && num_read() < limit && budget > 0) {
    if (head - result.next > ring.num_slots) {
      result.lost += partial.drop() + (head - ring.num_slots - result.next);
      result.next = head - ring.num_slots;
    }
    const std::uint64_t first = result.next & (ring.num_slots - 1);
    const std::uint64_t count = std::min(
        {head - result.next, ring.num_slots - first, limit - num_read(), budget, kSlotsPerRead});
    copy(ring.offset + sizeof(RingHeader) + first * kSlotBytes, count * kSlotBytes, buffer->words);
    budget -= count;
    bool lapped = false;
    for (std::uint64_t i = 0; i < count; ++i) {
      std::uint32_t values[kSlotWords];
      const SlotRead read = read_slot(buffer->words + i * kSlotWords,
                                      ring_epoch(result.next, ring.num_slots), values);
      if (read == SlotRead::kNotYet && !orphaned) {
        // The head was seen before the slot. Nobody will complete what a dead writer left.
        if (owner() == Owner::kAlive) {
          result.next -= partial.drop();
          return result;
        }
        orphaned = true;
        budget += count;
        break;  // read it once more: it may have been completed before the owner went
      }
      ++result.next;
      if (read != SlotRead::kWhole) {
        result.lost += partial.drop() + 1;
        lapped = lapped || read == SlotRead::kLapped;
        continue;
      }
      const std::uint32_t type = values[kRouteType] & 0xFF;
      if (type == static_cast<std::uint32_t>(RecordType::kContinuation)) {
        if (partial.slots == 0) {  // what it continues was overwritten
          ++result.lost;
          continue;
        }
        partial.add(values);
      } else {
        result.unknown += partial.drop();  // its other slots never came
        if (type == static_cast<std::uint32_t>(RecordType::kRoute)) {
          result.records.push_back(decode_route(values, lane, clock_offset_ns_));
          continue;
        }
        if (!is_transfer(type)) {
          ++result.unknown;
          continue;
        }
        partial.begin(result.next - 1, values);
      }
      if (partial.is_whole()) {
        const bool known = decode_transfer(partial, group_size_, lane, clock_offset_ns_, &result);
        const std::uint32_t slots = partial.drop();
        if (!known) result.unknown += slots;
      }
    }
    if (lapped) head = std::max(head, this->head(lane));
  }
  // Some of it is behind the limit: next time.
  result.next -= partial.drop();
  return result;
}

}  // namespace dodoco
