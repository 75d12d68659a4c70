// sam_kernels._cpu: the table of tensors and the launches of the CPU backend, for sam_kernels/backends/cpu.py.
#include <algorithm>
#include <limits>
#include <vector>

#include "../cpu/kernels.h"
#include "pointer_table.h"
#include "table_binding.h"

namespace samk {

namespace {

// Below this many elements a launch is over before another Python thread could make use of the lock.
constexpr int64_t kReleaseLockAbove = 65536;

class Table : public TableBinding {
public:
    Table(const std::vector<std::vector<int64_t>>& shapes, const std::vector<std::vector<int64_t>>& strides,
          const std::vector<int64_t>& numels, const std::vector<int>& dtypes, const std::vector<int32_t>& groups,
          const std::vector<double>& etas)
        : TableBinding({dlpack::kCpu, 0}, shapes, strides, numels, dtypes, groups, etas), steps_(numels.size()) {}

    // ------------------------------------------------------------ launches

    // Each returns (finite, Gram matrix row by row, coefficients before the scales), for as many lists as it took.
    py::tuple gram(int lists, bool weighted, py::object taken, int threads) {
        check_lists(lists);
        choose_all_with_gradient(lists);
        Launch launch = prepare(lists, threads, 4 * lists);
        launch.weighted_gram = weighted;
        launch.taken = flags(taken);
        prepare_gram(launch);
        run(launch, kernels().gram);
        return result(launch);
    }

    void perturb(int lists, const std::vector<double>& scale, py::object taken, int threads) {
        check_lists(lists);
        choose_with_gradient_or_copy(lists, flags(taken));
        Launch launch = prepare(lists, threads, 4 * lists + 12);
        give_coefficients(launch, scale);
        launch.taken = flags(taken);
        launch.take_snapshot = launch.taken != nullptr;
        run(launch, kernels().perturb);
    }

    void restore(py::object taken, int threads) {
        const uint8_t* holds = flags(taken);
        choose([&](size_t r, const Row&) { return holds[r] != 0; });
        Launch launch = prepare(0, threads, 8);
        run(launch, kernels().restore);
    }

    void combine(int lists, const std::vector<double>& scale, int threads) {
        check_lists(lists);
        choose([](size_t, const Row& row) { return row.cells[kWeight].present(); });
        Launch launch = prepare(lists, threads, 4 * lists + 4);
        give_coefficients(launch, scale);
        run(launch, kernels().combine);
    }

    py::tuple ascent(int lists, int rule, double epsilon, double alpha, const std::vector<double>& scale,
                     py::object taken, int threads) {
        check_lists(lists);
        choose_with_gradient_or_copy(lists, flags(taken));
        Launch launch = prepare(lists, threads, 8 * lists + 12);
        launch.rule = {Rule(rule), epsilon, alpha};
        check_groups(scale.size() / size_t(std::max(lists, 1)), "scales");
        launch.scale = scale.data();
        launch.taken = flags(taken);
        launch.take_snapshot = launch.taken != nullptr;
        prepare_gram(launch);
        run(launch, kernels().ascent);
        return result(launch);
    }

