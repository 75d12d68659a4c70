// A table of tensors whose rows somebody else's kernels read: it fills the records of sam_kernels/triton/layout.py, which
// says what their words mean.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "table_binding.h"

namespace samk {

class PointerTable : public TableBinding {
public:
    enum Flag : int64_t { kHeld = 1, kFirst = 2, kHasGradient = 4, kStepOnDevice = 8, kStepIsDouble = 16 };

    PointerTable(int device_type, int device, const std::vector<std::vector<int64_t>>& shapes,
                 const std::vector<std::vector<int64_t>>& strides, const std::vector<int64_t>& numels,
                 const std::vector<int>& dtypes, const std::vector<int32_t>& groups, const std::vector<double>& etas)
        : TableBinding({dlpack::DeviceType(device_type), device}, shapes, strides, numels, dtypes, groups, etas) {}

    // The rows that the next launch walks over.
    void select_gradients(int lists, py::object taken) {
        check_lists(lists);
        choose_with_gradient_or_copy(lists, flags(taken));
    }
    void select_copies(py::object taken) {
        const uint8_t* holds = flags(taken);
        choose([&](size_t r, const Row&) { return holds[r] != 0; });
    }
    void select_all() {
        choose([](size_t, const Row&) { return true; });
    }

    // The type of each cell, row by row.
    py::bytes dtypes() const {
        std::string codes;
        for (const Row& row : rows_)
            for (const Cell& cell : row.cells) codes.push_back(char(cell.dtype));
        return codes;
    }

    // Writes flags and addresses of all rows; records begin at `address` and are `row_words` words long.
    void fill(uintptr_t address, int row_words, int flags_word, int pointers_word, int lists, py::object taken,
              py::object first) const {
        const uint8_t* holds = flags(taken);
        const uint8_t* is_first = flags(first);
        for (size_t r = 0; r < rows_.size(); ++r) {
            int64_t* record = reinterpret_cast<int64_t*>(address) + r * size_t(row_words);
            const Cell& step = rows_[r].cells[kStep];
            int64_t word = 0;
            if (holds && holds[r]) word |= kHeld;
            if (is_first && is_first[r]) word |= kFirst;
            if (rows_[r].has_gradient(lists)) word |= kHasGradient;
            if (step.present() && !step_is_on_host_[r]) word |= kStepOnDevice;
            if (step.dtype == DType::Float64) word |= kStepIsDouble;
            record[flags_word] = word;
            for (int column = 0; column < kColumns; ++column)
                record[pointers_word + column] = int64_t(reinterpret_cast<uintptr_t>(rows_[r].cells[column].pointer));
        }
    }

    // Writes the numbers that follow from step counts, float64, of the rows whose step counts are on the host.
    void fill_corrections(uintptr_t address, int row_words, int word, int lists, const std::string& base,
                          const py::list& settings) {
        const int number = base_number(base);
        const std::vector<BaseSettings> own = read_settings(number, settings);
        count_on_host(lists);
        check_groups(own.size(), "settings");
        with_base(number, [&](auto known) {
            double last_step = 0.0, corrections[kMaxCorrections] = {};
            int32_t last_group = -1;
            const auto power = [](double base, double exponent) { return std::pow(base, exponent); };
            for (size_t r = 0; r < rows_.size(); ++r) {
                if (host_steps_[r] == 0.0) continue;
                if (host_steps_[r] != last_step || rows_[r].group != last_group) {
                    last_step = host_steps_[r], last_group = rows_[r].group;
                    known.corrections(own[size_t(last_group)].of<decltype(known)>(), last_step, power, corrections);
                }
                double* numbers = reinterpret_cast<double*>(address) + r * size_t(row_words) + word;
                std::copy(corrections, corrections + kMaxCorrections, numbers);
            }
        });
    }

    // Counts the step whose corrections were written last.
    void count_steps() const { store_host_steps(); }

    bool has_step_on_device() const { return has_device_step(); }

    void mark_rows(py::object taken, bool value) const { mark(flags(taken), value); }

    void check_complete(int lists, const std::string& base, const py::list& settings) const {
        const int number = base_number(base);
        check_state(lists, number, read_settings(number, settings));
    }

    static void define(py::module_& module) {
        py::class_<PointerTable> table(module, "PointerTable");
        define_table<PointerTable>(table);
        table
            .def(py::init<int, int, const std::vector<std::vector<int64_t>>&, const std::vector<std::vector<int64_t>>&,
                          const std::vector<int64_t>&, const std::vector<int>&, const std::vector<int32_t>&,
                          const std::vector<double>&>(),
                 py::arg("device_type"), py::arg("device"), py::arg("shapes"), py::arg("strides"), py::arg("numels"),
                 py::arg("dtypes"), py::arg("groups"), py::arg("etas"))
            .def("select_gradients", &PointerTable::select_gradients)
            .def("select_copies", &PointerTable::select_copies)
            .def("select_all", &PointerTable::select_all)
            .def("dtypes", &PointerTable::dtypes)
            .def("fill", &PointerTable::fill)
            .def("fill_corrections", &PointerTable::fill_corrections)
            .def("count_steps", &PointerTable::count_steps)
            .def("has_step_on_device", &PointerTable::has_step_on_device)
            .def("mark_rows", &PointerTable::mark_rows)
            .def("check_complete", &PointerTable::check_complete);
        table.attr("HELD") = int(kHeld);
        table.attr("FIRST") = int(kFirst);
        table.attr("HAS_GRADIENT") = int(kHasGradient);
        table.attr("STEP_ON_DEVICE") = int(kStepOnDevice);
        table.attr("STEP_IS_DOUBLE") = int(kStepIsDouble);
    }
};

}  // namespace samk
