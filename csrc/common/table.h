// The table of tensors that a launch walks over: a row for each parameter, a column for each role.
#pragma once

#include <cstdint>

#include "bases/base.h"
#include "config.h"
#include "scalar_types.h"

namespace samk {

// Distinct pairs (i, j), i <= j, of so many lists.
constexpr int pair_count(int lists) { return lists * (lists + 1) / 2; }
constexpr int kMaxPairs = pair_count(kMaxLists);

enum Column : int {
    kWeight = 0,
    kSnapshot = 1,
    kList = 2,                   // gradient list i is column kList + i
    kState = kList + kMaxLists,  // the base optimizer's state tensor s is column kState + s
    kStep = kState + kMaxStates,
    kColumns,
};

// Flags of a row's cell in the snapshot's column: it holds a copy of a weight that may be perturbed; it is the weight's
// master, always there, of a wider type, and the weight is its rounding. Whichever is set, the weight itself is there.
enum SnapshotFlag : uint8_t { kTaken = 1, kMaster = 2 };

struct Cell {
    void* pointer = nullptr;  // may be null for an empty tensor
    DType dtype = DType::None;

    bool present() const { return dtype != DType::None; }
};

struct Row {
    int64_t numel = 0;
    int32_t group = 0;
    double eta = -1.0;  // geometry: T = |w| + eta, or T = 1 if negative
    Cell cells[kColumns];

    bool has_gradient(int lists) const {
        for (int i = 0; i < lists; ++i)
            if (cells[kList + i].present()) return true;
        return false;
    }

    // Only launches with a snapshot may ask: the column keeps what an earlier one has bound.
    bool has_master() const { return cells[kSnapshot].present() && cells[kSnapshot].dtype != cells[kWeight].dtype; }
};

}  // namespace samk