    py::tuple descent(int lists, int rule, double epsilon, double alpha, bool needs_gram, bool weighted,
                      const std::vector<double>& scale, py::object taken, const std::string& base,
                      const py::list& settings, const std::vector<double>& lr, py::object first,
                      double inverse_grad_scale, bool skip_update, bool preview, int threads) {
        check_lists(lists);
        choose_with_gradient_or_copy(lists, flags(taken));
        Launch launch = prepare(lists, threads, 4 * lists + 16);
        check_groups(scale.size() / size_t(std::max(lists, 1)), "scales");
        check_groups(lr.size(), "learning rate");
        launch.rule = {Rule(rule), epsilon, alpha};
        launch.scale = scale.data();
        launch.taken = flags(taken);
        launch.inverse_grad_scale = inverse_grad_scale;
        launch.skip_update = skip_update;
        launch.preview = preview;
        launch.needs_gram = needs_gram && !skip_update;
        launch.weighted_gram = weighted;
        launch.base = base_number(base);
        const std::vector<BaseSettings> own = read_settings(launch.base, settings);
        launch.settings = own.data();
        launch.lr = lr.data();
        launch.first = flags(first);
        launch.steps = steps_.data();
        if (!skip_update) check_state(lists, launch.base, own);
        if (launch.needs_gram) {
            prepare_gram(launch);
        } else {
            for (int i = 0; i < kMaxLists; ++i) coefficients_[i] = 1.0;
            launch.coefficients = coefficients_;
        }
        run(launch, kernels().descent);
        return result(launch);
    }

private:
    Launch prepare(int lists, int threads, int bytes_per_element) {
        if (threads < 1) throw py::value_error("threads must be at least 1");
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
        check_groups(scale.size() / size_t(std::max(launch.lists, 1)), "scales");
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
        py::list gram(launch.lists * launch.lists), coefficients(launch.lists);
        for (int i = 0; i < launch.lists; ++i) {
            coefficients[i] = coefficients_[i];
            for (int j = 0; j < launch.lists; ++j) gram[i * launch.lists + j] = gram_[i * kMaxLists + j];
        }
        return py::make_tuple(launch.finite, gram, coefficients);
    }

    // Larger launches leave nothing in the cache for whoever comes next, so their write-only results bypass it.
    static constexpr int64_t kCacheBytes = int64_t(32) << 20;

    Schedule schedule_;
    std::vector<double> partials_;
    std::vector<double> steps_;
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

    py::class_<Table> table(module, "Table");
    define_table<Table>(table);
    table
        .def(py::init<const std::vector<std::vector<int64_t>>&, const std::vector<std::vector<int64_t>>&,
                      const std::vector<int64_t>&, const std::vector<int>&, const std::vector<int32_t>&,
                      const std::vector<double>&>(),
             py::arg("shapes"), py::arg("strides"), py::arg("numels"), py::arg("dtypes"), py::arg("groups"),
             py::arg("etas"))
        .def("gram", &Table::gram, py::arg("lists"), py::arg("weighted"), py::arg("taken"), py::arg("threads"))
        .def("perturb", &Table::perturb, py::arg("lists"), py::arg("scale"), py::arg("taken"), py::arg("threads"))
        .def("restore", &Table::restore, py::arg("taken"), py::arg("threads"))
        .def("combine", &Table::combine, py::arg("lists"), py::arg("scale"), py::arg("threads"))
        .def("ascent", &Table::ascent, py::arg("lists"), py::arg("rule"), py::arg("epsilon"), py::arg("alpha"),
             py::arg("scale"), py::arg("taken"), py::arg("threads"))
        .def("descent", &Table::descent, py::arg("lists"), py::arg("rule"), py::arg("epsilon"), py::arg("alpha"),
             py::arg("needs_gram"), py::arg("weighted"), py::arg("scale"), py::arg("taken"), py::arg("base"),
             py::arg("settings"), py::arg("lr"), py::arg("first"), py::arg("inverse_grad_scale"),
             py::arg("skip_update"), py::arg("preview"), py::arg("threads"));

    PointerTable::define(module);

    module.def("gradients", &gradients, py::arg("params"), "The .grad of each parameter.");
    module.def("same_objects", &same_objects, py::arg("a"), py::arg("b"), "Whether two lists hold the same objects.");
    module.def("lookup", &lookup, py::arg("dictionaries"), py::arg("key"),
               "The value of a key in each of a list of dicts, None where it is missing.");
    module.def("missing", &missing, py::arg("entries"), "The indices at which a list holds None.");
    module.def("instruction_set", [] { return kernels().name; }, "The instruction set the kernels run with.");

    define_columns(module);
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
}

}  // namespace samk
