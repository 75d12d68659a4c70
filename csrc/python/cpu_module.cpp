// sam_kernels._cpu: the table of tensors and the launches of the CPU backend, for sam_kernels/cpu.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../cpu/kernels.h"
#include "tensor_reader.h"

namespace samk {

namespace {

// Below this many elements a launch is over before another Python thread could make use of the lock.
constexpr int64_t kReleaseLockAbove = 65536;

class Table {
public:
    // shapes, strides: of each tensor, in elements. numels: real elements of each (complex ones count twice).
    // dtypes: codes of the weights. groups: indices into the per-group arguments. etas: geometry, negative for T = 1.
    Table(const std::vector<std::vector<int64_t>>& shapes, const std::vector<std::vector<int64_t>>& strides,
          const std::vector<int64_t>& numels, const std::vector<int>& dtypes, const std::vector<int32_t>& groups,
          const std::vector<double>& etas)
        : rows_(numels.size()), layouts_(numels.size()), steps_(numels.size()), wanted_(numels.size()) {
        if (shapes.size() != rows_.size() || strides.size() != rows_.size() || dtypes.size() != rows_.size() ||
            groups.size() != rows_.size() || etas.size() != rows_.size())
            throw py::value_error("Table: the arguments differ in length");
        for (size_t r = 0; r < rows_.size(); ++r) {
            if (shapes[r].size() != strides[r].size()) throw py::value_error("Table: shape and strides differ in length");
            rows_[r].numel = numels[r];
            rows_[r].group = groups[r];
            rows_[r].eta = etas[r];
            int64_t elements = 1;
            for (const int64_t size : shapes[r]) elements *= size;
            layouts_[r] = {shapes[r], strides[r], numels[r] != elements, DType(dtypes[r])};
        }
    }

    // Takes the pointers of a column from `tensors` (None leaves the cell empty). Returns the rows that need a closer
    // look; their cells are empty until set() fills them. Weights must be of the type that the table was made for, as
    // their snapshot is; lists and state may be of any.
    py::list bind(int column, const py::list& tensors) {
        check_column(column);
        check_length(tensors.size());
        static const RowLayout scalar;
        const TensorReader& reader = TensorReader::get();
        py::list odd;
        for (size_t r = 0; r < rows_.size(); ++r) {
            PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), Py_ssize_t(r));
            TensorView view;
            if (tensor != Py_None) {
                bool usable = reader.read(tensor, column == kStep ? scalar : layouts_[r], view);
                if (column == kWeight) usable = usable && view.dtype == layouts_[r].dtype;
                if (column == kStep) usable = usable && size_of(view.dtype) >= 4;
                if (!usable) {
                    view = TensorView{};
                    odd.append(r);
                }
            }
            rows_[r].cells[column] = Cell{view.pointer, view.dtype};
        }
        return odd;
    }

    void set(int column, size_t row, uintptr_t pointer, int dtype) {
        check_column(column);
        rows_.at(row).cells[column] = Cell{reinterpret_cast<void*>(pointer), DType(dtype)};
    }

    void clear(int column) {
        check_column(column);
        for (Row& row : rows_) row.cells[column] = Cell{};
    }

    // ------------------------------------------------------------ launches

    // Each returns (finite, Gram matrix row by row with MAX_LISTS columns, coefficients before the scales).
    py::tuple gram(int lists, bool weighted, py::object taken, int threads) {
        Launch launch = prepare(lists, threads, 4 * lists, [&](const Row& row) { return row.has_gradient(lists); });
        launch.weighted_gram = weighted;
        launch.taken = flags(taken);
        prepare_gram(launch);
        run(launch, kernels().gram);
        return result(launch);
    }

    void perturb(int lists, const std::vector<double>& scale, py::object taken, int threads) {
        Launch launch = prepare(lists, threads, 4 * lists + 12, with_gradient_or_copy(lists, flags(taken)));
        give_coefficients(launch, scale);
        launch.taken = flags(taken);
        launch.take_snapshot = launch.taken != nullptr;
        run(launch, kernels().perturb);
    }

