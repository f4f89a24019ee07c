// The board: exact cumulative counters of one layer in one lane.
#pragma once

#include <cstdint>

#include "format.h"
#include "route_stats.h"
#include "words.h"

namespace dodoco {

inline std::uint32_t size_class(std::uint64_t tokens) {
  const std::uint32_t log2 = 63 - static_cast<std::uint32_t>(__builtin_clzll(tokens | 1));
  return log2 < kSizeClasses ? log2 : kSizeClasses - 1;
}

// Both bins come from integer comparisons, so that every backend picks the same
// one.
inline std::uint32_t gini_bin(const PassStatistics& s, std::uint64_t num_experts) {
  // At most 2^16 experts times 2^32 assignments times 32 bins: fits.
  const std::uint64_t bin = s.gini_numerator * kGiniBins / (num_experts * s.assignments);
  return static_cast<std::uint32_t>(bin < kGiniBins ? bin : kGiniBins - 1);
}

inline std::uint32_t max_mean_bin(const PassStatistics& s, std::uint64_t num_experts) {
  const std::uint64_t eighths = 8 * num_experts * s.max_count;
  std::uint32_t bin = 0;
  while (bin + 1 < kMaxMeanBins &&
         eighths >= kMaxMeanEighths[bin + 1] * std::uint64_t{s.assignments})
    ++bin;
  return bin;
}

class BoardWriter {
 public:
  BoardWriter() = default;
  BoardWriter(std::uint64_t* block, std::uint64_t num_experts)
      : block_(block), num_experts_(num_experts) {}

  // Publishes one counted pass. Caller: the block's only writer. `counts`: [num_experts].
  // `recorded` adds it to the histograms too. Between its first store and its last the passes
  // started and the passes differ, and a reader knows that the block is in flight.
  void add_pass(const PassTotals& totals, const std::uint32_t* counts, const PassStatistics& stats,
                bool recorded, std::uint64_t now_ns) {
    std::uint64_t* expert_counts = block_ + kBoardWords;
    add_to_own_word(block_ + kStartedPasses, 1);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);  // no instruction: keeps the compiler's order
    // All of them: a branch on each count would be mispredicted more often than
    // it saves a store.
    const std::uint64_t num_experts = num_experts_;  // the stores below could alias the member
#pragma GCC unroll 8
    for (std::uint64_t e = 0; e < num_experts; ++e) add_to_own_word(expert_counts + e, counts[e]);
    if (recorded) {
      add_to_own_word(block_ + kRecordedPasses, 1);
      if (stats.assignments != 0) {
        const std::uint64_t row = size_class(totals.tokens);
        std::uint64_t* histograms = expert_counts + board_count_words(num_experts_);
        add_to_own_word(histograms + row * kGiniBins + gini_bin(stats, num_experts_), 1);
        add_to_own_word(histograms + std::uint64_t{kSizeClasses} * kGiniBins + row * kMaxMeanBins +
                            max_mean_bin(stats, num_experts_),
                        1);
      }
    }
    add_to_own_word(block_ + kTokens, totals.tokens);
    add_to_own_word(block_ + kPadded, totals.padded);
    add_to_own_word(block_ + kInvalid, totals.invalid);
    add_to_own_word(block_ + kCapacityDropped, totals.capacity_dropped);
    store_word(block_ + kLastPassMonotonicNs, now_ns);
    add_to_own_word(block_ + kAssignments, totals.assignments);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    add_to_own_word(block_ + kPasses, 1);
  }

  // Asks for what add_pass() will touch and a model's layers have evicted since the last pass.
  void prefetch() const {
    const std::uint64_t* end = block_ + kBoardWords + board_count_words(num_experts_);
    for (const std::uint64_t* line = block_; line < end; line += 8) __builtin_prefetch(line, 1);
  }

  void add_recomputed() { add_to_own_word(block_ + kRecomputed, 1); }

 private:
  std::uint64_t* block_ = nullptr;
  std::uint64_t num_experts_ = 0;
};

// Reads a block that may be moving into `words`. copy(first, count, to) fetches words of the block,
// each of them whole; adds_up(words) says whether counts in a copy sum to their total. Thread-safe;
// never blocks. True: what was read is a state that the writer published. Updates finished, read
// before the rest, and updates started, read after it, are then equal, so none lay in between; that
// counts add up holds where stores become visible in another order, too.
template <typename Copy, typename AddsUp>
bool read_settled(Copy copy, std::uint64_t num_words, std::uint32_t finished_word,
                  std::uint32_t started_word, AddsUp adds_up, std::uint64_t* words) {
  constexpr int kAttempts = 100, kAttemptsAtRest = 10;
  std::uint64_t last_started = 0;
  for (int attempt = 0, at_rest = 0; attempt < kAttempts && at_rest < kAttemptsAtRest; ++attempt) {
    std::uint64_t finished, started;
    copy(finished_word, 1, &finished);
    copy(0, num_words, words);
    copy(started_word, 1, &started);
    if (started == finished && words[finished_word] == finished && adds_up(words)) return true;
    // A dead writer's last update does not become whole by waiting for it.
    at_rest = attempt > 0 && started == last_started ? at_rest + 1 : 0;
    last_started = started;
  }
  return false;
}

// A layer's block, into `words` [board_block_words(num_experts)].
template <typename Copy>
bool read_block(Copy copy, std::uint64_t num_experts, std::uint64_t* words) {
  const auto adds_up = [&](const std::uint64_t* copied) {
    std::uint64_t sum = 0;
    for (std::uint64_t e = 0; e < num_experts; ++e) sum += copied[kBoardWords + e];
    return sum == copied[kAssignments];
  };
  return read_settled(copy, board_block_words(num_experts), kPasses, kStartedPasses, adds_up,
                      words);
}

// The same for a block in this process's memory.
inline bool read_block(const std::uint64_t* block, std::uint64_t num_experts,
                       std::uint64_t* words) {
  const auto copy = [block](std::uint64_t first, std::uint64_t count, std::uint64_t* to) {
    for (std::uint64_t i = 0; i < count; ++i) to[i] = load_word(block + first + i);
  };
  return read_block(copy, num_experts, words);
}

}  // namespace dodoco
