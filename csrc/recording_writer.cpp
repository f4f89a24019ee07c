#include "recording_writer.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <set>
#include <stdexcept>
#include <system_error>

#include "words.h"

namespace dodoco {
namespace {

constexpr std::uint64_t kMinSlots = 64;

std::uint64_t aligned(std::uint64_t bytes) {
  return (bytes + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment;
}

std::uint64_t unix_ns() {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1000000000u +
         static_cast<std::uint64_t>(now.tv_nsec);
}

[[noreturn]] void fail(int error, const std::string& what) {
  throw std::system_error(error, std::generic_category(), what);
}

// Every lane ever made and every lock descriptor now held, for the child of a fork: it must neither
// write into its parent's recording nor keep the parent's lock alive.
struct ForkRegistry {
  std::mutex mutex;
  std::vector<Lane*> lanes;
  std::set<int> lock_fds;
};

ForkRegistry& fork_registry() {
  static ForkRegistry* registry = [] {
    auto* made = new ForkRegistry;
    pthread_atfork([] { fork_registry().mutex.lock(); }, [] { fork_registry().mutex.unlock(); },
                   [] {
                     ForkRegistry& r = fork_registry();
                     for (Lane* lane : r.lanes) lane->abandon();
                     for (int fd : r.lock_fds) ::close(fd);
                     r.lock_fds.clear();
                     r.mutex.unlock();
                   });
    return made;
  }();
  return *registry;
}

// A reader that looks at the new file holds its lock for an instant.
bool lock_new_file(int fd) {
  constexpr int kAttempts = 1000;
  constexpr timespec kPause{0, 1000000};
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) return true;
    if (errno != EWOULDBLOCK && errno != EINTR) return false;
    ::nanosleep(&kPause, nullptr);
  }
  return false;
}

// Maps the file open at `lock_fd` through a descriptor of its own. A mapping keeps the open file
// description alive, and a forked child inherits mappings: through `lock_fd`, it would go on
// holding its dead parent's lock.
std::uint8_t* map_apart(const std::string& path, int lock_fd, std::uint64_t bytes) {
  const int fd = ::open(path.c_str(), O_RDWR | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) fail(errno, "cannot open " + path);
  struct stat locked, opened;
  const bool same = ::fstat(lock_fd, &locked) == 0 && ::fstat(fd, &opened) == 0 &&
                    locked.st_dev == opened.st_dev && locked.st_ino == opened.st_ino;
  // Populated: tmpfs clears reserved pages at the first touch, which would be on the hot path.
  void* mapped =
      same ? ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0)
           : MAP_FAILED;
  const int error = same ? errno : EBUSY;
  ::close(fd);
  if (mapped == MAP_FAILED) fail(error, "cannot map " + path);
  return static_cast<std::uint8_t*>(mapped);
}

}  // namespace

RecordingWriter::RecordingWriter(const RecordingSpec& spec) {
  lay_out(spec);
  const int flags = O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
  const int fd = ::open(spec.path.c_str(), flags, 0600);
  if (fd < 0) fail(errno, "cannot create " + spec.path);
  lock_fd_ = fd;
  ForkRegistry& registry = fork_registry();
  {
    const std::lock_guard<std::mutex> guard(registry.mutex);
    registry.lock_fds.insert(lock_fd_);
  }
  try {
    if (!lock_new_file(fd)) fail(errno, "cannot lock " + spec.path);
    if (::fchmod(fd, spec.mode) != 0) fail(errno, "cannot set the mode of " + spec.path);
    // Reserved now: a full file system is an error here, never a SIGBUS while recording.
    const int error = ::posix_fallocate(fd, 0, static_cast<off_t>(file_bytes_));
    if (error != 0) {
      fail(error, "cannot reserve " + std::to_string(file_bytes_) + " bytes for " + spec.path);
    }
    base_ = mapped_ = map_apart(spec.path, fd, file_bytes_);
    fill(spec);
  } catch (...) {
    if (base_ != nullptr) ::munmap(base_, file_bytes_);
    base_ = nullptr;
    ::unlink(spec.path.c_str());
    const std::lock_guard<std::mutex> guard(registry.mutex);
    if (registry.lock_fds.erase(fd) != 0) ::close(fd);
    throw;
  }
  const std::lock_guard<std::mutex> guard(registry.mutex);
  registry.lanes.insert(registry.lanes.end(), lanes_.begin(), lanes_.end());
}