    void restore(py::object taken, int threads) {
        const uint8_t* holds = flags(taken);
        Launch launch = prepare(0, threads, 8, [&](const Row& row) { return holds[&row - rows_.data()] != 0; });
        run(launch, kernels().restore);
    }

    void combine(int lists, const std::vector<double>& scale, int threads) {
        Launch launch =
            prepare(lists, threads, 4 * lists + 4, [&](const Row& row) { return row.cells[kWeight].present(); });
        give_coefficients(launch, scale);
        run(launch, kernels().combine);
    }

    py::tuple ascent(int lists, int rule, double epsilon, double alpha, const std::vector<double>& scale,
                     py::object taken, int threads) {
        Launch launch = prepare(lists, threads, 8 * lists + 12, with_gradient_or_copy(lists, flags(taken)));
        launch.rule = {Rule(rule), epsilon, alpha};
        check_scale(scale, lists);
        launch.scale = scale.data();
        launch.taken = flags(taken);
        launch.take_snapshot = launch.taken != nullptr;
        prepare_gram(launch);
        run(launch, kernels().ascent);
        return result(launch);
    }

    py::tuple descent(int lists, int rule, double epsilon, double alpha, bool needs_gram, bool weighted,
                      const std::vector<double>& scale, py::object taken, int base, const py::list& settings,
                      py::object first, double inverse_grad_scale, bool skip_update, bool preview, int threads) {
        Launch launch = prepare(lists, threads, 4 * lists + 16, with_gradient_or_copy(lists, flags(taken)));
        check_scale(scale, lists);
        launch.rule = {Rule(rule), epsilon, alpha};
        launch.scale = scale.data();
        launch.taken = flags(taken);
        launch.inverse_grad_scale = inverse_grad_scale;
        launch.skip_update = skip_update;
        launch.preview = preview;
        launch.needs_gram = needs_gram && !skip_update;
        launch.weighted_gram = weighted;
        launch.base = BaseKind(base);
        if (launch.base == BaseKind::Sgd)
            read_sgd(settings);
        else
            read_adam(settings);
        launch.sgd = sgd_.data();
        launch.adam = adam_.data();
        launch.first = flags(first);
        launch.steps = steps_.data();
        check_state(launch);
        if (launch.needs_gram) {
            prepare_gram(launch);
        } else {
            for (int i = 0; i < kMaxLists; ++i) coefficients_[i] = 1.0;
            launch.coefficients = coefficients_;
        }
        run(launch, kernels().descent);
        return result(launch);
    }

    // The rows that the last launch walked over; None for all of them.
    py::object written_rows() const {
        if (std::find(wanted_.begin(), wanted_.end(), uint8_t(0)) == wanted_.end()) return py::none();
        py::list rows;
        for (size_t r = 0; r < rows_.size(); ++r)
            if (wanted_[r]) rows.append(r);
        return rows;
    }

private:
    // Rows to walk over: those with something to add, and those that have been perturbed.
    std::function<bool(const Row&)> with_gradient_or_copy(int lists, const uint8_t* holds) const {
        return [this, lists, holds](const Row& row) {
            return row.has_gradient(lists) || (holds && holds[&row - rows_.data()] != 0);
        };
    }

    template <class Wanted>
    Launch prepare(int lists, int threads, int bytes_per_element, Wanted wanted) {
        if (lists < 0 || lists > kMaxLists) throw py::value_error("the kernels take 1 to 3 gradient lists");
        if (threads < 1) throw py::value_error("threads must be at least 1");
        for (size_t r = 0; r < rows_.size(); ++r) wanted_[r] = wanted(rows_[r]);
        schedule_.update(rows_, wanted_, threads);
        Launch launch;
        launch.rows = rows_.data();
        launch.schedule = &schedule_;
        launch.lists = lists;
        launch.streaming = schedule_.elements * bytes_per_element > kCacheBytes;
        for (int i = 0; i < kMaxLists * kMaxLists; ++i) gram_[i] = std::numeric_limits<double>::quiet_NaN();
        launch.gram = gram_;
        launch.coefficients = coefficients_;
        return launch;
    }

