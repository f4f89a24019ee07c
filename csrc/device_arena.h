// What the kernels of a device's lanes read and write: where it lies, and what it holds at first.
#pragma once

#include <cstdint>
#include <vector>

#include "divisor.h"
#include "format.h"
#include "recording_writer.h"

namespace dodoco {

// One allocation on a device. What comes before `zeroed` is copied there, what follows is cleared.
class DeviceArena {
 public:
  DeviceArena() = default;
  DeviceArena(const RecordingWriter& writer, std::uint32_t first_lane, std::uint32_t num_lanes);

  std::uint64_t bytes() const { return bytes_; }
  std::uint64_t zeroed() const { return zeroed_; }

  // What to copy, for an arena and a file at these addresses of the device.
  std::vector<std::uint8_t> image(const RecordingWriter& writer, std::uint64_t arena,
                                  std::uint64_t file) const;

  // Offsets.
  std::uint64_t lane(std::uint32_t lane) const { return lanes_ + lane * sizeof(DeviceLane); }
  std::uint64_t site(std::uint64_t layer) const { return sites_ + layer * sizeof(Site); }
  std::uint64_t clock() const { return clock_; }
  std::uint64_t scratch(std::uint32_t lane) const { return scratch_ + lane * scratch_bytes_; }
  std::uint64_t totals(std::uint32_t lane) const { return totals_ + lane * board_bytes_; }
  std::uint64_t traffic(std::uint32_t lane) const { return traffic_ + lane * traffic_bytes_; }

 private:
  std::uint32_t first_lane_ = 0, num_lanes_ = 0;
  std::uint64_t lanes_ = 0, sites_ = 0, clock_ = 0, scratch_ = 0, totals_ = 0, traffic_ = 0;
  std::uint64_t zeroed_ = 0, bytes_ = 0;
  std::uint64_t scratch_bytes_ = 0, board_bytes_ = 0, traffic_bytes_ = 0;
};

}  // namespace dodoco
