// The passes of a race. What a lane records as its n-th pass follows from n alone, so that a reader
// can recompute every record and, after any number of passes, every word of the board.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "format.h"
#include "lane.h"
#include "recording_reader.h"
#include "recording_writer.h"

namespace race {

using namespace dodoco;
using Words = std::vector<std::uint64_t>;

inline void check(bool condition, const std::string& what) {
  std::printf("%s: %s\n", condition ? "ok" : "FAILED", what.c_str());
  std::fflush(stdout);
  if (!condition) std::exit(1);
}

inline void require(bool condition, const std::string& what) {
  if (!condition) check(false, what);
}

// Patterns of one layer, used in turn. Everything expected of them is counted the slow way here.
class Layer {
 public:
  static constexpr std::uint64_t kPatterns = 16;

  Layer(std::uint32_t num_experts, std::uint32_t k) : num_experts_(num_experts), k_(k) {
    after_.emplace_back(board_block_words(num_experts), 0);
    for (std::uint64_t pattern = 0; pattern < kPatterns; ++pattern) add_pattern(pattern);
  }

  LayerSpec spec() const { return {num_experts_, k_}; }

  IdTensor ids(std::uint64_t pass) const {
    const std::vector<std::int32_t>& ids = ids_[pass % kPatterns];
    const auto k = static_cast<std::int64_t>(k_);
    return {ids.data(), IdType::kInt32, static_cast<std::int64_t>(ids.size()) / k, k, k, 1};
  }

  const RouteRecord& record(std::uint64_t pass) const { return records_[pass % kPatterns]; }

  // Whether `words` is the block after words[kPasses] passes.
  bool is_block(const std::uint64_t* words) const {
    const std::uint64_t rounds = words[kPasses] / kPatterns;
    const Words& full = after_[kPatterns];
    const Words& rest = after_[words[kPasses] % kPatterns];
    for (std::size_t i = 0; i < full.size(); ++i) {
      if (i != kLastPassMonotonicNs && words[i] != rounds * full[i] + rest[i]) return false;
    }
    return true;
  }

 private:
  void add_pattern(std::uint64_t pattern) {
    const std::uint64_t rows = 1 + pattern % 5 + (pattern == 7) * 30;
    std::vector<std::int32_t> ids;
    for (std::uint64_t row = 0; row < rows; ++row) {
      for (std::uint64_t slot = 0; slot < k_; ++slot)
        ids.push_back(static_cast<std::int32_t>((pattern * (row + 1) + 5 * slot) % num_experts_));
    }
    if (pattern % 4 == 1) ids.back() = -1;
    if (pattern == 11) std::fill(ids.begin(), ids.end(), -1);  // nothing to count: padding only
    if (pattern % 4 == 2) ids.back() = 100000;

    Words counts(num_experts_, 0);
    RouteRecord r{};
    for (const std::int32_t id : ids) {
      if (id == -1) {
        ++r.padded;
      } else if (id >= static_cast<std::int32_t>(num_experts_)) {
        ++r.invalid;
      } else {
        ++counts[static_cast<std::size_t>(id)];
        ++r.assignments;
      }
    }
    r.tokens = static_cast<std::uint32_t>(pattern == 11 ? 0 : rows);
    for (std::size_t a = 0; a < counts.size(); ++a) {
      r.max_count = std::max(r.max_count, static_cast<std::uint32_t>(counts[a]));
      r.unused_experts += counts[a] == 0;
      for (std::size_t b = 0; b < a; ++b)
        r.gini_numerator += std::max(counts[a], counts[b]) - std::min(counts[a], counts[b]);
    }

    Words block = after_.back();
    block[kPasses] += 1;
    block[kTokens] += r.tokens;
    block[kAssignments] += r.assignments;
    block[kPadded] += r.padded;
    block[kInvalid] += r.invalid;
    block[kRecordedPasses] += 1;
    block[kStartedPasses] += 1;
    for (std::size_t e = 0; e < counts.size(); ++e) block[kBoardWords + e] += counts[e];
    if (r.assignments != 0) add_to_histograms(r, &block);

    ids_.push_back(std::move(ids));
    records_.push_back(r);
    after_.push_back(std::move(block));
  }

  void add_to_histograms(const RouteRecord& r, Words* block) const {
    std::uint64_t size = 0, max_bin = 0;
    while (std::uint64_t{2} << size <= r.tokens) ++size;
    const double gini = static_cast<double>(r.gini_numerator) / num_experts_ / r.assignments;
    const double max_mean = static_cast<double>(num_experts_) * r.max_count / r.assignments;
    for (std::uint64_t bin = 0; bin < kMaxMeanBins; ++bin) {
      if (kMaxMeanEighths[bin] / 8.0 <= max_mean) max_bin = bin;
    }
    std::uint64_t* histograms = block->data() + kBoardWords + board_count_words(num_experts_);
    ++histograms[size * kGiniBins + static_cast<std::uint64_t>(gini * kGiniBins)];
    ++histograms[kSizeClasses * kGiniBins + size * kMaxMeanBins + max_bin];
  }

