// Placements that are recorded while passes are, while they are read, and while the recording
// closes. For the sanitizers (`make sanitize`). Prints one line a check; exits 1 on a failure.
#include <atomic>
#include <thread>

#include "one_mapping.h"
#include "race.h"

using namespace race;

namespace {

constexpr std::uint32_t kRanks = 7, kSlots = 300, kKept = 3;

// What is in a slot follows from the version alone.
std::uint32_t slot_of(std::uint32_t version, std::uint64_t place, std::uint32_t num_experts) {
  const std::uint32_t expert = static_cast<std::uint32_t>(version + 3 * place) % num_experts;
  return (version + place) % 11 == 0 ? kEmptySlot : expert | version % kRanks << 16;
}

LayerPlacement placement_of(std::uint32_t version, std::uint32_t layer, std::uint32_t num_experts) {
  LayerPlacement made{layer, kRanks, std::vector<std::uint32_t>(1 + version % kSlots)};
  for (std::uint64_t i = 0; i < made.slots.size(); ++i)
    made.slots[i] = slot_of(version, i, num_experts);
  return made;
}

bool is_whole(const PlacementRecord& read, std::uint32_t layer, std::uint32_t num_experts) {
  const bool counted = num_experts == read.counts.size();
  return counted && read.num_ranks == kRanks &&
         read.slots == placement_of(read.version, layer, num_experts).slots;
}

RecordingSpec with_placements(const std::string& path) {
  RecordingSpec spec;
  spec.path = path;
  spec.metadata = "{}";
  for (const Layer& layer : layers()) spec.layers.push_back(layer.spec());
  spec.max_bytes = 1 << 20;
  spec.num_slots = kSlots;
  spec.kept_placements = kKept;
  return spec;
}

// Two threads record placements, one records passes, one reads, until one closes.
void race_on_placements(const std::string& path) {
  constexpr std::uint32_t kChanges = 4000;
  RecordingWriter writer(with_placements(path));
  std::atomic<bool> done{false};
  std::uint32_t next = 0;
  std::mutex turns;  // a version is what its placement was made for
  const auto change = [&] {
    for (;;) {
      const std::lock_guard<std::mutex> guard(turns);
      if (next == kChanges) return;
      const std::uint32_t version = next++, layer = version % num_layers();
      const std::uint32_t num_experts = layers()[layer].spec().num_experts;
      require(writer.record_placement({placement_of(version, layer, num_experts)}) == version,
              "versions are numbered");
    }
  };
  std::thread first(change), second(change), passes([&] {
    for (std::uint64_t n = 0; !done; ++n)
      writer.lane(0)->record(n % num_layers(), layers()[n % num_layers()].ids(n), false);
  });
  std::uint64_t whole = 0, lost = 0;
  std::thread reading([&] {
    const RecordingReader reader(path);
    std::vector<std::uint32_t> latest(num_layers(), 0);
    while (!done) {
      for (std::uint32_t layer = 0; layer < num_layers(); ++layer) {
        const PlacementRead read = reader.read_placements(layer);
        lost += read.entries.size() < kKept;
        for (std::size_t i = 0; i < read.entries.size(); ++i) {
          const PlacementRecord& entry = read.entries[i];
          require(is_whole(entry, layer, reader.layers()[layer].num_experts),
                  "an entry that is read is whole");
          require(i == 0 || entry.version > read.entries[i - 1].version, "entries are in order");
          for (std::size_t e = 0; i > 0 && e < entry.counts.size(); ++e)
            require(entry.counts[e] >= read.entries[i - 1].counts[e], "counts only grow");
          ++whole;
        }
        if (read.entries.size() < kKept) continue;  // the latest may be among those overwritten
        require(read.entries.back().version >= latest[layer], "the latest never goes back");
        latest[layer] = read.entries.back().version;
      }
    }
  });
  first.join();
  second.join();
  done = true;
  passes.join();
  reading.join();
  const RecordingReader reader(path);
  bool sound = reader.placements_recorded() == kChanges;
  for (std::uint32_t layer = 0; layer < num_layers(); ++layer)
    sound &= reader.read_placements(layer).entries.size() == kKept;
  check(sound && whole > 0, "placements: " + std::to_string(whole) + " read whole, " +
                                std::to_string(lost) + " times one was overwritten");
  writer.close();
  ::unlink(path.c_str());
}

// close() waits for a placement that is being recorded; later ones are ignored.
void race_on_close(const std::string& path) {
  for (int round = 0; round < 50; ++round) {
    RecordingWriter writer(with_placements(path));
    std::atomic<bool> started{false};
    std::thread changing([&] {
      std::uint32_t version = 0;
      const std::uint32_t num_experts = layers()[0].spec().num_experts;
      while (writer.record_placement({placement_of(version, 0, num_experts)}) >= 0) {
        ++version;
        started = true;
      }
    });
    while (!started) sched_yield();
    writer.close();
    changing.join();
    const RecordingReader reader(path);
    for (const PlacementRecord& entry : reader.read_placements(0).entries)
      require(is_whole(entry, 0, layers()[0].spec().num_experts), "closed: entries are whole");
    ::unlink(path.c_str());
  }
  check(true, "placements: closing waits for them");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = std::string(argc > 1 ? argv[1] : ".") + "/placement-" +
                           std::to_string(::getpid()) + ".dodoco";
  race_on_placements(path);
  race_on_close(path);
  return 0;
}
