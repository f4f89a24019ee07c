// Races, for the sanitizers (`make sanitize`). Prints one line a check; exits 1 on a failure.
#include <atomic>
#include <thread>

#include "board.h"
#include "one_mapping.h"
#include "race.h"
#include "ring.h"

using namespace race;

namespace {

// The bare ring, from `start` on: every accepted record is whole, and accepted + lost = written.
void race_on_ring(std::uint64_t start, const std::string& name) {
  constexpr std::uint64_t kSlots = 64, kWritten = 300000;
  Words memory(sizeof(RingHeader) / 8 + kSlots * kSlotWords, 0);
  auto* header = reinterpret_cast<RingHeader*>(memory.data());
  const auto* slots = memory.data() + sizeof(RingHeader) / 8;
  header->head = start;
  std::thread writer([&] {
    RingWriter ring(header, kSlots);
    for (std::uint64_t n = start; n < start + kWritten; ++n) {
      std::uint32_t values[kSlotWords];
      for (std::uint32_t i = 0; i < kSlotWords; ++i)
        values[i] = static_cast<std::uint32_t>(n) * 31 + i;
      ring.push(values);
    }
  });
  std::uint64_t position = start, accepted = 0, lost = 0;
  bool whole = true;
  while (position < start + kWritten) {
    const std::uint64_t head = load_word(&header->head);
    if (head > position + kSlots) {
      lost += head - kSlots - position;
      position = head - kSlots;
    }
    if (position >= head) continue;
    std::uint32_t values[kSlotWords];
    const SlotRead read =
        read_slot(slots + position % kSlots * kSlotWords, ring_epoch(position, kSlots), values);
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
        name + ": every accepted record is whole (" + std::to_string(accepted) + ")");
  check(accepted + lost == kWritten, name + ": accepted + lost = written");
}

// The bare board: every consistent copy is the state after some number of passes.
void race_on_board() {
  constexpr std::uint32_t kExperts = 16, kPassesWritten = 200000;
  Words block(board_block_words(kExperts), 0);
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
  Words words(block.size());
  std::uint64_t last = 0, consistent = 0;
  bool sound = true;
  do {
    if (!read_block(std::as_const(block).data(), kExperts, words.data())) continue;
    ++consistent;
    sound &= words[kAssignments] == 3 * words[kTokens] && words[kTokens] == words[kPasses];
    sound &= words[kAssignments] >= last;
    last = words[kAssignments];
  } while (!done.load());
  writer.join();
  check(sound && consistent > 0,
        "bare board: consistent copies are sound (" + std::to_string(consistent) + ")");
  check(read_block(std::as_const(block).data(), kExperts, words.data()) &&
            words[kPasses] == kPassesWritten,
        "bare board: exact at the end");
}

// A recording: every lane has a writer, two readers look at all of them, until it is closed.
void race_on_lanes(const std::string& path, std::uint32_t num_lanes, bool wrap) {
  constexpr std::uint64_t kPassesEach = 20000;
  std::atomic<int> reading{0};
  RecordingWriter writer(spec(path, num_lanes, (64u << 10) + num_lanes * (64u << 10)));
  const std::vector<std::uint64_t> starts =
      wrap ? start_below_the_last_epoch(path) : std::vector<std::uint64_t>(num_lanes, 0);
  const std::string name =
      std::to_string(num_lanes) + (wrap ? " lanes, epoch wraps: " : " lanes: ");
  const auto read_until_closed = [&] {
    const RecordingReader reader(path);
    ++reading;
    std::vector<LaneReading> lanes;
    for (std::uint32_t lane = 0; lane < num_lanes; ++lane) lanes.emplace_back(lane, starts[lane]);
    while (reader.header().state != static_cast<std::uint32_t>(FileState::kClosed)) {
      for (LaneReading& lane : lanes) lane.read(reader);
    }
    std::uint64_t accepted = 0;
    for (LaneReading& lane : lanes) {
      require(lane.is_all_of(reader, kPassesEach), name + "accepted + lost = written, board exact");
      accepted += lane.accepted;
    }
    check(accepted > 0, name + "every accepted record is whole (" + std::to_string(accepted) +
                            "), accepted + lost = written, board exact");
  };
  std::vector<std::thread> readers, writers;
  for (int i = 0; i < 2; ++i) readers.emplace_back(read_until_closed);
  while (reading < 2) std::this_thread::yield();
  for (std::uint32_t lane = 0; lane < num_lanes; ++lane) {
    writers.emplace_back([&, lane] {
      write_passes(writer.lane(lane), [](std::uint64_t n) { return n < kPassesEach; });
    });
  }
  for (std::thread& thread : writers) thread.join();
  for (int i = 0; i < 3; ++i) writer.add_fault(Fault::kInternal);
  writer.close();
  for (std::thread& thread : readers) thread.join();
  check(RecordingReader(path).header().num_faults == 3, name + "faults counted");
  ::unlink(path.c_str());
}

// Threads that share a lane lose nothing, and a thread that has chosen another lane writes there.
void race_on_one_lane(const std::string& path) {
  constexpr int kThreads = 4, kPassesEach = 2000;
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = "{}";
  spec.layers = {{8, 2}, {60, 4}};
  spec.num_lanes = 2;
  spec.max_bytes = 1 << 18;
  RecordingWriter writer(spec);
  alignas(8) Site sites[2];
  for (std::uint64_t layer = 0; layer < 2; ++layer) writer.bind_site(&sites[layer], 0, layer);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads + 1; ++t) {
    threads.emplace_back([&, t] {
      const LaneChoice choice(writer.lane(0), writer.lane(t == kThreads ? 1 : 0));
      const std::int32_t ids[4] = {t, 7, -1, 1000};
      const IdTensor tensor{ids, IdType::kInt32, 2, 2, 2, 1};
      for (int n = 0; n < kPassesEach; ++n) record_at_site(&sites[n % 2], tensor, false);
    });
  }
  const RecordingReader reader(path);
  Words words(board_block_words(60));
  for (int n = 0; n < 200; ++n) {
    reader.read_board(0, 1, words.data());
    reader.read_ring(0, 0, UINT64_MAX);
  }
  for (std::thread& thread : threads) thread.join();
  for (std::uint32_t lane = 0; lane < 2; ++lane) {
    std::uint64_t passes = 0, assignments = 0, invalid = 0, padded = 0;
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      check(reader.read_board(lane, layer, words.data()), "one lane: board consistent");
      passes += words[kPasses];
      assignments += words[kAssignments];
      invalid += words[kInvalid];
      padded += words[kPadded];
    }
    const std::uint64_t total = std::uint64_t{kPassesEach} * (lane == 0 ? kThreads : 1);
    check(passes == total && assignments == 2 * total && invalid == total && padded == total,
          "one lane: totals exact");
  }
  check(reader.owner() == Owner::kAlive, "owner alive while open");
  writer.close();
  check(reader.owner() == Owner::kGone, "owner gone after close");
  check(record_at_site(&sites[0], IdTensor{}, false) == RecordResult::kIgnored,
        "a detached site is ignored");
  ::unlink(path.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path =
      std::string(argc > 1 ? argv[1] : ".") + "/stress-" + std::to_string(::getpid()) + ".dodoco";
  race_on_ring(0, "bare ring");
  race_on_ring((std::uint64_t{UINT32_MAX} - 3) * 64 + 5, "bare ring, epoch wraps");
  race_on_board();
  race_on_lanes(path, 2, false);
  race_on_lanes(path, 8, false);
  race_on_lanes(path, 2, true);
  race_on_one_lane(path);
  return 0;
}
