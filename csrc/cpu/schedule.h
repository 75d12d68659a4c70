// How the chunks of a table are shared out among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/table.h"

namespace samk {

// 16,384 elements are 64 KiB of float32: large enough to amortise the start of a chunk, small enough to share out evenly.
constexpr int64_t kChunkSize = 16384;

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
