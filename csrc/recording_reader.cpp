#include "recording_reader.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <utility>

#include "board.h"

namespace dodoco {
namespace {

int open_read_only(const std::string& path) {
  // Non-blocking: a FIFO of that name must not hang the reader.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd >= 0) return fd;
  const int error = errno;
  const bool missing = error == ENOENT || error == ENOTDIR || error == ENAMETOOLONG;
  if (error == ELOOP) {
    throw RecordingError(Problem::kForeign, path + " is a link: give the file that it points to");
  }
  const char* advice = error == EACCES ? ": read it as its owner or as a member of its group" : "";
  throw RecordingError(missing ? Problem::kMissing : Problem::kUnreadable,
                       "cannot open " + path + ": " + std::strerror(error) + advice);
}

Owner lock_owner(int fd) {
  // No writer creates a recording where locks are refused: any other error is a copy's.
  if (::flock(fd, LOCK_SH | LOCK_NB) != 0) {
    return errno == EWOULDBLOCK ? Owner::kAlive : Owner::kGone;
  }
  ::flock(fd, LOCK_UN);
  return Owner::kGone;
}

}  // namespace

const char* name_of(Problem problem) {
  switch (problem) {
    case Problem::kMissing:
      return "missing";
    case Problem::kUnreadable:
      return "unreadable";
    case Problem::kForeign:
      return "foreign";
    case Problem::kCreating:
      return "creating";
    case Problem::kUnfinished:
      return "unfinished";
    case Problem::kVersion:
      return "version";
    case Problem::kTruncated:
      return "truncated";
    case Problem::kDamaged:
      break;
  }
  return "damaged";
}

Owner recording_owner(const std::string& path) {
  const int fd = open_read_only(path);
  const Owner owner = lock_owner(fd);
  ::close(fd);
  return owner;
}

RecordingReader::RecordingReader(const std::string& path) : path_(path), fd_(open_read_only(path)) {
  try {
    validate();
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

RecordingReader::~RecordingReader() { ::close(fd_); }

void RecordingReader::fail(Problem problem, const std::string& what) const {
  throw RecordingError(problem, path_ + " " + what);
}

void RecordingReader::fail_unborn() const {
  if (owner() == Owner::kAlive) fail(Problem::kCreating, "is still being created: try again");
  fail(Problem::kUnfinished,
       "was never finished: its creation was interrupted, or has this instant begun");
}

void RecordingReader::copy(std::uint64_t offset, std::uint64_t bytes, void* to) const {
  auto* next = static_cast<std::uint8_t*>(to);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd_, next, bytes, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      fail(Problem::kUnreadable, std::string("cannot be read: ") + std::strerror(errno));
    }
    if (got == 0) fail(Problem::kTruncated, "was truncated while it was open");
    next += got;
    offset += static_cast<std::uint64_t>(got);
    bytes -= static_cast<std::uint64_t>(got);
  }
}

FileHeader RecordingReader::header() const {
  struct stat info;
  if (::fstat(fd_, &info) != 0 || static_cast<std::uint64_t>(info.st_size) < bytes_)
    fail(Problem::kTruncated, "was truncated while it was open");
  FileHeader header;
  copy(0, sizeof(header), &header);
  return header;
}

// Everything is copied once and checked in the copy: what the file says later cannot lead a read
// astray.
void RecordingReader::validate() {
  struct stat info;
  if (::fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) fail(Problem::kForeign, "is not a file");
  bytes_ = static_cast<std::uint64_t>(info.st_size);
  std::uint64_t magic = 0;
  copy(0, std::min<std::uint64_t>(bytes_, sizeof(magic)), &magic);
  const std::string size = std::to_string(bytes_) + " bytes";
  if (magic == 0) fail_unborn();
  if (magic != kFileMagic) fail(Problem::kForeign, "is not a DODOCO recording");
  if (bytes_ < kHeaderBytes) {
    fail(Problem::kTruncated, "is truncated: " + size + ", too short for a header");
  }
  const FileHeader h = header();
  const auto state = static_cast<FileState>(h.state);
  if (h.format_version != kFormatVersion) {
    fail(Problem::kVersion, "has format version " + std::to_string(h.format_version) +
                                "; this reader knows version " + std::to_string(kFormatVersion) +
                                ": read it with a matching dodoco-ext");
  }
  if (state == FileState::kCreating) fail_unborn();
  if (state != FileState::kLive && state != FileState::kClosed)
    fail(Problem::kDamaged, "is damaged: unknown state " + std::to_string(h.state));
  if (h.header_bytes != kHeaderBytes || h.num_sections > kMaxSections ||
      h.file_bytes > kMaxFileBytes) {
    fail(Problem::kDamaged, "is damaged: impossible header");
  }
  if (h.file_bytes > bytes_) {
    fail(Problem::kTruncated,
         "is truncated: " + size + " of " + std::to_string(h.file_bytes) + " are left");
  }
  if (h.num_lanes < 1 || h.num_lanes > kMaxLanes || h.num_layers < 1 || h.num_layers > kMaxLayers) {
    fail(Problem::kDamaged, "is damaged: impossible number of lanes or layers");
  }
  bytes_ = h.file_bytes;  // what lies behind is not ours
  find_sections(h);
  clock_offset_ns_ = h.created_unix_ns - h.created_monotonic_ns;
}

void RecordingReader::find_sections(const FileHeader& h) {
  boards_.assign(h.num_lanes, 0);
  rings_.assign(h.num_lanes, Ring{0, 0});
  std::vector<std::uint64_t> board_bytes(h.num_lanes, 0);
  std::vector<const Section*> traffic(h.num_lanes, nullptr);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> taken;  // begin and end of each section
  const Section *layer_table = nullptr, *placement = nullptr;
  for (std::uint32_t i = 0; i < h.num_sections; ++i) {
    const Section& s = h.sections[i];
    if (s.offset % kSectionAlignment != 0 || s.offset < kHeaderBytes || s.offset > bytes_ ||
        s.bytes > bytes_ - s.offset) {
      fail(Problem::kDamaged,
           "is damaged: section " + std::to_string(i) + " lies outside the file");
    }
    if (s.bytes > 0) taken.emplace_back(s.offset, s.offset + s.bytes);
    switch (static_cast<SectionKind>(s.kind)) {
      case SectionKind::kMetadata:
        if (s.bytes > kMaxMetadataBytes) fail(Problem::kDamaged, "is damaged: oversized metadata");
        metadata_ = s;
        break;
      case SectionKind::kLayers:
        if (s.count != h.num_layers || s.bytes != s.count * sizeof(LayerEntry))
          fail(Problem::kDamaged, "is damaged: impossible layer table");
        layer_table = &s;
        break;
      case SectionKind::kBoard:
        if (s.lane >= h.num_lanes) fail(Problem::kDamaged, "is damaged: board of an unknown lane");
        boards_[s.lane] = s.offset;
        board_bytes[s.lane] = s.bytes;
        break;
      case SectionKind::kRing: {
        const bool power_of_two = s.count != 0 && (s.count & (s.count - 1)) == 0;
        if (s.lane >= h.num_lanes || !power_of_two || s.bytes < sizeof(RingHeader) ||
            s.count > (s.bytes - sizeof(RingHeader)) / kSlotBytes) {
          fail(Problem::kDamaged, "is damaged: impossible ring");
        }
        rings_[s.lane] = Ring{s.offset, s.count};
        break;
      }
      case SectionKind::kTraffic:
        if (s.lane >= h.num_lanes)
          fail(Problem::kDamaged, "is damaged: traffic of an unknown lane");
        traffic[s.lane] = &s;
        break;
      case SectionKind::kPlacement:
        placement = &s;
        break;
      default:
        break;  // sections of later writers are skipped
    }
  }
  // Sixteen boards in one place would make a file sixteen times as long to read as it is.
  std::sort(taken.begin(), taken.end());
  for (std::size_t i = 1; i < taken.size(); ++i) {
    if (taken[i].first < taken[i - 1].second)
      fail(Problem::kDamaged, "is damaged: sections overlap");
  }
  if (layer_table == nullptr || metadata_.offset == 0)
    fail(Problem::kDamaged, "is damaged: a section is missing");
  layers_.resize(layer_table->count);
  copy(layer_table->offset, layer_table->bytes, layers_.data());
  check_layers(board_bytes);
  check_traffic(traffic);
  check_placement(placement);
}

// All lanes have traffic of one group, or none has.
void RecordingReader::check_traffic(const std::vector<const Section*>& sections) {
  for (const Section* s : sections) {
    if ((s == nullptr) != (sections[0] == nullptr))
      fail(Problem::kDamaged, "is damaged: a lane has no traffic");
    if (s == nullptr) continue;
    if (s->bytes < sizeof(TrafficHeader)) fail(Problem::kDamaged, "is damaged: impossible traffic");
    TrafficHeader header;
    copy(s->offset, sizeof(header), &header);
    const bool first = s == sections[0];
    if (header.num_ranks < 1 || header.num_ranks > kMaxRanks || header.index >= header.num_ranks ||
        s->count != layers_.size() * kTransferTypes || s->stride % 8 != 0 ||
        s->stride < traffic_block_words(header.num_ranks) * 8 || s->stride > kMaxFileBytes ||
        s->stride * s->count > s->bytes - sizeof(header) ||
        (!first && (header.num_ranks != group_size_ || header.index != group_index_ ||
                    s->stride != traffic_stride_))) {
      fail(Problem::kDamaged, "is damaged: impossible traffic");
    }
    group_size_ = static_cast<std::uint32_t>(header.num_ranks);
    group_index_ = static_cast<std::uint32_t>(header.index);
    traffic_stride_ = s->stride;
    traffic_.push_back(s->offset + sizeof(header));
  }
}

void RecordingReader::check_layers(const std::vector<std::uint64_t>& board_bytes) const {
  for (std::size_t lane = 0; lane < rings_.size(); ++lane) {
    if (boards_[lane] == 0 || rings_[lane].offset == 0)
      fail(Problem::kDamaged, "is damaged: a lane has no board or no ring");
    // In order and apart: thousands of layers that share one block would make a small file huge to
    // read.
    std::uint64_t end = 0;
    for (const LayerEntry& layer : layers_) {
      if (layer.num_experts < 1 || layer.num_experts > kMaxExperts ||
          layer.top_k > layer.num_experts || layer.board_offset % 8 != 0 ||
          layer.board_offset < end ||
          layer.board_bytes < board_block_words(layer.num_experts) * 8 ||
          layer.board_offset > board_bytes[lane] ||
          layer.board_bytes > board_bytes[lane] - layer.board_offset) {
        fail(Problem::kDamaged, "is damaged: impossible layer");
      }
      end = layer.board_offset + layer.board_bytes;
    }
  }
}

Owner RecordingReader::owner() const { return lock_owner(fd_); }

std::string RecordingReader::metadata() const {
  std::string text(metadata_.bytes, '\0');
  copy(metadata_.offset, metadata_.bytes, text.data());
  return text;
}

std::uint64_t RecordingReader::head(std::uint32_t lane) const {
  std::uint64_t head;
  copy(rings_.at(lane).offset, sizeof(head), &head);
  return head;
}

bool RecordingReader::read_board(std::uint32_t lane, std::uint32_t layer,
                                 std::uint64_t* words) const {
  const std::uint64_t block = boards_.at(lane) + layers_.at(layer).board_offset;
  const auto fetch = [&](std::uint64_t first, std::uint64_t count, std::uint64_t* to) {
    copy(block + first * 8, count * 8, to);
  };
  return read_block(fetch, layers_[layer].num_experts, words);
}

bool RecordingReader::read_traffic(std::uint32_t lane, std::uint64_t block,
                                   std::uint64_t* words) const {
  const std::uint64_t at = traffic_.at(lane) + block * traffic_stride_;
  if (block >= layers_.size() * kTransferTypes) throw std::out_of_range("no such traffic block");
  const auto fetch = [&](std::uint64_t first, std::uint64_t count, std::uint64_t* to) {
    copy(at + first * 8, count * 8, to);
  };
  const auto counts_add_up = [&](const std::uint64_t* copied) {
    const std::uint64_t* sent = copied + kTrafficWords;
    const std::uint64_t* received = sent + group_size_;
    return std::accumulate(sent, received, std::uint64_t{0}) == copied[kSentRows] &&
           std::accumulate(received, received + group_size_, std::uint64_t{0}) ==
               copied[kReceivedRows];
  };
  return read_settled(fetch, traffic_block_words(group_size_), kTransfers, kStartedTransfers,
                      counts_add_up, words);
}

}  // namespace dodoco
