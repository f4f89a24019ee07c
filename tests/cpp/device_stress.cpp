// Device lanes under the sanitizers, on the fake driver: every call fails once in turn, and lanes
// open and close beside others that launch. Prints what it did; ends with 1 where something is
// left behind or lost.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#include "device_lanes.h"
#include "device_registry.h"
#include "recording_reader.h"

extern "C" {
void fake_reset(int num_devices);
void fake_fail(const char* name, int after, int code);
void fake_recover();
const char* fake_calls();
int fake_num_launches();
void fake_live(int* out);
}

namespace {

using namespace dodoco;

int g_wrong = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "device_stress: %s\n", what.c_str());
  g_wrong = 1;
}

RecordingSpec spec_at(const std::string& path) {
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = "{}";
  spec.layers = {{8, 2}, {60, 4}};
  spec.num_lanes = 3;
  spec.max_bytes = 1 << 18;
  return spec;
}

void add_kernels(DeviceLanes* lanes) {
  for (const bool shared : {false, true}) {
    for (const std::uint32_t experts : {8u, 60u}) {
      lanes->add_kernel(
          {ChoiceForm::kIds, 8, shared, experts, 4, 64, 8, 128, "observe", 4, 60000, "code"});
    }
  }
  lanes->calibrate_clock("read_clock", "code");
}

RecordResult launch(DeviceLanes* lanes, std::uint64_t layer, std::int64_t rows) {
  const std::uint64_t site = lanes->site_address(layer);
  DeviceLanes* found = device_registry::of_site(site);
  if (found == nullptr) return RecordResult::kCopiedSite;
  const DeviceTensor ids{reinterpret_cast<const void*>(0x1000), ChoiceForm::kIds, 8, rows, 2, 2, 1};
  return found->launch(site, ids, nullptr, false);
}

// One life of a recording with lanes on a device. False: a failure ended it early.
bool live_once(const std::string& path, int launches) {
  RecordingWriter writer(spec_at(path));
  bool whole = true;
  DeviceLanes* lanes = nullptr;
  try {
    lanes = new DeviceLanes(&writer, 0, 1, 2);
    add_kernels(lanes);
    lanes->set(0, "record_every", 3, nullptr);
    for (int i = 0; i < launches; ++i) {
      const RecordResult result = launch(lanes, static_cast<std::uint64_t>(i % 2), i * 100);
      whole = whole && result == RecordResult::kRecorded;
    }
  } catch (const cuda::Error&) {
    whole = false;
  }
  try {
    if (lanes != nullptr) lanes->close(nullptr);
  } catch (const cuda::Error&) {
    whole = false;
  }
  writer.close();
  expect(!RecordingReader(path).metadata().empty(), "a recording cannot be read");
  ::unlink(path.c_str());
  return whole;
}

std::map<std::string, int> count_calls() {
  std::map<std::string, int> counts;
  std::istringstream names(fake_calls());
  for (std::string name; names >> name;) ++counts[name];
  return counts;
}

int nothing_left() {
  int live[5];
  fake_live(live);
  return live[0] + live[1] + live[2] + live[3] + live[4];
}

// Every call of a life fails once, alone or with all that follow.
void fail_in_turn(const std::string& path) {
  // What gives things back: a driver that refuses that keeps them.
  const std::set<std::string> kEnds = {"cuMemFree",        "cuMemHostUnregister",
                                       "cuModuleUnload",   "cuDevicePrimaryCtxRelease",
                                       "cuStreamDestroy",  "cuCtxSynchronize",
                                       "cuCtxPopCurrent",  "cuThreadExchangeStreamCaptureMode",
                                       "cuCtxPushCurrent", "cuMemcpyHtoD"};
  fake_reset(1);
  expect(live_once(path, 4), "a life without failures failed");
  const auto calls = count_calls();
  int lives = 0;
  for (const auto& [name, count] : calls) {
    for (int after = 0; after < count; ++after) {
      for (const int code : {700, -700}) {
        fake_reset(1);
        fake_fail(name.c_str(), after, code);
        live_once(path, 4);
        ++lives;
        const bool must_be_clean = code > 0 && kEnds.count(name) == 0;
        if (must_be_clean) expect(nothing_left() == 0, name + " failed: something is left");
        fake_recover();
      }
    }
  }
  std::printf("device_stress: %d lives, each with another call that fails\n", lives);
}

void open_beside(const std::string& folder, double seconds) {
  fake_reset(1);
  RecordingWriter writer(spec_at(folder + "/steady"));
  auto* steady = new DeviceLanes(&writer, 0, 1, 2);
  add_kernels(steady);
  std::atomic<bool> stop{false};
  std::atomic<int> lives{0};
  std::vector<std::thread> others;
  for (int number = 0; number < 2; ++number) {
    others.emplace_back([&, number] {
      while (!stop.load()) {
        live_once(folder + "/other" + std::to_string(number), 3);
        ++lives;
      }
    });
  }
  int launched = 0;
  const std::uint64_t end = monotonic_ns() + static_cast<std::uint64_t>(seconds * 1e9);
  while (monotonic_ns() < end) {
    expect(launch(steady, 0, launched % 500) == RecordResult::kRecorded, "a launch was refused");
    ++launched;
  }
  stop.store(true);
  for (std::thread& other : others) other.join();
  expect(fake_num_launches() == launched + 3 * lives.load(), "launches are missing");
  steady->close(nullptr);
  writer.close();
  ::unlink((folder + "/steady").c_str());
  expect(nothing_left() == 0, "something is left");
  std::printf("device_stress: %d launches beside %d lives\n", launched, lives.load());
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return 2;
  const std::string folder = arguments[1];
  fail_in_turn(folder + "/failing");
  open_beside(folder, 2);
  return g_wrong;
}
