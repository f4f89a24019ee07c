#include "recording_reader.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "board.h"
#include "ring.h"
#include "words.h"

namespace dodoco {
namespace {

constexpr std::uint64_t kMaxMetadataBytes = 64u << 20;

int open_read_only(const std::string& path) {
  // Non-blocking: a FIFO of that name must not hang the reader.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) throw RecordingError("cannot open " + path + ": " + std::strerror(errno));
  return fd;
}

Owner lock_owner(int fd) {
  if (::flock(fd, LOCK_SH | LOCK_NB) != 0) return Owner::kAlive;
  ::flock(fd, LOCK_UN);
  return Owner::kGone;
}

}  // namespace

Owner recording_owner(const std::string& path) {
  const int fd = open_read_only(path);
  const Owner owner = lock_owner(fd);
  ::close(fd);
  return owner;
}

RecordingReader::RecordingReader(const std::string& path) : path_(path), fd_(open_read_only(path)) {
  try {
    struct stat info;
    if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) fail("is not a file");
    bytes_ = static_cast<std::uint64_t>(info.st_size);
    if (bytes_ < kHeaderBytes)
      fail("is " + std::to_string(bytes_) + " bytes long, too short for a recording");
    void* mapped = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, fd_, 0);
    if (mapped == MAP_FAILED) fail(std::string("cannot be mapped: ") + std::strerror(errno));
    base_ = static_cast<const std::uint8_t*>(mapped);
    validate();
  } catch (...) {
    if (base_ != nullptr) ::munmap(const_cast<std::uint8_t*>(base_), bytes_);
    ::close(fd_);
    throw;
  }
}

RecordingReader::~RecordingReader() {
  ::munmap(const_cast<std::uint8_t*>(base_), bytes_);
  ::close(fd_);
}

void RecordingReader::fail(const std::string& what) const {
  throw RecordingError(path_ + " " + what);
}

FileHeader RecordingReader::header() const {
  check_not_truncated();
  FileHeader copy;
  std::memcpy(&copy, base_, sizeof(copy));
  return copy;
}

// Everything is copied once and checked in the copy: what the file says later cannot lead a read
// astray.
void RecordingReader::validate() {
  const FileHeader h = header();
  const auto state = static_cast<FileState>(h.state);
  if (h.magic != kFileMagic) {
    fail(h.magic == 0 ? "is still being created, or its creation was interrupted"
                      : "is not a DODOCO recording");
  }
  if (h.format_version != kFormatVersion) {
    fail("has format version " + std::to_string(h.format_version) + "; this reader knows version " +
         std::to_string(kFormatVersion) + ": read it with a matching dodoco-ext");
  }
  if (state == FileState::kCreating)
    fail("is still being created, or its creation was interrupted");
  if (state != FileState::kLive && state != FileState::kClosed)
    fail("is damaged: unknown state " + std::to_string(h.state));
  if (h.header_bytes != kHeaderBytes || h.num_sections > kMaxSections)
    fail("is damaged: impossible header");
  if (h.file_bytes > bytes_) {
    fail("is truncated: " + std::to_string(bytes_) + " of " + std::to_string(h.file_bytes) +
         " bytes");
  }
  if (h.num_lanes < 1 || h.num_lanes > kMaxLanes || h.num_layers < 1 || h.num_layers > kMaxLayers) {
    fail("is damaged: impossible number of lanes or layers");
  }
  boards_.assign(h.num_lanes, 0);
  rings_.assign(h.num_lanes, Ring{0, 0});
  std::vector<std::uint64_t> board_bytes(h.num_lanes, 0);
  const Section* layer_table = nullptr;
  for (std::uint32_t i = 0; i < h.num_sections; ++i) {
    const Section& s = h.sections[i];
    if (s.offset % kSectionAlignment != 0 || s.offset < kHeaderBytes || s.offset > bytes_ ||
        s.bytes > bytes_ - s.offset) {
      fail("is damaged: section " + std::to_string(i) + " lies outside the file");
    }
    switch (static_cast<SectionKind>(s.kind)) {
      case SectionKind::kMetadata:
        if (s.bytes > kMaxMetadataBytes) fail("is damaged: oversized metadata");
        metadata_ = s;
        break;
      case SectionKind::kLayers:
        if (s.count != h.num_layers || s.bytes != s.count * sizeof(LayerEntry))
          fail("is damaged: impossible layer table");
        layer_table = &s;
        break;
      case SectionKind::kBoard:
        if (s.lane >= h.num_lanes) fail("is damaged: board of an unknown lane");
        boards_[s.lane] = s.offset;
        board_bytes[s.lane] = s.bytes;
        break;
      case SectionKind::kRing: {
        const bool power_of_two = s.count != 0 && (s.count & (s.count - 1)) == 0;
        if (s.lane >= h.num_lanes || !power_of_two || s.bytes < sizeof(RingHeader) ||
            s.count > (s.bytes - sizeof(RingHeader)) / kSlotBytes) {
          fail("is damaged: impossible ring");
        }
        rings_[s.lane] = Ring{s.offset, s.count};
        break;
      }
      default:
        break;  // sections of later writers are skipped
    }
  }
  if (layer_table == nullptr || metadata_.offset == 0) fail("is damaged: a section is missing");
  const auto* entries = at<LayerEntry>(layer_table->offset);
  layers_.assign(entries, entries + layer_table->count);
  for (std::uint32_t lane = 0; lane < h.num_lanes; ++lane) {
    if (boards_[lane] == 0 || rings_[lane].offset == 0)
      fail("is damaged: a lane has no board or no ring");
    for (const LayerEntry& layer : layers_) {
      if (layer.num_experts < 1 || layer.num_experts > kMaxExperts ||
          layer.top_k > layer.num_experts || layer.board_offset % 8 != 0 ||
          layer.board_bytes < board_block_words(layer.num_experts) * 8 ||
          layer.board_offset > board_bytes[lane] ||
          layer.board_bytes > board_bytes[lane] - layer.board_offset) {
        fail("is damaged: impossible layer");
      }
    }
  }
  clock_offset_ns_ = h.created_unix_ns - h.created_monotonic_ns;
}

