#include "schedule.h"

#include <algorithm>

namespace samk {

namespace {

// Starting a chunk costs about as much as this many elements; it keeps a thousand tiny tensors evenly shared.
constexpr int64_t kChunkStartCost = 256;

// Below this many elements a second thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 32768;

}  // namespace

void Schedule::update(const std::vector<Row>& rows, const std::vector<uint8_t>& wanted, int wanted_threads) {
    if (wanted_threads == threads && wanted == active) return;
    active = wanted;
    threads = wanted_threads;
    chunks.clear();
    elements = 0;
    int64_t cost = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
        if (!active[r]) continue;
        elements += rows[r].numel;
        for (int64_t offset = 0; offset < rows[r].numel; offset += kChunkSize) {
            const int64_t count = std::min(kChunkSize, rows[r].numel - offset);
            chunks.push_back({int32_t(r), int32_t(count), offset});
            cost += count + kChunkStartCost;
        }
    }

    const int64_t useful = std::max<int64_t>(1, elements / kElementsPerThread);
    const int team = int(std::min<int64_t>(threads, useful));
    bounds.assign(team + 1, int64_t(chunks.size()));
    bounds[0] = 0;
    int64_t reached = 0;
    int next = 1;
    for (size_t c = 0; c < chunks.size() && next < team; ++c) {
        reached += chunks[c].count + kChunkStartCost;
        if (reached >= cost * next / team) bounds[next++] = int64_t(c) + 1;
    }
}

}  // namespace samk
