// The phases that kernels are made of. Each walks over the chunks of all rows; all threads of a block work on one chunk.
#pragma once

#include "work.cuh"

namespace samk {
namespace cuda {

// ---------------------------------------------------------------- sums over a block

SAMK_DEVICE double warp_sum(double value) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
    return value;
}

// Sums of each value over the block, in a fixed order, valid in thread 0. Two barriers of the block.
template <int count>
SAMK_DEVICE void block_sums(Shared& shared, double (&values)[count]) {
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
#pragma unroll
    for (int i = 0; i < count; ++i) {
        const double sum = warp_sum(values[i]);
        if (lane == 0) shared.warp_sums[i][warp] = sum;
    }
    __syncthreads();
    if (warp == 0) {
        const bool has_warp = lane < int(blockDim.x) / kWarp;
#pragma unroll
        for (int i = 0; i < count; ++i) values[i] = warp_sum(has_warp ? shared.warp_sums[i][lane] : 0.0);
    }
    __syncthreads();
}

// ---------------------------------------------------------------- Gram matrix

template <int lists>
constexpr int kPairs = pair_count(lists);

// Vectors that a thread has under way at a time, to hide the memory's latency: of one gradient; of pairs of a gradient and
// its weight, or of two gradients. More would need more registers than there are.
constexpr int kGradientsAhead = 4;
constexpr int kPairsAhead = 2;

template <int lists>
struct GramBody {
    const Packed& p;
    double (&sums)[kPairs<lists>];

    template <class A>
    SAMK_DEVICE void run(const Work& work, const Share& share) const {
        int i = share.first;
        if (is_weighted(p, work)) {
            if constexpr (lists <= 2 && A::N > 1) i = walk<A, true, kPairsAhead>(work, share, i);
            walk<A, true, 1>(work, share, i);
        } else if constexpr (!A::kIsMixed) {  // those read gradients alone as path_of_gradients() says
            if constexpr (lists <= 2 && A::N > 1)
                i = walk<A, false, lists == 1 ? kGradientsAhead : kPairsAhead>(work, share, i);
            walk<A, false, 1>(work, share, i);
        }
    }

    // Whether the chunk's gradients are weighted by its weights. Gradients alone can be read in larger vectors.
    static SAMK_DEVICE bool is_weighted(const Packed& p, const Work& work) {
        return p.is(Header::kWeightedGram) && work.eta >= 0.0;
    }

private:
    // From element i of the thread's share on, `ahead` vectors at a time; where it stopped.
    template <class A, bool weighted, int ahead>
    SAMK_DEVICE int walk(const Work& work, const Share& share, int i) const {
#pragma unroll 1
        for (; i + (ahead - 1) * share.stride < share.end; i += ahead * share.stride) {
            typename A::Own w[ahead] = {};
            typename A::Gradient x[ahead][lists];
#pragma unroll
            for (int k = 0; k < ahead; ++k) {
                // The geometry is that of the weights themselves, not of perturbed ones.
                if (weighted) w[k] = A::template own<Reuse::Again>(work.unperturbed(), i + k * share.stride);
                load<A>(work, i + k * share.stride, x[k]);
            }
#pragma unroll
            for (int k = 0; k < ahead; ++k) add<A, weighted>(x[k], w[k], work.eta);
        }
        return i;
    }

    template <class A>
    static SAMK_DEVICE void load(const Work& work, int index, typename A::Gradient (&x)[lists]) {
#pragma unroll
        for (int k = 0; k < lists; ++k) {
            x[k] = {};
            if (lists == 1 || work.dtype[kList + k] != DType::None) x[k] = A::gradient(work.column(kList + k), index);
        }
    }

