// Reads a recording that may be live, closed, orphaned or hostile. Trusts nothing.
//
// It reads the file and does not map it: a mapped file that its owner truncates at the wrong moment
// would end the reading process with SIGBUS. A read costs a system call for a whole board block or
// some hundred records.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "format.h"

namespace dodoco {

// Why a file is not a recording that can be read.
enum class Problem {
  kMissing,
  kUnreadable,  // no permission, or an I/O error
  kForeign,     // not a recording at all
  kCreating,    // its creator is at work
  kUnfinished,  // its creator went before it was done
  kVersion,
  kTruncated,
  kDamaged,
};
const char* name_of(Problem problem);

class RecordingError : public std::runtime_error {
 public:
  RecordingError(Problem problem, const std::string& what)
      : std::runtime_error(what), problem_(problem) {}
  Problem problem() const { return problem_; }

 private:
  Problem problem_;
};

struct RouteRecord {  // the numpy dtype of recording.py mirrors this
  std::uint64_t iteration;
  std::uint64_t time_ns;  // Unix time, by the clock of the recording's machine
  std::uint64_t gini_numerator;
  std::uint32_t layer;
  std::uint32_t microbatch;
  std::uint32_t tokens;
  std::uint32_t assignments;
  std::uint32_t max_count;
  std::uint32_t padded;
  std::uint32_t invalid;
  std::uint32_t capacity_dropped;
  std::uint32_t unused_experts;
  std::uint32_t map_version;
  std::uint8_t type;
  std::uint8_t lane;
  std::uint8_t direction;  // 0 forward, 1 backward
  std::uint8_t recompute;
  std::uint32_t reserved;
};
static_assert(sizeof(RouteRecord) == 72);

struct TransferRecord {  // the numpy dtype of transfers.py mirrors this
  std::uint64_t iteration;
  std::uint64_t begin_ns, end_ns;  // Unix time, by the clock of the recording's machine
  std::uint32_t layer;
  std::uint32_t microbatch;
  std::uint32_t bytes_per_row;
  std::uint32_t sequence;
  std::uint32_t num_experts;
  std::uint32_t map_version;
  std::uint8_t type;
  std::uint8_t lane;
  std::uint8_t direction;  // 0 forward, 1 backward
  std::uint8_t recompute;
  std::uint8_t timed;
  std::uint8_t unit;  // 0 assignments, 1 tokens
  std::uint16_t reserved;
};
static_assert(sizeof(TransferRecord) == 56);

struct RingRead {
  std::vector<RouteRecord> records;
  std::vector<TransferRecord> transfers;
  // Of all transfers one after another: sent [ranks], received [ranks], experts [num_experts].
  std::vector<std::uint32_t> counts;
  std::uint64_t next;     // the position to continue from
  std::uint64_t lost;     // slots overwritten before they could be read
  std::uint64_t unknown;  // slots of records that this version does not know
};

struct PlacementRecord {
  std::uint32_t version;
  std::uint32_t num_ranks;
  std::uint64_t time_ns;  // Unix time, by the clock of the recording's machine
  std::uint64_t iteration;
  std::vector<std::uint64_t> counts;  // of each expert when it was recorded
  std::vector<std::uint32_t> slots;   // logical expert | rank << 16, or kEmptySlot
};

struct PlacementRead {
  std::vector<PlacementRecord> entries;  // oldest first
  std::uint64_t lost;                    // overwritten, not whole, or impossible
};

enum class Owner { kAlive, kGone };

class RecordingReader {
 public:
  // Throws RecordingError where the file is not a whole, readable recording.
  explicit RecordingReader(const std::string& path);
  ~RecordingReader();
  RecordingReader(const RecordingReader&) = delete;
  RecordingReader& operator=(const RecordingReader&) = delete;

  FileHeader header() const;  // as it is now
  Owner owner() const;        // whether a process holds the recording's lock
  std::string metadata() const;
  const std::vector<LayerEntry>& layers() const { return layers_; }
  std::uint32_t num_lanes() const { return static_cast<std::uint32_t>(rings_.size()); }
  std::uint64_t num_slots(std::uint32_t lane) const { return rings_.at(lane).num_slots; }
  std::uint64_t head(std::uint32_t lane) const;

  // Copies the board block of a layer to `words` [board_block_words(num_experts)]. True: the copy
  // is consistent (its counts sum to its assignments and nothing moved meanwhile).
  bool read_board(std::uint32_t lane, std::uint32_t layer, std::uint64_t* words) const;

  // Ranks of the group that transfers are between; 0: none are recorded.
  std::uint32_t group_size() const { return group_size_; }
  std::uint32_t group_index() const { return group_index_; }

  // Copies a traffic block of a lane to `words` [traffic_block_words(group_size())]; see
  // traffic_block(). True: the copy is consistent.
  bool read_traffic(std::uint32_t lane, std::uint64_t block, std::uint64_t* words) const;

  // Times that placements were recorded; most entries kept of a layer, 0: none are recorded.
  std::uint64_t placements_recorded() const;
  std::uint64_t placements_kept() const { return placement_.kept; }

  // The placements of a layer that are still there.
  PlacementRead read_placements(std::uint32_t layer) const;

  // The records of a lane from `position` on, at most `limit`.
  RingRead read_ring(std::uint32_t lane, std::uint64_t position, std::uint64_t limit) const;

 private:
  struct Ring {
    std::uint64_t offset;
    std::uint64_t num_slots;
  };
  void validate();
  void find_sections(const FileHeader& header);
  void check_layers(const std::vector<std::uint64_t>& board_bytes) const;
  void check_traffic(const std::vector<const Section*>& sections);
  void check_placement(const Section* section);
  void copy(std::uint64_t offset, std::uint64_t bytes, void* to) const;
  [[noreturn]] void fail(Problem problem, const std::string& what) const;
  [[noreturn]] void fail_unborn() const;

  std::string path_;
  int fd_ = -1;
  std::uint64_t bytes_ = 0;
  Section metadata_{};
  std::vector<LayerEntry> layers_;
  std::vector<std::uint64_t> boards_;
  std::vector<Ring> rings_;
  std::vector<std::uint64_t> traffic_;  // where the blocks of each lane begin
  std::uint64_t traffic_stride_ = 0;
  std::uint32_t group_size_ = 0, group_index_ = 0;
  PlacementHeader placement_{};  // as it was when the file was opened
  std::uint64_t placement_offset_ = 0, placement_stride_ = 0;
  std::uint64_t clock_offset_ns_ = 0;
};

// Whether a process holds the lock of the recording at `path`. Throws RecordingError if it cannot
// be opened.
Owner recording_owner(const std::string& path);

}  // namespace dodoco
