// What the fake driver of fake_cuda.cpp remembers.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "capture.h"
#include "cuda_driver.h"

namespace {

using namespace dodoco::cuda;

constexpr int kInvalidValue = 1, kNotFound = 500, kLaunchTimeout = 702, kCaptureUnsupported = 900;

struct Launch {
  std::string name;
  unsigned programs, threads, shared_bytes;
  std::uintptr_t stream;
  std::uint64_t arguments[13];
};

struct Memory {
  void* base;
  std::size_t bytes;
};

struct State {
  std::recursive_mutex mutex;
  std::string calls;                                    // names, a line each
  std::map<std::string, std::pair<int, int>> failures;  // name -> calls until then, code
  int sticky = 0;  // what every call returns from a sticky failure on
  int num_devices = 1;
  std::map<Address, Memory> allocated;
  std::map<void*, std::size_t> registered;
  std::map<std::pair<Context, void*>, void*> aliases;
  std::map<Context, int> retained;
  std::set<Module> modules;
  std::map<Function, std::pair<std::string, Context>> functions;
  std::set<Stream> streams;
  std::map<Stream, int> capturing;
  std::map<Stream, std::vector<std::function<void()>>> pending;
  std::vector<std::function<void()>> graph;  // what was captured, of transfers
  std::vector<Launch> launches;
  bool quiet = false;  // launches only return: for timing what comes before them
  void (*run)(const char* name, const std::uint64_t* arguments, unsigned programs) = nullptr;
  bool at_once = false;
  std::uint64_t clock = 0;
  std::uintptr_t next = 0x1000;
};

State& state() {
  static auto* made = new State;
  return *made;
}

thread_local std::vector<Context> contexts;
thread_local int capture_mode = 0;

template <typename Handle>
Handle make_handle(State& s) {
  return reinterpret_cast<Handle>(s.next += 16);
}

// Writes the call down. Not 0: what it has to fail with.
Result enter(State& s, const char* name) {
  s.calls += name;
  s.calls += '\n';
  if (s.sticky != 0) return s.sticky;
  const auto found = s.failures.find(name);
  if (found == s.failures.end() || found->second.first-- > 0) return 0;
  const int code = found->second.second;
  s.failures.erase(found);
  if (code < 0) s.sticky = -code;
  return code < 0 ? -code : code;
}

Context context_of(Device device) {
  return reinterpret_cast<Context>(std::uintptr_t{0x10} + static_cast<unsigned>(device));
}

// Ends at a page that may not be touched. No address is given out twice, nor touched once free.
Address take_memory(State& s, std::size_t bytes) {
  constexpr std::size_t kPage = 4096;
  const std::size_t pages = (bytes + kPage - 1) / kPage * kPage;
  void* base =
      ::mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) std::abort();
  ::mprotect(static_cast<char*>(base) + pages, kPage, PROT_NONE);
  std::memset(base, 0xA5, pages);
  const Address address = reinterpret_cast<Address>(base) + pages - (bytes + 255) / 256 * 256;
  s.allocated[address] = {base, pages + kPage};
  return address;
}

void give_memory_back(const Memory& memory) {
  ::mmap(memory.base, memory.bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

std::atomic<bool> g_full{false};
std::atomic<int> g_waiting{0};

// False: given up.
bool wait_for_room() {
  ++g_waiting;
  for (int i = 0; i < 5000 && g_full; ++i) ::usleep(1000);
  --g_waiting;
  return !g_full;
}

// Does what is in a stream.
void settle(State& s, Stream stream) {
  auto work = std::move(s.pending[stream]);
  s.pending.erase(stream);
  for (const auto& each : work) each();
}

void settle_all(State& s) {
  while (!s.pending.empty()) settle(s, s.pending.begin()->first);
}

Context current() { return contexts.empty() ? nullptr : contexts.back(); }

}  // namespace
