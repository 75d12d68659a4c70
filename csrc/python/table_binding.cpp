#include "table_binding.h"

#include <algorithm>
#include <iterator>

namespace samk {

TableBinding::TableBinding(dlpack::Device device, const std::vector<std::vector<int64_t>>& shapes,
                           const std::vector<std::vector<int64_t>>& strides, const std::vector<int64_t>& numels,
                           const std::vector<int>& dtypes, const std::vector<int32_t>& groups,
                           const std::vector<double>& etas)
    : device_(device),
      rows_(numels.size()),
      layouts_(numels.size()),
      wanted_(numels.size()),
      host_steps_(numels.size()),
      step_is_on_host_(numels.size()) {
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

bool TableBinding::bind_launch(const py::object& weights, const py::object& lists, const py::object& state,
                               const py::object& steps, bool steps_on_host, int writes) {
    odd_.clear();
    if (weights.is_none())
        clear(kWeight);
    else
        read(kWeight, weights);
    const auto read_columns = [&](int first, int columns, const py::object& given) {
        int column = first;
        for (const py::handle& tensors : given) {
            if (column == first + columns) throw py::value_error("more columns than the table has");
            if (py::len(tensors) > 0)
                read(column, tensors);
            else if (first == kList)
                check_length(0);
            else
                clear(column);
            ++column;
        }
        const int given_columns = column - first;
        for (; column < first + columns; ++column) clear(column);
        return given_columns;
    };
    const int list_count = read_columns(kList, kMaxLists, lists);
    if (!state.is_none()) {
        read_columns(kState, kStep - kState, state);
        if (py::len(steps) > 0)
            read(kStep, steps, steps_on_host);
        else
            clear(kStep);
    }
    return odd_.empty() && (writes == kNothing || !may_overlap(list_count, writes));
}

std::vector<size_t> TableBinding::bind(int column, const py::object& tensors) {
    check_column(column);
    odd_.clear();
    read(column, tensors);
    std::vector<size_t> rows;
    for (const auto& cell : odd_) rows.push_back(cell.second);
    return rows;
}

void TableBinding::read(int column, const py::handle& tensors, bool on_host) {
    const auto sequence =
        py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "expected a list of tensors"));
    if (!sequence) throw py::error_already_set();
    check_length(size_t(PySequence_Fast_GET_SIZE(sequence.ptr())));
    PyObject** const items = PySequence_Fast_ITEMS(sequence.ptr());
    static const RowLayout scalar;
    const TensorReader& reader = TensorReader::get();
    is_bound_[column] = true;
    bool moved = false;
    for (size_t r = 0; r < rows_.size(); ++r) {
        PyObject* tensor = items[r];
        TensorView view;
        bool is_odd = false;
        if (column == kStep) step_is_on_host_[r] = 0;
        if (tensor != Py_None) {
            bool usable;
            if (column == kStep) {
                usable = !on_host && reader.read(tensor, device_, scalar, view);
                if (!usable && (on_host || device_.type != dlpack::kCpu)) {
                    usable = reader.read(tensor, {dlpack::kCpu, 0}, scalar, view);
                    step_is_on_host_[r] = usable;
                }
                usable = usable && size_of(view.dtype) >= 4;
            } else {
                usable = reader.read(tensor, device_, layouts_[r], view);
                if (column == kWeight) usable = usable && view.dtype == layouts_[r].dtype;
            }
            if (!usable) {
                view = TensorView{};
                is_odd = true;
                odd_.emplace_back(column, r);
            }
        }
        Cell& cell = rows_[r].cells[column] = Cell{view.pointer, view.dtype};
        if (!is_odd) moved = remember(column, r, cell) || moved;  // of the others set() will know
    }
    changes_[column] += moved;
}

void TableBinding::set(int column, size_t row, uintptr_t pointer, int dtype, uintptr_t begin, uintptr_t end) {
    check_column(column);
    is_bound_[column] = true;
    Cell& cell = rows_.at(row).cells[column] = Cell{reinterpret_cast<void*>(pointer), DType(dtype)};
    changes_[column] += begin == 0 ? remember(column, row, cell) : remember(column, row, begin, end);
}

void TableBinding::clear(int column) {
    check_column(column);
    if (!is_bound_[column]) return;
    is_bound_[column] = false;
    for (Row& row : rows_) row.cells[column] = Cell{};
}