RecordingWriter::~RecordingWriter() { close(); }

void RecordingWriter::lay_out(const RecordingSpec& spec) {
  if (spec.layers.empty()) throw std::invalid_argument("a recording needs at least one layer");
  if (spec.layers.size() > kMaxLayers) {
    throw std::invalid_argument(std::to_string(spec.layers.size()) + " layers; at most " +
                                std::to_string(kMaxLayers));
  }
  if (spec.num_lanes < 1 || spec.num_lanes > kMaxLanes) {
    throw std::invalid_argument("num_lanes is " + std::to_string(spec.num_lanes) + "; give 1 to " +
                                std::to_string(kMaxLanes));
  }
  if (spec.metadata.size() > kMaxMetadataBytes) {
    throw std::invalid_argument("the metadata has " + std::to_string(spec.metadata.size()) +
                                " bytes; at most " + std::to_string(kMaxMetadataBytes) +
                                ": shorten the labels");
  }
  group_size_ = spec.group_size;
  if (group_size_ > kMaxRanks || (group_size_ != 0 && spec.group_index >= group_size_)) {
    throw std::invalid_argument("rank " + std::to_string(spec.group_index) + " of a group of " +
                                std::to_string(group_size_) + "; groups have 1 to " +
                                std::to_string(kMaxRanks) + " ranks, numbered from 0");
  }
  std::uint64_t board_bytes = 0;
  for (const LayerSpec& layer : spec.layers) {
    const std::string where = "layer " + std::to_string(layers_.size());
    if (layer.num_experts < 1 || layer.num_experts > kMaxExperts) {
      throw std::invalid_argument(where + " has num_experts " + std::to_string(layer.num_experts) +
                                  "; give 1 to " + std::to_string(kMaxExperts));
    }
    if (layer.top_k > layer.num_experts) {
      throw std::invalid_argument(where + " has top_k " + std::to_string(layer.top_k) +
                                  " above its num_experts " + std::to_string(layer.num_experts));
    }
    const std::uint64_t bytes = aligned(board_block_words(layer.num_experts) * 8);
    layers_.push_back({layer.num_experts, layer.top_k, board_bytes, bytes, 0});
    board_bytes += bytes;
  }

  std::uint64_t offset = kHeaderBytes;
  const auto add = [&](SectionKind kind, std::uint32_t lane, std::uint64_t bytes,
                       std::uint64_t count, std::uint64_t stride) {
    sections_.push_back({static_cast<std::uint32_t>(kind), lane, offset, bytes, count, stride});
    offset += aligned(bytes);
  };
  add(SectionKind::kMetadata, 0, spec.metadata.size(), spec.metadata.size(), 1);
  add(SectionKind::kLayers, 0, layers_.size() * sizeof(LayerEntry), layers_.size(),
      sizeof(LayerEntry));
  for (std::uint32_t lane = 0; lane < spec.num_lanes; ++lane) {
    add(SectionKind::kBoard, lane, board_bytes, layers_.size(), 0);
  }
  const std::uint64_t blocks = layers_.size() * kTransferTypes;
  const std::uint64_t block_bytes = traffic_block_words(group_size_) * 8;
  for (std::uint32_t lane = 0; lane < spec.num_lanes && group_size_ != 0; ++lane) {
    add(SectionKind::kTraffic, lane, sizeof(TrafficHeader) + blocks * block_bytes, blocks,
        block_bytes);
  }

  if (spec.kept_placements != 0) {
    const PlacementShape shape = placement_shape(layers_, spec.num_slots, spec.kept_placements);
    add(SectionKind::kPlacement, 0, shape.section_bytes(layers_.size()), layers_.size(),
        shape.block_bytes());
  }

  // The rings take what the cap leaves: as many slots as fit, a power of two.
  const auto total = [&](std::uint64_t slots) {
    return offset + spec.num_lanes * (sizeof(RingHeader) + slots * kSlotBytes);
  };
  std::uint64_t least = kMinSlots;  // a few of the longest records
  while (least < 8 * std::uint64_t{transfer_slots(2 * group_size_)}) least *= 2;
  if (total(least) > spec.max_bytes) {
    throw std::invalid_argument("the recording needs at least " + std::to_string(total(least)) +
                                " bytes and may have " + std::to_string(spec.max_bytes) +
                                "; raise DODOCO_MAX_BYTES or free space");
  }
  num_slots_ = least;
  while (total(num_slots_ * 2) <= spec.max_bytes) num_slots_ *= 2;
  for (std::uint32_t lane = 0; lane < spec.num_lanes; ++lane) {
    add(SectionKind::kRing, lane, sizeof(RingHeader) + num_slots_ * kSlotBytes, num_slots_,
        kSlotBytes);
  }
  file_bytes_ = offset;
}

