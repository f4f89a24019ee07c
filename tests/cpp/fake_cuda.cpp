// A CUDA driver without a GPU: keeps "device" memory on the host, writes down every call, fails
// where it is told to, and runs kernels by handing them to a callback. What is put into a stream
// is done when somebody waits for the stream or the context, and not before.
//
// Built as a shared object with the driver's SONAME, so that whoever loads it first is what
// dlopen("libcuda.so.1") then finds. Mapped files get a second address, as on a device.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fake_cuda.h"

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
  *context = context_of(device);
  ++s.retained[*context];
  return 0;
}
FAKE Result cuDevicePrimaryCtxRelease_v2(Device device) {
  ENTER("cuDevicePrimaryCtxRelease");
  --s.retained[context_of(device)];
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
  // Refused, and the end of the capture, even to a thread in relaxed mode.
  for (auto& [stream, status] : s.capturing) {
    if (status == 0) continue;
    status = 2;
    return kCaptureUnsupported;
  }
  settle_all(s);
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
  *address = take_memory(s, bytes);
  return 0;
}
FAKE Result cuMemFree_v2(Address address) {
  ENTER("cuMemFree");
  if (s.allocated.count(address) == 0) return kInvalidValue;
  settle_all(s);  // as the real one waits for what may use the memory
  give_memory_back(s.allocated[address]);
  s.allocated.erase(address);
  return 0;
}
FAKE Result cuMemsetD32Async(Address address, unsigned value, std::size_t count, Stream stream) {
  ENTER("cuMemsetD32Async");
  NEED_CONTEXT;
  s.pending[stream].push_back([=] {
    for (std::size_t i = 0; i < count; ++i) reinterpret_cast<unsigned*>(address)[i] = value;
  });
  return 0;
}
// From memory that is not pinned: read before the call returns, stored later.
FAKE Result cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, Stream stream) {
  ENTER("cuMemcpyHtoDAsync");
  NEED_CONTEXT;
  const std::string held(static_cast<const char*>(from), bytes);
  s.pending[stream].push_back(
      [=] { std::memcpy(reinterpret_cast<void*>(to), held.data(), held.size()); });
  return 0;
}
FAKE Result cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, Stream stream) {
  ENTER("cuMemcpyDtoHAsync");
  NEED_CONTEXT;
  s.pending[stream].push_back([=] { std::memcpy(to, reinterpret_cast<const void*>(from), bytes); });
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
FAKE Result cuFuncGetAttribute(int* value, int, Function) {
  ENTER("cuFuncGetAttribute");
  *value = 32;
  return 0;
}
FAKE Result cuFuncSetAttribute(Function, int, int) {
  ENTER("cuFuncSetAttribute");
  return 0;
}
namespace {

// The threads of a block, on threads of the host.
struct Team {
  pthread_barrier_t barrier;
  std::uint64_t sums[dodoco::kMostThreads][2];
  void meet() { pthread_barrier_wait(&barrier); }
  std::uint64_t* sums_of(std::uint32_t thread) { return sums[thread]; }
};

// A kernel of capture.cu: the code that it runs on a device, by as many threads as were asked for.
std::function<void()> transfer_kernel(State& s, const std::string& name, void** params,
                                      unsigned num_threads) {
  auto* lane = *static_cast<dodoco::DeviceLane**>(params[0]);
  if (name == "dodoco_transfer_begin") {
    const std::uint32_t slot = *static_cast<std::uint32_t*>(params[1]);
    return [&s, lane, slot] { dodoco::begin_transfer(lane, slot, s.clock); };
  }
  auto* totals = *static_cast<std::uint64_t**>(params[1]);
  auto* board = *static_cast<std::uint64_t**>(params[2]);
  const auto transfer = *static_cast<dodoco::Transfer*>(params[3]);
  std::shared_ptr<dodoco::Constants> constants;
  if (name == "dodoco_transfer_end_constants")
    constants = std::make_shared<dodoco::Constants>(*static_cast<dodoco::Constants*>(params[4]));
  return [=, &s] {
    Team team;
    pthread_barrier_init(&team.barrier, nullptr, num_threads);
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < num_threads; ++thread) {
      threads.emplace_back([=, &s, &team] {
        dodoco::Transfer mine = transfer;
        if (constants != nullptr) dodoco::find_constants(&mine, *constants);
        dodoco::end_transfer(lane, totals, board, mine, s.clock, thread, num_threads, team);
      });
    }
    for (std::thread& thread : threads) thread.join();
    pthread_barrier_destroy(&team.barrier);
  };
}

}  // namespace

