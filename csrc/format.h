// Recording format, version 1: the only definition of the bytes that writers and readers share.
//
// A recording is one file: header page, sections. All integers are little-endian, every section
// starts on a 64-byte boundary, and every word that moves while the recording is live is an aligned
// 8-byte word with exactly one writer. docs/recording-format.md describes the same bytes in prose.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dodoco {

constexpr std::uint64_t kFileMagic = 0x0A0D4F434F444F44;  // "DODOCO\r\n": text-mode copies break it
constexpr std::uint64_t kControlMagic = 0x4C525443434F4444;  // "DDOCCTRL"
constexpr std::uint64_t kSiteMagic = 0x455449534F434F44;     // "DOCOSITE"
constexpr std::uint32_t kFormatVersion = 1;

constexpr std::uint32_t kHeaderBytes = 4096;
constexpr std::uint32_t kMaxSections = 64;
constexpr std::uint32_t kMaxLanes = 16;
constexpr std::uint32_t kMaxLayers = 65536;  // a ring record keeps the layer in 16 bits
constexpr std::uint32_t kMaxExperts = 65536;
constexpr std::uint32_t kMaxRanks = 1024;   // of a group: its two rows of counts fit one record
constexpr std::uint32_t kMaxSlots = 65536;  // physical experts of a layer: replicas of logical ones
constexpr std::uint32_t kMaxKept = 1024;    // placements kept of a layer
constexpr std::uint64_t kSectionAlignment = 64;
constexpr std::uint64_t kMaxMetadataBytes = 16u << 20;
constexpr std::uint64_t kMaxFileBytes = std::uint64_t{1} << 32;

enum class FileState : std::uint32_t { kCreating = 0, kLive = 1, kClosed = 2 };

enum class SectionKind : std::uint32_t {
  kMetadata = 1,    // JSON, UTF-8; written once, before the state becomes live
  kLayers = 2,      // LayerEntry[num_layers]
  kBoard = 3,       // one per lane: the board blocks of all layers
  kRing = 4,        // one per lane: RingHeader, then slots
  kPlacement = 5,   // where asked for: PlacementHeader, then a block per layer
  kPassCounts = 6,  // reserved: packed per-pass counts, on request only
  kTokenIds = 7,    // reserved: per-token ids, on request only
  kTraffic = 8,     // one per lane, where a group was named: TrafficHeader, then blocks
};

struct Section {
  std::uint32_t kind;
  std::uint32_t lane;
  std::uint64_t offset;
  std::uint64_t bytes;
  std::uint64_t count;   // entries: bytes of JSON, layers, board blocks, ring slots
  std::uint64_t stride;  // bytes of one entry; 0 where entries differ in size
};
static_assert(sizeof(Section) == 40);

enum class Fault : std::uint32_t {
  kNone = 0,
  kUnsupportedDtype = 1,
  kBadShape = 2,
  kTooLarge = 3,
  kUnsupportedDevice = 4,
  kCopiedSite = 5,
  kInternal = 6,
  kNoDevice = 7,       // the device could not be set up: its layers are not recorded
  kNoLane = 8,         // more streams at the same time than lanes
  kDeviceError = 9,    // a launch was refused
  kUnattributed = 10,  // an AlltoAll that fits no layer or no forward one
};
constexpr std::uint32_t kFaultCounters = 16;

struct FileHeader {
  std::uint64_t magic;
  std::uint32_t format_version;
  std::uint32_t header_bytes;
  std::uint64_t file_bytes;
  std::uint32_t state;  // FileState
  std::uint32_t num_sections;
  std::uint64_t created_unix_ns;
  std::uint64_t created_monotonic_ns;  // record time stamps are on this clock
  std::uint64_t closed_unix_ns;        // 0 until closed
  std::uint32_t owner_pid;             // information, never proof: the flock is the proof
  std::uint32_t rank;
  std::uint32_t world_size;
  std::uint32_t num_layers;
  std::uint32_t num_lanes;
  std::uint32_t last_fault;  // Fault
  std::uint64_t num_faults;
  std::uint8_t uuid[16];
  std::uint64_t faults[kFaultCounters];  // by Fault; all zero in recordings of older writers
  std::uint8_t reserved[16];
  Section sections[kMaxSections];
};
static_assert(offsetof(FileHeader, state) == 24);
static_assert(offsetof(FileHeader, num_faults) == 80);
static_assert(offsetof(FileHeader, uuid) == 88);
static_assert(offsetof(FileHeader, faults) == 104);
static_assert(offsetof(FileHeader, sections) == 248);
static_assert(sizeof(FileHeader) <= kHeaderBytes);

