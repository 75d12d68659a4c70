// The bodies of the CPU kernels. Included inside the namespace of each instruction set, after tiles.inl.

// Sixteen float64 lanes: products of float32 values are exact in them and no gradient overflows them. Element i of a
// chunk always goes to lane i % 16, whatever the instruction set.
constexpr int kLanes = 16;
static_assert(kTile % kLanes == 0, "a tile must not shift the lanes of the next one");

template <class A, class B>
inline void add_products(const A* SAMK_RESTRICT a, const B* SAMK_RESTRICT b, int n, double* SAMK_RESTRICT lanes) {
    double sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) sums[lane] += double(a[i + lane]) * double(b[i + lane]);
    for (int lane = 0; i < n; ++i, ++lane) sums[lane] += double(a[i]) * double(b[i]);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
}

template <class T>
inline void add_squares(const T* SAMK_RESTRICT a, int n, double* SAMK_RESTRICT lanes) {
    double sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = lanes[lane];
    int i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
            const double value = double(a[i + lane]);
            sums[lane] += value * value;
        }
    for (int lane = 0; i < n; ++i, ++lane) sums[lane] += double(a[i]) * double(a[i]);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = sums[lane];
}

// ---------------------------------------------------------------- Gram matrix

// T(w) x in float64.
template <class T>
inline void scale_by_geometry(const T* SAMK_RESTRICT weights, const T* SAMK_RESTRICT x, double eta, int n,
                              double* SAMK_RESTRICT out) {
    for (int e = 0; e < n; ++e) out[e] = (fabs(double(weights[e])) + eta) * double(x[e]);
}

template <class T>
inline void gram_chunk(const Launch& launch, const Chunk& chunk, double* partial) {
    const Row& row = launch.rows[chunk.row];
    const bool weighted = launch.weighted_gram && row.eta >= 0.0;
    // The geometry is that of the weights themselves, not of perturbed ones.
    const bool held = launch.taken && launch.taken[chunk.row];
    const Cell& weight_cell = row.cells[held ? kSnapshot : kWeight];
    const int pairs = pair_count(launch.lists);
    double lanes[kMaxPairs][kLanes];
    for (int pair = 0; pair < pairs; ++pair)
        for (int lane = 0; lane < kLanes; ++lane) lanes[pair][lane] = 0.0;
    T buffers[kMaxLists][kTile];
    T weight_buffer[kTile];
    double scaled[kMaxLists][kTile];

    for (int start = 0; start < chunk.count; start += kTile) {
        const int n = chunk.count - start < kTile ? chunk.count - start : kTile;
        const int64_t offset = chunk.offset + start;
        const T* tiles[kMaxLists] = {};
        for (int i = 0; i < launch.lists; ++i)
            if (row.cells[kList + i].present()) tiles[i] = load(row.cells[kList + i], offset, n, buffers[i]);
        if (weighted) {
            const T* weights = load(weight_cell, offset, n, weight_buffer);
            for (int i = 0; i < launch.lists; ++i)
                if (tiles[i]) scale_by_geometry(weights, tiles[i], row.eta, n, scaled[i]);
        }
        for (int i = 0, pair = 0; i < launch.lists; ++i)
            for (int j = i; j < launch.lists; ++j, ++pair) {
                if (!tiles[i] || !tiles[j]) continue;
                if (i == j && weighted)
                    add_squares(scaled[i], n, lanes[pair]);
                else if (i == j)
                    add_squares(tiles[i], n, lanes[pair]);
                else if (weighted)
                    add_products(scaled[i], scaled[j], n, lanes[pair]);
                else
                    add_products(tiles[i], tiles[j], n, lanes[pair]);
            }
    }
    for (int pair = 0; pair < pairs; ++pair) {
        partial[pair] = 0.0;
        for (int lane = 0; lane < kLanes; ++lane) partial[pair] += lanes[pair][lane];
    }
}

inline bool has_float64(const Row& row, int lists) {
    for (int i = 0; i < lists; ++i)
        if (row.cells[kList + i].dtype == DType::Float64) return true;
    return row.cells[kWeight].dtype == DType::Float64;
}

