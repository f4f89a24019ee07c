#include "device_registry.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <map>
#include <stdexcept>
#include <vector>

#include "device_lanes.h"

namespace dodoco::device_registry {
namespace {

// Open lanes. A slot is written by whoever opens or closes lanes and read by launches.
constexpr std::size_t kMaxOpen = 64;
std::atomic<DeviceLanes*> g_open[kMaxOpen];
std::atomic<std::size_t> g_num_slots{0};  // ever used

struct Registry {
  std::mutex mutex;
  std::map<const void*, int> users;  // of files
  std::vector<DeviceLanes*> made;    // all there ever were
};

Registry& registry() {
  static Registry* made = [] {
    auto* result = new Registry;
    // A child of fork() has no driver: nothing there may call it, nor wait for a lock held here.
    pthread_atfork([] { registry().mutex.lock(); }, [] { registry().mutex.unlock(); },
                   [] {
                     for (DeviceLanes* lanes : registry().made) lanes->abandon();
                     registry().mutex.unlock();
                   });
    return result;
  }();
  return *made;
}

}  // namespace

void open(DeviceLanes* lanes) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> guard(all.mutex);
  const std::size_t slots = g_num_slots.load(std::memory_order_relaxed);
  std::size_t slot = 0;
  while (slot < slots && g_open[slot].load(std::memory_order_relaxed) != nullptr) ++slot;
  if (slot == kMaxOpen) throw std::invalid_argument("64 recordings on devices are open: detach");
  all.made.push_back(lanes);
  g_open[slot].store(lanes, std::memory_order_release);
  g_num_slots.store(std::max(slots, slot + 1), std::memory_order_release);
}

void close(DeviceLanes* lanes) {
  for (auto& slot : g_open) {
    DeviceLanes* expected = lanes;
    slot.compare_exchange_strong(expected, nullptr);
  }
}

DeviceLanes* of_site(std::uint64_t address) {
  const std::size_t count = g_num_slots.load(std::memory_order_acquire);
  for (std::size_t i = 0; i < count; ++i) {
    DeviceLanes* lanes = g_open[i].load(std::memory_order_acquire);
    if (lanes != nullptr && lanes->has_site(address)) return lanes;
  }
  return nullptr;
}

bool is_switched_off(std::uint64_t address) {
  Registry& all = registry();
  const std::lock_guard<std::mutex> guard(all.mutex);
  return std::any_of(all.made.begin(), all.made.end(), [&](const DeviceLanes* lanes) {
    return lanes->closed() && lanes->is_held() && lanes->has_site(address);
  });
}

File::File(const void* base) : lock_(registry().mutex), base_(base) {}

bool File::in_use() const { return registry().users.count(base_) != 0; }

void File::add_user() { ++registry().users[base_]; }

bool File::remove_user() {
  auto& users = registry().users;
  const auto found = users.find(base_);
  if (found == users.end() || --found->second != 0) return false;
  users.erase(found);
  return true;
}

}  // namespace dodoco::device_registry
