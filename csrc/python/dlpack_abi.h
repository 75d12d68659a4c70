// The part of the DLPack exchange ABI (version 1) that reading a tensor needs; see github.com/dmlc/dlpack.
//
// A type with the attribute __dlpack_c_exchange_api__ (torch.Tensor since 2.10) offers this table of C functions, so
// that kernels can read a tensor's address, type and layout in one call and without the framework's headers.
#pragma once

#include <cstdint>

namespace samk {
namespace dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kFloat = 2, kBFloat = 4, kComplex = 5 };

struct Device {
    int32_t type;
    int32_t id;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t dimensions;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // elements
    uint64_t byte_offset;
};

struct ExchangeApi {
    struct {
        uint32_t major;
        uint32_t minor;
        ExchangeApi* previous;
    } header;
    void* allocate;
    void* to_managed;
    void* from_managed;
    // Fills in a view that is valid until control returns to the framework. 0, or -1 with a Python exception set.
    int (*view)(void* py_object, Tensor* out);
    // The framework's current stream on a device. 0, or -1 with a Python exception set.
    int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

}  // namespace dlpack
}  // namespace samk