    // Adds the products of one vector of each list; those of float32 elements are exact.
    template <class A, bool scaled>
    SAMK_DEVICE void add(const typename A::Gradient (&x)[lists], const typename A::Own& w, double eta) const {
#pragma unroll
        for (int e = 0; e < A::N; ++e) {
            double value[lists];
#pragma unroll
            for (int i = 0; i < lists; ++i) {
                value[i] = double(x[i].get(e));
                if (scaled) value[i] *= fabs(double(w.get(e))) + eta;
            }
            int pair = 0;
#pragma unroll
            for (int i = 0; i < lists; ++i)
#pragma unroll
                for (int j = i; j < lists; ++j, ++pair) sums[pair] = fma(value[i], value[j], sums[pair]);
        }
    }
};

template <int lists>
SAMK_DEVICE void gram_phase_of(const Packed& p, Shared& shared) {
    const uint32_t chunks = p.header.chunks;
    const uint32_t virtual_blocks = chunks < kVirtualBlocks ? chunks : kVirtualBlocks;
    double sums[kPairs<lists>] = {};
    // Chunk `index` of virtual block `v`; afterwards the next chunk of it, or the first one of this block's next.
    uint32_t v = blockIdx.x, index = v;
    const auto is_last_of_block = [&] { return index + kVirtualBlocks >= chunks; };
    int slot = 0;
    if (v < virtual_blocks) prepare(p, shared, slot, index, 0, NothingMore{});
    __syncthreads();
    while (v < virtual_blocks) {
        const uint32_t next = is_last_of_block() ? v + gridDim.x : index + kVirtualBlocks;
        if (!is_last_of_block() || next < virtual_blocks)
            prepare(p, shared, slot ^ 1, next, shared.work[slot].row, NothingMore{});
        const Work& work = shared.work[slot];
        // Rows that only hold a copy take part in what follows, not in the sums.
        if (work.has_gradient()) {
            using Body = GramBody<lists>;
            on_path(work, Body{p, sums}, Body::is_weighted(p, work) ? work.path : path_of_gradients(work.path));
        }
        if (is_last_of_block()) {
            block_sums(shared, sums);
            double* partial = p.header.partials + int64_t(p.header.first_slot + v) * kPairs<lists>;
#pragma unroll
            for (int pair = 0; pair < kPairs<lists>; ++pair) {
                if (threadIdx.x == 0) partial[pair] = sums[pair];
                sums[pair] = 0.0;
            }
            v = index = v + gridDim.x;
        } else {
            __syncthreads();
            index += kVirtualBlocks;
        }
        slot ^= 1;
    }
}

// Writes the partial sums of this launch.
SAMK_DEVICE void gram_phase(const Packed& p, Shared& shared) {
    switch (p.header.lists) {
        case 1: gram_phase_of<1>(p, shared); break;
        case 2: gram_phase_of<2>(p, shared); break;
        case 3: gram_phase_of<3>(p, shared); break;
    }
}

template <int lists>
SAMK_DEVICE void sum_partials(const Packed& p, Shared& shared) {
    double sums[kPairs<lists>] = {};
    for (uint32_t slot = threadIdx.x; slot < p.header.slots; slot += blockDim.x)
#pragma unroll
        for (int pair = 0; pair < kPairs<lists>; ++pair)
            sums[pair] += __ldcg(p.header.partials + int64_t(slot) * kPairs<lists> + pair);
    block_sums(shared, sums);
    if (threadIdx.x != 0) return;
    int pair = 0;
#pragma unroll
    for (int i = 0; i < lists; ++i)
#pragma unroll
        for (int j = i; j < lists; ++j, ++pair)
            shared.gram[i * kMaxLists + j] = shared.gram[j * kMaxLists + i] = sums[pair];
}

// Sums the partials in a fixed order and applies the rule; leaves the coefficients in `shared`, for thread 0.
SAMK_DEVICE void finish_gram(const Packed& p, Shared& shared, bool write_report) {
    if (threadIdx.x == 0)
        for (int i = 0; i < kMaxLists * kMaxLists; ++i) shared.gram[i] = 0.0;
    switch (p.header.lists) {
        case 1: sum_partials<1>(p, shared); break;
        case 2: sum_partials<2>(p, shared); break;
        case 3: sum_partials<3>(p, shared); break;
    }
    if (threadIdx.x == 0) {
        shared.finite = apply_rule(p.header.rule, shared.gram, p.header.lists, shared.coefficients);
        if (write_report) {
            p.header.report[kFinite] = shared.finite ? 1.0 : 0.0;
            for (int i = 0; i < kMaxLists * kMaxLists; ++i) p.header.report[kGram + i] = shared.gram[i];
            for (int i = 0; i < kMaxLists; ++i) p.header.report[kCoefficients + i] = shared.coefficients[i];
        }
    }
}

// Whether this block is the last to come here. What the first threads of the other blocks have written before is then
// visible to it, and they have read what they will ever read.
SAMK_DEVICE bool is_last_block(const Packed& p, Shared& shared, Ticket which) {
    if (threadIdx.x == 0) {
        __threadfence();
        uint32_t* ticket = p.header.tickets + which;
        shared.is_last_block = atomicAdd(ticket, 1u) == gridDim.x - 1;
        if (shared.is_last_block) *ticket = 0;
        __threadfence();
    }
    __syncthreads();
    return shared.is_last_block;
}

// ---------------------------------------------------------------- combination of lists

// sum_i c_i x_i over the `lists` lists that the chunk's row has.
template <class A>
SAMK_DEVICE void load_combination(const Work& work, int lists, int index, typename A::T (&sum)[A::N]) {
    using T = typename A::T;
    const auto& c = work.coefficient.template as<T>();
    typename A::Gradient x = {};
    if (lists > 0) x = A::gradient(work.column(work.list_column[0]), index);
#pragma unroll
    for (int e = 0; e < A::N; ++e) sum[e] = c[0] * T(x.get(e));
#pragma unroll 1
    for (int i = 1; i < lists; ++i) {
        x = A::gradient(work.column(work.list_column[i]), index);
#pragma unroll
        for (int e = 0; e < A::N; ++e) sum[e] += c[i] * T(x.get(e));
    }
}

// ---------------------------------------------------------------- restore

// Bit for bit, or a master's rounded.
SAMK_DEVICE void restore_chunk(const Work& work) {
    const Source weight = work.column(kWeight), snapshot = work.column(kSnapshot);
    const int size = size_of(weight.dtype);
    int done = 0;
    if (is_vector_path(work.path) && weight.dtype == snapshot.dtype) {
        const int vectors = int(int64_t(work.count) * size / 16);
        for (int v = int(threadIdx.x); v < vectors; v += int(blockDim.x))
            __stcs(reinterpret_cast<uint4*>(weight.pointer) + v,
                   __ldcs(reinterpret_cast<const uint4*>(snapshot.pointer) + v));
        done = vectors * (16 / size);
    }
    for (int i = done + int(threadIdx.x); i < work.count; i += int(blockDim.x))
        Single<float>::restore(weight, snapshot, i);
}

SAMK_DEVICE void restore_phase(const Packed& p, Shared& shared) {
    for_chunks(p, shared, NothingMore{}, [&](const Work& work) { restore_chunk(work); });
}

// ---------------------------------------------------------------- perturb, combine

// w <- w + T(w)^2 d. Where a copy of w is held already, w is that copy, whatever the weights hold now.
struct PerturbBody {
    bool take;