void RecordingWriter::fill(const RecordingSpec& spec) {
  auto* header = reinterpret_cast<FileHeader*>(base_);
  header->format_version = kFormatVersion;
  header->header_bytes = kHeaderBytes;
  header->file_bytes = file_bytes_;
  header->num_sections = static_cast<std::uint32_t>(sections_.size());
  header->created_unix_ns = unix_ns();
  header->created_monotonic_ns = monotonic_ns();
  owner_ = ::getpid();
  header->owner_pid = static_cast<std::uint32_t>(owner_);
  header->rank = spec.rank;
  header->world_size = spec.world_size;
  header->num_layers = static_cast<std::uint32_t>(layers_.size());
  header->num_lanes = spec.num_lanes;
  if (::getrandom(header->uuid, sizeof(header->uuid), 0) != sizeof(header->uuid))
    fail(errno, "no random bytes");
  std::copy(sections_.begin(), sections_.end(), header->sections);

  std::vector<std::uint8_t*> boards, rings;
  std::vector<Lane::Traffic> traffic(spec.num_lanes);
  for (const Section& section : sections_) {
    std::uint8_t* at = base_ + section.offset;
    switch (static_cast<SectionKind>(section.kind)) {
      case SectionKind::kMetadata:
        std::memcpy(at, spec.metadata.data(), spec.metadata.size());
        break;
      case SectionKind::kLayers:
        std::memcpy(at, layers_.data(), section.bytes);
        break;
      case SectionKind::kBoard:
        boards.push_back(at);
        break;
      case SectionKind::kPlacement:
        placement_.open(at, layers_,
                        placement_shape(layers_, spec.num_slots, spec.kept_placements));
        break;
      case SectionKind::kTraffic:
        *reinterpret_cast<TrafficHeader*>(at) = {group_size_, spec.group_index, {}};
        traffic[section.lane] = {reinterpret_cast<std::uint64_t*>(at + sizeof(TrafficHeader)),
                                 group_size_};
        break;
      default:
        rings.push_back(at);
    }
  }
  for (std::uint32_t lane = 0; lane < spec.num_lanes; ++lane) {
    std::vector<Lane::Layer> layers;
    for (const LayerEntry& entry : layers_) {
      auto* block = reinterpret_cast<std::uint64_t*>(boards[lane] + entry.board_offset);
      layers.push_back({BoardWriter(block, entry.num_experts), entry.num_experts, entry.top_k});
    }
    const RingWriter ring(reinterpret_cast<RingHeader*>(rings[lane]), num_slots_);
    lanes_.push_back(new Lane(std::move(layers), ring, traffic[lane], base_));
  }
  header->state = static_cast<std::uint32_t>(FileState::kLive);
  // Readers look at nothing else until they see this.
  __atomic_store_n(&header->magic, kFileMagic, __ATOMIC_RELEASE);
}

void RecordingWriter::bind_site(void* address, std::uint32_t lane, std::uint64_t layer) {
  if (reinterpret_cast<std::uintptr_t>(address) % alignof(Site) != 0)
    throw std::invalid_argument("a site must be 8-byte aligned");
  if (layer >= layers_.size())
    throw std::invalid_argument("no layer " + std::to_string(layer) + " in this recording");
  auto* site = static_cast<Site*>(address);
  *site = Site{kSiteMagic,
               reinterpret_cast<std::uintptr_t>(address),
               reinterpret_cast<std::uintptr_t>(lanes_.at(lane)),
               layer,
               {}};
  sites_.push_back(site);
}

