// What a device writes about a transfer: a node before it, and a node where its result is awaited.
#include "capture.h"

namespace dodoco {
namespace {

// On the host's monotonic clock.
__device__ std::uint64_t now_ns(const ControlBlock& control) {
  std::uint64_t device_ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(device_ns));
  return device_ns + static_cast<std::uint64_t>(control.clock_offset_ns);
}

struct BlockBarrier {
  DODOCO_BOTH void operator()() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
};

__device__ void end(DeviceLane* lane, std::uint64_t* totals, std::uint64_t* board, Transfer& t) {
  const ControlBlock& control = lane->control;
  if (control.magic != kControlMagic) return;
  t.end_ns = now_ns(control);
  if (t.begin_slot < kTransfersAtOnce) t.begin_ns = lane->begins[t.begin_slot];
  const TransferPlace place{&control, &lane->state, reinterpret_cast<std::uint64_t*>(control.ring),
                            totals,   board,        static_cast<std::uint32_t>(control.log2_slots)};
  write_transfer(place, t, threadIdx.x, blockDim.x, BlockBarrier());
}

}  // namespace

extern "C" __global__ void dodoco_transfer_begin(DeviceLane* lane, std::uint32_t slot) {
  if (lane->control.magic != kControlMagic) return;
  lane->begins[slot] = now_ns(lane->control);
}

// Counts are in the device's memory.
extern "C" __global__ void dodoco_transfer_end(DeviceLane* lane, std::uint64_t* totals,
                                               std::uint64_t* board, Transfer transfer) {
  end(lane, totals, board, transfer);
}

// Counts without an address are among the constants, one behind the other.
extern "C" __global__ void dodoco_transfer_end_constants(DeviceLane* lane, std::uint64_t* totals,
                                                         std::uint64_t* board, Transfer transfer,
                                                         const __grid_constant__ Constants given) {
  const std::uint32_t* next = given.values;
  for (Counts* counts : {&transfer.sent, &transfer.received, &transfer.experts}) {
    if (counts->data != nullptr || counts->size == 0) continue;
    *counts = {next, 1, counts->size, 0};
    next += counts->size;
  }
  end(lane, totals, board, transfer);
}

}  // namespace dodoco