    template <class A>
    SAMK_DEVICE void run(const Work& work, const Share& share) const {
        using T = typename A::T;
        const int lists = work.lists;
        const bool held = work.held();
        const Source weight = work.column(kWeight), snapshot = work.column(kSnapshot);
#pragma unroll 1
        for (int i = share.first; i < share.end; i += share.stride) {
            typename A::Own w = A::own(work.unperturbed(), i);
            T step[A::N];
            load_combination<A>(work, lists, i, step);
            if (take && !held) A::copy(snapshot, weight, i, w);
            if (lists > 0) {
                const T eta = T(work.eta);
#pragma unroll
                for (int e = 0; e < A::N; ++e) w.set(e, perturbed(T(w.get(e)), step[e], eta));
                A::store_weights(weight, i, w);
            } else if (held) {
                A::restore(weight, snapshot, i, w);
            }
        }
    }
};

SAMK_DEVICE void perturb_phase(const Packed& p, Shared& shared, const double* coefficients) {
    const PerturbBody body{p.is(Header::kTakeSnapshot)};
    for_chunks(p, shared, Coefficients{coefficients}, [&](const Work& work) { on_path(work, body); });
}

struct CombineBody {
    template <class A>
    SAMK_DEVICE void run(const Work& work, const Share& share) const {
        const int lists = work.lists;
#pragma unroll 1
        for (int i = share.first; i < share.end; i += share.stride) {
            typename A::T sum[A::N];
            load_combination<A>(work, lists, i, sum);
            typename A::Own result = {};
#pragma unroll
            for (int e = 0; e < A::N; ++e) result.set(e, sum[e]);
            A::store(work.column(kWeight), i, result);
        }
    }
};

SAMK_DEVICE void combine_phase(const Packed& p, Shared& shared, const double* coefficients) {
    for_chunks(p, shared, Coefficients{coefficients}, [&](const Work& work) { on_path(work, CombineBody{}); });
}

// ---------------------------------------------------------------- base optimizers

// w <- base(snapshot or w, combination of the lists), one pass; a master is updated and rounded to w. Addresses and
// scalars are read from shared memory where they are used: kept in registers, they would leave too few for the elements.
template <class Base, int variant>
struct UpdateBody {
    bool preview;