// Note [Shared memory]
// One Parameter may stand twice in a list, two may lie in the same memory, and `p.data = ...` makes it so between two
// steps. Rows are worked on side by side, so a launch would copy weights that another row has perturbed already, or
// lose one of two updates. Whether memory overlaps is therefore asked before each launch that writes. Addresses are read
// anew anyway; only if one is another than last time are they sorted and compared, and gradients looked up.
//
// clear() leaves what is remembered: most columns that it empties are filled again with the same addresses. So a
// column counts only if it is bound.

bool TableBinding::remember(int column, size_t row, uintptr_t begin, uintptr_t end) {
    std::vector<Extent>& column_extents = extents_[column];
    if (column_extents.empty()) column_extents.resize(rows_.size());
    Extent& extent = column_extents[row];
    if (begin == end) begin = end = 0;
    if (extent.begin == begin && extent.end == end) return false;
    extent = {begin, end};
    return true;
}

bool TableBinding::may_overlap(int lists, int writes) {
    check_lists(lists);
    const bool with_state = writes == kWeightsAndState, is_sum = writes == kSum;
    Written& written = written_[with_state];
    const auto has_changed = [&](int column) {
        const uint64_t now = is_bound_[column] ? changes_[column] + 1 : 0;
        const bool changed = written.seen[column] != now;
        written.seen[column] = now;
        return changed;
    };
    const auto starts_before = [](const Extent& a, const Extent& b) { return a.begin < b.begin; };

    bool changed = has_changed(kWeight);
    for (int column = kState; with_state && column <= kStep; ++column) changed = has_changed(column) || changed;
    if (changed) {
        std::vector<Extent>& sorted = written.sorted;
        sorted.clear();
        for (int column = kWeight; column <= kStep; ++column) {
            if (!is_bound_[column] || !(column == kWeight || (with_state && column >= kState))) continue;
            for (const Extent& extent : extents_[column])
                if (extent.begin != extent.end) sorted.push_back(extent);
        }
        std::sort(sorted.begin(), sorted.end(), starts_before);
        written.overlap = false;
        for (size_t i = 1; i < sorted.size(); ++i)
            written.overlap = written.overlap || sorted[i].begin < sorted[i - 1].end;
    }

    changed = changed || written.lists != lists || written.is_sum != is_sum;
    written.lists = lists;
    written.is_sum = is_sum;
    for (int list = 0; list < lists; ++list) changed = has_changed(kList + list) || changed;
    if (changed) {
        written.lists_overlap = false;
        for (int list = 0; list < lists && !written.overlap; ++list) {
            if (!is_bound_[kList + list]) continue;
            for (size_t r = 0; r < rows_.size(); ++r) {
                const Extent& extent = extents_[kList + list][r];
                if (extent.begin == extent.end) continue;
                const Cell &weight = rows_[r].cells[kWeight], &entry = rows_[r].cells[kList + list];
                if (is_sum && entry.pointer == weight.pointer && entry.dtype == weight.dtype) continue;
                const auto after =
                    std::upper_bound(written.sorted.begin(), written.sorted.end(), extent, starts_before);
                const bool reaches_next = after != written.sorted.end() && after->begin < extent.end;
                const bool is_reached = after != written.sorted.begin() && std::prev(after)->end > extent.begin;
                written.lists_overlap = written.lists_overlap || reaches_next || is_reached;
            }
        }
    }
    return written.overlap || written.lists_overlap;
}

void TableBinding::mark(uint8_t* flags, bool taken) const {
    for (size_t r = 0; r < rows_.size(); ++r)
        if (wanted_[r]) flags[r] = uint8_t((flags[r] & ~kTaken) | (taken ? kTaken : 0));
}

bool TableBinding::has_host_step() const {
    for (size_t r = 0; r < rows_.size(); ++r)
        if (rows_[r].cells[kStep].present() && step_is_on_host_[r]) return true;
    return false;
}

bool TableBinding::has_device_step() const {
    for (size_t r = 0; r < rows_.size(); ++r)
        if (rows_[r].cells[kStep].present() && !step_is_on_host_[r]) return true;
    return false;
}

void TableBinding::count_on_host(int lists) {
    for (size_t r = 0; r < rows_.size(); ++r) {
        const Cell& cell = rows_[r].cells[kStep];
        host_steps_[r] = 0.0;
        if (!wanted_[r] || !rows_[r].has_gradient(lists) || !cell.present() || !step_is_on_host_[r]) continue;
        host_steps_[r] = 1.0 + (cell.dtype == DType::Float64 ? *static_cast<const double*>(cell.pointer)
                                                             : double(*static_cast<const float*>(cell.pointer)));
    }
}

