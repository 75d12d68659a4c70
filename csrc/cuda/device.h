// What the kernels use of CUDA. Tests build the same kernels for the CPU with a stand-in for this part of CUDA.
#pragma once

#ifdef SAMK_CUDA_SHIM
#include SAMK_CUDA_SHIM
#else

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "packed.h"

#define SAMK_KERNEL __global__ void __launch_bounds__(samk::cuda::kMaxThreads, samk::cuda::kMinBlocks)
#define SAMK_PARAMETERS const __grid_constant__ samk::cuda::Packed
#define SAMK_SHARED(Type, name) __shared__ Type name
#define SAMK_DEVICE __device__ __forceinline__

namespace samk {
namespace cuda {

// Waits for all blocks of a cooperative launch; what they wrote before is visible after it.
SAMK_DEVICE void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace cuda
}  // namespace samk

#endif
