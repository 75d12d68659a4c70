// A launch's table and arguments as the kernels receive them: one structure, passed by value.
//
// Note [The table by value]
// Launch parameters live in constant memory: every thread of a block reads the same word of them, at the price of a
// register, and no copy to the device precedes the launch. They may be 32,764 bytes long (CUDA 12.1, sm_70), which holds
// the pointers of some 580 tensors with six columns each, whatever the tensors' sizes: a tensor's chunks are found by
// binary search in the numbers of its first chunk, so no map from blocks to chunks is needed. A longer list of tensors
// takes several launches.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/bases.h"
#include "../common/rules.h"
#include "../common/table.h"

namespace samk {
namespace cuda {

// The limit of CUDA for the parameters of one launch.
constexpr int kParameterBytes = 32764;

// Threads of a block; kernels are compiled for at most this many, with two such blocks to a multiprocessor.
constexpr int kMaxThreads = 512;
constexpr int kMinBlocks = 2;

// Partial sums of the Gram matrix of one launch. Virtual block v sums chunks v, v + kVirtualBlocks, ...; real blocks
// share out the virtual ones, so the sums do not depend on how many real blocks there are.
constexpr uint32_t kVirtualBlocks = 1024;

// A number that is either known to the host or read from device memory when the kernel runs.
enum class ScalarKind : uint32_t { Value = 0, Float32 = 1, Float64 = 2 };

struct Scalar {
    ScalarKind kind = ScalarKind::Value;
    union {
        double value;
        const void* pointer;
    };

    Scalar(double number = 0.0) : value(number) {}
};

struct Group {
    uint32_t kinds;  // ScalarKind of scale[i] in bits 2 i, of lr in bits 2 kMaxLists
    uint64_t scale[kMaxLists];
    uint64_t lr;
    BaseSettings settings;
};

// How the elements of a row are read: in vectors of 16 bytes where all of its columns have the types that mixed-precision
// training gives them and all addresses are multiples of 16 bytes, else one by one.
enum class Path : uint8_t {
    Float32,
    BFloat16,
    Float16,
    Float32BFloat16,  // gradients in bfloat16, all else in float32, or weights in bfloat16 with masters
    SingleFloat,      // any types, each column's looked up on the way, arithmetic in float
    SingleDouble,     // the same with arithmetic in double
};

// What many rows have in common.
struct RowClass {
    enum Flag : uint8_t { kHeld = 1, kFirst = 2, kHasGradient = 4 };

    uint16_t group;
    uint8_t flags;
    Path path;
    DType dtype[kColumns];
    double eta;
    double corrections[kMaxCorrections];  // where the step count is on the host
};

// First word of a row; its pointers follow.
struct RowStart {
    uint32_t first_chunk;
    uint16_t missing;  // elements that the row's last chunk lacks
    uint16_t row_class;
};

struct Header {
    enum Flag : uint32_t {
        kTakeSnapshot = 1,
        kPreview = 2,  // look ahead: write weights of held rows only, no state
        kWeightedGram = 4,
        kSkipUpdate = 8,
        kReverse = 16,     // walk from the last chunk to the first
        kFinalise = 32,    // gram: the last block sums all partials and applies the rule
        kCountSteps = 64,  // descent: the last block counts the step tensors on the device
    };

    uint32_t rows;
    uint32_t chunks;
    uint32_t chunk_size;
    uint32_t flags;
    uint16_t classes_at, groups_at, rows_at, row_words;  // words
    int8_t position[kColumns];                           // of each column among a row's pointers, -1 if not there
    uint8_t lists;
    uint8_t grad_scale_kind;
    RuleArguments rule;
    uint32_t first_slot;         // partials of this launch, among those of all launches of the operation
    uint32_t slots;              // of all launches
    double* partials;            // [slot][pair]
    double* report;              // see Report
    uint32_t* tickets;           // kGramTicket, kStepTicket; zero between launches
    const double* coefficients;  // of the lists, before the scales; null for ones
    const double* finite;        // zero: restore, but do not update. May be null
    const float* found_inf;      // nonzero: the same. May be null
    uint64_t grad_scale;
};

enum Ticket : int { kGramTicket = 0, kStepTicket = 1 };

// What an operation with a Gram matrix writes, as float64 numbers.
enum Report : int {
    kFinite = 0,
    kGram = 1,
    kCoefficients = kGram + kMaxLists * kMaxLists,
    kReportSize = kCoefficients + kMaxLists
};

constexpr int kCapacity = (kParameterBytes - int(sizeof(Header))) / 8;

struct Packed {
    Header header;
    uint64_t words[kCapacity];

    SAMK_HOST_DEVICE const RowClass& row_class(int index) const {
        return reinterpret_cast<const RowClass*>(words + header.classes_at)[index];
    }
    SAMK_HOST_DEVICE const Group& group(int index) const {
        return reinterpret_cast<const Group*>(words + header.groups_at)[index];
    }
    SAMK_HOST_DEVICE const uint64_t* row(uint32_t index) const {
        return words + header.rows_at + index * header.row_words;
    }
    SAMK_HOST_DEVICE const RowStart& start(uint32_t index) const {
        return *reinterpret_cast<const RowStart*>(row(index));
    }
    SAMK_HOST_DEVICE bool is(uint32_t flag) const { return (header.flags & flag) != 0; }
};

static_assert(sizeof(Packed) <= kParameterBytes, "a launch's parameters are too long");
static_assert(sizeof(RowStart) == 8 && sizeof(RowClass) % 8 == 0 && sizeof(Group) % 8 == 0, "words have 8 bytes");

}  // namespace cuda
}  // namespace samk
