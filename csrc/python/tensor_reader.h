// Reads what a launch needs from torch.Tensor objects, without a torch header.
//
// Note [Reading tensors]
// A launch reads a thousand tensors, so the cost of reading one decides the host time of an optimizer step. Torch
// exports DLPack's table of C functions, which give address, type, device, shape and strides in one call; through
// Python the same takes five. Every tensor is read anew for every launch: its memory may have moved, and `p.data = ...`
// can change everything else. `grad` is read by calling the C function of its descriptor (public structures of
// CPython), which skips the interpreter's attribute lookup.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../common/scalar_types.h"
#include "dlpack_abi.h"

namespace samk {

namespace py = pybind11;

// How a row's elements lie in memory, the same in all its columns, and the type of its weights.
struct RowLayout {
    std::vector<int64_t> shape;
    std::vector<int64_t> strides;
    bool complex = false;
    DType dtype = DType::None;
};

// What the kernels may know of a dense tensor. Complex elements count as two real ones.
struct TensorView {
    void* pointer = nullptr;
    DType dtype = DType::None;
};

class TensorReader {
public:
    // The reader of the interpreter's torch; imports it.
    static TensorReader& get();

    // True and `view` filled in if the tensor is a plain torch.Tensor or Parameter on this device, of a supported dtype,
    // and has this shape and these strides. False if a closer look is needed, which is left to Python; never raises.
    bool read(PyObject* tensor, dlpack::Device device, const RowLayout& layout, TensorView& view) const;

    // The handle of torch's current stream on a device that has streams.
    void* current_stream(dlpack::Device device) const;

    // New reference to tensor.grad (None where there is none); nullptr with an exception set on error.
    PyObject* gradient(PyObject* tensor) const;

private:
    TensorReader();

    bool is_set(PyObject* tensor, PyObject* method) const;

    PyTypeObject* tensor_type_ = nullptr;
    PyTypeObject* parameter_type_ = nullptr;
    PyObject* is_neg_ = nullptr;
    PyObject* is_conj_ = nullptr;
    const dlpack::ExchangeApi* exchange_ = nullptr;
    getter grad_ = nullptr;
    void* grad_closure_ = nullptr;
};

}  // namespace samk
