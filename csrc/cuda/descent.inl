// The kernels that know a base optimizer, for one; the file that includes this defines SAMK_IS_ADAM and SAMK_NAME(x).
#include "launch.h"
#include "phases.cuh"

namespace samk {
namespace cuda {

// Coefficients are given, and whether to skip the update.
SAMK_KERNEL SAMK_NAME(descent_kernel)(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    update_phase<SAMK_IS_ADAM>(p, shared, p.header.coefficients, nullptr);
    if (SAMK_IS_ADAM) count_steps(p, shared);
}

// Cooperative: Gram matrix and rule first. A Gram matrix that is not finite skips the update too.
SAMK_KERNEL SAMK_NAME(rule_descent_kernel)(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    gram_phase<1>(p, shared);  // an update's loops leave no registers for more
    grid_barrier();
    finish_gram(p, shared, blockIdx.x == 0);
    update_phase<SAMK_IS_ADAM>(p, shared, shared.coefficients, &shared.finite);
    if (SAMK_IS_ADAM) count_steps(p, shared);
}

Kernel* const SAMK_NAME(kDescentKernel) = SAMK_NAME(descent_kernel);
Kernel* const SAMK_NAME(kRuleDescentKernel) = SAMK_NAME(rule_descent_kernel);

}  // namespace cuda
}  // namespace samk
