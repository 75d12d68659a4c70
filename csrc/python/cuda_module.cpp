// sam_kernels._cuda: the table of tensors and the launches of the CUDA backend, for sam_kernels/backends/cuda.py.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/launch.h"
#include "../cuda/packing.h"
#include "table_binding.h"

#ifndef SAMK_CUDA_MODULE
#define SAMK_CUDA_MODULE _cuda
#endif

namespace samk {
namespace cuda {

namespace {

#ifdef SAMK_CUDA_SHIM
constexpr dlpack::DeviceType kDeviceType = dlpack::kCpu;
#else
constexpr dlpack::DeviceType kDeviceType = dlpack::kCuda;
#endif

// Float64 numbers at the start of the scratch memory that hold the tickets.
constexpr int kTicketDoubles = 2;

// As in sam_kernels/backends/cuda.py, which says what it means and has the defaults.
struct Tuning {
    int chunk_size;
    int threads;
    int blocks_per_multiprocessor;
    bool one_launch;
};

// Number, epsilon and alpha of a rule.
using RuleTuple = std::tuple<int, double, double>;

class Table : public TableBinding {
public:
    Table(int device, const std::vector<std::vector<int64_t>>& shapes, const std::vector<std::vector<int64_t>>& strides,
          const std::vector<int64_t>& numels, const std::vector<int>& dtypes, const std::vector<int32_t>& groups,
          const std::vector<double>& etas)
        : TableBinding({kDeviceType, device}, shapes, strides, numels, dtypes, groups, etas) {}

    void tune(int chunk_size, int threads, int blocks_per_multiprocessor, bool one_launch) {
        if (chunk_size < 8 || chunk_size > 65536 || chunk_size % 8 != 0)
            throw py::value_error("chunk_size must be a multiple of 8, 8 to 65536");
        if (threads < 32 || threads > kMaxThreads || threads % 32 != 0)
            throw py::value_error("threads must be a multiple of 32, 32 to " + std::to_string(kMaxThreads));
        if (blocks_per_multiprocessor < 0) throw py::value_error("blocks_per_multiprocessor must be at least 0");
        tuning_ = {chunk_size, threads, blocks_per_multiprocessor, one_launch};
    }

    // Float64 numbers of device memory, zero at first, that set_scratch() wants.
    int64_t scratch_size() const { return kTicketDoubles + max_launches() * int64_t(kVirtualBlocks) * kMaxPairs; }
    void set_scratch(uintptr_t pointer) { scratch_ = reinterpret_cast<double*>(pointer); }

    // ------------------------------------------------------------ launches
    //
    // `report` is the address of REPORT_SIZE float64 numbers on the device; scales, learning rates and grad_scale are
    // numbers or tensors of one float32 or float64 element on the device. Nothing waits for the device.

    void gram(int lists, const RuleTuple& rule, bool weighted, py::object taken, uintptr_t report) {
        check_lists(lists);
        choose_all_with_gradient(lists);
        Operation operation = operation_of(lists, weighted, weighted && !taken.is_none());
        operation.taken = flags(taken);
        operation.reads_weights = weighted;
        Header header = header_of(rule, report);
        header.flags = weighted ? Header::kWeightedGram : 0u;
        begin();
        launch_gram(operation, header);
    }

    void perturb(int lists, const py::list& scale, uintptr_t coefficients, py::object taken) {
        check_lists(lists);
        uint8_t* holds = flags(taken);
        choose_with_gradient_or_copy(lists, holds);
        Operation operation = operation_of(lists, true, holds != nullptr);
        operation.taken = holds;
        operation.scale = read_scales(scale, lists);
        Header header = {};
        header.flags = holds ? Header::kTakeSnapshot : 0u;
        header.coefficients = reinterpret_cast<const double*>(coefficients);
        begin();
        launch_each(operation, header, kPerturbKernel);
        if (holds) mark(holds, true);
    }

    void restore(py::object taken) {
        const uint8_t* holds = flags(taken);
        choose([&](size_t r, const Row&) { return holds[r] != 0; });
        begin();
        launch_each(operation_of(0, true, true), {}, kRestoreKernel);
    }

