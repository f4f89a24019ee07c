// Reads everything that can be read of a file that may hold anything.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "format.h"
#include "recording_reader.h"

namespace hostile {

// From a position that a cursor of another recording, or of none, could have.
inline void read_ring(const dodoco::RecordingReader& reader, std::uint32_t lane,
                      std::uint64_t position) {
  const dodoco::RingRead read = reader.read_ring(lane, position, UINT64_MAX);
  // What was read, lost or unknown is what the position moved by.
  std::uint64_t moved = read.records.size() + read.lost + read.unknown, counts = 0;
  for (const dodoco::TransferRecord& transfer : read.transfers) {
    moved += dodoco::transfer_slots(2 * reader.group_size() + transfer.num_experts);
    counts += 2 * reader.group_size() + transfer.num_experts;
  }
  if (counts != read.counts.size()) __builtin_trap();
  if (read.next - position != moved) __builtin_trap();
}

// False: refused with a RecordingError. Anything else than an answer ends the program.
inline bool read_everything(const std::string& path) {
  using namespace dodoco;
  try {
    const RecordingReader reader(path);
    reader.header();
    reader.metadata();
    reader.owner();
    reader.placements_recorded();
    for (std::uint32_t layer = 0; layer < reader.layers().size(); ++layer) {
      const PlacementRead read = reader.read_placements(layer);
      if (read.entries.size() > reader.placements_kept()) __builtin_trap();
      for (const PlacementRecord& entry : read.entries) {
        if (entry.counts.size() != reader.layers()[layer].num_experts) __builtin_trap();
        for (const std::uint32_t slot : entry.slots) {
          const bool placed = (slot & 0xFFFF) < entry.counts.size() && slot >> 16 < entry.num_ranks;
          if (slot != kEmptySlot && !placed) __builtin_trap();
        }
      }
    }
    for (std::uint32_t lane = 0; lane < reader.num_lanes(); ++lane) {
      for (std::uint32_t layer = 0; layer < reader.layers().size(); ++layer) {
        std::vector<std::uint64_t> words(board_block_words(reader.layers()[layer].num_experts));
        reader.read_board(lane, layer, words.data());
      }
      std::vector<std::uint64_t> block(traffic_block_words(reader.group_size()));
      for (std::uint64_t i = 0; reader.group_size() != 0 && i < 2 * reader.layers().size(); ++i)
        reader.read_traffic(lane, i, block.data());
      const std::uint64_t head = reader.head(lane), slots = reader.num_slots(lane);
      for (const std::uint64_t position :
           {std::uint64_t{0}, head, head - 1, head - slots / 2, head + 1, UINT64_MAX})
        read_ring(reader, lane, position);
    }
    return true;
  } catch (const RecordingError& error) {
    if (std::string(error.what()).find('\n') != std::string::npos) __builtin_trap();
    if (std::string(name_of(error.problem())).empty()) __builtin_trap();
    return false;
  }
}

}  // namespace hostile
