// Two faults for compute-sanitizer to find: a check that finds nothing here does not look.
//
//     planted memcheck     a store past the end of an allocation
//     planted racecheck    warps that read what another warp stores, without a barrier in between

#include <cstdio>
#include <cstring>

__global__ void planted_out_of_bounds(int* words, int count) {
  words[threadIdx.x + blockIdx.x * blockDim.x] = count;
}

__global__ void planted_race(int* out) {
  __shared__ volatile int shared[128];
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = shared[127 - threadIdx.x];
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: planted memcheck|racecheck\n");
    return 2;
  }
  int* words = nullptr;
  if (cudaMalloc(&words, 128 * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "no memory on the GPU\n");
    return 3;
  }
  if (std::strcmp(argv[1], "memcheck") == 0) {
    planted_out_of_bounds<<<1, 129>>>(words, 128);
  } else {
    planted_race<<<1, 128>>>(words);
  }
  const cudaError_t launched = cudaGetLastError();
  const cudaError_t finished = cudaDeviceSynchronize();
  std::printf("launch: %s; run: %s\n", cudaGetErrorString(launched), cudaGetErrorString(finished));
  return 0;
}
