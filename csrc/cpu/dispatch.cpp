#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace samk {

const KernelSet& kernels() {
    static const KernelSet& chosen = [&]() -> const KernelSet& {
        const char* wanted = std::getenv("SAM_KERNELS_CPU_ISA");
        const bool baseline = wanted && std::strcmp(wanted, "baseline") == 0;
        const KernelSet* avx2 = avx2_kernels();
        return avx2 && !baseline ? *avx2 : baseline_kernels();
    }();
    return chosen;
}

}  // namespace samk
