// The table of tensors as Python fills it, for the bindings of all backends.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../common/bases.h"
#include "../common/table.h"
#include "tensor_reader.h"

namespace samk {

class TableBinding {
public:
    // shapes, strides: of each tensor, in elements. numels: real elements of each (complex ones count twice).
    // dtypes: codes of the weights. groups: indices into the per-group arguments. etas: geometry, negative for T = 1.
    TableBinding(dlpack::Device device, const std::vector<std::vector<int64_t>>& shapes,
                 const std::vector<std::vector<int64_t>>& strides, const std::vector<int64_t>& numels,
                 const std::vector<int>& dtypes, const std::vector<int32_t>& groups, const std::vector<double>& etas);

    // Takes the pointers of all that a launch reads and writes from sequences of tensors; None leaves a cell empty. Those
    // of a column that is not given are cleared, but state and steps stay where `state` is None. Weights must be of the
    // type that the table was made for; lists, state and masters may be of any.
    //
    // True if the launch can go ahead. Otherwise odd_cells() have to be filled by set(), after a closer look, and
    // may_overlap() says whether memory needs one.
    bool bind_launch(const py::object& weights, const py::object& lists, const py::object& state,
                     const py::object& steps, bool steps_on_host, int writes);

    // What bind_launch() has left empty: pairs of column and row.
    const std::vector<std::pair<int, size_t>>& odd_cells() const { return odd_; }

    // Whether a step count that was bound lies on the host and not on the device.
    bool has_host_step() const;

    // Takes the pointers of one column. Returns the rows that need a closer look.
    std::vector<size_t> bind(int column, const py::object& tensors);

    // `begin`, `end`: addresses of the memory that the cell stands for, where that is not what it points to.
    void set(int column, size_t row, uintptr_t pointer, int dtype, uintptr_t begin, uintptr_t end);

    // What a launch writes, as sam_kernels/backends/binding.py says.
    enum Writes : int { kNothing, kWeights, kWeightsAndState, kSum };

    // Whether memory that a launch over this many lists may write overlaps any other that was bound to it: see Note
    // [Shared memory]. Ranges of memory are compared, so tensors that lie between each other's elements count as
    // overlapping.
    bool may_overlap(int lists, int writes);

    // The rows that the last launch walked over; None for all of them.
    py::object written_rows() const;

protected:
    // Marks the rows to walk over in wanted_.
    template <class Wanted>
    void choose(Wanted wanted) {
        for (size_t r = 0; r < rows_.size(); ++r) wanted_[r] = wanted(r, rows_[r]);
    }
    void choose_all_with_gradient(int lists) {
        choose([&](size_t, const Row& row) { return row.has_gradient(lists); });
    }
    // Those with something to add, and those that have been perturbed.
    void choose_with_gradient_or_copy(int lists, const uint8_t* holds) {
        check_masters(holds);
        choose([&](size_t r, const Row& row) { return row.has_gradient(lists) || (holds && holds[r]); });
    }

    // One byte a row, shared with Python, so that a flag is up to date even if an interrupt follows the launch.
    uint8_t* flags(const py::object& bytes) const;

    // Sets or clears kTaken of the rows that the last launch walked over.
    void mark(uint8_t* flags, bool taken) const;

    // Whether a step count lies on the device.
    bool has_device_step() const;
    // Puts step counts after this step into host_steps_; zero for those on the device and those that do not count.
    void count_on_host(int lists);
    void store_host_steps() const;

    // Of each group, from the tuples of sam_kernels/bases. `lr` is left out: it may lie on a device.
    static std::vector<BaseSettings> read_settings(int base, const py::list& settings);

    void check_lists(int lists) const;
    void check_column(int column) const;
    void check_length(size_t length) const;
    // Per-group arguments must reach every row's group.
    void check_groups(size_t groups, const char* what) const;
    // What is held of another type than its weight must be its master.
    void check_masters(const uint8_t* holds) const;
    // A missing pointer must never be walked over.
    void check_state(int lists, int base, const std::vector<BaseSettings>& settings) const;

    dlpack::Device device_;
    bool is_bound_[kColumns] = {};  // whether some cell of the column may be filled
    std::vector<Row> rows_;
    std::vector<RowLayout> layouts_;
    std::vector<uint8_t> wanted_;
    std::vector<double> host_steps_;
    std::vector<uint8_t> step_is_on_host_;

private:
    struct Extent {
        uintptr_t begin = 0, end = 0;  // both 0 where there is nothing
    };
    // What was found of the memory that one kind of launch writes.
    struct Written {
        std::vector<Extent> sorted;
        int lists = 0;
        bool is_sum = false;
        uint64_t seen[kColumns] = {};  // changes of each column that this is true of, plus one; 0 if it was not bound
        bool overlap = false;          // with itself
        bool lists_overlap = false;    // with gradient lists
    };

    // Fills the cells of a column; those left empty go to odd_. Step counts are single elements, and may lie on the host
    // as well; with `on_host` they all do.
    void read(int column, const py::handle& tensors, bool on_host = false);
    void clear(int column);

    // Remembers where a cell's memory lies. True if it lay elsewhere before.
    bool remember(int column, size_t row, uintptr_t begin, uintptr_t end);
    bool remember(int column, size_t row, const Cell& cell) {
        const auto begin = reinterpret_cast<uintptr_t>(cell.pointer);
        const int64_t elements = column == kStep ? 1 : rows_[row].numel;
        return remember(column, row, begin, begin + uintptr_t(elements) * uintptr_t(size_of(cell.dtype)));
    }

    std::vector<std::pair<int, size_t>> odd_;
    std::vector<Extent> extents_[kColumns];
    uint64_t changes_[kColumns] = {};  // how often some address of a column became another
    Written written_[2];               // without and with state
};

// Defines what fills a table, and the constants that name its columns.
template <class Table, class Class>
void define_table(Class& definition) {
    definition
        .def("bind_launch", &Table::bind_launch, py::arg("weights"), py::arg("lists"), py::arg("state"),
             py::arg("steps"), py::arg("steps_on_host"), py::arg("writes"))
        .def("odd_cells", &Table::odd_cells)
        .def("has_host_step", &Table::has_host_step)
        .def("bind", &Table::bind, py::arg("column"), py::arg("tensors"))
        .def("set", &Table::set, py::arg("column"), py::arg("row"), py::arg("pointer"), py::arg("dtype"),
             py::arg("begin") = uintptr_t(0), py::arg("end") = uintptr_t(0))
        .def("may_overlap", &Table::may_overlap, py::arg("lists"), py::arg("writes"))
        .def("written_rows", &Table::written_rows);
}
void define_columns(py::module_& module);

}  // namespace samk