inline void gram_chunks(const Launch& launch, int thread) {
    const Schedule& schedule = *launch.schedule;
    for (int64_t c = schedule.bounds[thread]; c < schedule.bounds[thread + 1]; ++c) {
        const Chunk& chunk = schedule.chunks[c];
        double* partial = launch.partials + c * kMaxPairs;
        if (has_float64(launch.rows[chunk.row], launch.lists))
            gram_chunk<double>(launch, chunk, partial);
        else
            gram_chunk<float>(launch, chunk, partial);
    }
}

// Sums the chunks in their order, whatever thread they came from, and applies the rule.
inline void finish_gram(Launch& launch) {
    double sums[kMaxPairs] = {};
    const int64_t chunk_count = int64_t(launch.schedule->chunks.size());
    const int pairs = pair_count(launch.lists);
    for (int64_t c = 0; c < chunk_count; ++c)
        for (int pair = 0; pair < pairs; ++pair) sums[pair] += launch.partials[c * kMaxPairs + pair];
    for (int i = 0, pair = 0; i < launch.lists; ++i)
        for (int j = i; j < launch.lists; ++j, ++pair)
            launch.gram[i * kMaxLists + j] = launch.gram[j * kMaxLists + i] = sums[pair];
    launch.finite = apply_rule(launch.rule, launch.gram, launch.lists, launch.coefficients);
}

// ---------------------------------------------------------------- combination of lists

template <class T, class X>
inline void add_scaled(const X* SAMK_RESTRICT x, T c, T* SAMK_RESTRICT sum, int n, bool started) {
    if (!started)
        for (int e = 0; e < n; ++e) sum[e] = c * T(to_float(x[e]));
    else
        for (int e = 0; e < n; ++e) sum[e] += c * T(to_float(x[e]));
}

// sum_i c_i x_i over the lists that this row has, c_i as T; the lists' own memory where there is nothing to compute.
template <class T>
struct Combination {
    T coefficients[kMaxLists];
    const Row& row;
    int lists;
    T buffers[2][kTile];

    Combination(const Launch& launch, const Row& row_, double factor) : row(row_), lists(launch.lists) {
        for (int i = 0; i < lists; ++i)
            coefficients[i] = T(factor * launch.coefficients[i] * launch.scale[row.group * lists + i]);
    }

    bool is_zero() const {
        for (int i = 0; i < lists; ++i)
            if (row.cells[kList + i].present() && coefficients[i] != T(0)) return false;
        return true;
    }

    const T* at(int64_t offset, int n) {
        T* SAMK_RESTRICT sum = buffers[0];
        bool started = false;
        for (int i = 0; i < lists; ++i) {
            const Cell& cell = row.cells[kList + i];
            // A coefficient of zero leaves its list out, so that an infinite entry cannot become NaN.
            if (!cell.present() || coefficients[i] == T(0)) continue;
            const T c = coefficients[i];
            if (!started && c == T(1) && lists == 1) return load(cell, offset, n, buffers[1]);
            // bfloat16 is converted on the way: a pass over the tile less.
            if (cell.dtype == DType::BFloat16)
                add_scaled(reinterpret_cast<const BFloat16*>(address(cell, offset)), c, sum, n, started);
            else
                add_scaled(load(cell, offset, n, buffers[1]), c, sum, n, started);
            started = true;
        }
        if (!started)
            for (int e = 0; e < n; ++e) sum[e] = T(0);
        return sum;
    }
};

// ---------------------------------------------------------------- restore

// Bit for bit, or a master's rounded.
inline void restore_chunk(const Launch& launch, const Chunk& chunk) {
    const Row& row = launch.rows[chunk.row];
    const Cell &weight = row.cells[kWeight], &snapshot = row.cells[kSnapshot];
    if (!row.has_master()) {
        copy_bytes(address(weight, chunk.offset), address(snapshot, chunk.offset),
                   int64_t(chunk.count) * size_of(weight.dtype), launch.streaming);
        return;
    }
    float buffer[kTile];
    for (int start = 0; start < chunk.count; start += kTile) {
        const int n = chunk.count - start < kTile ? chunk.count - start : kTile;
        const int64_t offset = chunk.offset + start;
        store(weight, offset, n, load(snapshot, offset, n, buffer), launch.streaming);
    }
}

// ---------------------------------------------------------------- perturb