    void combine(int lists, const py::list& scale, uintptr_t coefficients) {
        check_lists(lists);
        choose([](size_t, const Row& row) { return row.cells[kWeight].present(); });
        Operation operation = operation_of(lists, true, false);
        operation.scale = read_scales(scale, lists);
        Header header = {};
        header.coefficients = reinterpret_cast<const double*>(coefficients);
        begin();
        launch_each(operation, header, kCombineKernel);
    }

    void ascent(int lists, const RuleTuple& rule, const py::list& scale, py::object taken, uintptr_t report) {
        check_lists(lists);
        uint8_t* holds = flags(taken);
        choose_with_gradient_or_copy(lists, holds);
        Operation operation = operation_of(lists, true, holds != nullptr);
        operation.taken = holds;
        operation.scale = read_scales(scale, lists);
        Header header = header_of(rule, report);
        header.flags = Header::kWeightedGram | Header::kReverse | (holds ? Header::kTakeSnapshot : 0u);
        begin();
        if (!launch_together(operation, header, kAscentKernel)) {
            launch_gram(operation, header);
            header.coefficients = header.report + kCoefficients;
            launch_each(operation, header, kPerturbKernel);
        }
        if (holds) mark(holds, true);
    }

    // With needs_gram the rule gives the coefficients; otherwise they are read from `coefficients`, ones if that is null.
    // The update is skipped if there is a nonzero at `found_inf`, which may be null.
    void descent(int lists, const RuleTuple& rule, bool needs_gram, bool weighted, const py::list& scale,
                 py::object taken, const std::string& base, const py::list& settings, const py::list& lr,
                 py::object first, py::handle grad_scale, uintptr_t found_inf, bool skip_update, bool preview,
                 uintptr_t coefficients, uintptr_t report) {
        check_lists(lists);
        uint8_t* holds = flags(taken);
        choose_with_gradient_or_copy(lists, holds);
        Operation operation = operation_of(lists, true, holds != nullptr);
        operation.taken = holds;
        operation.scale = read_scales(scale, lists);
        const Operation without_base = operation;
        give_base(operation, base, settings, lr, first);
        if (!skip_update) check_state(lists, operation.base, operation.settings);
        const bool counts = !skip_update && with_base(operation.base, [](auto known) { return known.kCountsSteps; });

        Header header = header_of(rule, report);
        const Scalar unscale = read_scalar(grad_scale);
        header.grad_scale_kind = uint8_t(unscale.kind);
        std::memcpy(&header.grad_scale, &unscale.value, sizeof header.grad_scale);
        header.found_inf = reinterpret_cast<const float*>(found_inf);
        header.coefficients = reinterpret_cast<const double*>(coefficients);
        header.flags = (weighted ? Header::kWeightedGram : 0u) | (preview ? Header::kPreview : 0u) |
                       (skip_update ? Header::kSkipUpdate : 0u) | (needs_gram ? Header::kReverse : 0u) |
                       (counts && !preview && has_device_step() ? Header::kCountSteps : 0u);
        begin();
        const auto [alone, together] = with_base(operation.base, [](auto known) {
            using Kernels = DescentKernels<decltype(known)>;
            return std::make_pair(Kernels::alone, Kernels::together);
        });
        if (!needs_gram) {
            launch_each(operation, header, alone);
        } else if (!launch_together(operation, header, together)) {
            launch_gram(without_base, header);
            header.coefficients = header.report + kCoefficients;
            header.finite = header.report + kFinite;
            launch_each(operation, header, alone);
        }
        if (counts && !preview) store_host_steps();
        if (holds && !preview) mark(holds, false);
    }

    int launches() const { return launches_; }

    // How the rows of the last launch were read, for tests: in vectors, or element by element.
    py::list paths() const {
        static const char* const names[] = {"float32",           "bfloat16",     "float16",
                                            "float32, bfloat16", "single float", "single double"};
        py::list result;
        for (uint32_t row = 0; row < packed_.header.rows; ++row)
            result.append(names[int(packed_.row_class(packed_.start(row).row_class).path)]);
        return result;
    }

private:
    // ------------------------------------------------------------ arguments

    Operation operation_of(int lists, bool weights, bool snapshot) const {
        Operation operation;
        operation.rows = &rows_;
        operation.wanted = &wanted_;
        operation.lists = lists;
        operation.chunk_size = uint32_t(tuning_.chunk_size);
        if (weights) operation.columns.push_back(kWeight);
        if (snapshot) operation.columns.push_back(kSnapshot);
        add_columns(operation, kList, lists);
        return operation;
    }

