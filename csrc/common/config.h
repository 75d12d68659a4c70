// Qualifiers that let one definition serve the CPU compiler and nvcc.
#pragma once

#ifdef __CUDACC__
#define SAMK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SAMK_HOST_DEVICE inline
#endif

#if defined(__GNUC__) || defined(__clang__)
#define SAMK_RESTRICT __restrict__
#else
#define SAMK_RESTRICT
#endif

namespace samk {

// The Gram matrix, the rules and the combination take at most this many gradient lists.
constexpr int kMaxLists = 3;

}  // namespace samk
