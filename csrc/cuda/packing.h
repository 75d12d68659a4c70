// Packs the rows of an operation into as few launches as they fit in. Knows nothing of CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"

namespace samk {
namespace cuda {

// One operation over a table, as its launches share it.
struct Operation {
    const std::vector<Row>* rows = nullptr;
    const std::vector<uint8_t>* wanted = nullptr;     // rows that take part
    const uint8_t* taken = nullptr;                   // rows that hold a snapshot; may be null
    const uint8_t* first = nullptr;                   // rows whose state is new; may be null
    const std::vector<double>* host_steps = nullptr;  // row's step count after this step, 0 where it lies on
                                                      // the device

    std::vector<int> columns;   // those that the kernel reads or writes
    bool reads_weights = true;  // their type and the snapshot's decide how elements are read
    uint32_t chunk_size = 16384;
    int lists = 0;
    std::vector<Scalar> scale;           // [group][list]; empty for operations without
    int base = 0;                        // its place in the list of bases
    std::vector<Scalar> lr;              // [group]; empty for operations without a base
    std::vector<BaseSettings> settings;  // [group]; the same
};

// Packs rows from `begin` on, as many as fit; fills in the header's table fields and leaves its others alone.
// Returns the row to go on with.
size_t pack(const Operation& operation, size_t begin, Packed& packed);

// How many launches the operation takes.
int count_launches(const Operation& operation);

}  // namespace cuda
}  // namespace samk
