// Settings of device lanes, which the host changes in the order of a stream.
#include <array>
#include <cstddef>
#include <stdexcept>

#include "device_lanes.h"

namespace dodoco {
namespace {

struct Setting {
  const char* name;
  std::size_t offset, words;  // in ControlBlock
};
constexpr std::array<Setting, 5> kSettings = {{
    {"enabled", offsetof(ControlBlock, enabled), 1},
    {"record_every", offsetof(ControlBlock, record_every), 1},
    {"num_valid", offsetof(ControlBlock, num_valid), 2},
    {"map_version", offsetof(ControlBlock, map_version), 1},
    {"microbatch", offsetof(ControlBlock, microbatch), 1},
}};

std::size_t setting_named(const std::string& name) {
  for (std::size_t i = 0; i < kSettings.size(); ++i)
    if (name == kSettings[i].name) return i;
  throw std::invalid_argument("no setting '" + name + "' of a lane");
}

}  // namespace

void DeviceLanes::set(std::uint32_t lane, const std::string& name, std::int64_t value,
                      cuda::Stream stream) {
  check_lane(lane);
  const std::size_t index = setting_named(name);
  const Setting& setting = kSettings[index];
  const std::int64_t least = name == "record_every" ? 1 : 0;
  if (setting.words == 1 && (value < least || value > UINT32_MAX)) {
    throw std::invalid_argument(name + "=" + std::to_string(value) + ": give " +
                                std::to_string(least) + " to 4294967295");
  }
  const Use use(this);
  if (!use) return;
  const cuda::Current current(context_->get());
  int capturing = 0;
  const cuda::Result result = driver_.stream_is_capturing(stream, &capturing);
  if (capturing != 0 || result == cuda::kCaptureImplicit) {
    throw std::runtime_error(
        "the current stream is being captured, and the graph would set it at each replay: set it "
        "outside the capture");
  }
  cuda::check(result, "cuStreamIsCapturing");
  const cuda::Address control = lane_address(lane);
  if (name == "record_every") {
    const Divisor every(static_cast<std::uint64_t>(value));
    write_words(control + offsetof(ControlBlock, every_mask), &every, 6, stream);
  }
  write_words(control + setting.offset, &value, setting.words, stream);
  settings_[lane].values[index].store(value, std::memory_order_relaxed);
}

std::int64_t DeviceLanes::get(std::uint32_t lane, const std::string& name) const {
  check_lane(lane);
  return settings_[lane].values[setting_named(name)].load(std::memory_order_relaxed);
}

}  // namespace dodoco