  std::uint32_t num_experts_, k_;
  std::vector<std::vector<std::int32_t>> ids_;
  std::vector<RouteRecord> records_;
  std::vector<Words> after_;  // [kPatterns + 1]: the block after so many passes
};

inline const std::vector<Layer>& layers() {
  static const std::vector<Layer> all = {{8, 2}, {60, 4}, {256, 8}};
  return all;
}

inline std::uint64_t num_layers() { return layers().size(); }

// Witnesses of a whole record: they differ from pass to pass in the first and the last word.
inline std::uint32_t microbatch(std::uint64_t n) { return n * 40503 & 0xFFFF; }
inline std::uint32_t map_version(std::uint64_t n) {
  return static_cast<std::uint32_t>(n * 2654435761u);
}

inline RecordingSpec spec(const std::string& path, std::uint32_t num_lanes,
                          std::uint64_t max_bytes) {
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = "{}";
  for (const Layer& layer : layers()) spec.layers.push_back(layer.spec());
  spec.num_lanes = num_lanes;
  spec.max_bytes = max_bytes;
  return spec;
}

// Lets every ring begin a few laps below the last epoch: call it before the first record.
inline std::vector<std::uint64_t> start_below_the_last_epoch(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  FileHeader header;
  require(::pread(fd, &header, sizeof(header), 0) == sizeof(header), "the header can be read");
  std::vector<std::uint64_t> heads;
  for (const Section& section : header.sections) {
    if (section.kind != static_cast<std::uint32_t>(SectionKind::kRing)) continue;
    const std::uint64_t laps = UINT32_MAX - 3 - heads.size();
    heads.push_back(laps * section.count + heads.size());
    require(::pwrite(fd, &heads.back(), 8, static_cast<off_t>(section.offset)) == 8,
            "the head can be set");
  }
  ::close(fd);
  return heads;
}

// Records passes n, n + 1, ... of a lane through the production path; returns the last n + 1.
template <typename More>
std::uint64_t write_passes(Lane* lane, More more) {
  std::uint64_t n = 0;
  for (; more(n); ++n) {
    lane->control()->microbatch = microbatch(n);
    lane->control()->map_version = map_version(n);
    const std::uint64_t layer = n % num_layers();
    const RecordResult result = lane->record(layer, layers()[layer].ids(n / num_layers()), false);
    require(result == RecordResult::kRecorded, "every pass is recorded");
  }
  return n;
}

// What one reader has seen of one lane.
class LaneReading {
 public:
  LaneReading(std::uint32_t lane, std::uint64_t start)
      : lane_(lane), start_(start), position_(start), passes_(num_layers(), 0) {}

  std::uint64_t accepted = 0, lost = 0, consistent = 0, in_flight = 0;

  void read(const RecordingReader& reader) {
    read_ring(reader);
    for (std::uint32_t layer = 0; layer < num_layers(); ++layer) read_board(reader, layer);
  }

  // After the writer's end: nothing is missing and nothing is in flight.
  bool is_all_of(const RecordingReader& reader, std::uint64_t written) {
    while (reader.head(lane_) != position_) read_ring(reader);
    const std::uint64_t in_flight_before = in_flight;
    bool exact = accepted + lost == written && position_ - start_ == written;
    for (std::uint32_t layer = 0; layer < num_layers(); ++layer) {
      read_board(reader, layer);
      exact &= passes_[layer] == (written + num_layers() - 1 - layer) / num_layers();
    }
    return exact && in_flight == in_flight_before;
  }

 private:
  void read_ring(const RecordingReader& reader) {
    const RingRead read = reader.read_ring(lane_, position_, UINT64_MAX);
    require(read.unknown == 0, "no record of a type that was never written");
    require(read.next - position_ == read.lost + read.records.size(), "the cursor adds up");
    std::uint64_t n = position_ - start_;
    for (const RouteRecord& r : read.records) {
      const std::uint64_t found = r.iteration * num_layers() + r.layer;
      require(found >= n && found < read.next - start_, "records come in order, each once");
      n = found + 1;
      const RouteRecord& e = layers()[r.layer].record(r.iteration);
      require(r.microbatch == microbatch(found) && r.map_version == map_version(found) &&
                  r.type == 1 && r.lane == lane_ && r.direction == 0 && r.recompute == 0 &&
                  r.time_ns >= time_ns_ && r.tokens == e.tokens && r.max_count == e.max_count &&
                  r.assignments == e.assignments && r.gini_numerator == e.gini_numerator &&
                  r.padded == e.padded && r.invalid == e.invalid && r.capacity_dropped == 0 &&
                  r.unused_experts == e.unused_experts,
              "every accepted record is whole");
      time_ns_ = r.time_ns;
    }
    accepted += read.records.size();
    lost += read.lost;
    position_ = read.next;
  }

  void read_board(const RecordingReader& reader, std::uint32_t layer) {
    Words words(board_block_words(reader.layers()[layer].num_experts));
    if (!reader.read_board(lane_, layer, words.data())) {
      ++in_flight;
      return;
    }
    ++consistent;
    require(layers()[layer].is_block(words.data()), "a consistent block is exact");
    require(words[kPasses] >= passes_[layer], "counters never go back");
    passes_[layer] = words[kPasses];
  }

  std::uint32_t lane_;
  std::uint64_t start_, position_, time_ns_ = 0;
  Words passes_;
};

}  // namespace race
