#include "packing.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace samk {
namespace cuda {

namespace {

constexpr size_t kClassWords = sizeof(RowClass) / 8;
constexpr size_t kGroupWords = sizeof(Group) / 8;

bool is_vector_aligned(const Cell& cell) { return reinterpret_cast<uintptr_t>(cell.pointer) % 16 == 0; }

Path path_of(const Operation& operation, const Row& row) {
    DType own = DType::None, gradient = DType::None, rounded = DType::None;
    const auto& columns = operation.columns;
    const bool has_master =
        row.has_master() && std::find(columns.begin(), columns.end(), int(kSnapshot)) != columns.end();
    bool uniform = true, aligned = true, has_double = false;
    for (const int column : columns) {
        const Cell& cell = row.cells[column];
        if (!cell.present() || column == kStep) continue;
        const bool is_list = column >= kList && column < kList + kMaxLists;
        // Where there are masters, everything is read and written as they are, but for what rounds them.
        const bool is_rounding = has_master && column == kWeight;
        DType& seen = is_list ? gradient : is_rounding ? rounded : own;
        if (seen == DType::None) seen = cell.dtype;
        uniform = uniform && seen == cell.dtype;
        aligned = aligned && is_vector_aligned(cell);
        // The arithmetic is that of the weights' type; sums of products alone may run over float64 lists.
        has_double = has_double || (cell.dtype == DType::Float64 && (column == kWeight || !operation.reads_weights));
    }
    if (own == DType::None) own = gradient;
    if (gradient == DType::None) gradient = has_master ? rounded : own;
    if (has_double) return Path::SingleDouble;
    if (!aligned || !uniform || (has_master && rounded != gradient)) return Path::SingleFloat;
    if (own == DType::Float32 && gradient == DType::Float32) return Path::Float32;
    if (own == DType::BFloat16 && gradient == DType::BFloat16) return Path::BFloat16;
    if (own == DType::Float16 && gradient == DType::Float16) return Path::Float16;
    if (own == DType::Float32 && gradient == DType::BFloat16) return Path::Float32BFloat16;
    return Path::SingleFloat;
}

uint64_t bits_of(const Scalar& scalar) {
    uint64_t bits;
    std::memcpy(&bits, &scalar.value, sizeof bits);
    return bits;
}

class Packer {
public:
    Packer(const Operation& operation, Packed& packed) : operation_(operation), packed_(packed) {
        row_words_ = 1 + operation.columns.size();
    }

    size_t run(size_t begin) {
        const std::vector<Row>& rows = *operation_.rows;
        size_t next = begin;
        for (; next < rows.size(); ++next)
            if ((*operation_.wanted)[next] && !add(next)) break;
        finish();
        return next;
    }

private:
    bool add(size_t index) {
        const Row& row = (*operation_.rows)[index];
        const uint64_t row_chunks = uint64_t(row.numel + operation_.chunk_size - 1) / operation_.chunk_size;
        const int group = index_of_group(row.group);
        const RowClass row_class = class_of(index, group);
        const int class_index = index_of_class(row_class);
        const size_t new_words = row_words_ + (size_t(class_index) == classes_.size() ? kClassWords : 0) +
                                 (size_t(group) == groups_.size() ? kGroupWords : 0);
        if (used_words() + new_words > size_t(kCapacity) || chunks_ + row_chunks > INT32_MAX) {
            if (row_count_ == 0) throw std::length_error("one tensor alone is too large for a launch");
            return false;
        }
        if (size_t(group) == groups_.size()) {
            groups_.push_back(settings_of(row.group));
            group_numbers_.push_back(row.group);
        }
        if (size_t(class_index) == classes_.size()) classes_.push_back(row_class);

        const RowStart start = {uint32_t(chunks_), uint16_t(row_chunks * operation_.chunk_size - uint64_t(row.numel)),
                                uint16_t(class_index)};
        uint64_t word;
        std::memcpy(&word, &start, sizeof word);
        row_data_.push_back(word);
        for (const int column : operation_.columns)
            row_data_.push_back(reinterpret_cast<uintptr_t>(row.cells[column].pointer));
        chunks_ += row_chunks;
        ++row_count_;
        return true;
    }