// w <- w + T(w)^2 d. Where a copy of w is held already, w is that copy, whatever the weights hold now.
template <class T>
inline void perturb_chunk(const Launch& launch, const Chunk& chunk) {
    const Row& row = launch.rows[chunk.row];
    const Cell& weight_cell = row.cells[kWeight];
    const bool held = launch.taken && launch.taken[chunk.row];
    Combination<T> combination(launch, row, 1.0);
    if (!launch.finite || combination.is_zero()) {
        if (held)
            restore_chunk(launch, chunk);
        else if (launch.take_snapshot && launch.finite)
            copy_bytes(address(row.cells[kSnapshot], chunk.offset), address(weight_cell, chunk.offset),
                       int64_t(chunk.count) * size_of(weight_cell.dtype), launch.streaming);
        return;
    }
    const Cell& source_cell = held ? row.cells[kSnapshot] : weight_cell;
    const T eta = T(row.eta);
    T source_buffer[kTile], out[kTile];

    for (int start = 0; start < chunk.count; start += kTile) {
        const int n = chunk.count - start < kTile ? chunk.count - start : kTile;
        const int64_t offset = chunk.offset + start;
        if (launch.take_snapshot && !held)
            copy_bytes(address(row.cells[kSnapshot], offset), address(weight_cell, offset),
                       int64_t(n) * size_of(weight_cell.dtype), launch.streaming);
        const T* SAMK_RESTRICT direction = combination.at(offset, n);
        const T* SAMK_RESTRICT source = load(source_cell, offset, n, source_buffer);
        if (eta < T(0))
            for (int e = 0; e < n; ++e) out[e] = source[e] + direction[e];
        else
            for (int e = 0; e < n; ++e) out[e] = perturbed(source[e], direction[e], eta);
        // Weights that were read a moment ago are in the cache; those read from the copy are not.
        store(weight_cell, offset, n, out, held && launch.streaming);
    }
}

inline void perturb_chunks(const Launch& launch, int thread) {
    const Schedule& schedule = *launch.schedule;
    for (int64_t c = schedule.bounds[thread]; c < schedule.bounds[thread + 1]; ++c) {
        const Chunk& chunk = schedule.chunks[c];
        if (launch.rows[chunk.row].cells[kWeight].dtype == DType::Float64)
            perturb_chunk<double>(launch, chunk);
        else
            perturb_chunk<float>(launch, chunk);
    }
    finish_streaming();
}

inline void mark_taken(Launch& launch, bool taken) {
    const std::vector<uint8_t>& active = launch.schedule->active;
    for (size_t r = 0; r < active.size(); ++r)
        if (active[r]) launch.taken[r] = uint8_t((launch.taken[r] & ~kTaken) | (taken ? kTaken : 0));
}

inline void restore_chunks(const Launch& launch, int thread) {
    const Schedule& schedule = *launch.schedule;
    for (int64_t c = schedule.bounds[thread]; c < schedule.bounds[thread + 1]; ++c)
        restore_chunk(launch, schedule.chunks[c]);
    finish_streaming();
}

// ---------------------------------------------------------------- combine

template <class T>
inline void combine_chunk(const Launch& launch, const Chunk& chunk) {
    const Row& row = launch.rows[chunk.row];
    Combination<T> combination(launch, row, 1.0);
    for (int start = 0; start < chunk.count; start += kTile) {
        const int n = chunk.count - start < kTile ? chunk.count - start : kTile;
        const int64_t offset = chunk.offset + start;
        store(row.cells[kWeight], offset, n, combination.at(offset, n), launch.streaming);
    }
}

inline void combine_chunks(const Launch& launch, int thread) {
    const Schedule& schedule = *launch.schedule;
    for (int64_t c = schedule.bounds[thread]; c < schedule.bounds[thread + 1]; ++c) {
        const Chunk& chunk = schedule.chunks[c];
        if (launch.rows[chunk.row].cells[kWeight].dtype == DType::Float64)
            combine_chunk<double>(launch, chunk);
        else
            combine_chunk<float>(launch, chunk);
    }
    finish_streaming();
}

// ---------------------------------------------------------------- base optimizers

// A base optimizer's update of one tensor, tile by tile.
template <class T, class Base, int variant>
struct Update {
    static constexpr bool uses(int state) { return (Base::states(variant) >> state) & 1; }

    typename Base::template Scalars<T> scalars;
    bool preview;