struct LayerEntry {
  std::uint32_t num_experts;
  std::uint32_t top_k;         // 0: unknown
  std::uint64_t board_offset;  // within the board section of a lane
  std::uint64_t board_bytes;
  std::uint64_t reserved;
};
static_assert(sizeof(LayerEntry) == 32);

// --- Board: exact totals. Block of one layer in one lane, as 8-byte words. ---------------------
enum BoardWord : std::uint32_t {
  kPasses = 0,           // executions counted (enabled, not recomputed); stored last
  kTokens = 1,           // rows with something to route
  kAssignments = 2,      // equals the sum of the counts when the block is consistent
  kPadded = 3,           // (token, slot) pairs that were padding
  kInvalid = 4,          // ids outside [0, num_experts) other than -1
  kCapacityDropped = 5,  // assignments missing from a routing map
  kRecomputed = 6,       // executions during backward: seen, not counted
  kRecordedPasses = 7,   // passes that also went to the ring and the histograms
  kLastPassMonotonicNs = 8,
  kStartedPasses = 9,  // stored first, as kPasses is stored last: equal between passes
  kBoardWords = 16,
};

// Per-pass statistics fall into fixed bins, keyed by pass size because their null floor moves with
// it.
constexpr std::uint32_t kSizeClasses =
    20;                                  // class c: 2^c <= tokens < 2^(c+1); the last one is open
constexpr std::uint32_t kGiniBins = 32;  // bin b: b/32 <= gini < (b+1)/32
constexpr std::uint32_t kMaxMeanBins = 32;  // lower bounds in eighths, below
constexpr std::uint32_t kMaxMeanEighths[kMaxMeanBins] = {
    8,  9,  10, 11, 12,  14,  16,  18,  20,  22,  24,  28,  32,  36,   40,   48,
    56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024, 1536, 2048};

constexpr std::uint64_t board_count_words(std::uint64_t num_experts) {
  return (num_experts + 7) / 8 * 8;
}
constexpr std::uint64_t board_block_words(std::uint64_t num_experts) {
  return kBoardWords + board_count_words(num_experts) +
         std::uint64_t{kSizeClasses} * (kGiniBins + kMaxMeanBins);
}

// --- Ring: the latest passes. ------------------------------------------------------------------
constexpr std::uint32_t kEpochs = 0xFFFFFFFF;  // epochs run from 1 to this; 0: never written

struct RingHeader {
  std::uint64_t head;  // records ever written; record n: slot n % num_slots, epoch
                       // n / num_slots % kEpochs + 1
  std::uint64_t reserved[15];
};
static_assert(sizeof(RingHeader) == 128);

constexpr std::uint32_t kSlotWords = 16;  // each {u32 value, u32 epoch}; 128 bytes a record
constexpr std::uint32_t kSlotBytes = kSlotWords * 8;

enum class RecordType : std::uint32_t {
  kRoute = 1,
  kDispatch = 2,
  kCombine = 3,
  kContinuation = 15,  // further slots of a longer record: word 0 this, the others its counts
};
// Word 0 of every slot: type (8 bits), slots of the whole record (8), flags (16).
constexpr std::uint32_t kFlagBackward = 1u << 16;
constexpr std::uint32_t kFlagRecompute = 1u << 17;
constexpr std::uint32_t kFlagUntimed = 1u << 18;  // begin and end are not those of the transfer
constexpr std::uint32_t kFlagTokens = 1u << 19;   // a row is a token, not an assignment

enum RouteWord : std::uint32_t {
  kRouteType = 0,
  kRouteLayer = 1,  // layer (low 16 bits), microbatch (high 16 bits)
  kRouteIterationLow = 2,
  kRouteIterationHigh = 3,
  kRouteTimeLow = 4,  // monotonic nanoseconds
  kRouteTimeHigh = 5,
  kRouteTokens = 6,
  kRouteAssignments = 7,
  kRouteMaxCount = 8,
  kRouteGiniLow = 9,  // sum over pairs i < j of |c_i - c_j|; gini = this / (E * assignments)
  kRouteGiniHigh = 10,
  kRoutePadded = 11,
  kRouteInvalid = 12,
  kRouteDropped = 13,
  kRouteUnused = 14,
  kRouteMapVersion = 15,
};