    size_t used_words() const {
        return row_data_.size() + classes_.size() * kClassWords + groups_.size() * kGroupWords;
    }

    int index_of_group(int32_t number) const {
        for (size_t g = group_numbers_.size(); g-- > 0;)
            if (group_numbers_[g] == number) return int(g);
        return int(group_numbers_.size());
    }

    RowClass class_of(size_t index, int group) const {
        const Row& row = (*operation_.rows)[index];
        RowClass result;
        std::memset(&result, 0, sizeof result);  // compared byte by byte, padding included
        const double host_step = operation_.host_steps ? (*operation_.host_steps)[index] : 0.0;
        for (const int column : operation_.columns)
            if (row.cells[column].present() && !(column == kStep && host_step > 0.0))
                result.dtype[column] = row.cells[column].dtype;
        result.group = uint16_t(group);
        if (operation_.taken && operation_.taken[index]) result.flags |= RowClass::kHeld;
        if (operation_.first && operation_.first[index]) result.flags |= RowClass::kFirst;
        if (row.has_gradient(operation_.lists)) result.flags |= RowClass::kHasGradient;
        result.path = path_of(operation_, row);
        result.eta = row.eta;
        if (!operation_.settings.empty() && host_step > 0.0)
            with_base(operation_.base, [&](auto base) {
                const auto power = [](double base, double exponent) { return std::pow(base, exponent); };
                const auto& settings = operation_.settings[size_t(row.group)].of<decltype(base)>();
                base.corrections(settings, host_step, power, result.corrections);
            });
        return result;
    }

    int index_of_class(const RowClass& wanted) const {
        for (size_t c = classes_.size(); c-- > 0;)
            if (std::memcmp(&classes_[c], &wanted, sizeof wanted) == 0) return int(c);
        return int(classes_.size());
    }

    Group settings_of(int32_t number) const {
        Group group;
        std::memset(&group, 0, sizeof group);
        const size_t g = size_t(number);
        if (!operation_.scale.empty())
            for (int i = 0; i < operation_.lists; ++i)
                put(group, group.scale[i], i, operation_.scale[g * operation_.lists + i]);
        if (!operation_.lr.empty()) put(group, group.lr, kMaxLists, operation_.lr[g]);
        if (!operation_.settings.empty()) group.settings = operation_.settings[g];
        return group;
    }

    static void put(Group& group, uint64_t& place, int which, const Scalar& scalar) {
        place = bits_of(scalar);
        group.kinds |= uint32_t(scalar.kind) << (2 * which);
    }

    void finish() {
        Header& header = packed_.header;
        header.rows = row_count_;
        header.chunks = uint32_t(chunks_);
        header.chunk_size = operation_.chunk_size;
        header.lists = uint8_t(operation_.lists);
        header.row_words = uint16_t(row_words_);
        for (int column = 0; column < kColumns; ++column) header.position[column] = -1;
        for (size_t i = 0; i < operation_.columns.size(); ++i) header.position[operation_.columns[i]] = int8_t(i);
        header.rows_at = 0;
        header.classes_at = uint16_t(row_data_.size());
        header.groups_at = uint16_t(header.classes_at + classes_.size() * kClassWords);
        copy(row_data_.data(), header.rows_at, row_data_.size());
        copy(classes_.data(), header.classes_at, classes_.size() * kClassWords);
        copy(groups_.data(), header.groups_at, groups_.size() * kGroupWords);
    }

    void copy(const void* source, size_t at, size_t words) {
        if (words > 0) std::memcpy(packed_.words + at, source, words * 8);
    }

    const Operation& operation_;
    Packed& packed_;
    size_t row_words_;
    uint32_t row_count_ = 0;
    uint64_t chunks_ = 0;
    std::vector<uint64_t> row_data_;
    std::vector<RowClass> classes_;
    std::vector<Group> groups_;
    std::vector<int32_t> group_numbers_;
};

}  // namespace

size_t pack(const Operation& operation, size_t begin, Packed& packed) { return Packer(operation, packed).run(begin); }

int count_launches(const Operation& operation) {
    static thread_local Packed packed;
    int launches = 0;
    for (size_t next = 0; next < operation.rows->size(); ++launches) next = pack(operation, next, packed);
    return launches;
}

}  // namespace cuda
}  // namespace samk
