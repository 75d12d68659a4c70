// The same kernels for x86-64 processors with AVX2 and F16C. "Instruction sets" in docs/measurements.md says what it
// buys.
#include "kernels.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#ifdef _OPENMP
#include <omp.h>
#endif
#include <immintrin.h>
#define SAMK_SSE2
#define SAMK_F16C

// Only what follows is compiled for AVX2; headers stay outside, so that no shared inline function needs it.
#pragma GCC push_options
#pragma GCC target("avx2,f16c")

namespace samk {
namespace avx2 {
namespace {
#include "tiles.inl"
#include "kernels.inl"
}  // namespace
}  // namespace avx2
}  // namespace samk

#pragma GCC pop_options

namespace samk {

const KernelSet* avx2_kernels() {
    using namespace avx2;
    static const KernelSet set = {"avx2", run_gram, run_perturb, run_restore, run_combine, run_ascent, run_descent};
    static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    return supported ? &set : nullptr;
}

}  // namespace samk

#else

namespace samk {

const KernelSet* avx2_kernels() { return nullptr; }

}  // namespace samk

#endif
