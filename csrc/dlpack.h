// The part of DLPack 1.x that a consumer of tensors needs: how a framework
// describes a tensor without allocating anything. Only the layout matters; it
// is a stable ABI, so torch need not be built against.
#pragma once

#include <cstdint>

namespace dodoco::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr std::int32_t kCpu = 1;
constexpr std::int32_t kCuda = 2;
enum TypeCode : std::uint8_t { kInt = 0, kUnsigned = 1, kBool = 6 };

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;

  std::uint8_t* address() const { return static_cast<std::uint8_t*>(data) + byte_offset; }
};
static_assert(sizeof(Tensor) == 48);

struct ExchangeApi {
  std::uint32_t major_version, minor_version;
  const ExchangeApi* previous;
  void* other[3];
  int (*describe)(void* object,
                  Tensor* out);  // may be null; 0, or -1 with a Python error set
  // the framework's current stream of a device; 0, or -1 with a Python error set
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};
static_assert(sizeof(ExchangeApi) == 56);

}  // namespace dodoco::dlpack
