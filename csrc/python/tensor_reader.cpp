#include "tensor_reader.h"

#include <stdexcept>

namespace samk {

namespace {

// DType::None for types that the kernels do not know.
DType dtype_of(dlpack::DataType type) {
    if (type.lanes != 1) return DType::None;
    switch (type.code) {
        case dlpack::kFloat:
            return type.bits == 32   ? DType::Float32
                   : type.bits == 64 ? DType::Float64
                   : type.bits == 16 ? DType::Float16
                                     : DType::None;
        case dlpack::kBFloat: return type.bits == 16 ? DType::BFloat16 : DType::None;
        case dlpack::kComplex:
            return type.bits == 64 ? DType::Float32 : type.bits == 128 ? DType::Float64 : DType::None;
        default: return DType::None;
    }
}

// Strides of dimensions of one element say nothing about where elements lie; those of empty tensors neither.
bool has_layout(const dlpack::Tensor& tensor, const RowLayout& layout, int64_t& elements) {
    if (size_t(tensor.dimensions) != layout.shape.size()) return false;
    elements = 1;
    bool same_strides = true;
    for (int32_t d = 0; d < tensor.dimensions; ++d) {
        if (tensor.shape[d] != layout.shape[d]) return false;
        elements *= tensor.shape[d];
        same_strides = same_strides && (tensor.shape[d] == 1 || tensor.strides[d] == layout.strides[d]);
    }
    return same_strides || elements == 0;
}

}  // namespace

TensorReader& TensorReader::get() {
    // Leaked on purpose: it owns Python objects and must not outlive the interpreter's shutdown.
    static TensorReader* reader = new TensorReader();
    return *reader;
}

TensorReader::TensorReader() {
    const py::module_ torch = py::module_::import("torch");
    const auto keep = [](py::object object) { return object.release().ptr(); };
    tensor_type_ = reinterpret_cast<PyTypeObject*>(keep(torch.attr("Tensor")));
    parameter_type_ = reinterpret_cast<PyTypeObject*>(keep(torch.attr("nn").attr("Parameter")));
    is_neg_ = keep(torch.attr("is_neg"));
    is_conj_ = keep(torch.attr("is_conj"));

    const py::object capsule = torch.attr("Tensor").attr("__dlpack_c_exchange_api__");
    exchange_ = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
    if (!exchange_) throw py::error_already_set();
    while (exchange_ && exchange_->header.major != dlpack::kMajorVersion) exchange_ = exchange_->header.previous;
    if (!exchange_ || !exchange_->view)
        throw std::runtime_error("this torch does not offer version 1 of the DLPack exchange functions");

    const py::object grad = torch.attr("_C").attr("TensorBase").attr("grad");
    if (Py_IS_TYPE(grad.ptr(), &PyGetSetDescr_Type)) {
        const auto* descriptor = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
        grad_ = descriptor->get;
        grad_closure_ = descriptor->closure;
    }
}

PyObject* TensorReader::gradient(PyObject* tensor) const {
    const PyTypeObject* type = Py_TYPE(tensor);
    if (grad_ && (type == tensor_type_ || type == parameter_type_)) return grad_(tensor, grad_closure_);
    return PyObject_GetAttrString(tensor, "grad");
}

bool TensorReader::is_set(PyObject* tensor, PyObject* method) const {
    PyObject* answer = PyObject_CallOneArg(method, tensor);
    if (!answer) PyErr_Clear();
    const bool set = answer != Py_False;
    Py_XDECREF(answer);
    return set;
}

bool TensorReader::read(PyObject* tensor, dlpack::Device device, const RowLayout& layout, TensorView& view) const {
    const PyTypeObject* type = Py_TYPE(tensor);
    if (type != tensor_type_ && type != parameter_type_) return false;

    dlpack::Tensor raw;
    if (exchange_->view(tensor, &raw) != 0) {
        PyErr_Clear();
        return false;
    }
    if (raw.device.type != device.type || raw.device.id != device.id) return false;
    view.dtype = dtype_of(raw.dtype);
    const bool complex = raw.dtype.code == dlpack::kComplex;
    int64_t elements = 0;
    if (view.dtype == DType::None || complex != layout.complex || !has_layout(raw, layout, elements)) return false;
    if (!raw.data && elements > 0) return false;  // zeros that autograd has not written down, or freed memory
    view.pointer = static_cast<char*>(raw.data) + raw.byte_offset;

    // Views with a pending conjugation or negation hold other values than their memory does. A negation is pending
    // only on the imaginary part of a conjugated tensor, whose elements lie apart: it is dense with one element only.
    return !((complex || elements == 1) && (is_set(tensor, is_neg_) || is_set(tensor, is_conj_)));
}

void* TensorReader::current_stream(dlpack::Device device) const {
    void* stream = nullptr;
    if (exchange_->current_stream(device.type, device.id, &stream) != 0) throw py::error_already_set();
    return stream;
}

}  // namespace samk
