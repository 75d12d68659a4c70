// How kernels read and write the elements of a tensor: N neighbours at a time for each thread.
//
// An access type A has `T`, the type of the arithmetic, `N`, and `Own` and `Gradient`, which hold N elements of a column
// as they lie in memory until get() is asked for one of them, so that loads are under way together and 16-bit elements
// take half a register each.
#pragma once

#include "device.h"
#include "packed.h"

namespace samk {
namespace cuda {

// Where a column of the current chunk begins, and its type. Null pointers are of columns that the row does not have.
struct Source {
    char* pointer;
    DType dtype;
};

// Data that is used once passes through the cache without staying; gradients are read twice within one operation.
enum class Reuse { Once, Again };

template <int words, Reuse reuse>
SAMK_DEVICE void load_words(const void* source, uint32_t (&out)[words]) {
    if constexpr (words % 4 == 0) {
#pragma unroll
        for (int w = 0; w < words; w += 4) {
            const uint4* place = reinterpret_cast<const uint4*>(source) + w / 4;
            const uint4 four = reuse == Reuse::Once ? __ldcs(place) : __ldcg(place);
            out[w] = four.x, out[w + 1] = four.y, out[w + 2] = four.z, out[w + 3] = four.w;
        }
    } else if constexpr (words == 2) {
        const uint2* place = reinterpret_cast<const uint2*>(source);
        const uint2 two = reuse == Reuse::Once ? __ldcs(place) : __ldcg(place);
        out[0] = two.x, out[1] = two.y;
    } else {
        static_assert(words == 1, "1, 2 or a multiple of 4 words");
        out[0] = __ldcg(reinterpret_cast<const uint32_t*>(source));
    }
}

template <int words>
SAMK_DEVICE void store_words(void* target, const uint32_t (&values)[words]) {
    if constexpr (words % 4 == 0) {
#pragma unroll
        for (int w = 0; w < words; w += 4)
            __stcs(reinterpret_cast<uint4*>(target) + w / 4,
                   make_uint4(values[w], values[w + 1], values[w + 2], values[w + 3]));
    } else if constexpr (words == 2) {
        __stcs(reinterpret_cast<uint2*>(target), make_uint2(values[0], values[1]));
    } else {
        static_assert(words == 1, "1, 2 or a multiple of 4 words");
        __stcs(reinterpret_cast<uint32_t*>(target), values[0]);
    }
}

// N elements of one type, as they lie in memory.
template <class S, int N>
struct Elements {
    static constexpr int kWords = int(sizeof(S)) * N / 4;
    uint32_t words[kWords];

    SAMK_DEVICE float get(int e) const {
        if constexpr (sizeof(S) == 4) {
            return float_of(words[e]);
        } else {
            const uint16_t bits = uint16_t(words[e / 2] >> (16 * (e % 2)));
            return to_float(S{bits});
        }
    }
    SAMK_DEVICE void set(int e, float value) {
        if constexpr (sizeof(S) == 4) {
            words[e] = bits_of(value);
        } else {
            const uint32_t bits = Rounded<S>::from(value).bits;
            const int shift = 16 * (e % 2);
            words[e / 2] = (words[e / 2] & (0xffff0000u >> shift)) | (bits << shift);
        }
    }
};

// All of a row's own columns are of type W, all its gradients of type G, and every address is a multiple of 16 bytes.
// With float32 columns and 16-bit gradients the weights may be of the gradients' type: the rounding of masters.
template <class W, class G>
struct Uniform {
    using T = float;
    static constexpr int N = 16 / int(sizeof(W));
    static constexpr bool kIsMixed = sizeof(W) != sizeof(G);
    using Own = Elements<W, N>;
    using Gradient = Elements<G, N>;

