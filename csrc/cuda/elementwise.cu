// Kernels that need no sum.
#include "launch.h"
#include "phases.cuh"

namespace samk {
namespace cuda {

SAMK_KERNEL perturb_kernel(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    perturb_phase(p, shared, p.header.coefficients);
}

SAMK_KERNEL restore_kernel(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    restore_phase(p, shared);
}

SAMK_KERNEL combine_kernel(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    combine_phase(p, shared, p.header.coefficients);
}

Kernel* const kPerturbKernel = perturb_kernel;
Kernel* const kRestoreKernel = restore_kernel;
Kernel* const kCombineKernel = combine_kernel;

}  // namespace cuda
}  // namespace samk
