// What a block knows of the chunk it works on.
//
// Note [Preparing chunks]
// Finding a chunk's row, its addresses, coefficients and hyper-parameters takes some hundred cycles and many registers,
// and is the same for all threads. The first warp does it for the next chunk while the block works on the current one,
// and leaves the result in shared memory: one barrier for each chunk, no thread waits for a search, and the loops over
// elements have the registers to themselves.
#pragma once

#include <cmath>

#include "../common/bases.h"
#include "../common/elementwise.h"
#include "access.cuh"

namespace samk {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMaxWarps = kMaxThreads / kWarp;

// A value for arithmetic in double and one for arithmetic in float.
template <class Double, class Float>
struct InBoth {
    Double in_double;
    Float in_float;

    template <class T>
    SAMK_DEVICE const auto& as() const {
        if constexpr (sizeof(T) == sizeof(double))
            return in_double;
        else
            return in_float;
    }
};

template <class Base>
using ScalarsOf = InBoth<typename Base::template Scalars<double>, typename Base::template Scalars<float>>;

struct Work {
    char* pointer[kColumns];  // of the chunk's first element
    DType dtype[kColumns];
    Path path;
    uint8_t flags;  // of the row's class
    int variant;    // of the base's update
    int count;
    uint32_t row;
    double eta;

    // The lists that the row has and whose coefficient is not zero; an infinite entry of others must not become NaN.
    int lists;
    int list_column[kMaxLists];

    // In both types of arithmetic, to be read where they are used: they would take more registers than there are.
    InBoth<double[kMaxLists], float[kMaxLists]> coefficient;
    OneOf<ScalarsOf> scalars;

    SAMK_DEVICE Source column(int which) const { return {pointer[which], dtype[which]}; }
    SAMK_DEVICE bool held() const { return (flags & RowClass::kHeld) != 0; }
    SAMK_DEVICE bool has_gradient() const { return (flags & RowClass::kHasGradient) != 0; }
    SAMK_DEVICE bool has_master() const { return held() && dtype[kSnapshot] != dtype[kWeight]; }
    // Where the weights themselves are, whatever they are perturbed to.
    SAMK_DEVICE Source unperturbed() const { return column(held() ? kSnapshot : kWeight); }
};

// What the threads of a block share.
struct Shared {
    Work work[2];
    double warp_sums[kMaxPairs][kMaxWarps];
    double gram[kMaxLists * kMaxLists];
    double coefficients[kMaxLists];
    bool finite;
    bool is_last_block;
    bool skip_update;
    double inverse_grad_scale;
    // What follows from the step count that was last looked at on the device, with that group's settings.
    double step, corrections[kMaxCorrections];
    int group;
};

struct Chunk {
    uint32_t row;
    int64_t offset;
    int count;
};

// near: a row where the search begins, in steps that double. The row of the chunk before is a good one, for mostly the
// wanted row is the same or the next; each step is a read that the one after it has to wait for.
SAMK_DEVICE Chunk chunk_at(const Packed& p, uint32_t index, uint32_t near) {
    // The last row whose first chunk is not behind the wanted one is in [low, high).
    uint32_t low = near, high = near + 1;
    if (p.start(near).first_chunk <= index) {
        for (uint32_t step = 1; high < p.header.rows && p.start(high).first_chunk <= index; step *= 2)
            low = high, high += step;
        if (high > p.header.rows) high = p.header.rows;
    } else {
        low = near - 1;  // row 0 begins with chunk 0
        for (uint32_t step = 1; p.start(low).first_chunk > index; step *= 2)
            high = low, low = low > step ? low - step : 0;
        if (low + 1 > high) high = low + 1;
    }
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (p.start(middle).first_chunk <= index)
            low = middle;
        else
            high = middle;
    }
    const RowStart start = p.start(low);
    const uint32_t end = low + 1 < p.header.rows ? p.start(low + 1).first_chunk : p.header.chunks;
    Chunk chunk;
    chunk.row = low;
    chunk.offset = int64_t(index - start.first_chunk) * p.header.chunk_size;
    chunk.count = int(p.header.chunk_size) - (index + 1 == end ? int(start.missing) : 0);
    return chunk;
}

