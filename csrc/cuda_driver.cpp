#include "cuda_driver.h"

#include <dlfcn.h>

namespace dodoco::cuda {
namespace {

template <typename Pointer>
void find(void* library, const char* name, Pointer* pointer) {
  void* symbol = ::dlsym(library, name);
  if (symbol == nullptr) {
    throw Error(0, std::string("the CUDA driver has no ") + name + ": it is too old");
  }
  *pointer = reinterpret_cast<Pointer>(symbol);
}

Driver load() {
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = ::dlerror();
    throw Error(0, std::string("no CUDA driver: ") + (reason == nullptr ? "" : reason));
  }
  Driver d{};
  find(library, "cuInit", &d.init);
  find(library, "cuDeviceGet", &d.device_get);
  find(library, "cuDeviceGetCount", &d.device_get_count);
  find(library, "cuDeviceGetAttribute", &d.device_get_attribute);
  find(library, "cuDevicePrimaryCtxRetain", &d.primary_retain);
  find(library, "cuDevicePrimaryCtxRelease_v2", &d.primary_release);
  find(library, "cuCtxPushCurrent_v2", &d.push);
  find(library, "cuCtxPopCurrent_v2", &d.pop);
  find(library, "cuCtxSynchronize", &d.synchronize);
  find(library, "cuThreadExchangeStreamCaptureMode", &d.exchange_capture_mode);
  find(library, "cuMemAlloc_v2", &d.alloc);
  find(library, "cuMemFree_v2", &d.free);
  find(library, "cuMemsetD32Async", &d.memset_words);
  find(library, "cuMemcpyHtoDAsync_v2", &d.copy_to_device);
  find(library, "cuMemcpyDtoHAsync_v2", &d.copy_to_host);
  find(library, "cuMemHostRegister_v2", &d.host_register);
  find(library, "cuMemHostUnregister", &d.host_unregister);
  find(library, "cuMemHostGetDevicePointer_v2", &d.host_device_pointer);
  find(library, "cuModuleLoadData", &d.module_load);
  find(library, "cuModuleUnload", &d.module_unload);
  find(library, "cuModuleGetFunction", &d.module_function);
  find(library, "cuFuncGetAttribute", &d.function_get);
  find(library, "cuFuncSetAttribute", &d.function_set);
  find(library, "cuLaunchKernel", &d.launch);
  find(library, "cuStreamCreate", &d.stream_create);
  find(library, "cuStreamDestroy_v2", &d.stream_destroy);
  find(library, "cuStreamSynchronize", &d.stream_synchronize);
  find(library, "cuStreamIsCapturing", &d.stream_is_capturing);
  find(library, "cuGetErrorName", &d.error_name);
  return d;
}

[[noreturn]] void fail(const Driver& d, Result result, const char* call) {
  const char* name = nullptr;
  const bool known = d.error_name(result, &name) == kSuccess && name != nullptr;
  throw Error(result, std::string(call) + " failed: " + (known ? name : "unknown error") + " (" +
                          std::to_string(result) + ")");
}

}  // namespace

const Driver& driver() {
  static const Driver loaded = [] {  // tried again by the next caller if it throws
    const Driver d = load();
    const Result result = d.init(0);
    if (result != kSuccess) fail(d, result, "cuInit");
    return d;
  }();
  return loaded;
}

void check(Result result, const char* call) {
  if (result != kSuccess) fail(driver(), result, call);
}

int capability(int ordinal) {
  const Driver& d = driver();
  Device device = 0;
  int major = 0, minor = 0;
  check(d.device_get(&device, ordinal), "cuDeviceGet");
  check(d.device_get_attribute(&major, kComputeCapabilityMajor, device), "cuDeviceGetAttribute");
  check(d.device_get_attribute(&minor, kComputeCapabilityMinor, device), "cuDeviceGetAttribute");
  return major * 10 + minor;
}

PrimaryContext::PrimaryContext(int ordinal) : driver_(driver()) {
  check(driver_.device_get(&device_, ordinal), "cuDeviceGet");
  check(driver_.primary_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

PrimaryContext::~PrimaryContext() { driver_.primary_release(device_); }

Current::Current(Context context) : driver_(driver()) {
  check(driver_.push(context), "cuCtxPushCurrent");
  driver_.exchange_capture_mode(&capture_mode_);
}

Current::~Current() {
  Context popped = nullptr;
  driver_.exchange_capture_mode(&capture_mode_);
  driver_.pop(&popped);
}

}  // namespace dodoco::cuda