// One execution of an AlltoAll by one rank. From kTransferCounts on, and through the slots that
// follow: rows sent to each rank, rows received from each rank, rows received for each local
// expert.
enum TransferWord : std::uint32_t {
  kTransferType = 0,
  kTransferLayer = 1,  // layer (low 16 bits), microbatch (high 16 bits)
  kTransferIterationLow = 2,
  kTransferIterationHigh = 3,
  kTransferBeginLow = 4,  // monotonic nanoseconds
  kTransferBeginHigh = 5,
  kTransferEndLow = 6,
  kTransferEndHigh = 7,
  kTransferBytesPerRow = 8,
  kTransferSizes = 9,      // ranks (low 16 bits), experts (high 16 bits)
  kTransferSequence = 10,  // transfers of the lane before this one, low 32 bits
  kTransferMapVersion = 11,
  kTransferReserved = 12,
  kTransferCounts = 13,
};
constexpr std::uint32_t kCountsInFirstSlot = 3;
constexpr std::uint32_t kCountsInNextSlots = 15;
static_assert(kTransferCounts + kCountsInFirstSlot == kSlotWords);
static_assert(1 + kCountsInNextSlots == kSlotWords);
constexpr std::uint32_t kMaxRecordSlots = 255;

constexpr std::uint32_t transfer_slots(std::uint32_t num_counts) {
  return num_counts <= kCountsInFirstSlot
             ? 1
             : 1 + (num_counts - kCountsInFirstSlot + kCountsInNextSlots - 1) / kCountsInNextSlots;
}
static_assert(transfer_slots(2 * kMaxRanks) <= kMaxRecordSlots);

// --- Traffic: exact totals of transfers, a block for each layer and type. ------------------------
struct TrafficHeader {
  std::uint64_t num_ranks;  // of the group
  std::uint64_t index;      // of the writing rank in it
  std::uint64_t reserved[6];
};
static_assert(sizeof(TrafficHeader) == 64);

// A block, as 8-byte words.
enum TrafficWord : std::uint32_t {
  kTransfers = 0,  // executions of any kind; stored last
  kForward = 1,    // forward, not recomputed: what the rows below count
  kBackward = 2,
  kRecomputedTransfers = 3,
  kUntimed = 4,    // of any kind, without a duration
  kSentBytes = 5,  // of any kind
  kReceivedBytes = 6,
  kDurationNs = 7,    // of any kind that is timed
  kSentRows = 8,      // equals the sum of the rows sent when the block is consistent
  kReceivedRows = 9,  // likewise
  kLastEndMonotonicNs = 10,
  kStartedTransfers = 11,  // stored first, as kTransfers is stored last: equal between transfers
  kTrafficWords = 16,      // from here: rows sent to each rank, then rows received from each rank
};

constexpr std::uint32_t kTransferTypes = 2;

// Which block, of a layer and a type that may carry flags.
constexpr std::uint64_t traffic_block(std::uint64_t layer, std::uint32_t type) {
  return layer * kTransferTypes +
         ((type & 0xFF) - static_cast<std::uint32_t>(RecordType::kDispatch));
}

constexpr std::uint64_t traffic_block_words(std::uint64_t num_ranks) {
  return kTrafficWords + (2 * num_ranks + 7) / 8 * 8;
}

// --- Placement: on which rank each physical expert lies, and which logical expert it is. ---------
struct PlacementHeader {
  std::uint64_t num_slots;    // most physical experts of a layer
  std::uint64_t kept;         // entries of a layer; older ones are overwritten
  std::uint64_t entry_bytes;  // of one entry
  std::uint64_t recorded;     // times that placements were recorded; the next one's version
  std::uint64_t reserved[4];
};
static_assert(sizeof(PlacementHeader) == 64);

struct PlacementHead {  // of the block of a layer; its entries follow
  std::uint64_t
      head;  // entries ever written; entry n: place n % kept, epoch n / kept % kEpochs + 1
  std::uint64_t reserved[7];
};
static_assert(sizeof(PlacementHead) == 64);

