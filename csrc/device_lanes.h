// The lanes of a recording on one CUDA device: what their kernels read and write, and the launch.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "device_arena.h"
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

// Threads may launch, set and close at the same time; kernels are added before anything launches.
// In the child of a fork all of it does nothing.
class DeviceLanes {
 public:
  // Lanes [first_lane, first_lane + num_lanes) of the recording, whose file is mapped into the
  // device's address space. Throws cuda::Error or std::invalid_argument; nothing is left then.
  DeviceLanes(RecordingWriter* writer, int device, std::uint32_t first_lane,
              std::uint32_t num_lanes);
  DeviceLanes(const DeviceLanes&) = delete;
  DeviceLanes& operator=(const DeviceLanes&) = delete;

  // Loads a kernel, for every layer that it fits.
  void add_kernel(const KernelSpec& spec);

  // Finds how far the device's clock is from the host's, with a kernel that stores the former.
  // Waits for that kernel.
  void calibrate_clock(const std::string& name, const std::string& code);

  std::uint64_t site_address(std::uint64_t layer) const;
  std::uint32_t num_lanes() const { return num_lanes_; }
  int device() const { return device_; }
  bool captured() const { return captured_.load(std::memory_order_relaxed); }
  bool closed() const { return !open_.load(std::memory_order_relaxed); }
  bool is_held() const { return held_.load(std::memory_order_relaxed); }
  bool has_site(std::uint64_t address) const {
    const std::uint64_t offset = address - arena_ - places_.site(0);
    return offset < layers_.size() * sizeof(Site) && offset % sizeof(Site) == 0;
  }

  // Settings of a lane by the names of ControlBlock's members, changed in the order of the stream.
  // Throws std::invalid_argument for what cannot be set, std::runtime_error while the stream is
  // being captured, cuda::Error where the driver refuses.
  void set(std::uint32_t lane, const std::string& name, std::int64_t value, cuda::Stream stream);
  std::int64_t get(std::uint32_t lane, const std::string& name) const;

  // Records a pass: one cuLaunchKernel and, before the first capture, on streams other than the
  // default one, a look at whether this is one. `site` is a site_address(). May wait where the
  // stream has no room for another launch: not to be called with an interpreter lock held, which
  // what is in the stream may need.
  RecordResult launch(std::uint64_t site, const DeviceTensor& tensor, cuda::Stream stream,
                      bool recomputed);

  // Loads the kernels that write transfers. Throws cuda::Error, or std::invalid_argument where the
  // recording has no group.
  void add_transfers(const std::string& code);

  // Stamps the begin of a transfer: one node. `slot` is one of kTransfersAtOnce, and may be taken
  // again after the transfer's end.
  RecordResult begin_transfer(std::uint32_t slot, cuda::Stream stream);

  // Records a transfer: one node. Counts are at addresses of the device, or, where those are null,
  // in `constants`, one behind the other, at most Constants::kMost.
  RecordResult end_transfer(const Transfer& transfer, const std::vector<std::uint32_t>& constants,
                            cuda::Stream stream);

  // Waits for the device, switches off, and lets go of everything. After a capture it all stays,
  // switched off. Nor can it wait while `current`, the calling thread's stream, is being captured:
  // then it switches off at once. Idempotent.
  void close(cuda::Stream current);

  // Launches nothing more for a site.
  void switch_off(std::uint64_t site);

  // Keeps a lane from being given to a stream, as threads will choose it with the result as
  // LaneChoice's `chosen` and these lanes as its `usual`.
  void* reserve(std::uint32_t lane);

  // For the child of a fork: its driver is gone.
  void abandon() { open_.store(false, std::memory_order_relaxed); }

 private:
  ~DeviceLanes() = default;  // never destroyed: compiled code and captured graphs name sites of it

  // Keeps close() from taking away what a call needs. False: it has begun to.
  class Use {
   public:
    explicit Use(DeviceLanes* lanes) : lanes_(lanes) { lanes_->uses_.fetch_add(1); }
    ~Use() { lanes_->uses_.fetch_sub(1); }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    explicit operator bool() const { return lanes_->open_.load(); }

   private:
    DeviceLanes* lanes_;
  };
  struct Kernel {
    cuda::Function function;
    std::uint32_t block_k;
    std::uint32_t threads, shared_bytes, max_programs;
    std::int64_t rows_per_program, max_rows;
  };
  struct Layer {
    std::uint32_t num_experts, top_k;
    std::uint64_t board_offset;
    std::atomic<bool> is_off{false};
    // By slot_of(form, id_bytes), then alone or shared.
    std::array<std::array<const Kernel*, 2>, 5> kernels{};
  };
  struct LaneSettings {  // as last set, in the order of kSettings
    std::array<std::atomic<std::int64_t>, 5> values{1, 1, -1, 0, 0};
  };

  static std::size_t slot_of(ChoiceForm form, int id_bytes);
  cuda::Address lane_address(std::uint32_t lane) const { return arena_ + places_.lane(lane); }
  cuda::Module load_module(const std::string& code);
  cuda::Function load(cuda::Module module, const std::string& name);
  void set_up();
  void finish_own_stream();
  void write_words(cuda::Address at, const void* words, std::size_t count, cuda::Stream stream);
  std::uint32_t lane_of(cuda::Stream stream);
  std::uint32_t lane_for(cuda::Stream stream);
  RecordResult start(cuda::Function function, unsigned programs, unsigned threads,
                     unsigned shared_bytes, cuda::Stream stream, void** params);
  bool is_capturing(cuda::Stream stream) const;
  void check_lane(std::uint32_t lane) const;
  void switch_all_off(cuda::Stream current);
  void release();

  RecordingWriter* writer_;
  int device_;
  std::uint32_t num_lanes_;
  std::unique_ptr<cuda::PrimaryContext> context_;
  const cuda::Driver& driver_;
  bool only_device_ = false;
  bool registered_ = false;
  void* file_base_;
  DeviceArena places_;
  cuda::Address arena_ = 0, file_ = 0;
  cuda::Stream own_stream_ = nullptr;  // for what nobody launched: waits for no work of the host's
  std::uint64_t clock_ = 0;            // as last read; where a copy under way may still store it
  std::vector<Layer> layers_;
  std::vector<std::uint64_t> boards_;   // of each lane: where in the file
  std::vector<std::uint64_t> traffic_;  // likewise; none without a group
  cuda::Function transfer_begin_ = nullptr, transfer_end_ = nullptr, transfer_constants_ = nullptr;
  std::array<LaneSettings, kMaxLanes> settings_;
  std::vector<cuda::Module> modules_;
  std::vector<std::unique_ptr<Kernel>> kernels_;

  std::atomic<bool> open_{false};
  std::atomic<int> uses_{0};  // calls that need what close() takes away
  std::atomic<bool> captured_{false};
  std::atomic<bool> held_{true};                     // the arena
  std::mutex streams_mutex_;                         // of the next two
  std::vector<std::optional<cuda::Stream>> owners_;  // of each lane
  std::vector<bool> reserved_;
};

}  // namespace dodoco