void TableBinding::store_host_steps() const {
    for (size_t r = 0; r < rows_.size(); ++r) {
        const Cell& cell = rows_[r].cells[kStep];
        if (host_steps_[r] == 0.0) continue;
        if (cell.dtype == DType::Float64)
            *static_cast<double*>(cell.pointer) = host_steps_[r];
        else
            *static_cast<float*>(cell.pointer) = float(host_steps_[r]);
    }
}

py::object TableBinding::written_rows() const {
    if (std::find(wanted_.begin(), wanted_.end(), uint8_t(0)) == wanted_.end()) return py::none();
    py::list rows;
    for (size_t r = 0; r < rows_.size(); ++r)
        if (wanted_[r]) rows.append(r);
    return rows;
}

uint8_t* TableBinding::flags(const py::object& bytes) const {
    if (bytes.is_none()) return nullptr;
    if (!PyByteArray_Check(bytes.ptr())) throw py::type_error("flags must be a bytearray");
    check_length(size_t(PyByteArray_GET_SIZE(bytes.ptr())));
    return reinterpret_cast<uint8_t*>(PyByteArray_AS_STRING(bytes.ptr()));
}

std::vector<BaseSettings> TableBinding::read_settings(int base, const py::list& settings) {
    std::vector<BaseSettings> result;
    with_base(base, [&](auto known) {
        for (const py::handle& item : settings) {
            const auto entries = item.cast<py::tuple>();
            size_t next = 1;
            BaseSettings own = {};
            known.each(own.of<decltype(known)>(), [&](auto& setting) {
                setting = py::object(entries[next++]).cast<std::decay_t<decltype(setting)>>();
            });
            if (next != entries.size()) throw py::value_error("more settings than the base optimizer has");
            result.push_back(own);
        }
    });
    return result;
}

void TableBinding::check_lists(int lists) const {
    if (lists < 0 || lists > kMaxLists) throw py::value_error("the kernels take 1 to 3 gradient lists");
}

void TableBinding::check_column(int column) const {
    if (column < 0 || column >= kColumns) throw py::index_error("no such column");
}

void TableBinding::check_length(size_t length) const {
    if (length != rows_.size())
        throw py::value_error("expected one entry for each of " + std::to_string(rows_.size()) + " tensors, got " +
                              std::to_string(length));
}

void TableBinding::check_groups(size_t groups, const char* what) const {
    for (const Row& row : rows_)
        if (row.group < 0 || size_t(row.group) >= groups)
            throw py::value_error(std::string("a tensor's group has no ") + what);
}

void TableBinding::check_masters(const uint8_t* holds) const {
    for (size_t r = 0; holds && r < rows_.size(); ++r)
        if (!holds[r] && rows_[r].has_master() && rows_[r].cells[kWeight].present())
            throw py::value_error("a snapshot's tensor is of another type than its weight, and no master");
}

void TableBinding::check_state(int lists, int base, const std::vector<BaseSettings>& settings) const {
    check_groups(settings.size(), "settings");
    with_base(base, [&](auto known) {
        using Base = decltype(known);
        for (const Row& row : rows_) {
            if (!row.has_gradient(lists)) continue;
            const unsigned states = Base::states(Base::variant(settings[size_t(row.group)].of<Base>()));
            bool complete = row.cells[kWeight].present() && (!Base::kCountsSteps || row.cells[kStep].present());
            for (int state = 0; state < kMaxStates; ++state)
                complete = complete && (!((states >> state) & 1) || row.cells[kState + state].present());
            if (!complete) throw py::value_error("a tensor with a gradient has no optimizer state");
        }
    });
}

namespace {

template <class... Each>
py::list names_of(BaseList<Each...>) {
    py::list names;
    (names.append(Each::kName), ...);
    return names;
}

}  // namespace

void define_columns(py::module_& module) {
    module.attr("BASES") = names_of(Bases{});
    module.attr("WEIGHT") = int(kWeight);
    module.attr("SNAPSHOT") = int(kSnapshot);
    module.attr("LIST") = int(kList);
    module.attr("STATE") = int(kState);
    module.attr("STEP") = int(kStep);
    module.attr("MAX_LISTS") = kMaxLists;
}

}  // namespace samk
