// The CUDA driver, found at run time: one binary runs with any driver, and without one.
//
// Declares what is used of the driver's stable C interface; no CUDA header is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace dodoco::cuda {

using Result = int;
using Device = int;
using Context = struct Context_*;
using Stream = struct Stream_*;
using Module = struct Module_*;
using Function = struct Function_*;
using Address = std::uint64_t;

constexpr Result kSuccess = 0;
constexpr Result kDeinitialized = 4;  // the process is ending
constexpr Result kInvalidContext = 201;
constexpr Result kCaptureImplicit = 906;
constexpr int kComputeCapabilityMajor = 75, kComputeCapabilityMinor = 76;
constexpr unsigned kHostRegisterPortable = 1, kHostRegisterDeviceMap = 2;
constexpr int kNumRegisters = 4, kMaxDynamicSharedBytes = 8;  // of a function
constexpr unsigned kStreamNonBlocking = 1;
constexpr int kCaptureModeRelaxed = 2;

// A call that the driver refused: its name, what it was for, the error.
class Error : public std::runtime_error {
 public:
  Error(Result code, const std::string& what) : std::runtime_error(what), code_(code) {}
  Result code() const { return code_; }

 private:
  Result code_;
};

struct Driver {
  Result (*init)(unsigned flags);
  Result (*device_get)(Device*, int ordinal);
  Result (*device_get_count)(int*);
  Result (*device_get_attribute)(int*, int attribute, Device);
  Result (*primary_retain)(Context*, Device);
  Result (*primary_release)(Device);
  Result (*push)(Context);
  Result (*pop)(Context*);
  Result (*synchronize)();
  Result (*exchange_capture_mode)(int*);
  Result (*alloc)(Address*, std::size_t);
  Result (*free)(Address);
  Result (*memset_words)(Address, unsigned, std::size_t, Stream);
  Result (*copy_to_device)(Address, const void*, std::size_t, Stream);
  Result (*copy_to_host)(void*, Address, std::size_t, Stream);
  Result (*host_register)(void*, std::size_t, unsigned flags);
  Result (*host_unregister)(void*);
  Result (*host_device_pointer)(Address*, void*, unsigned flags);
  Result (*module_load)(Module*, const void* image);
  Result (*module_unload)(Module);
  Result (*module_function)(Function*, Module, const char* name);
  Result (*function_get)(int*, int attribute, Function);
  Result (*function_set)(Function, int attribute, int value);
  Result (*launch)(Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, Stream, void** params,
                   void** extra);
  Result (*stream_create)(Stream*, unsigned flags);
  Result (*stream_destroy)(Stream);
  Result (*stream_synchronize)(Stream);
  Result (*stream_is_capturing)(Stream, int*);
  Result (*error_name)(Result, const char**);
};

// The driver, initialised. Thread-safe. Throws Error where there is none or it finds no device.
const Driver& driver();

// Throws Error, with the name of the call and of the error, unless it succeeded.
void check(Result result, const char* call);

// 90 for compute capability 9.0. Throws Error for a device that is not there.
int capability(int ordinal);

// The primary context of a device, which torch uses too, retained for as long as this lives.
class PrimaryContext {
 public:
  explicit PrimaryContext(int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;

  Context get() const { return context_; }

 private:
  const Driver& driver_;
  Device device_ = 0;
  Context context_ = nullptr;
};

// Makes a context the calling thread's, for a scope, and lets it make calls that would end a
// capture under way in another thread: what we allocate and copy is nobody's graph.
class Current {
 public:
  explicit Current(Context context);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

 private:
  const Driver& driver_;
  int capture_mode_ = kCaptureModeRelaxed;
};

}  // namespace dodoco::cuda
