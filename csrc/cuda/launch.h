// Launching kernels, and what there is to know of the device. Without a CUDA header, for the binding's sake.
#pragma once

#include <string>

#include "packed.h"

namespace samk {
namespace cuda {

// As the host sees a kernel.
using Kernel = void(
#ifdef SAMK_CUDA_SHIM
    const Packed&
#else
    const Packed
#endif
);

extern Kernel* const kGramKernel;
extern Kernel* const kAscentKernel;
extern Kernel* const kPerturbKernel;
extern Kernel* const kRestoreKernel;
extern Kernel* const kCombineKernel;

// Of each base in common/bases.h: descents whose coefficients are given, and with Gram matrix and rule in one launch.
template <class Base>
struct DescentKernels {
    static Kernel* const alone;
    static Kernel* const together;
};

// Makes a device current for the calling thread, and the one before it again at the end.
class DeviceGuard {
public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

// Blocks of a kernel that the current device can run at once, at most `per_multiprocessor` on each multiprocessor (0:
// as many as fit). Remembered for each device, kernel and block size.
int resident_blocks(Kernel* kernel, int threads, int per_multiprocessor);

// On the current device. Throws std::runtime_error with CUDA's message and, where there is one, the remedy.
void launch(Kernel* kernel, const Packed& packed, int blocks, int threads, bool cooperative, void* stream);

// Empty if kernels can run on the device, else why they cannot.
std::string why_unusable(int device);

}  // namespace cuda
}  // namespace samk