    template <class A>
    SAMK_DEVICE void run(const Work& work, const Share& share) const {
        using T = typename A::T;
        const int lists = work.lists;
#pragma unroll 1
        for (int i = share.first; i < share.end; i += share.stride) {
            typename A::Own w = A::own(work.unperturbed(), i);
            typename A::Own state[kMaxStates];
#pragma unroll
            for (int s = 0; s < kMaxStates; ++s)
                if (uses(s)) state[s] = A::own(work.column(kState + s), i);
            T gradient[A::N];
            load_combination<A>(work, lists, i, gradient);
#pragma unroll
            for (int e = 0; e < A::N; ++e) {
                T own[kMaxStates];
#pragma unroll
                for (int s = 0; s < kMaxStates; ++s) own[s] = uses(s) ? T(state[s].get(e)) : T(0);
                const auto& scalars = work.scalars.template of<Base>().template as<T>();
                w.set(e, Base::template update<variant>(T(w.get(e)), gradient[e], own, scalars));
#pragma unroll
                for (int s = 0; s < kMaxStates; ++s)
                    if (uses(s)) state[s].set(e, own[s]);
            }
            A::store_weights(work.column(kWeight), i, w);
            if (!preview) {
                if (work.has_master()) A::store(work.column(kSnapshot), i, w);
#pragma unroll
                for (int s = 0; s < kMaxStates; ++s)
                    if (uses(s)) A::store(work.column(kState + s), i, state[s]);
            }
        }
    }

private:
    static constexpr unsigned kStates = Base::states(variant);
    static SAMK_DEVICE bool uses(int state) { return (kStates >> state) & 1; }
};

template <class Base, int variant = 0>
SAMK_DEVICE void update_chunk(const Work& work, bool preview) {
    if constexpr (variant + 1 < Base::kVariants)
        if (work.variant != variant) return update_chunk<Base, variant + 1>(work, preview);
    on_path(work, UpdateBody<Base, variant>{preview});
}

// Whether a descent only restores. `finite` is that of the launch's own Gram matrix, null if it has none.
SAMK_DEVICE bool skips_update(const Packed& p, const bool* finite) {
    return (finite && !*finite) || p.is(Header::kSkipUpdate) || (p.header.found_inf && *p.header.found_inf != 0.0f) ||
           (p.header.finite && *p.header.finite == 0.0);
}

template <class Base>
SAMK_DEVICE void update_phase(const Packed& p, Shared& shared, const double* coefficients, const bool* finite) {
    if (threadIdx.x == 0) {
        shared.skip_update = skips_update(p, finite);
        shared.inverse_grad_scale = 1.0 / read_scalar(p.header.grad_scale_kind, p.header.grad_scale);
        shared.step = 0.0;  // of no step that is made
    }
    const bool preview = p.is(Header::kPreview);
    for_chunks(p, shared, BaseScalars<Base>{{coefficients}}, [&](const Work& work) {
        if (shared.skip_update || !work.has_gradient()) {
            if (work.held()) restore_chunk(work);
            return;
        }
        if (preview && !work.held()) return;
        update_chunk<Base>(work, preview);
    });
}

// Counts this step in the step tensors that lie on the device, once every block has read them.
SAMK_DEVICE void count_steps(const Packed& p, Shared& shared) {
    if (!p.is(Header::kCountSteps) || !is_last_block(p, shared, kStepTicket) || shared.skip_update) return;
    for (uint32_t row = threadIdx.x; row < p.header.rows; row += blockDim.x) {
        const RowClass& c = p.row_class(p.start(row).row_class);
        if (!(c.flags & RowClass::kHasGradient) || c.dtype[kStep] == DType::None) continue;
        void* place = reinterpret_cast<void*>(p.row(row)[1 + p.header.position[kStep]]);
        if (c.dtype[kStep] == DType::Float64)
            *static_cast<double*>(place) += 1.0;
        else
            *static_cast<float*>(place) += 1.0f;
    }
}

}  // namespace cuda
}  // namespace samk
