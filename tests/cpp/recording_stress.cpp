// Races and damage, for the sanitizers (`make sanitize`). Prints one line a check; exits 1 on a
// failure.
//
// ThreadSanitizer sees a race only where both threads use one mapping, so the races run on the ring
// and the board in plain memory; the file is exercised by the checks after them.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/board.h"
#include "../../csrc/recording_reader.h"
#include "../../csrc/recording_writer.h"
#include "../../csrc/ring.h"

using namespace dodoco;

namespace {

void check(bool condition, const std::string& what) {
  std::printf("%s: %s\n", condition ? "ok" : "FAILED", what.c_str());
  if (!condition) std::exit(1);
}

// Every accepted record is whole, and accepted + lost = written.
void race_on_ring() {
  constexpr std::uint64_t kSlots = 64, kWritten = 300000;
  std::vector<std::uint64_t> memory(sizeof(RingHeader) / 8 + kSlots * kSlotWords, 0);
  auto* header = reinterpret_cast<RingHeader*>(memory.data());
  const auto* slots = memory.data() + sizeof(RingHeader) / 8;
  std::thread writer([&] {
    RingWriter ring(header, kSlots);
    for (std::uint64_t n = 0; n < kWritten; ++n) {
      std::uint32_t values[kSlotWords];
      for (std::uint32_t i = 0; i < kSlotWords; ++i)
        values[i] = static_cast<std::uint32_t>(n) * 31 + i;
      ring.push(values);
    }
  });
  std::uint64_t position = 0, accepted = 0, lost = 0;
  bool whole = true;
  while (position < kWritten) {
    const std::uint64_t head = load_word(&header->head);
    if (head > position + kSlots) {
      lost += head - kSlots - position;
      position = head - kSlots;
    }
    if (position >= head) continue;
    std::uint32_t values[kSlotWords];
    const SlotRead read = read_slot(slots, kSlots, position, values);
    if (read == SlotRead::kNotYet) continue;
    if (read == SlotRead::kWhole) {
      ++accepted;
      for (std::uint32_t i = 0; i < kSlotWords; ++i)
        whole &= values[i] == static_cast<std::uint32_t>(position) * 31 + i;
    } else {
      ++lost;
    }
    ++position;
  }
  writer.join();
  check(whole && accepted > 0,
        "ring race: every accepted record is whole (" + std::to_string(accepted) + ")");
  check(accepted + lost == kWritten, "ring race: accepted + lost = written");
}

// Every consistent copy of the board satisfies what holds between passes; counters never go back.
void race_on_board() {
  constexpr std::uint32_t kExperts = 16, kPassesWritten = 200000;
  std::vector<std::uint64_t> block(board_block_words(kExperts), 0);
  std::atomic<bool> done{false};
  std::thread writer([&] {
    BoardWriter board(block.data(), kExperts);
    std::vector<std::uint32_t> counts(kExperts, 0), scratch(kExperts * kScratchPerExpert);
    for (std::uint32_t n = 0; n < kPassesWritten; ++n) {
      const std::uint32_t expert = n % kExperts;
      counts[expert] = 3;
      PassTotals totals;
      totals.tokens = 1;
      totals.assignments = 3;
      board.add_pass(totals, counts.data(),
                     pass_statistics(counts.data(), kExperts, scratch.data()), true, n);
      counts[expert] = 0;
    }
    done.store(true);
  });
  std::vector<std::uint64_t> words(block.size());
  std::uint64_t last = 0, consistent = 0;
  bool sound = true;
  do {
    if (!read_block(block.data(), kExperts, words.data())) continue;
    ++consistent;
    sound &= words[kAssignments] == 3 * words[kTokens] && words[kTokens] == words[kPasses];
    sound &= words[kAssignments] >= last;
    last = words[kAssignments];
  } while (!done.load());
  writer.join();
  check(sound && consistent > 0,
        "board race: consistent copies are sound (" + std::to_string(consistent) + ")");
  check(read_block(block.data(), kExperts, words.data()) && words[kPasses] == kPassesWritten,
        "board race: exact at the end");
}

// Threads that share a lane lose nothing.
void race_on_lane(const std::string& path) {
  constexpr int kThreads = 4, kPassesEach = 2000;
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = "{}";
  spec.layers = {{8, 2}, {60, 4}};
  spec.max_bytes = 1 << 18;
  RecordingWriter writer(spec);
  alignas(8) Site sites[2];
  for (std::uint64_t layer = 0; layer < 2; ++layer) writer.bind_site(&sites[layer], 0, layer);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const std::int32_t ids[4] = {t, 7, -1, 1000};
      const IdTensor tensor{ids, IdType::kInt32, 2, 2, 2, 1};
      for (int n = 0; n < kPassesEach; ++n) record_at_site(&sites[n % 2], tensor, false);
    });
  }
  const RecordingReader reader(path);
  std::vector<std::uint64_t> words(board_block_words(60));
  for (int n = 0; n < 200; ++n) {
    reader.read_board(0, 1, words.data());
    reader.read_ring(0, 0, UINT64_MAX);
  }
  for (std::thread& thread : threads) thread.join();
  std::uint64_t passes = 0, assignments = 0, invalid = 0, padded = 0;
  for (std::uint32_t layer = 0; layer < 2; ++layer) {
    check(reader.read_board(0, layer, words.data()), "lane race: board consistent");
    passes += words[kPasses];
    assignments += words[kAssignments];
    invalid += words[kInvalid];
    padded += words[kPadded];
  }
  constexpr std::uint64_t kTotal = std::uint64_t{kThreads} * kPassesEach;
  check(passes == kTotal && assignments == 2 * kTotal && invalid == kTotal && padded == kTotal,
        "lane race: totals exact");
  check(reader.owner() == Owner::kAlive, "owner alive while open");
  writer.close();
  check(reader.owner() == Owner::kGone, "owner gone after close");
  check(record_at_site(&sites[0], IdTensor{}, false) == RecordResult::kIgnored,
        "a detached site is ignored");
}