SAMK_DEVICE double read_scalar(uint32_t kind, uint64_t bits) {
    if (kind == uint32_t(ScalarKind::Value)) {
        double value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    if (kind == uint32_t(ScalarKind::Float32)) return double(*reinterpret_cast<const float*>(bits));
    return *reinterpret_cast<const double*>(bits);
}

SAMK_DEVICE double scale_of(const Group& group, int list) {
    return read_scalar((group.kinds >> (2 * list)) & 3u, group.scale[list]);
}

SAMK_DEVICE double learning_rate_of(const Group& group) {
    return read_scalar((group.kinds >> (2 * kMaxLists)) & 3u, group.lr);
}

// By repeated squaring: step counts are whole numbers, and CUDA's pow() is a function call that costs every thread of
// the kernel registers.
struct Power {
    SAMK_HOST_DEVICE double operator()(double base, double step) const {
        double result = 1.0;
#pragma unroll 1
        for (uint32_t exponent = uint32_t(step); exponent > 0; exponent /= 2, base *= base)
            if (exponent % 2 == 1) result *= base;
        return result;
    }
};

// What only some phases need to know of a chunk, computed by one thread.
struct NothingMore {
    SAMK_DEVICE void operator()(const Packed&, Shared&, const Chunk&, const RowClass&, Work&) const {}
};

struct Coefficients {
    const double* of_lists;  // null for ones

    SAMK_DEVICE void operator()(const Packed& p, Shared&, const Chunk&, const RowClass& c, Work& work) const {
        set(p, c, work, 1.0);
    }

    SAMK_DEVICE void set(const Packed& p, const RowClass& c, Work& work, double factor) const {
        const Group& group = p.group(c.group);
        int lists = 0;
        for (int i = 0; i < p.header.lists; ++i) {
            const double value = factor * (of_lists ? of_lists[i] : 1.0) * scale_of(group, i);
            // Zero in the type of the arithmetic.
            const bool is_zero = c.path == Path::SingleDouble ? value == 0.0 : float(value) == 0.0f;
            if (c.dtype[kList + i] == DType::None || is_zero) continue;
            work.list_column[lists] = kList + i;
            set_coefficient(work, lists, value);
            ++lists;
        }
        work.lists = lists;
        for (; lists < kMaxLists; ++lists) {
            work.list_column[lists] = kList;
            set_coefficient(work, lists, 0.0);
        }
    }

    static SAMK_DEVICE void set_coefficient(Work& work, int list, double value) {
        work.coefficient.in_double[list] = value;
        work.coefficient.in_float[list] = float(value);
    }
};

template <class Base>
struct BaseScalars {
    Coefficients coefficients;

    SAMK_DEVICE void operator()(const Packed& p, Shared& shared, const Chunk& chunk, const RowClass& c,
                                Work& work) const {
        if (!(c.flags & RowClass::kHasGradient)) return;
        coefficients.set(p, c, work, shared.inverse_grad_scale);
        const Group& group = p.group(c.group);
        const auto& settings = group.settings.template of<Base>();
        TensorFacts facts = {(c.flags & RowClass::kFirst) != 0, {}};
        if constexpr (Base::kHasCorrections) {
            // Not by one pointer to either: it would point into two address spaces.
            if (c.dtype[kStep] != DType::None) {
                look_up_step(p, shared, chunk, c, settings);
                for (int i = 0; i < kMaxCorrections; ++i) facts.corrections[i] = shared.corrections[i];
            } else {
                for (int i = 0; i < kMaxCorrections; ++i) facts.corrections[i] = c.corrections[i];
            }
        }
        const double lr = learning_rate_of(group);
        work.variant = Base::variant(settings);
        work.scalars.template of<Base>() = {Base::template scalars<double>(settings, lr, facts),
                                            Base::template scalars<float>(settings, lr, facts)};
    }

    // Two powers, unless the step count is that of the chunk before.
    static SAMK_DEVICE void look_up_step(const Packed& p, Shared& shared, const Chunk& chunk, const RowClass& c,
                                         const typename Base::Settings& settings) {
        const uint64_t place = p.row(chunk.row)[1 + p.header.position[kStep]];
        const ScalarKind kind = c.dtype[kStep] == DType::Float64 ? ScalarKind::Float64 : ScalarKind::Float32;
        const double step = 1.0 + read_scalar(uint32_t(kind), place);
        if (step == shared.step && int(c.group) == shared.group) return;
        shared.step = step, shared.group = int(c.group);
        Base::corrections(settings, step, Power{}, shared.corrections);
    }
};

// For all threads of the block; the first warp writes. A barrier must follow before anybody reads.
template <class More>
SAMK_DEVICE void prepare(const Packed& p, Shared& shared, int slot, uint32_t index, uint32_t near, const More& more) {
    const int lane = int(threadIdx.x);
    if (lane >= kWarp) return;
    Work& work = shared.work[slot];
    const Chunk chunk = chunk_at(p, index, near);
    const RowClass& c = p.row_class(p.start(chunk.row).row_class);
    if (lane < kColumns) {
        const DType dtype = c.dtype[lane];
        char* pointer = nullptr;
        if (dtype != DType::None)
            pointer =
                reinterpret_cast<char*>(p.row(chunk.row)[1 + p.header.position[lane]]) + chunk.offset * size_of(dtype);
        work.pointer[lane] = pointer;
        work.dtype[lane] = dtype;
    }
    if (lane == 0) {
        work.path = c.path;
        work.flags = c.flags;
        work.count = chunk.count;
        work.row = chunk.row;
        work.eta = c.eta;
        more(p, shared, chunk, c, work);
    }
}

// Calls f(work) for this block's share of the chunks. Barriers before its first and after each call.
template <class More, class F>
SAMK_DEVICE void for_chunks(const Packed& p, Shared& shared, const More& more, const F& f) {
    const uint32_t chunks = p.header.chunks;
    // After a Gram phase the cache still holds the gradients of the last chunks.
    const bool reverse = p.is(Header::kReverse);
    int slot = 0;
    const auto place_of = [&](uint32_t step) { return reverse ? chunks - 1 - step : step; };
    if (blockIdx.x < chunks) prepare(p, shared, slot, place_of(blockIdx.x), reverse ? p.header.rows - 1 : 0, more);
    __syncthreads();
    for (uint32_t step = blockIdx.x; step < chunks; step += gridDim.x) {
        const uint32_t next = step + gridDim.x;
        if (next < chunks) prepare(p, shared, slot ^ 1, place_of(next), shared.work[slot].row, more);
        f(shared.work[slot]);
        __syncthreads();
        slot ^= 1;
    }
}

SAMK_DEVICE bool is_vector_path(Path path) { return path != Path::SingleFloat && path != Path::SingleDouble; }

// For loops that read no other column: 16 bytes at a time whatever the weights are.
SAMK_DEVICE Path path_of_gradients(Path path) { return path == Path::Float32BFloat16 ? Path::BFloat16 : path; }

// The elements [first, first + N), [first + stride, ...), up to `end`, which one thread works on.
struct Share {
    int first, stride, end;
};

template <class A, class Body>
SAMK_DEVICE void run_range(const Work& work, const Body& body, int begin, int end) {
    body.template run<A>(work, Share{begin + int(threadIdx.x) * A::N, int(blockDim.x) * A::N, end});
}

// Calls body.run<access>(work, share) for all elements of the chunk, in vectors where the path has them.
template <class Body>
SAMK_DEVICE void on_path(const Work& work, const Body& body, Path path) {
    const int count = work.count;
    const int whole = is_vector_path(path) ? count - count % 8 : 0;
    switch (path) {
        case Path::Float32: run_range<Uniform<float, float>>(work, body, 0, whole); break;
        case Path::BFloat16: run_range<Uniform<BFloat16, BFloat16>>(work, body, 0, whole); break;
        case Path::Float16: run_range<Uniform<Float16, Float16>>(work, body, 0, whole); break;
        case Path::Float32BFloat16: run_range<Uniform<float, BFloat16>>(work, body, 0, whole); break;
        case Path::SingleFloat: break;
        case Path::SingleDouble: run_range<Single<double>>(work, body, 0, count); return;
    }
    if (whole < count) run_range<Single<float>>(work, body, whole, count);
}

template <class Body>
SAMK_DEVICE void on_path(const Work& work, const Body& body) {
    on_path(work, body, work.path);
}

}  // namespace cuda
}  // namespace samk
