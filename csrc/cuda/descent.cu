// The kernels that know a base optimizer. Compiled once for each in common/bases.h, with its struct as SAMK_BASE.
#include "launch.h"
#include "phases.cuh"

namespace samk {
namespace cuda {

// Coefficients are given, and whether to skip the update.
template <class Base>
SAMK_KERNEL descent_kernel(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    update_phase<Base>(p, shared, p.header.coefficients, nullptr);
    if (Base::kCountsSteps) count_steps(p, shared);
}

// Cooperative: Gram matrix and rule first. A Gram matrix that is not finite skips the update too.
template <class Base>
SAMK_KERNEL rule_descent_kernel(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    gram_phase(p, shared);
    grid_barrier();
    finish_gram(p, shared, blockIdx.x == 0);
    update_phase<Base>(p, shared, shared.coefficients, &shared.finite);
    if (Base::kCountsSteps) count_steps(p, shared);
}

template <class Base>
Kernel* const DescentKernels<Base>::alone = descent_kernel<Base>;
template <class Base>
Kernel* const DescentKernels<Base>::together = rule_descent_kernel<Base>;

template struct DescentKernels<SAMK_BASE>;

}  // namespace cuda
}  // namespace samk