    void prepare_gram(Launch& launch) {
        const size_t size = schedule_.chunks.size() * kMaxPairs;
        if (partials_.size() < size) partials_.resize(size);
        launch.partials = partials_.data();
    }

    void give_coefficients(Launch& launch, const std::vector<double>& scale) {
        check_scale(scale, launch.lists);
        for (int i = 0; i < kMaxLists; ++i) coefficients_[i] = 1.0;
        launch.scale = scale.data();
    }

    void run(Launch& launch, void (*kernel)(Launch&)) {
        if (schedule_.elements > kReleaseLockAbove) {
            py::gil_scoped_release release;
            kernel(launch);
        } else {
            kernel(launch);
        }
    }

    py::tuple result(const Launch& launch) const {
        return py::make_tuple(launch.finite, std::vector<double>(gram_, gram_ + kMaxLists * kMaxLists),
                              std::vector<double>(coefficients_, coefficients_ + kMaxLists));
    }

    // One byte a row, shared with Python, so that a flag is up to date even if an interrupt follows the launch.
    uint8_t* flags(const py::object& bytes) const {
        if (bytes.is_none()) return nullptr;
        if (!PyByteArray_Check(bytes.ptr())) throw py::type_error("flags must be a bytearray");
        check_length(size_t(PyByteArray_GET_SIZE(bytes.ptr())));
        return reinterpret_cast<uint8_t*>(PyByteArray_AS_STRING(bytes.ptr()));
    }

    void read_sgd(const py::list& settings) {
        sgd_.clear();
        for (const py::handle& item : settings) {
            const auto s = item.cast<py::tuple>();
            sgd_.push_back({s[0].cast<double>(), s[1].cast<double>(), s[2].cast<double>(), s[3].cast<double>(),
                            s[4].cast<bool>(), s[5].cast<bool>()});
        }
        check_groups(sgd_.size());
    }

    void read_adam(const py::list& settings) {
        adam_.clear();
        for (const py::handle& item : settings) {
            const auto s = item.cast<py::tuple>();
            adam_.push_back({s[0].cast<double>(), s[1].cast<double>(), s[2].cast<double>(), s[3].cast<double>(),
                             s[4].cast<double>(), s[5].cast<bool>(), s[6].cast<bool>(), s[7].cast<bool>()});
        }
        check_groups(adam_.size());
    }

    void check_column(int column) const {
        if (column < 0 || column >= kColumns) throw py::index_error("no such column");
    }

    void check_length(size_t length) const {
        if (length != rows_.size())
            throw py::value_error("expected one entry for each of " + std::to_string(rows_.size()) + " tensors, got " +
                                  std::to_string(length));
    }

    void check_groups(size_t count) const {
        for (const Row& row : rows_)
            if (row.group < 0 || size_t(row.group) >= count) throw py::value_error("a tensor's group has no settings");
    }

    void check_scale(const std::vector<double>& scale, int lists) const {
        for (const Row& row : rows_)
            if (row.group < 0 || size_t(row.group + 1) * size_t(lists) > scale.size())
                throw py::value_error("a tensor's group has no scales");
    }

    // A missing pointer must never be walked over.
    void check_state(const Launch& launch) const {
        if (launch.skip_update) return;
        for (const Row& row : rows_) {
            if (!row.has_gradient(launch.lists)) continue;
            bool complete = row.cells[kWeight].present();
            if (launch.base == BaseKind::Sgd) {
                const bool has_buffer = sgd_[row.group].momentum == 0.0 || row.cells[kState].present();
                complete = complete && has_buffer && launch.first;
            } else {
                complete = complete && row.cells[kState].present() && row.cells[kState + 1].present() &&
                           row.cells[kStep].present() &&
                           (!adam_[row.group].amsgrad || row.cells[kState + 2].present());
            }
            if (!complete) throw py::value_error("a tensor with a gradient has no optimizer state");
        }
    }

