// Creates a recording and owns its lanes.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "lane.h"
#include "placement.h"

namespace dodoco {

struct LayerSpec {
  std::uint32_t num_experts;
  std::uint32_t top_k;  // 0: unknown
};

struct RecordingSpec {
  std::string path;      // must not exist
  std::string metadata;  // JSON
  std::vector<LayerSpec> layers;
  std::uint32_t num_lanes = 1;
  std::uint64_t max_bytes = 8u << 20;
  std::uint32_t mode = 0600;
  std::uint32_t rank = 0;
  std::uint32_t world_size = 1;
  std::uint32_t group_size = 0;  // ranks that transfers are between; 0: none are recorded
  std::uint32_t group_index = 0;
  std::uint32_t num_slots = 0;        // physical experts of a layer, at most
  std::uint32_t kept_placements = 0;  // of a layer; 0: none are recorded
};

class RecordingWriter {
 public:
  // Creates, reserves, locks and maps the file. Throws std::invalid_argument for a spec that cannot
  // be, std::system_error where the file system refuses; no file is left behind then.
  explicit RecordingWriter(const RecordingSpec& spec);
  ~RecordingWriter();
  RecordingWriter(const RecordingWriter&) = delete;
  RecordingWriter& operator=(const RecordingWriter&) = delete;

  // Lanes outlive the writer on purpose: a site tensor kept by compiled code or a captured graph
  // still points at one.
  Lane* lane(std::uint32_t index) { return lanes_.at(index); }

  // Fills the Site at `address` (64 bytes that stay where they are until close()).
  void bind_site(void* address, std::uint32_t lane, std::uint64_t layer);

  void add_fault(Fault fault);

  // Records where experts lie from now on. Returns its version; -1: the recording has ended, or
  // this is a forked child. Throws std::invalid_argument for what cannot be. Thread-safe.
  std::int64_t record_placement(const std::vector<LayerPlacement>& layers);

  // Stops recording, marks the file closed, releases the lock. Idempotent.
  void close();

  // For lanes that a device writes: where the parts of the file lie in memory. Null once closed.
  std::uint8_t* base() const { return base_; }
  std::uint32_t num_lanes() const { return static_cast<std::uint32_t>(lanes_.size()); }
  const std::vector<LayerEntry>& layers() const { return layers_; }
  const Section& section(SectionKind kind, std::uint32_t lane) const;

  // Keeps the file mapped after close(), until as many calls of release() as of hold().
  // Thread-safe.
  void hold() { ++holders_; }
  void release();

  std::uint64_t num_slots() const { return num_slots_; }
  std::uint32_t group_size() const { return group_size_; }
  std::uint64_t file_bytes() const { return file_bytes_; }
  bool closed() const { return base_ == nullptr; }

 private:
  void lay_out(const RecordingSpec& spec);
  void fill(const RecordingSpec& spec);
  std::uint64_t latest_iteration() const;

  std::uint64_t file_bytes_ = 0;
  std::uint64_t num_slots_ = 0;
  std::uint32_t group_size_ = 0;
  std::vector<Section> sections_;
  std::vector<LayerEntry> layers_;
  std::vector<Lane*> lanes_;
  std::vector<Site*> sites_;
  PlacementWriter placement_;
  std::uint8_t* base_ = nullptr;
  std::uint8_t* mapped_ = nullptr;
  int lock_fd_ = -1;
  int owner_ = 0;                // process
  std::atomic<int> holders_{1};  // the writer itself until close()
};

}  // namespace dodoco
