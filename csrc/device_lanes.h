// The lanes of a recording on one CUDA device: what their kernels read and write, and the launch.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "format.h"
#include "lane.h"
#include "recording_writer.h"

namespace dodoco {

enum class ChoiceForm : int { kIds = 0, kByteMap = 1, kBitMap = 2 };

struct DeviceTensor {  // [rows, columns] in device memory; strides in elements
  const void* data;
  ChoiceForm form;
  int id_bytes;  // 2, 4 or 8; 0 for maps
  std::int64_t rows, columns, row_stride, column_stride;
};

struct KernelSpec {
  ChoiceForm form;
  int id_bytes;
  bool shared;  // several programs may share a pass
  std::uint32_t num_experts;
  std::uint32_t block_k;  // most columns of an id tensor
  std::int64_t rows_per_program;
  std::uint32_t max_programs;
  std::int64_t max_rows;  // of a pass that one program takes
  std::string name;
  std::uint32_t num_warps;
  std::uint32_t shared_bytes;
  std::string code;  // a cubin
};

// Threads that use one object take turns, as Python's interpreter lock has them do; different
// objects are independent.
class DeviceLanes {
 public:
  // Lanes [first_lane, first_lane + num_lanes) of the recording, whose file is mapped into the
  // device's address space. Throws cuda::Error or std::invalid_argument; nothing is left then.
  DeviceLanes(RecordingWriter* writer, int device, std::uint32_t first_lane,
              std::uint32_t num_lanes);
  DeviceLanes(const DeviceLanes&) = delete;
  DeviceLanes& operator=(const DeviceLanes&) = delete;

  // Loads a kernel, for every layer that it fits. Not while something launches.
  void add_kernel(const KernelSpec& spec);

  // Finds how far the device's clock is from the host's, with a kernel that stores the former.
  // Waits for the device.
  void calibrate_clock(const std::string& name, const std::string& code);

  std::uint64_t site_address(std::uint64_t layer) const;
  std::uint32_t num_lanes() const { return static_cast<std::uint32_t>(settings_.size()); }
  int device() const { return device_; }
  bool captured() const { return captured_; }
  bool closed() const { return !open_.load(std::memory_order_relaxed); }

  // Settings of a lane by the names of ControlBlock's members, changed in the order of the stream.
  // Throws std::invalid_argument for an unknown one, std::runtime_error while the stream is being
  // captured, cuda::Error where the driver refuses.
  void set(std::uint32_t lane, const std::string& name, std::int64_t value, cuda::Stream stream);
  std::int64_t get(std::uint32_t lane, const std::string& name) const;

  // Records a pass: one cuLaunchKernel and, before the first capture, on streams other than the
  // default one, a look at whether this is one. `site` is a site_address().
  RecordResult launch(std::uint64_t site, const DeviceTensor& tensor, cuda::Stream stream,
                      bool recomputed);

  // Waits for the device, then lets go of everything; after a capture it all stays, switched off.
  // To be called while nothing launches through these lanes. Idempotent; does nothing in a child.
  void close();

  // Launches nothing more for a site.
  void switch_off(std::uint64_t site);

  // Keeps a lane from being given to a stream, as threads will choose it with the result as
  // LaneChoice's `chosen` and these lanes as its `usual`.
  void* reserve(std::uint32_t lane);

  // The open lanes whose sites include an address; null: none.
  static DeviceLanes* of_site(std::uint64_t address);

 private:
  ~DeviceLanes() = default;  // never destroyed: compiled code and captured graphs name sites of it

  struct Kernel {
    cuda::Function function;
    std::uint32_t block_k;
    std::uint32_t threads, shared_bytes, max_programs;
    std::int64_t rows_per_program, max_rows;
  };
  struct Layer {
    std::uint32_t num_experts, top_k;
    std::uint64_t board_offset;
    bool is_off;
    // By slot_of(form, id_bytes), then alone or shared.
    std::array<std::array<const Kernel*, 2>, 5> kernels;
  };
  struct Places {  // offsets in the arena
    std::uint64_t lanes, sites, clock, zeroed, scratch, totals, bytes;
    std::uint64_t scratch_bytes, board_bytes;
  };
  struct LaneSettings {
    std::uint32_t enabled, record_every, map_version, microbatch;
    std::int64_t num_valid;
  };

  cuda::Address lane_address(std::uint32_t lane) const {
    return arena_ + at_.lanes + lane * sizeof(DeviceLane);
  }
  static std::size_t slot_of(ChoiceForm form, int id_bytes);
  void lay_out();
  void fill_arena();
  void write_words(cuda::Address at, const std::uint32_t* words, std::size_t count,
                   cuda::Stream stream);
  std::uint32_t lane_of(cuda::Stream stream);
  void release();

  RecordingWriter* writer_;
  int device_;
  std::uint32_t first_lane_;
  std::unique_ptr<cuda::PrimaryContext> context_;
  const cuda::Driver& driver_;
  bool only_device_;
  std::atomic<bool> open_{false};
  bool captured_ = false;
  bool registered_ = false;
  std::int32_t owner_pid_;
  void* file_base_;
  cuda::Address arena_ = 0, file_ = 0;
  Places at_{};
  std::vector<Layer> layers_;
  std::vector<std::uint64_t> boards_;  // of each lane: where in the file
  std::vector<LaneSettings> settings_;
  std::vector<std::optional<cuda::Stream>> owners_;  // of each lane
  std::vector<bool> reserved_;
  std::vector<cuda::Module> modules_;
  std::vector<std::unique_ptr<Kernel>> kernels_;
};

}  // namespace dodoco