FAKE Result cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                           unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                           Stream stream, void** params, void**) {
  if (state().quiet) return 0;
  if (!wait_for_room()) return kLaunchTimeout;
  ENTER("cuLaunchKernel");
  const auto& [name, context] = s.functions.at(function);
  if (current() == nullptr || current() != context) return kInvalidContext;
  if (grid_y * grid_z * block_y * block_z != 1) return kInvalidValue;
  if (name.find("clock") != std::string::npos) {
    // One argument, then Triton's two.
    auto* out = *static_cast<std::uint64_t**>(params[0]);
    s.pending[stream].push_back([&s, out] { *out = s.clock; });
    return *static_cast<void**>(params[1]) == nullptr && *static_cast<void**>(params[2]) == nullptr
               ? 0
               : kInvalidValue;
  }
  if (name.rfind("dodoco_transfer", 0) == 0) {
    auto work = transfer_kernel(s, name, params, block_x);
    s.launches.push_back(
        {name, grid_x, block_x, shared, reinterpret_cast<std::uintptr_t>(stream), {}});
    const bool captured = s.capturing.count(stream) != 0 && s.capturing[stream] != 0;
    (captured ? s.graph : s.pending[stream]).push_back(std::move(work));
    return 0;
  }
  Launch launch{name, grid_x, block_x, shared, reinterpret_cast<std::uintptr_t>(stream), {}};
  constexpr std::size_t kBytes[] = {8, 8, 8, 8, 4, 4, 4, 4, 8, 8, 4, 8, 8};
  for (int i = 0; i < 13; ++i) std::memcpy(&launch.arguments[i], params[i], kBytes[i]);
  s.launches.push_back(launch);
  if (s.capturing.count(stream) != 0 && s.capturing[stream] != 0) return 0;
  if (s.run != nullptr) {
    s.pending[stream].push_back(
        [&s, launch] { s.run(launch.name.c_str(), launch.arguments, launch.programs); });
    if (s.at_once) settle(s, stream);
  }
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
FAKE Result cuStreamSynchronize(Stream stream) {
  ENTER("cuStreamSynchronize");
  settle(s, stream);
  return 0;
}
FAKE Result cuStreamIsCapturing(Stream stream, int* status) {
  ENTER("cuStreamIsCapturing");
  *status = s.capturing.count(stream) != 0 ? s.capturing[stream] : 0;
  return 0;
}
FAKE Result cuGetErrorName(Result code, const char** name) {
  static const std::map<int, const char*> kNames = {
      {1, "CUDA_ERROR_INVALID_VALUE"},
      {2, "CUDA_ERROR_OUT_OF_MEMORY"},
      {4, "CUDA_ERROR_DEINITIALIZED"},
      {100, "CUDA_ERROR_NO_DEVICE"},
      {101, "CUDA_ERROR_INVALID_DEVICE"},
      {201, "CUDA_ERROR_INVALID_CONTEXT"},
      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
      {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
      {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
      {801, "CUDA_ERROR_NOT_SUPPORTED"},
      {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT"},
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
  for (const auto& [address, memory] : s.allocated) give_memory_back(memory);
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
  s.pending.clear();
  s.graph.clear();
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
// Lets streams do what is in them.
FAKE void fake_settle() {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> guard(s.mutex);
  settle_all(s);
}
// Makes a device current in this thread, as running something on it does; -1: none.
FAKE void fake_use_device(int device) {
  contexts.clear();
  if (device >= 0) contexts.push_back(context_of(device));
}
FAKE void fake_capture(std::uintptr_t stream, int status) {
  state().capturing[reinterpret_cast<Stream>(stream)] = status;
}
// Once more what was captured.
FAKE void fake_replay() {
  State& s = state();
  const std::lock_guard<std::recursive_mutex> guard(s.mutex);
  settle_all(s);
  for (const auto& each : s.graph) each();
}
FAKE void fake_quiet() { state().quiet = true; }
FAKE void fake_full(int full) { g_full = full != 0; }
FAKE int fake_waiting() { return g_waiting; }
FAKE void fake_clock(std::uint64_t now) { state().clock = now; }
// `at_once`: at the launch, with what its stream holds before it.
FAKE void fake_run(void (*run)(const char*, const std::uint64_t*, unsigned), int at_once) {
  state().run = run;
  state().at_once = at_once != 0;
}
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
