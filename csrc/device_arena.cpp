#include "device_arena.h"

#include <algorithm>
#include <cstring>
#include <iterator>

namespace dodoco {
namespace {

std::uint64_t aligned(std::uint64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

DeviceArena::DeviceArena(const RecordingWriter& writer, std::uint32_t first_lane,
                         std::uint32_t num_lanes)
    : first_lane_(first_lane), num_lanes_(num_lanes) {
  std::uint64_t widest = 1;
  for (const LayerEntry& layer : writer.layers()) {
    std::uint64_t padded = 1;
    while (padded < layer.num_experts) padded *= 2;
    widest = std::max(widest, padded);
  }
  board_bytes_ = writer.section(SectionKind::kBoard, first_lane).bytes;
  if (writer.group_size() != 0)
    traffic_bytes_ = aligned(writer.section(SectionKind::kTraffic, first_lane).bytes);
  scratch_bytes_ = aligned((kScratchCounts + widest) * 4);
  const auto take = [&](std::uint64_t bytes) {
    const std::uint64_t at = bytes_;
    bytes_ += aligned(bytes);
    return at;
  };
  lanes_ = take(num_lanes * sizeof(DeviceLane));
  sites_ = take(writer.layers().size() * sizeof(Site));
  zeroed_ = bytes_;
  clock_ = take(8);
  scratch_ = take(num_lanes * scratch_bytes_);
  totals_ = take(num_lanes * board_bytes_);
  traffic_ = take(num_lanes * traffic_bytes_);
}

std::vector<std::uint8_t> DeviceArena::image(const RecordingWriter& writer, std::uint64_t arena,
                                             std::uint64_t file) const {
  std::vector<std::uint8_t> image(zeroed_, 0);
  const Divisor every(1);
  for (std::uint32_t number = 0; number < num_lanes_; ++number) {
    const Section& ring = writer.section(SectionKind::kRing, first_lane_ + number);
    DeviceLane block{};
    ControlBlock& control = block.control;
    control.magic = kControlMagic;
    control.recording = file;
    control.enabled = 1;
    control.record_every = 1;
    control.num_valid = -1;
    control.ring = file + ring.offset;
    control.log2_slots = static_cast<std::uint64_t>(__builtin_ctzll(ring.count));
    control.scratch = arena + scratch(number);
    control.every_mask = every.mask;
    control.every_inverse = every.inverse;
    control.every_limit = every.limit;
    block.state.last_layer = -1;
    std::copy(std::begin(kMaxMeanEighths), std::end(kMaxMeanEighths), block.max_mean_eighths);
    std::memcpy(image.data() + lane(number), &block, sizeof(block));
  }
  for (std::uint64_t layer = 0; layer < writer.layers().size(); ++layer) {
    const Site made{kSiteMagic, arena + site(layer), arena + lane(0), layer, {}};
    std::memcpy(image.data() + site(layer), &made, sizeof(made));
  }
  return image;
}

}  // namespace dodoco
