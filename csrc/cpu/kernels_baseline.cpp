// The kernels for any processor of the architecture that the compiler targets.
#include "kernels.h"

#include <cmath>
#include <cstring>

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#define SAMK_SSE2
#endif

namespace samk {
namespace baseline {
namespace {
#include "tiles.inl"
#include "kernels.inl"
}  // namespace
}  // namespace baseline

const KernelSet& baseline_kernels() {
    using namespace baseline;
    static const KernelSet set = {"baseline", run_gram, run_perturb, run_restore, run_combine, run_ascent, run_descent};
    return set;
}

}  // namespace samk
