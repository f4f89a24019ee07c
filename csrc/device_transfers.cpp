// Transfers whose counts are on a device, or which a captured graph repeats.
#include <algorithm>
#include <stdexcept>

#include "device_lanes.h"

namespace dodoco {

void DeviceLanes::add_transfers(const std::string& code) {
  if (traffic_.empty()) throw std::invalid_argument("the recording names no group");
  const Use use(this);
  if (!use) return;
  const cuda::Current current(context_->get());
  const cuda::Module module = load_module(code);
  transfer_begin_ = load(module, "dodoco_transfer_begin");
  transfer_end_ = load(module, "dodoco_transfer_end");
  transfer_constants_ = load(module, "dodoco_transfer_end_constants");
}

RecordResult DeviceLanes::begin_transfer(std::uint32_t slot, cuda::Stream stream) {
  const Use use(this);
  if (!use) return RecordResult::kIgnored;
  if (transfer_begin_ == nullptr || slot >= kTransfersAtOnce) return RecordResult::kBadSite;
  const std::uint32_t lane = lane_for(stream);
  if (lane >= num_lanes()) return RecordResult::kNoLane;
  cuda::Address block = lane_address(lane);
  void* params[] = {&block, &slot};
  return start(transfer_begin_, 1, 1, 0, stream, params);
}

RecordResult DeviceLanes::end_transfer(const Transfer& transfer,
                                       const std::vector<std::uint32_t>& constants,
                                       cuda::Stream stream) {
  const Use use(this);
  if (!use) return RecordResult::kIgnored;
  if (transfer_end_ == nullptr || transfer.layer >= layers_.size()) return RecordResult::kBadSite;
  const std::uint32_t ranks = writer_->group_size();
  const RecordResult checked = check_transfer(transfer, ranks, writer_->num_slots());
  if (checked != RecordResult::kRecorded) return checked;
  if (constants.size() > Constants::kMost) return RecordResult::kTooLarge;
  const std::uint32_t lane = lane_for(stream);
  if (lane >= num_lanes()) return RecordResult::kNoLane;

  cuda::Address block = lane_address(lane);
  const std::uint64_t at = sizeof(TrafficHeader) + traffic_block(transfer.layer, transfer.type) *
                                                       traffic_block_words(ranks) * 8;
  cuda::Address totals = arena_ + places_.traffic(lane) + at;
  cuda::Address board = file_ + traffic_[lane] + at;
  Transfer argument = transfer;
  Constants given;
  std::copy(constants.begin(), constants.end(), given.values);
  void* params[] = {&block, &totals, &board, &argument, &given};
  const std::uint32_t counts = 2 * ranks + transfer.experts.size;
  const unsigned threads = std::clamp((counts + 31) / 32 * 32, 32u, kMostThreads);
  return start(constants.empty() ? transfer_end_ : transfer_constants_, 1, threads, 0, stream,
               params);
}

}  // namespace dodoco
