// A CUDA driver without a GPU: keeps "device" memory on the host, writes down every call, fails
// where it is told to, and runs kernels by handing them to a callback.
//
// Built as a shared object with the driver's SONAME, so that whoever loads it first is what
// dlopen("libcuda.so.1") then finds. Mapped files get a second address, as on a device.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "cuda_driver.h"

namespace {

using namespace dodoco::cuda;

constexpr int kInvalidValue = 1, kInvalidContext = 201, kNotFound = 500;

struct Launch {
  std::string name;
  unsigned programs, threads, shared_bytes;
  std::uintptr_t stream;
  std::uint64_t arguments[13];
};

struct State {
  std::recursive_mutex mutex;
  std::string calls;                                    // names, a line each
  std::map<std::string, std::pair<int, int>> failures;  // name -> calls until then, code
  int sticky = 0;  // what every call returns from a sticky failure on
  int num_devices = 1;
  std::map<Address, std::size_t> allocated;
  std::map<void*, std::size_t> registered;
  std::map<std::pair<Context, void*>, void*> aliases;
  std::map<Context, int> retained;
  std::set<Module> modules;
  std::map<Function, std::pair<std::string, Context>> functions;
  std::set<Stream> streams;
  std::map<Stream, int> capturing;
  std::vector<Launch> launches;
  bool quiet = false;  // launches only return: for timing what comes before them
  void (*run)(const char* name, const std::uint64_t* arguments, unsigned programs) = nullptr;
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

Context current() { return contexts.empty() ? nullptr : contexts.back(); }

}  // namespace

#define FAKE extern "C" __attribute__((visibility("default")))
#define ENTER(name)                                           \
  State& s = state();                                         \
  const std::lock_guard<std::recursive_mutex> guard(s.mutex); \
  if (const Result failure = enter(s, name); failure != 0) return failure
#define NEED_CONTEXT \
  if (current() == nullptr) return kInvalidContext

FAKE Result cuInit(unsigned) {
  ENTER("cuInit");
  return 0;
}
FAKE Result cuDeviceGetCount(int* count) {
  ENTER("cuDeviceGetCount");
  *count = s.num_devices;
  return 0;
}
FAKE Result cuDeviceGet(Device* device, int ordinal) {
  ENTER("cuDeviceGet");
  if (ordinal < 0 || ordinal >= s.num_devices) return 101;
  *device = ordinal;
  return 0;
}
FAKE Result cuDeviceGetAttribute(int* value, int attribute, Device) {
  ENTER("cuDeviceGetAttribute");
  *value = attribute == kComputeCapabilityMajor ? 9 : 0;
  return 0;
}
FAKE Result cuDevicePrimaryCtxRetain(Context* context, Device device) {
  ENTER("cuDevicePrimaryCtxRetain");
  *context = reinterpret_cast<Context>(std::uintptr_t{0x10} + static_cast<unsigned>(device));
  ++s.retained[*context];
  return 0;
}
FAKE Result cuDevicePrimaryCtxRelease_v2(Device device) {
  ENTER("cuDevicePrimaryCtxRelease");
  --s.retained[reinterpret_cast<Context>(std::uintptr_t{0x10} + static_cast<unsigned>(device))];
  return 0;
}
FAKE Result cuCtxPushCurrent_v2(Context context) {
  ENTER("cuCtxPushCurrent");
  contexts.push_back(context);
  return 0;
}
FAKE Result cuCtxPopCurrent_v2(Context* context) {
  ENTER("cuCtxPopCurrent");
  NEED_CONTEXT;
  *context = current();
  contexts.pop_back();
  return 0;
}
FAKE Result cuCtxSynchronize() {
  ENTER("cuCtxSynchronize");
  NEED_CONTEXT;
  return 0;
}
FAKE Result cuThreadExchangeStreamCaptureMode(int* mode) {
  ENTER("cuThreadExchangeStreamCaptureMode");
  std::swap(*mode, capture_mode);
  return 0;
}
FAKE Result cuMemAlloc_v2(Address* address, std::size_t bytes) {
  ENTER("cuMemAlloc");
  NEED_CONTEXT;
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(memory, 0xA5, bytes);
  *address = reinterpret_cast<Address>(memory);
  s.allocated[*address] = bytes;
  return 0;
}
FAKE Result cuMemFree_v2(Address address) {
  ENTER("cuMemFree");
  if (s.allocated.erase(address) == 0) return kInvalidValue;
  std::free(reinterpret_cast<void*>(address));
  return 0;
}
FAKE Result cuMemsetD8_v2(Address address, unsigned char value, std::size_t bytes) {
  ENTER("cuMemsetD8");
  std::memset(reinterpret_cast<void*>(address), value, bytes);
  return 0;
}
FAKE Result cuMemsetD32Async(Address address, unsigned value, std::size_t count, Stream) {
  ENTER("cuMemsetD32Async");
  NEED_CONTEXT;
  for (std::size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(address)[i] = value;
  return 0;
}
FAKE Result cuMemcpyHtoD_v2(Address to, const void* from, std::size_t bytes) {
  ENTER("cuMemcpyHtoD");
  NEED_CONTEXT;
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
FAKE Result cuMemcpyDtoH_v2(void* to, Address from, std::size_t bytes) {
  ENTER("cuMemcpyDtoH");
  NEED_CONTEXT;
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return 0;
}
FAKE Result cuMemHostRegister_v2(void* memory, std::size_t bytes, unsigned flags) {
  ENTER("cuMemHostRegister");
  NEED_CONTEXT;
  if (flags != (kHostRegisterPortable | kHostRegisterDeviceMap)) return kInvalidValue;
  if (s.registered.count(memory) != 0) return 712;
  s.registered[memory] = bytes;
  return 0;
}
FAKE Result cuMemHostUnregister(void* memory) {
  ENTER("cuMemHostUnregister");
  NEED_CONTEXT;
  const auto found = s.registered.find(memory);
  if (found == s.registered.end()) return 713;
  for (auto alias = s.aliases.begin(); alias != s.aliases.end();) {
    if (alias->first.second == memory) {
      ::munmap(alias->second, found->second);
      alias = s.aliases.erase(alias);
    } else {
      ++alias;
    }
  }
  s.registered.erase(found);
  return 0;
}
FAKE Result cuMemHostGetDevicePointer_v2(Address* address, void* memory, unsigned) {
  ENTER("cuMemHostGetDevicePointer");
  NEED_CONTEXT;
  const auto found = s.registered.find(memory);
  if (found == s.registered.end()) return kInvalidValue;
  void*& alias = s.aliases[{current(), memory}];
  // The same pages again: what a device calls the file is not what the host calls it.
  if (alias == nullptr) alias = ::mremap(memory, 0, found->second, MREMAP_MAYMOVE);
  if (alias == MAP_FAILED) std::abort();
  *address = reinterpret_cast<Address>(alias);
  return 0;
}
FAKE Result cuModuleLoadData(Module* module, const void*) {
  ENTER("cuModuleLoadData");
  NEED_CONTEXT;
  *module = make_handle<Module>(s);
  s.modules.insert(*module);
  return 0;
}
FAKE Result cuModuleUnload(Module module) {
  ENTER("cuModuleUnload");
  return s.modules.erase(module) == 1 ? 0 : kNotFound;
}
FAKE Result cuModuleGetFunction(Function* function, Module module, const char* name) {
  ENTER("cuModuleGetFunction");
  if (s.modules.count(module) == 0) return kNotFound;
  *function = make_handle<Function>(s);
  s.functions[*function] = {name, current()};
  return 0;
}
FAKE Result cuFuncSetAttribute(Function, int, int) {
  ENTER("cuFuncSetAttribute");
  return 0;
}
FAKE Result cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                           unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                           Stream stream, void** params, void**) {
  if (state().quiet) return 0;
  ENTER("cuLaunchKernel");
  const auto& [name, context] = s.functions.at(function);
  // Where several devices are, the launching thread must be on the function's.
  if (s.num_devices > 1 && current() != context) return kInvalidContext;
  if (grid_y * grid_z * block_y * block_z != 1) return kInvalidValue;
  if (name.find("clock") != std::string::npos) {
    // One argument, then Triton's two.
    **static_cast<std::uint64_t**>(params[0]) = s.clock;
    return *static_cast<void**>(params[1]) == nullptr && *static_cast<void**>(params[2]) == nullptr
               ? 0
               : kInvalidValue;
  }
  Launch launch{name, grid_x, block_x, shared, reinterpret_cast<std::uintptr_t>(stream), {}};
  constexpr std::size_t kBytes[] = {8, 8, 8, 8, 4, 4, 4, 4, 8, 8, 4, 8, 8};
  for (int i = 0; i < 13; ++i) std::memcpy(&launch.arguments[i], params[i], kBytes[i]);
  s.launches.push_back(launch);
  const bool captured = s.capturing.count(stream) != 0 && s.capturing[stream] != 0;
  if (s.run != nullptr && !captured) s.run(name.c_str(), launch.arguments, grid_x);
  return 0;
}
FAKE Result cuStreamCreate(Stream* stream, unsigned flags) {
  ENTER("cuStreamCreate");
  if (flags != kStreamNonBlocking) return kInvalidValue;
  *stream = make_handle<Stream>(s);
  s.streams.insert(*stream);
  return 0;
}
FAKE Result cuStreamDestroy_v2(Stream stream) {
  ENTER("cuStreamDestroy");
  return s.streams.erase(stream) == 1 ? 0 : kInvalidValue;
}
FAKE Result cuStreamSynchronize(Stream) {
  ENTER("cuStreamSynchronize");
  return 0;
}
FAKE Result cuStreamIsCapturing(Stream stream, int* status) {
  ENTER("cuStreamIsCapturing");
  *status = s.capturing.count(stream) != 0 ? s.capturing[stream] : 0;
  return 0;
}
FAKE Result cuGetErrorName(Result code, const char** name) {
  static const std::map<int, const char*> kNames = {
      {1, "CUDA_ERROR_INVALID_VALUE"},     {2, "CUDA_ERROR_OUT_OF_MEMORY"},
      {4, "CUDA_ERROR_DEINITIALIZED"},     {100, "CUDA_ERROR_NO_DEVICE"},
      {101, "CUDA_ERROR_INVALID_DEVICE"},  {201, "CUDA_ERROR_INVALID_CONTEXT"},
      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
      {801, "CUDA_ERROR_NOT_SUPPORTED"},   {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
  };
  const auto found = kNames.find(code);
  if (found == kNames.end()) return kInvalidValue;
  *name = found->second;
  return 0;
}

// --- what tests ask ---------------------------------------------------------------------------

// What a driver in an error state could not take back is forgotten, too.
FAKE void fake_reset(int num_devices) {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> guard(s.mutex);
  for (const auto& [address, bytes] : s.allocated) std::free(reinterpret_cast<void*>(address));
  s.allocated.clear();
  s.registered.clear();
  s.aliases.clear();
  s.retained.clear();
  s.modules.clear();
  s.streams.clear();
  contexts.clear();
  s.calls.clear();
  s.failures.clear();
  s.launches.clear();
  s.capturing.clear();
  s.sticky = 0;
  s.run = nullptr;
  s.quiet = false;
  s.num_devices = num_devices;
}
// The (after + 1)-th call of `name` from now on fails; a negative code fails all later calls too.
FAKE void fake_fail(const char* name, int after, int code) {
  state().failures[name] = {after, code};
}
FAKE void fake_recover() { state().sticky = 0; }
FAKE void fake_capture(std::uintptr_t stream, int status) {
  state().capturing[reinterpret_cast<Stream>(stream)] = status;
}
FAKE void fake_quiet() { state().quiet = true; }
FAKE void fake_clock(std::uint64_t now) { state().clock = now; }
FAKE void fake_run(void (*run)(const char*, const std::uint64_t*, unsigned)) { state().run = run; }
FAKE const char* fake_calls() { return state().calls.c_str(); }
FAKE int fake_num_launches() { return static_cast<int>(state().launches.size()); }
// Programs, threads, shared bytes and stream, then the arguments.
FAKE const char* fake_launch(int index, std::uint64_t* out) {
  const Launch& launch = state().launches.at(static_cast<std::size_t>(index));
  out[0] = launch.programs;
  out[1] = launch.threads;
  out[2] = launch.shared_bytes;
  out[3] = launch.stream;
  std::memcpy(out + 4, launch.arguments, sizeof(launch.arguments));
  return launch.name.c_str();
}
// Allocations, registrations, references to contexts, modules and streams that are left.
FAKE void fake_live(int* out) {
  State& s = state();
  out[0] = static_cast<int>(s.allocated.size());
  out[1] = static_cast<int>(s.registered.size());
  out[2] = 0;
  for (const auto& [context, count] : s.retained) out[2] += count;
  out[3] = static_cast<int>(s.modules.size());
  out[4] = static_cast<int>(s.streams.size());
}
