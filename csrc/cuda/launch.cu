#include "launch.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

namespace samk {
namespace cuda {

namespace {

std::string explained(cudaError_t error) {
    std::string text = cudaGetErrorString(error);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion)
        text +=
            " (sam_kernels._cuda was built for other GPUs: reinstall it with SAM_KERNELS_CUDA_ARCHS set to this one)";
    if (error == cudaErrorInsufficientDriver)
        text += " (the NVIDIA driver is older than the CUDA version that sam_kernels._cuda was built with)";
    return text;
}

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // errors of this kind must not show up in somebody else's next call
    throw std::runtime_error(std::string(what) + ": " + explained(error));
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device == previous_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
}

DeviceGuard::~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
}

int resident_blocks(Kernel* kernel, int threads, int per_multiprocessor) {
    static std::mutex mutex;
    static std::map<std::tuple<int, Kernel*, int>, std::pair<int, int>> known;
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(device, kernel, threads);
    auto found = known.find(key);
    if (found == known.end()) {
        int multiprocessors = 0, fitting = 0;
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
              "cudaDeviceGetAttribute");
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, kernel, threads, 0),
              "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        if (fitting == 0) throw std::runtime_error("a block of this many threads does not fit on this GPU");
        found = known.emplace(key, std::make_pair(multiprocessors, fitting)).first;
    }
    const auto [multiprocessors, fitting] = found->second;
    return multiprocessors * (per_multiprocessor > 0 && per_multiprocessor < fitting ? per_multiprocessor : fitting);
}

void launch(Kernel* kernel, const Packed& packed, int blocks, int threads, bool cooperative, void* stream) {
    void* arguments[] = {const_cast<Packed*>(&packed)};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments), "launching a kernel");
}

std::string why_unusable(int device) {
    try {
        const DeviceGuard guard(device);
        int cooperative = 0;
        check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
        if (!cooperative) return "the GPU has no cooperative launches";
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kPerturbKernel)), "loading the kernels");
        return "";
    } catch (const std::exception& error) {
        return error.what();
    }
}

}  // namespace cuda
}  // namespace samk