const Section& RecordingWriter::section(SectionKind kind, std::uint32_t lane) const {
  for (const Section& section : sections_) {
    if (section.kind == static_cast<std::uint32_t>(kind) && section.lane == lane) return section;
  }
  throw std::out_of_range("no lane " + std::to_string(lane) + " in this recording");
}

void RecordingWriter::add_fault(Fault fault) {
  if (base_ == nullptr) return;
  auto* header = reinterpret_cast<FileHeader*>(base_);
  if (header->owner_pid != static_cast<std::uint32_t>(::getpid())) return;  // a forked child
  __atomic_store_n(&header->last_fault, static_cast<std::uint32_t>(fault), __ATOMIC_RELAXED);
  __atomic_fetch_add(&header->num_faults, 1, __ATOMIC_RELAXED);
  const auto index = static_cast<std::uint32_t>(fault);
  if (index < kFaultCounters) __atomic_fetch_add(&header->faults[index], 1, __ATOMIC_RELAXED);
}

// Of the latest record that starts in a ring; 0 where there is none.
std::uint64_t RecordingWriter::latest_iteration() const {
  std::uint64_t latest = 0;
  for (std::uint32_t lane = 0; lane < num_lanes(); ++lane) {
    const auto* ring =
        reinterpret_cast<const RingHeader*>(base_ + section(SectionKind::kRing, lane).offset);
    const auto* slots = reinterpret_cast<const std::uint64_t*>(ring + 1);
    const std::uint64_t head = load_word(&ring->head);
    const std::uint64_t least = head - std::min<std::uint64_t>({head, num_slots_, kMaxRecordSlots});
    for (std::uint64_t n = head; n-- > least;) {
      std::uint32_t v[kSlotWords];
      const std::uint64_t* slot = slots + (n & (num_slots_ - 1)) * kSlotWords;
      if (read_slot(slot, ring_epoch(n, num_slots_), v) != SlotRead::kWhole ||
          (v[kRouteType] & 0xFF) == static_cast<std::uint32_t>(RecordType::kContinuation)) {
        continue;
      }
      const std::uint64_t high = v[kRouteIterationHigh];
      latest = std::max(latest, v[kRouteIterationLow] | high << 32);
      break;
    }
  }
  return latest;
}

std::int64_t RecordingWriter::record_placement(const std::vector<LayerPlacement>& layers) {
  placement_.check(layers);
  if (owner_ != ::getpid()) return -1;  // a forked child, in which nobody may hold the lock
  const auto counts_of = [this](std::uint64_t layer, std::uint64_t* counts) {
    const std::uint64_t num_experts = layers_[layer].num_experts;
    std::fill(counts, counts + num_experts, 0);
    std::vector<std::uint64_t> words(board_block_words(num_experts));
    for (std::uint32_t lane = 0; lane < num_lanes(); ++lane) {
      const std::uint8_t* board = base_ + section(SectionKind::kBoard, lane).offset;
      read_block(reinterpret_cast<const std::uint64_t*>(board + layers_[layer].board_offset),
                 num_experts, words.data());
      for (std::uint64_t e = 0; e < num_experts; ++e) counts[e] += words[kBoardWords + e];
    }
  };
  return placement_.record(layers, [this] { return latest_iteration(); }, counts_of);
}

void RecordingWriter::close() {
  if (base_ == nullptr) return;
  for (Site* site : sites_) store_word(&site->magic, 0);
  for (Lane* lane : lanes_) lane->close();
  auto* header = reinterpret_cast<FileHeader*>(base_);
  if (owner_ == ::getpid()) placement_.close();
  ForkRegistry& registry = fork_registry();
  const std::lock_guard<std::mutex> guard(registry.mutex);
  const bool owner = registry.lock_fds.erase(lock_fd_) != 0;  // a forked child owns nothing
  if (owner) {
    store_word(&header->closed_unix_ns, unix_ns());
    __atomic_store_n(&header->state, static_cast<std::uint32_t>(FileState::kClosed),
                     __ATOMIC_RELEASE);
  }
  base_ = nullptr;
  if (owner) ::close(lock_fd_);
  lock_fd_ = -1;
  release();
}

void RecordingWriter::release() {
  if (--holders_ == 0) ::munmap(mapped_, file_bytes_);
}

}  // namespace dodoco
