// Stands in for CUDA, so that the kernels run on a processor: threads are fibers that give way at barriers and shuffles.
//
// Fibers run one at a time, in an order that the test chooses. A kernel that relies on an order, because it lacks a
// barrier, computes something else in another order; a barrier that not all threads reach is an error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../csrc/cuda/packed.h"

using std::fabs;
using std::fma;
using std::sqrt;

struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace shim {

struct Index {
    unsigned x;
};

// Of the running fiber.
extern Index thread_index, block_index, block_size, grid_size;

void block_barrier(const char* file, int line);
void grid_barrier();
double shuffle_down(double value, int distance);
void* shared_memory(size_t size);  // of the running fiber's block

// Vector accesses must be aligned on a GPU; a misaligned one ends the launch with an error.
void check_alignment(const void* place, size_t size);

template <class T>
T load(const T* place) {
    check_alignment(place, sizeof(T));
    T value;
    std::memcpy(&value, place, sizeof value);
    return value;
}
template <class T>
void store(T* place, T value) {
    check_alignment(place, sizeof(T));
    std::memcpy(place, &value, sizeof value);
}

}  // namespace shim

#define threadIdx ::shim::thread_index
#define blockIdx ::shim::block_index
#define blockDim ::shim::block_size
#define gridDim ::shim::grid_size
#define __syncthreads() ::shim::block_barrier(__FILE__, __LINE__)
#define __shfl_down_sync(mask, value, distance) ::shim::shuffle_down(value, distance)
#define __threadfence()
#define __ldcs(place) ::shim::load(place)
#define __ldcg(place) ::shim::load(place)
#define __stcs(place, value) ::shim::store(place, value)

inline uint32_t atomicAdd(uint32_t* place, uint32_t value) {
    const uint32_t before = *place;
    *place = before + value;
    return before;
}

#define SAMK_KERNEL void
#define SAMK_PARAMETERS const samk::cuda::Packed&
#define SAMK_SHARED(Type, name) Type& name = *static_cast<Type*>(::shim::shared_memory(sizeof(Type)))
#define SAMK_DEVICE inline

namespace samk {
namespace cuda {
inline void grid_barrier() { shim::grid_barrier(); }
}  // namespace cuda
}  // namespace samk
