// Device lanes under the sanitizers, on the fake driver: every call fails once in turn, lanes open
// and close beside others that launch, and lanes close and are forked while threads launch through
// them. Prints what it did; ends with 1 where something is left behind or lost.
#include <sys/wait.h>
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
  spec.group_size = 4;
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
  lanes->add_transfers("code");
}

// Both nodes of a transfer, with counts of the host's.
RecordResult transfer(DeviceLanes* lanes, std::uint32_t number, cuda::Stream stream = nullptr) {
  const RecordResult begun = lanes->begin_transfer(number % kTransfersAtOnce, stream);
  if (begun != RecordResult::kRecorded) return begun;
  Transfer made{};
  made.sent = made.received = {nullptr, 1, 4, 0};
  made.iteration = -1;
  made.type = static_cast<std::uint32_t>(RecordType::kDispatch);
  made.begin_slot = number % kTransfersAtOnce;
  return lanes->end_transfer(made, {1, 2, 3, 4, number, 6, 7, 8}, stream);
}

cuda::Stream stream_at(std::uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

RecordResult launch(DeviceLanes* lanes, std::uint64_t layer, std::int64_t rows,
                    cuda::Stream stream = nullptr) {
  const std::uint64_t site = lanes->site_address(layer);
  DeviceLanes* found = device_registry::of_site(site);
  if (found == nullptr) return RecordResult::kCopiedSite;
  const DeviceTensor ids{reinterpret_cast<const void*>(0x1000), ChoiceForm::kIds, 8, rows, 2, 2, 1};
  return found->launch(site, ids, stream, false);
}

struct Life {
  bool whole = true;   // nothing failed
  bool closed = true;  // nor did close()
};

// One life of a recording with lanes on a device.
Life live_once(const std::string& path, int launches) {
  RecordingWriter writer(spec_at(path));
  Life life;
  DeviceLanes* lanes = nullptr;
  try {
    lanes = new DeviceLanes(&writer, 0, 1, 2);
    add_kernels(lanes);
    lanes->set(0, "record_every", 3, nullptr);
    for (int i = 0; i < launches; ++i) {
      const RecordResult result = launch(lanes, static_cast<std::uint64_t>(i % 2), i * 100);
      life.whole = life.whole && result == RecordResult::kRecorded;
    }
    const RecordResult sent = transfer(lanes, static_cast<std::uint32_t>(launches));
    life.whole = life.whole && sent == RecordResult::kRecorded;
  } catch (const cuda::Error&) {
    life.whole = false;
  }
  try {
    if (lanes != nullptr) lanes->close(nullptr);
  } catch (const cuda::Error&) {
    life.whole = life.closed = false;
  }
  writer.close();
  expect(!RecordingReader(path).metadata().empty(), "a recording cannot be read");
  ::unlink(path.c_str());
  return life;
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
  const std::set<std::string> kGivesBack = {"cuMemFree", "cuMemHostUnregister", "cuModuleUnload",
                                            "cuDevicePrimaryCtxRelease", "cuStreamDestroy"};
  fake_reset(1);
  expect(live_once(path, 4).whole, "a life without failures failed");
  const auto calls = count_calls();
  int lives = 0, kept = 0;
  for (const auto& [name, count] : calls) {
    for (int after = 0; after < count; ++after) {
      for (const int code : {700, -700}) {
        fake_reset(1);
        fake_fail(name.c_str(), after, code);
        const Life life = live_once(path, 4);
        ++lives;
        if (code > 0 && !life.closed) ++kept;  // what may still be written to is not taken away
        if (code > 0 && life.closed && kGivesBack.count(name) == 0)
          expect(nothing_left() == 0, name + " failed: something is left");
        fake_recover();
      }
    }
  }
  expect(kept * 4 < lives, "most single failures are not those of close()");
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
        expect(live_once(folder + "/other" + std::to_string(number), 3).whole, "a life failed");
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
  expect(fake_num_launches() == launched + 5 * lives.load(), "launches are missing");
  steady->close(nullptr);
  writer.close();
  ::unlink((folder + "/steady").c_str());
  expect(nothing_left() == 0, "something is left");
  std::printf("device_stress: %d launches beside %d lives\n", launched, lives.load());
}

// Whether a forked child, which has no driver, is kept from it.
bool child_calls_nothing(DeviceLanes* lanes) {
  const std::uint64_t site = lanes->site_address(0);
  const ::pid_t child = ::fork();
  if (child == 0) {
    // Another thread may have left the fake's lock taken: any call would wait for ever.
    const bool ignored = lanes->closed() && launch(lanes, 0, 5) == RecordResult::kIgnored &&
                         device_registry::is_switched_off(site);
    lanes->set(0, "enabled", 0, nullptr);
    lanes->reserve(1);
    lanes->close(nullptr);
    ::_exit(ignored ? 0 : 1);
  }
  int status = 1;
  return ::waitpid(child, &status, 0) == child && status == 0;
}

void close_under_launches(const std::string& folder, int rounds) {
  long launched = 0;
  for (int round = 0; round < rounds; ++round) {
    fake_reset(1);
    RecordingWriter writer(spec_at(folder + "/closing"));
    auto* lanes = new DeviceLanes(&writer, 0, 0, 3);
    add_kernels(lanes);
    const int before = fake_num_launches();
    std::atomic<int> recorded{0}, running{0}, transfers{0};
    std::vector<std::thread> threads;
    for (std::uintptr_t number = 1; number <= 3; ++number) {
      threads.emplace_back([&, number] {
        ++running;
        for (int i = 0;; ++i) {
          const RecordResult result = launch(lanes, number % 2, i % 300, stream_at(number * 16));
          // Found closed: before, or while it was launching.
          if (result == RecordResult::kIgnored || result == RecordResult::kCopiedSite) return;
          expect(result == RecordResult::kRecorded, "a launch was refused");
          ++recorded;
          if (i % 64 == 0) {
            const RecordResult sent =
                transfer(lanes, static_cast<std::uint32_t>(i), stream_at(number * 16));
            if (sent == RecordResult::kRecorded) ++transfers;
            expect(sent == RecordResult::kRecorded || lanes->closed(), "a transfer was refused");
          }
          if (i % 16 == 0)
            lanes->set(static_cast<std::uint32_t>(number - 1), "num_valid", i, stream_at(16));
        }
      });
    }
    while (running < 3 || recorded < 30) std::this_thread::yield();
    if (round % 4 == 0) expect(child_calls_nothing(lanes), "a child called the driver");
    lanes->close(nullptr);
    for (std::thread& thread : threads) thread.join();
    writer.close();
    ::unlink((folder + "/closing").c_str());
    // Of a transfer under way at the end, the begin alone may have been launched.
    const int beyond = fake_num_launches() - before - recorded - 2 * transfers;
    expect(beyond >= 0 && beyond <= 3, "launches are missing");
    expect(nothing_left() == 0, "something is left");
    launched += recorded;
  }
  std::printf("device_stress: %d times closed under %ld launches\n", rounds, launched);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return 2;
  const std::string folder = arguments[1];
  fail_in_turn(folder + "/failing");
  open_beside(folder, 2);
  close_under_launches(folder, 40);
  return g_wrong;
}