// A damaged file gives data or a RecordingError.
void survive_damage(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::vector<char> original((std::istreambuf_iterator<char>(in)),
                                   std::istreambuf_iterator<char>());
  std::mt19937_64 random(1);
  int opened = 0, refused = 0;
  const std::string damaged = path + ".damaged";
  for (int n = 0; n < 2000; ++n) {
    std::vector<char> bytes = original;
    const std::uint64_t reach = n % 2 ? 1024 : bytes.size();
    for (int flips = 0; flips < 1 + n % 8; ++flips)
      bytes[random() % reach] = static_cast<char>(random());
    if (n % 5 == 0) bytes.resize(random() % bytes.size());
    std::ofstream(damaged, std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    try {
      const RecordingReader reader(damaged);
      for (std::uint32_t lane = 0; lane < reader.num_lanes(); ++lane) {
        for (std::uint32_t layer = 0; layer < reader.layers().size(); ++layer) {
          std::vector<std::uint64_t> words(board_block_words(reader.layers()[layer].num_experts));
          reader.read_board(lane, layer, words.data());
        }
        reader.read_ring(lane, 0, UINT64_MAX);
      }
      reader.metadata();
      ++opened;
    } catch (const RecordingError&) {
      ++refused;
    }
  }
  ::unlink(damaged.c_str());
  check(opened > 0 && refused > 0,
        "damage: " + std::to_string(opened) + " readable, " + std::to_string(refused) + " refused");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path =
      std::string(argc > 1 ? argv[1] : ".") + "/stress-" + std::to_string(::getpid()) + ".dodoco";
  race_on_ring();
  race_on_board();
  race_on_lane(path);
  survive_damage(path);
  ::unlink(path.c_str());
  return 0;
}