void RecordingReader::check_not_truncated() const {
  struct stat info;
  if (::fstat(fd_, &info) != 0 || static_cast<std::uint64_t>(info.st_size) < bytes_)
    fail("was truncated while it was open");
}

Owner RecordingReader::owner() const { return lock_owner(fd_); }

std::string RecordingReader::metadata() const {
  check_not_truncated();
  return std::string(at<char>(metadata_.offset), metadata_.bytes);
}

std::uint64_t RecordingReader::head(std::uint32_t lane) const {
  check_not_truncated();
  return load_word(&at<RingHeader>(rings_.at(lane).offset)->head);
}

bool RecordingReader::read_board(std::uint32_t lane, std::uint32_t layer,
                                 std::uint64_t* words) const {
  check_not_truncated();
  const LayerEntry& entry = layers_.at(layer);
  return read_block(at<std::uint64_t>(boards_.at(lane) + entry.board_offset), entry.num_experts,
                    words);
}

RingRead RecordingReader::read_ring(std::uint32_t lane, std::uint64_t position,
                                    std::uint64_t limit) const {
  check_not_truncated();
  const Ring& ring = rings_.at(lane);
  const auto* header = at<RingHeader>(ring.offset);
  const auto* slots = at<std::uint64_t>(ring.offset + sizeof(RingHeader));
  RingRead result{{}, position, 0, 0};
  std::uint64_t head = load_word(&header->head);
  result.records.reserve(std::min({head > position ? head - position : 0, ring.num_slots, limit}));
  while (result.next < head && result.records.size() < limit) {
    if (head - result.next > ring.num_slots) {
      const std::uint64_t oldest = head - ring.num_slots;
      result.lost += oldest - result.next;
      result.next = oldest;
    }
    std::uint32_t v[kSlotWords];
    const SlotRead read = read_slot(slots, ring.num_slots, result.next, v);
    if (read == SlotRead::kNotYet) break;  // the head was seen before the slot: come back later
    ++result.next;
    if (read == SlotRead::kLapped) {
      ++result.lost;
      head = std::max(head, load_word(&header->head));
      continue;
    }
    const std::uint32_t flags = v[kRouteType];
    if ((flags & 0xFF) != static_cast<std::uint32_t>(RecordType::kRoute)) {
      ++result.unknown;
      continue;
    }
    const auto wide = [&](int low, int high) { return v[low] | std::uint64_t{v[high]} << 32; };
    RouteRecord r{};
    r.iteration = wide(kRouteIterationLow, kRouteIterationHigh);
    r.time_ns = wide(kRouteTimeLow, kRouteTimeHigh) + clock_offset_ns_;
    r.gini_numerator = wide(kRouteGiniLow, kRouteGiniHigh);
    r.layer = v[kRouteLayer] & 0xFFFF;
    r.microbatch = v[kRouteLayer] >> 16;
    r.tokens = v[kRouteTokens];
    r.assignments = v[kRouteAssignments];
    r.max_count = v[kRouteMaxCount];
    r.padded = v[kRoutePadded];
    r.invalid = v[kRouteInvalid];
    r.capacity_dropped = v[kRouteDropped];
    r.unused_experts = v[kRouteUnused];
    r.map_version = v[kRouteMapVersion];
    r.type = static_cast<std::uint8_t>(flags);
    r.lane = static_cast<std::uint8_t>(lane);
    r.direction = (flags & kFlagBackward) != 0;
    r.recompute = (flags & kFlagRecompute) != 0;
    result.records.push_back(r);
  }
  return result;
}

}  // namespace dodoco