    // Larger launches leave nothing in the cache for whoever comes next, so their write-only results bypass it.
    static constexpr int64_t kCacheBytes = int64_t(32) << 20;

    std::vector<Row> rows_;
    std::vector<RowLayout> layouts_;
    Schedule schedule_;
    std::vector<double> partials_;
    std::vector<double> steps_;
    std::vector<uint8_t> wanted_;
    std::vector<SgdSettings> sgd_;
    std::vector<AdamSettings> adam_;
    double gram_[kMaxLists * kMaxLists];
    double coefficients_[kMaxLists];
};

// [p.grad for p in parameters]
py::list gradients(const py::list& parameters) {
    const TensorReader& reader = TensorReader::get();
    const Py_ssize_t count = PyList_GET_SIZE(parameters.ptr());
    py::list result(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* gradient = reader.gradient(PyList_GET_ITEM(parameters.ptr(), i));
        if (!gradient) throw py::error_already_set();
        PyList_SET_ITEM(result.ptr(), i, gradient);
    }
    return result;
}

// True if both lists hold the very same objects in the same order.
bool same_objects(const py::list& a, const py::list& b) {
    const Py_ssize_t count = PyList_GET_SIZE(a.ptr());
    if (count != PyList_GET_SIZE(b.ptr())) return false;
    for (Py_ssize_t i = 0; i < count; ++i)
        if (PyList_GET_ITEM(a.ptr(), i) != PyList_GET_ITEM(b.ptr(), i)) return false;
    return true;
}

// The indices at which a list holds None.
py::list missing(const py::list& entries) {
    py::list indices;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entries.ptr()); ++i)
        if (PyList_GET_ITEM(entries.ptr(), i) == Py_None) indices.append(i);
    return indices;
}

// [d.get(key) for d in dictionaries]
py::list lookup(const py::list& dictionaries, const py::str& key) {
    const Py_ssize_t count = PyList_GET_SIZE(dictionaries.ptr());
    py::list values(count);
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* dictionary = PyList_GET_ITEM(dictionaries.ptr(), i);
        if (!PyDict_Check(dictionary)) throw py::type_error("lookup: not a dict");
        PyObject* value = PyDict_GetItemWithError(dictionary, key.ptr());
        if (!value && PyErr_Occurred()) throw py::error_already_set();
        PyList_SET_ITEM(values.ptr(), i, Py_NewRef(value ? value : Py_None));
    }
    return values;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "CPU kernels of sam_kernels: a table of tensors and the launches over it.";

    py::class_<Table>(module, "Table")
        .def(py::init<const std::vector<std::vector<int64_t>>&, const std::vector<std::vector<int64_t>>&,
                      const std::vector<int64_t>&, const std::vector<int>&, const std::vector<int32_t>&,
                      const std::vector<double>&>(),
             py::arg("shapes"), py::arg("strides"), py::arg("numels"), py::arg("dtypes"), py::arg("groups"),
             py::arg("etas"))
        .def("bind", &Table::bind)
        .def("set", &Table::set)
        .def("clear", &Table::clear)
        .def("written_rows", &Table::written_rows)
        .def("gram", &Table::gram)
        .def("perturb", &Table::perturb)
        .def("restore", &Table::restore)
        .def("combine", &Table::combine)
        .def("ascent", &Table::ascent)
        .def("descent", &Table::descent);

    module.def("gradients", &gradients, "The .grad of each parameter.");
    module.def("same_objects", &same_objects, "Whether two lists hold the same objects.");
    module.def("lookup", &lookup, "The value of a key in each of a list of dicts, None where it is missing.");
    module.def("missing", &missing, "The indices at which a list holds None.");
    module.def("instruction_set", [] { return kernels().name; }, "The instruction set the kernels run with.");

    module.attr("WEIGHT") = int(kWeight);
    module.attr("SNAPSHOT") = int(kSnapshot);
    module.attr("LIST") = int(kList);
    module.attr("STATE") = int(kState);
    module.attr("STEP") = int(kStep);
    module.attr("MAX_LISTS") = kMaxLists;
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
}

}  // namespace samk