    // Those of `count` columns that some row has; others take no room.
    void add_columns(Operation& operation, int first, int count) const {
        for (int column = first; column < first + count; ++column)
            if (std::any_of(rows_.begin(), rows_.end(), [&](const Row& row) { return row.cells[column].present(); }))
                operation.columns.push_back(column);
    }

    // A base optimizer's settings, state and step counts. A kernel must never be sent to a step count on the host, also
    // where nothing is counted.
    void give_base(Operation& operation, const std::string& base, const py::list& settings, const py::list& lr,
                   const py::object& first) {
        operation.base = base_number(base);
        operation.first = flags(first);
        operation.settings = read_settings(operation.base, settings);
        for (const py::handle& entry : lr) operation.lr.push_back(read_scalar(entry));
        check_groups(operation.lr.size(), "learning rate");
        add_columns(operation, kState, kStep - kState);
        if (has_device_step()) operation.columns.push_back(kStep);
        count_on_host(operation.lists);
        operation.host_steps = &host_steps_;
    }

    Header header_of(const RuleTuple& rule, uintptr_t report) const {
        Header header = {};
        header.rule = {Rule(std::get<0>(rule)), std::get<1>(rule), std::get<2>(rule)};
        header.report = reinterpret_cast<double*>(report);
        header.tickets = reinterpret_cast<uint32_t*>(scratch_);
        header.partials = scratch_ + kTicketDoubles;
        return header;
    }

    Scalar read_scalar(py::handle entry) const {
        if (PyFloat_Check(entry.ptr()) || PyLong_Check(entry.ptr())) return Scalar(entry.cast<double>());
        static const RowLayout zero_dimensions, one_element{{1}, {1}};
        TensorView view;
        const TensorReader& reader = TensorReader::get();
        const bool usable = reader.read(entry.ptr(), device_, zero_dimensions, view) ||
                            reader.read(entry.ptr(), device_, one_element, view);
        if (!usable || size_of(view.dtype) < 4)
            throw py::type_error("a scalar must be a number, or one float32 or float64 element on the tensors' device");
        Scalar scalar;
        scalar.kind = view.dtype == DType::Float64 ? ScalarKind::Float64 : ScalarKind::Float32;
        scalar.pointer = view.pointer;
        return scalar;
    }

    std::vector<Scalar> read_scales(const py::list& scale, int lists) const {
        std::vector<Scalar> result;
        for (const py::handle& entry : scale) result.push_back(read_scalar(entry));
        check_groups(result.size() / size_t(std::max(lists, 1)), "scales");
        return result;
    }

    // ------------------------------------------------------------ launching

    void begin() { launches_ = 0; }

    void launch_packed(Kernel* kernel, bool cooperative) {
        const uint32_t useful = std::max<uint32_t>(1, packed_.header.chunks);
        const DeviceGuard guard(device_.id);
        const int resident = resident_blocks(kernel, tuning_.threads, tuning_.blocks_per_multiprocessor);
        const int blocks = int(std::min<uint32_t>(useful, uint32_t(resident)));
#ifdef SAMK_CUDA_SHIM
        void* const stream = nullptr;
#else
        void* const stream = TensorReader::get().current_stream(device_);
#endif
        launch(kernel, packed_, blocks, tuning_.threads, cooperative, stream);
        ++launches_;
    }

    // All rows of the operation, in as many launches as they need.
    void launch_each(const Operation& operation, const Header& header, Kernel* kernel) {
        for (size_t next = 0; next < rows_.size();) {
            packed_.header = header;
            next = pack(operation, next, packed_);
            if (packed_.header.rows > 0) launch_packed(kernel, false);
        }
    }

    // False if the rows do not fit in one launch, or two are wanted.
    bool launch_together(const Operation& operation, const Header& header, Kernel* kernel) {
        if (!tuning_.one_launch) return false;
        packed_.header = header;
        if (pack(operation, 0, packed_) < rows_.size()) return false;
        packed_.header.slots = std::min(packed_.header.chunks, kVirtualBlocks);
        launch_packed(kernel, true);
        return true;
    }

