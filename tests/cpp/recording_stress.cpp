// Races, for the sanitizers (`make sanitize`). Prints one line a check; exits 1 on a failure.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "board.h"
#include "capture.h"
#include "divisor.h"
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

// Transfers and passes in one ring: what a reader accepts is whole, the rest is counted as lost,
// and totals that are consistent are those of some number of transfers.
void race_on_transfers(const std::string& path) {
  constexpr std::uint32_t kRanks = 11;  // two slots with no experts, three with more than four
  constexpr std::uint32_t kEach = 40000;
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = "{}";
  spec.layers = {{8, 2}};
  spec.max_bytes = 40 << 10;
  spec.group_size = kRanks;
  RecordingWriter writer(spec);
  std::atomic<bool> done{false};
  std::thread thread([&] {
    const std::int32_t ids[2] = {1, 2};
    for (std::uint32_t n = 0; n < kEach; ++n) {
      std::uint32_t counts[kRanks + 7];
      for (std::uint32_t i = 0; i < kRanks + 7; ++i) counts[i] = n + i;
      Transfer transfer{};
      transfer.sent = {counts, 1, kRanks, 0};
      transfer.received = {counts + 7, 1, kRanks, 0};
      transfer.experts = {counts, 1, n % 8, 0};
      transfer.iteration = n;
      transfer.type = static_cast<std::uint32_t>(RecordType::kDispatch);
      require(writer.lane(0)->record(transfer, nullptr) == RecordResult::kRecorded, "recorded");
      if (n % 3 == 0) writer.lane(0)->record(0, IdTensor{ids, IdType::kInt32, 1, 2, 2, 1}, false);
    }
    done.store(true);
  });
  const RecordingReader reader(path);
  Words words(traffic_block_words(kRanks));
  std::uint64_t position = 0, accepted = 0, lost = 0, moved = 0, consistent = 0;
  bool sound = true, ended = false;
  while (!ended) {
    ended = done.load();
    const RingRead read = reader.read_ring(0, position, UINT64_MAX);
    const std::uint32_t* counts = read.counts.data();
    moved += read.records.size() + read.lost;
    for (const TransferRecord& r : read.transfers) {
      const auto n = static_cast<std::uint32_t>(r.iteration);
      sound &= r.sequence == n && r.num_experts == n % 8;
      for (std::uint32_t i = 0; i < kRanks; ++i)
        sound &= counts[i] == n + i && counts[kRanks + i] == n + i + 7;
      for (std::uint32_t i = 0; i < r.num_experts; ++i) sound &= counts[2 * kRanks + i] == n + i;
      counts += 2 * kRanks + r.num_experts;
      moved += transfer_slots(2 * kRanks + r.num_experts);
    }
    accepted += read.transfers.size();
    lost += read.lost;
    position = read.next;
    if (!reader.read_traffic(0, 0, words.data())) continue;
    ++consistent;
    const std::uint64_t n = words[kTransfers], sum = n * (n - 1) / 2;
    for (std::uint32_t i = 0; i < kRanks && n != 0; ++i)
      sound &= words[kTrafficWords + i] == sum + n * i;
  }
  thread.join();
  check(sound && accepted > 0 && consistent > 0, "transfers: whole (" + std::to_string(accepted) +
                                                     "), totals sound (" +
                                                     std::to_string(consistent) + ")");
  check(moved == position, "transfers: accepted + lost (" + std::to_string(lost) + ") = written");
  check(words[kTransfers] == kEach, "transfers: totals exact at the end");
  writer.close();
  ::unlink(path.c_str());
}

// The threads of a block, on threads of the host: a barrier that is missing is a race.
void race_in_a_block(const std::string& path) {
  constexpr std::uint32_t kRanks = 40, kThreads = 8, kEach = 300;
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = "{}";
  spec.layers = {{8, 2}};
  spec.max_bytes = 60 << 10;
  spec.group_size = kRanks;
  RecordingWriter writer(spec);
  const Section& ring = writer.section(SectionKind::kRing, 0);
  const Section& traffic = writer.section(SectionKind::kTraffic, 0);
  ControlBlock control{};
  control.magic = kControlMagic;
  control.enabled = 1;
  set_record_every(&control, 1);
  LaneState state{};
  state.last_layer = -1;
  Words totals(traffic_block_words(kRanks), 0);
  const TransferPlace place{
      &control,
      &state,
      reinterpret_cast<std::uint64_t*>(writer.base() + ring.offset),
      totals.data(),
      reinterpret_cast<std::uint64_t*>(writer.base() + traffic.offset + sizeof(TrafficHeader)),
      static_cast<std::uint32_t>(__builtin_ctzll(writer.num_slots()))};
  std::vector<std::uint64_t> counts(kRanks);
  Transfer transfer{};
  transfer.sent = transfer.received = {counts.data(), 1, kRanks, 1};
  transfer.iteration = -1;
  transfer.advances = 1;
  transfer.type = static_cast<std::uint32_t>(RecordType::kDispatch);
  struct {
    pthread_barrier_t barrier;
    std::uint64_t sums[kThreads][2];
    void meet() { pthread_barrier_wait(&barrier); }
    std::uint64_t* sums_of(std::uint32_t thread) { return sums[thread]; }
  } team;
  pthread_barrier_init(&team.barrier, nullptr, kThreads);
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (std::uint32_t n = 0; n < kEach; ++n) {
        team.meet();  // between two launches
        if (t == 0) std::fill(counts.begin(), counts.end(), n);
        team.meet();
        write_transfer(place, transfer, t, kThreads, team);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  pthread_barrier_destroy(&team.barrier);
  const RecordingReader reader(path);
  const RingRead read = reader.read_ring(0, 0, UINT64_MAX);
  bool sound = !read.transfers.empty() && read.transfers.back().iteration == kEach - 1;
  for (std::size_t i = 0; i < read.counts.size(); ++i)
    sound &= read.counts[i] == read.transfers[i / (2 * kRanks)].iteration;
  Words words(traffic_block_words(kRanks));
  sound &= reader.read_traffic(0, 0, words.data()) && words[kTransfers] == kEach &&
           words[kSentRows] == std::uint64_t{kRanks} * kEach * (kEach - 1) / 2 && words == totals;
  check(sound, "a block of threads writes what one thread would");
  writer.close();
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
  race_on_transfers(path);
  race_in_a_block(path);
  return 0;
}
