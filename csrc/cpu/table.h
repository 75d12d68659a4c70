// The table of tensors that a launch walks over, and how its chunks are shared out among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/config.h"
#include "../common/scalar_types.h"

namespace samk {

// 16,384 elements are 64 KiB of float32: large enough to amortise the start of a chunk, small enough to share out evenly.
constexpr int64_t kChunkSize = 16384;

// Distinct pairs (i, j), i <= j, of up to kMaxLists lists.
constexpr int kMaxPairs = kMaxLists * (kMaxLists + 1) / 2;

enum Column : int {
    kWeight = 0,
    kSnapshot = 1,
    kList = 2,  // gradient list i is column kList + i
    kState = kList + kMaxLists,  // momentum_buffer | exp_avg, exp_avg_sq, max_exp_avg_sq
    kStep = kState + 3,
    kColumns = kStep + 1,
};

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
};

struct Chunk {
    int32_t row;
    int32_t count;
    int64_t offset;  // elements
};

// Chunks of the rows that take part in a launch, and the range of them that each thread owns.
struct Schedule {
    std::vector<uint8_t> active;
    int threads = 0;
    int64_t elements = 0;
    std::vector<Chunk> chunks;
    std::vector<int64_t> bounds;  // thread t owns chunks [bounds[t], bounds[t + 1])

    // Rebuilds only if the active rows or the number of threads have changed.
    void update(const std::vector<Row>& rows, const std::vector<uint8_t>& wanted, int wanted_threads);
};

}  // namespace samk