    // The last of the launches sums up and applies the rule, also where there are no rows at all.
    void launch_gram(const Operation& operation, const Header& header) {
        uint32_t slots = 0;
        size_t next = 0;
        do {
            packed_.header = header;
            next = pack(operation, next, packed_);
            packed_.header.first_slot = slots;
            slots += std::min(packed_.header.chunks, kVirtualBlocks);
            packed_.header.slots = slots;
            if (next >= rows_.size()) packed_.header.flags |= Header::kFinalise;
            if (launches_ >= max_launches())
                throw std::logic_error("more launches than the scratch memory is made for");
            launch_packed(kGramKernel, false);
        } while (next < rows_.size());
    }

    // A row with a class and a group of its own takes 21 words at most.
    int64_t max_launches() const { return 1 + int64_t(rows_.size()) / (kCapacity / 21); }

    Tuning tuning_{};
    double* scratch_ = nullptr;
    Packed packed_;
    int launches_ = 0;
};

static_assert(1 + 5 + sizeof(RowClass) / 8 + sizeof(Group) / 8 <= 21, "see max_launches()");

// Launches of an operation over that many tensors of one group and type, with that many columns.
int launch_count(int tensors, int columns) {
    std::vector<Row> rows(static_cast<size_t>(tensors));
    const std::vector<uint8_t> wanted(rows.size(), 1);
    Operation operation;
    operation.rows = &rows;
    operation.wanted = &wanted;
    for (int column = 0; column < columns; ++column) operation.columns.push_back(column);
    for (Row& row : rows) {
        row.numel = 1000;
        for (const int column : operation.columns) row.cells[column] = {nullptr, DType::Float32};
    }
    return count_launches(operation);
}

}  // namespace

PYBIND11_MODULE(SAMK_CUDA_MODULE, module) {
    module.doc() = "CUDA kernels of sam_kernels: a table of tensors and the launches over it.";

    py::class_<Table> table(module, "Table");
    define_table<Table>(table);
    table
        .def(py::init<int, const std::vector<std::vector<int64_t>>&, const std::vector<std::vector<int64_t>>&,
                      const std::vector<int64_t>&, const std::vector<int>&, const std::vector<int32_t>&,
                      const std::vector<double>&>(),
             py::arg("device"), py::arg("shapes"), py::arg("strides"), py::arg("numels"), py::arg("dtypes"),
             py::arg("groups"), py::arg("etas"))
        .def("tune", &Table::tune, py::arg("chunk_size"), py::arg("threads"), py::arg("blocks_per_multiprocessor"),
             py::arg("one_launch"))
        .def("scratch_size", &Table::scratch_size)
        .def("set_scratch", &Table::set_scratch, py::arg("pointer"))
        .def("gram", &Table::gram, py::arg("lists"), py::arg("rule"), py::arg("weighted"), py::arg("taken"),
             py::arg("report"))
        .def("perturb", &Table::perturb, py::arg("lists"), py::arg("scale"), py::arg("coefficients"), py::arg("taken"))
        .def("restore", &Table::restore, py::arg("taken"))
        .def("combine", &Table::combine, py::arg("lists"), py::arg("scale"), py::arg("coefficients"))
        .def("ascent", &Table::ascent, py::arg("lists"), py::arg("rule"), py::arg("scale"), py::arg("taken"),
             py::arg("report"))
        .def("descent", &Table::descent, py::arg("lists"), py::arg("rule"), py::arg("needs_gram"), py::arg("weighted"),
             py::arg("scale"), py::arg("taken"), py::arg("base"), py::arg("settings"), py::arg("lr"), py::arg("first"),
             py::arg("grad_scale"), py::arg("found_inf"), py::arg("skip_update"), py::arg("preview"),
             py::arg("coefficients"), py::arg("report"))
        .def_property_readonly("launches", &Table::launches, "Kernel launches of the last operation.")
        .def_property_readonly("paths", &Table::paths, "How the rows of the last launch were read.");

    module.def("why_unusable", &why_unusable, py::arg("device"),
               "Empty if the kernels can run on a device, else why they cannot.");
    module.def("launch_count", &launch_count, py::arg("tensors"), py::arg("columns"),
               "Launches of an operation over tensors with that many columns.");

    define_columns(module);
    module.attr("REPORT_SIZE") = int(kReportSize);
    module.attr("FINITE") = int(kFinite);
    module.attr("GRAM") = int(kGram);
    module.attr("COEFFICIENTS") = int(kCoefficients);
    module.attr("TABLE_WORDS") = kCapacity;
}

}  // namespace cuda
}  // namespace samk