    Update(const Launch& launch, int32_t row_index) : preview(launch.preview) {
        const int32_t group = launch.rows[row_index].group;
        const auto& settings = launch.settings[group].of<Base>();
        TensorFacts facts = {launch.first && launch.first[row_index], {}};
        const auto power = [](double base, double exponent) { return std::pow(base, exponent); };
        Base::corrections(settings, launch.steps[row_index], power, facts.corrections);
        scalars = Base::template scalars<T>(settings, launch.lr[group], facts);
    }

    void tile(const Row& row, int64_t offset, int n, const T* SAMK_RESTRICT source, const T* SAMK_RESTRICT gradient,
              T* SAMK_RESTRICT out) const {
        const auto s = scalars;
        T storage[kMaxStates][kTile];
        // One by one: compilers do not believe that an array's pointers are apart.
        static_assert(kMaxStates == 3, "a pointer for each");
        T* SAMK_RESTRICT state0 = load_state<0>(row, offset, n, storage[0]);
        T* SAMK_RESTRICT state1 = load_state<1>(row, offset, n, storage[1]);
        T* SAMK_RESTRICT state2 = load_state<2>(row, offset, n, storage[2]);
        for (int e = 0; e < n; ++e) {
            T state[kMaxStates] = {uses(0) ? state0[e] : T(0), uses(1) ? state1[e] : T(0), uses(2) ? state2[e] : T(0)};
            out[e] = Base::template update<variant>(source[e], gradient[e], state, s);
            if (uses(0)) state0[e] = state[0];
            if (uses(1)) state1[e] = state[1];
            if (uses(2)) state2[e] = state[2];
        }
        if (preview) return;
        if (uses(0)) store(row.cells[kState], offset, n, state0);
        if (uses(1)) store(row.cells[kState + 1], offset, n, state1);
        if (uses(2)) store(row.cells[kState + 2], offset, n, state2);
    }

private:
    // To be changed: the tensor's own memory where possible, but a copy for a preview, which is thrown away.
    template <int state>
    T* load_state(const Row& row, int64_t offset, int n, T* buffer) const {
        if (!uses(state)) return buffer;
        T* tile = load_mutable(row.cells[kState + state], offset, n, buffer);
        if (!preview || tile == buffer) return tile;
        memcpy(buffer, tile, size_t(n) * sizeof(T));
        return buffer;
    }
};

// w <- base(snapshot or w, combination of the lists), one pass; a master is updated and rounded to w.
template <class T, class Update>
inline void update_chunk(const Launch& launch, const Chunk& chunk) {
    const Row& row = launch.rows[chunk.row];
    const Update update(launch, chunk.row);
    Combination<T> combination(launch, row, launch.inverse_grad_scale);
    const bool restores = launch.taken && launch.taken[chunk.row];
    const Cell& source_cell = row.cells[restores ? kSnapshot : kWeight];
    const Cell& weight_cell = row.cells[kWeight];
    const bool updates_master = restores && !launch.preview && row.has_master();
    const bool direct = restores && !launch.streaming && weight_cell.dtype == DTypeOf<T>::value;
    T source_buffer[kTile], out_buffer[kTile];

    for (int start = 0; start < chunk.count; start += kTile) {
        const int n = chunk.count - start < kTile ? chunk.count - start : kTile;
        const int64_t offset = chunk.offset + start;
        const T* source = load(source_cell, offset, n, source_buffer);
        T* out = direct ? reinterpret_cast<T*>(address(weight_cell, offset)) : out_buffer;
        update.tile(row, offset, n, source, combination.at(offset, n), out);
        store(weight_cell, offset, n, out, restores && launch.streaming);
        if (updates_master) store(row.cells[kSnapshot], offset, n, out);
    }
}

template <class T>
inline void descent_chunk(const Launch& launch, const Chunk& chunk) {
    const Row& row = launch.rows[chunk.row];
    const bool held = launch.taken && launch.taken[chunk.row];
    if (launch.skip_update || !row.has_gradient(launch.lists)) {
        if (held) restore_chunk(launch, chunk);
        return;
    }
    if (launch.preview && !held) return;
    with_base(launch.base, [&](auto base) {
        using Base = decltype(base);
        with_variant<Base>(Base::variant(launch.settings[row.group].of<Base>()), [&](auto variant) {
            update_chunk<T, Update<T, Base, decltype(variant)::value>>(launch, chunk);
        });
    });
}

