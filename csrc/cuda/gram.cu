// Kernels that take a Gram matrix and, in one launch with it, perturb.
#include "launch.h"
#include "phases.cuh"

namespace samk {
namespace cuda {

// Partial sums; the last block to finish sums them and applies the rule, if this is the operation's last launch.
SAMK_KERNEL gram_kernel(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    gram_phase(p, shared);
    if (p.is(Header::kFinalise) && is_last_block(p, shared, kGramTicket)) finish_gram(p, shared, true);
}

// Cooperative: Gram matrix, rule and perturbation. Every block sums the partials for itself, so one barrier is enough.
SAMK_KERNEL ascent_kernel(SAMK_PARAMETERS p) {
    SAMK_SHARED(Shared, shared);
    gram_phase(p, shared);
    grid_barrier();
    finish_gram(p, shared, blockIdx.x == 0);
    perturb_phase(p, shared, shared.coefficients);
}

Kernel* const kGramKernel = gram_kernel;
Kernel* const kAscentKernel = ascent_kernel;

}  // namespace cuda
}  // namespace samk