// An entry, as words {u32 value, u32 epoch} like those of a ring's slots.
enum PlacementWord : std::uint32_t {
  kPlacementVersion = 0,
  kPlacementTimeLow = 1,  // monotonic nanoseconds
  kPlacementTimeHigh = 2,
  kPlacementIterationLow = 3,  // of the latest record in a ring
  kPlacementIterationHigh = 4,
  kPlacementRanks = 5,
  kPlacementSlots = 6,   // physical experts P
  kPlacementCounts = 8,  // from here: E low and E high halves of the counts so far, then P slots
};
// A slot: logical expert (low 16 bits), rank (high 16 bits); or
constexpr std::uint32_t kEmptySlot = 0xFFFFFFFF;

constexpr std::uint64_t placement_entry_words(std::uint64_t num_experts, std::uint64_t num_slots) {
  return kPlacementCounts + 2 * num_experts + num_slots;
}

// --- What an op receives instead of arguments that could change under a captured graph. ---------
struct ControlBlock {          // one per lane, at a fixed address of the executing device
  std::uint64_t magic;         // 0 once detached: a graph that is replayed later records nothing
  std::uint64_t recording;     // address of the mapped file on that device
  std::uint32_t enabled;       // 0: the pass advances the iteration and counts nothing
  std::uint32_t record_every;  // iterations; gates ring and histograms, never the board
  std::int64_t num_valid;      // rows that are real; the rest is padding. Negative: all
  std::uint32_t map_version;
  std::uint32_t microbatch;
  // The addresses and the clock are for device lanes, and those of the executing device.
  std::uint64_t ring;            // the lane's RingHeader in the mapped file
  std::uint64_t log2_slots;      // slots of the ring
  std::int64_t clock_offset_ns;  // device clock + this = monotonic clock of the host
  std::uint64_t scratch;         // u32[kScratchCounts + experts of the widest layer]
  // n is a multiple of record_every if (n & every_mask) == 0 and n * every_inverse <= every_limit,
  // modulo 2^64: every_mask + 1 is its power of two, every_inverse that of its odd part.
  std::uint64_t every_mask;
  std::uint64_t every_inverse;
  std::uint64_t every_limit;
  std::uint64_t reserved[4];
};
static_assert(offsetof(ControlBlock, ring) == 40);
static_assert(offsetof(ControlBlock, every_limit) == 88);
static_assert(sizeof(ControlBlock) == 128);

struct LaneState {  // what a lane remembers from pass to pass
  std::uint64_t iteration;
  std::int64_t last_layer;  // -1 before the first pass
  std::uint64_t head;       // of the ring
  std::uint64_t transfers;  // recorded
  std::uint64_t reserved[12];
};
static_assert(sizeof(LaneState) == 128);

constexpr std::uint32_t kTransfersAtOnce = 16;  // of a device lane

// A lane on a device. Everything has its place behind one address, so that a kernel can ask for all
// of it at once: each look that depended on another one would cost a trip to memory.
struct DeviceLane {
  ControlBlock control;
  LaneState state;
  std::uint32_t max_mean_eighths[kMaxMeanBins];
  std::uint64_t begins[kTransfersAtOnce];  // of transfers under way, monotonic nanoseconds
};
static_assert(offsetof(DeviceLane, state) == 128);
static_assert(offsetof(DeviceLane, max_mean_eighths) == 256);
static_assert(offsetof(DeviceLane, begins) == 384);
static_assert(sizeof(DeviceLane) == 512);

// Where the programs of one launch meet, u32 words, all zero between launches.
enum ScratchWord : std::uint32_t {
  kScratchTicket = 0,
  kScratchTokens = 1,
  kScratchMinusOnes = 2,
  kScratchInvalid = 3,
  kScratchDropped = 4,
  kScratchCounts = 8,  // from here: tokens per expert
};

struct Site {  // the tensor a probe passes to the op
  std::uint64_t magic;
  std::uint64_t self;  // its own address: a copied tensor must not write as if it were the original
  std::uint64_t lane;  // host: a Lane; device: its first lane's DeviceLane
  std::uint64_t layer;
  std::uint64_t reserved[4];
};
static_assert(sizeof(Site) == 64);

}  // namespace dodoco
