// What a device writes about a transfer: a node before it, and a node where its result is awaited.
#include "capture.h"

namespace dodoco {
namespace {

__device__ std::uint64_t clock_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

struct Block {
  std::uint64_t (*sums)[2];
  DODOCO_BOTH void meet() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }
  DODOCO_BOTH std::uint64_t* sums_of(std::uint32_t thread) const { return sums[thread]; }
};

__device__ void end(DeviceLane* lane, std::uint64_t* totals, std::uint64_t* board,
                    const Transfer& transfer) {
  __shared__ std::uint64_t sums[kMostThreads][2];
  Block block{sums};
  end_transfer(lane, totals, board, transfer, clock_ns(), threadIdx.x, blockDim.x, block);
}

}  // namespace

extern "C" __global__ void dodoco_transfer_begin(DeviceLane* lane, std::uint32_t slot) {
  begin_transfer(lane, slot, clock_ns());
}

// Counts are in the device's memory.
extern "C" __global__ void dodoco_transfer_end(DeviceLane* lane, std::uint64_t* totals,
                                               std::uint64_t* board, Transfer transfer) {
  end(lane, totals, board, transfer);
}

// Some counts are among the arguments.
extern "C" __global__ void dodoco_transfer_end_constants(DeviceLane* lane, std::uint64_t* totals,
                                                         std::uint64_t* board, Transfer transfer,
                                                         const __grid_constant__ Constants given) {
  find_constants(&transfer, given);
  end(lane, totals, board, transfer);
}

}  // namespace dodoco