    template <Reuse reuse = Reuse::Once>
    static SAMK_DEVICE Own own(const Source& source, int index) {
        Own result;
        load_words<Own::kWords, reuse>(reinterpret_cast<const W*>(source.pointer) + index, result.words);
        return result;
    }
    static SAMK_DEVICE Gradient gradient(const Source& source, int index) {
        Gradient result;
        load_words<Gradient::kWords, Reuse::Again>(reinterpret_cast<const G*>(source.pointer) + index, result.words);
        return result;
    }
    static SAMK_DEVICE void store(const Source& target, int index, const Own& values) {
        store_words<Own::kWords>(reinterpret_cast<W*>(target.pointer) + index, values.words);
    }
    // Into weights, rounded if they have masters.
    static SAMK_DEVICE void store_weights(const Source& target, int index, const Own& values) {
        if constexpr (sizeof(G) < sizeof(W)) {
            if (size_of(target.dtype) == int(sizeof(G))) {
                Gradient rounded = {};
#pragma unroll
                for (int e = 0; e < N; ++e) rounded.set(e, values.get(e));
                store_words<Gradient::kWords>(reinterpret_cast<G*>(target.pointer) + index, rounded.words);
                return;
            }
        }
        store(target, index, values);
    }
    // From the snapshot to weights; `values` are what was read from it.
    static SAMK_DEVICE void restore(const Source& target, const Source&, int index, const Own& values) {
        store_weights(target, index, values);
    }
    // From weights to the snapshot, bit for bit; `values` are what was read from them.
    static SAMK_DEVICE void copy(const Source& target, const Source&, int index, const Own& values) {
        store(target, index, values);
    }
};

// One element at a time, of columns of any types, looked up for every access.
template <class T_>
struct Single {
    using T = T_;
    static constexpr int N = 1;
    static constexpr bool kIsMixed = false;

    struct Own {
        T value;
        SAMK_DEVICE T get(int) const { return value; }
        SAMK_DEVICE void set(int, T new_value) { value = new_value; }
    };
    using Gradient = Own;

    template <Reuse = Reuse::Once>
    static SAMK_DEVICE Own own(const Source& source, int index) {
        return element(source, index);
    }
    static SAMK_DEVICE Gradient gradient(const Source& source, int index) { return element(source, index); }

    static SAMK_DEVICE Own element(const Source& source, int index) {
        switch (source.dtype) {
            case DType::Float32: return {T(__ldcg(place<float>(source, index)))};
            case DType::Float64: return {T(__ldcg(place<double>(source, index)))};
            case DType::BFloat16: return {T(to_float(BFloat16{__ldcg(place<uint16_t>(source, index))}))};
            case DType::Float16: return {T(to_float(Float16{__ldcg(place<uint16_t>(source, index))}))};
            case DType::None: break;
        }
        return {T(0)};
    }

    static SAMK_DEVICE void store(const Source& target, int index, const Own& own) {
        const T value = own.value;
        switch (target.dtype) {
            case DType::Float32: __stcs(place<float>(target, index), float(value)); break;
            case DType::Float64: __stcs(place<double>(target, index), double(value)); break;
            case DType::BFloat16: __stcs(place<uint16_t>(target, index), Rounded<BFloat16>::from(value).bits); break;
            case DType::Float16: __stcs(place<uint16_t>(target, index), Rounded<Float16>::from(value).bits); break;
            case DType::None: break;
        }
    }
    static SAMK_DEVICE void store_weights(const Source& target, int index, const Own& own) {
        store(target, index, own);
    }
    static SAMK_DEVICE void restore(const Source& target, const Source& source, int index, const Own& = {}) {
        if (kIsDouble || target.dtype == source.dtype)
            copy(target, source, index);
        else
            store(target, index, element(source, index));
    }
    // Bit for bit: a conversion there and back would change the bits of a NaN.
    static SAMK_DEVICE void copy(const Source& target, const Source& source, int index, const Own& = {}) {
        if constexpr (kIsDouble) return copy_as<double>(target, source, index);
        switch (size_of(target.dtype)) {
            case 2: copy_as<uint16_t>(target, source, index); break;
            case 4: copy_as<uint32_t>(target, source, index); break;
            case 8: copy_as<double>(target, source, index); break;
        }
    }

private:
    // Then weights and their copies are float64 as well.
    static constexpr bool kIsDouble = sizeof(T) == sizeof(double);

    template <class S>
    static SAMK_DEVICE S* place(const Source& source, int index) {
        return reinterpret_cast<S*>(source.pointer) + index;
    }
    template <class S>
    static SAMK_DEVICE void copy_as(const Source& target, const Source& source, int index) {
        __stcs(place<S>(target, index), __ldcg(place<S>(source, index)));
    }
};

}  // namespace cuda
}  // namespace samk