inline void descent_chunks(const Launch& launch, int thread) {
    const Schedule& schedule = *launch.schedule;
    for (int64_t c = schedule.bounds[thread]; c < schedule.bounds[thread + 1]; ++c) {
        const Chunk& chunk = schedule.chunks[c];
        if (launch.rows[chunk.row].cells[kWeight].dtype == DType::Float64)
            descent_chunk<double>(launch, chunk);
        else
            descent_chunk<float>(launch, chunk);
    }
    finish_streaming();
}

// Counts this step in the step tensors, which torch keeps as float32 (or float64) scalars, one for each parameter.
inline void count_steps(Launch& launch) {
    const bool counts = with_base(launch.base, [](auto base) { return base.kCountsSteps; });
    if (!counts || launch.skip_update) return;
    const std::vector<uint8_t>& active = launch.schedule->active;
    for (size_t r = 0; r < active.size(); ++r) {
        const Row& row = launch.rows[r];
        if (!active[r] || !row.has_gradient(launch.lists)) continue;
        const Cell& cell = row.cells[kStep];
        const bool is_double = cell.dtype == DType::Float64;
        launch.steps[r] = 1.0 + (is_double ? *static_cast<double*>(cell.pointer) : *static_cast<float*>(cell.pointer));
        if (launch.preview) continue;
        if (is_double)
            *static_cast<double*>(cell.pointer) = launch.steps[r];
        else
            *static_cast<float*>(cell.pointer) = float(launch.steps[r]);
    }
}

// ---------------------------------------------------------------- the operations

// Calls f(thread) on every thread that the schedule has chunks for.
template <class F>
inline void on_threads(const Launch& launch, F f) {
    const int team = int(launch.schedule->bounds.size()) - 1;
    if (team == 1) return f(0);
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) schedule(static, 1)
#endif
    for (int thread = 0; thread < team; ++thread) f(thread);
}

// first(thread) on every thread, then between() once, then second(thread), with one team of threads throughout.
template <class First, class Between, class Second>
inline void in_two_phases(const Launch& launch, First first, Between between, Second second) {
    const int team = int(launch.schedule->bounds.size()) - 1;
    if (team == 1) {
        first(0);
        between();
        second(0);
        return;
    }
#ifdef _OPENMP
#pragma omp parallel num_threads(team)
    {
        // The runtime may grant fewer threads than asked for; each then takes several shares.
        const int size = omp_get_num_threads();
        for (int share = omp_get_thread_num(); share < team; share += size) first(share);
#pragma omp barrier
#pragma omp single
        between();
        for (int share = omp_get_thread_num(); share < team; share += size) second(share);
    }
#else
    for (int share = 0; share < team; ++share) first(share);
    between();
    for (int share = 0; share < team; ++share) second(share);
#endif
}

inline void run_gram(Launch& launch) {
    on_threads(launch, [&](int thread) { gram_chunks(launch, thread); });
    finish_gram(launch);
}

inline void run_perturb(Launch& launch) {
    on_threads(launch, [&](int thread) { perturb_chunks(launch, thread); });
    if (launch.take_snapshot) mark_taken(launch, true);
}

inline void run_restore(Launch& launch) {
    on_threads(launch, [&](int thread) { restore_chunks(launch, thread); });
}

inline void run_combine(Launch& launch) {
    on_threads(launch, [&](int thread) { combine_chunks(launch, thread); });
}

inline void run_ascent(Launch& launch) {
    in_two_phases(
        launch, [&](int thread) { gram_chunks(launch, thread); }, [&] { finish_gram(launch); },
        [&](int thread) { perturb_chunks(launch, thread); });
    if (launch.finite && launch.take_snapshot) mark_taken(launch, true);
}

inline void run_descent(Launch& launch) {
    if (!launch.needs_gram) {
        count_steps(launch);
        on_threads(launch, [&](int thread) { descent_chunks(launch, thread); });
    } else {
        in_two_phases(
            launch, [&](int thread) { gram_chunks(launch, thread); },
            [&] {
                finish_gram(launch);
                launch.skip_update = launch.skip_update || !launch.finite;
                count_steps(launch);
            },
            [&](int thread) { descent_chunks(launch, thread); });
    }
    if (launch.taken && !launch.preview) mark_taken(launch, false);
}
