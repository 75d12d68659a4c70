// Tiles: a few thousand bytes of a tensor in the type of the arithmetic. Included inside an instruction set's namespace.

// Elements handled at a time: a handful of float64 tiles stay within a 32 KiB first-level cache.
constexpr int kTile = 512;

template <class T, class Storage>
inline void convert(const Storage* SAMK_RESTRICT source, T* SAMK_RESTRICT out, int n) {
    for (int i = 0; i < n; ++i) out[i] = T(to_float(source[i]));
}

template <class Storage, class T>
inline void round_to(Storage* SAMK_RESTRICT out, const T* SAMK_RESTRICT source, int n) {
    for (int i = 0; i < n; ++i) out[i] = Rounded<Storage>::from(source[i]);
}

#ifdef SAMK_F16C
inline void convert(const Float16* SAMK_RESTRICT source, float* SAMK_RESTRICT out, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
    for (; i < n; ++i) out[i] = to_float(source[i]);
}

inline void round_to(Float16* SAMK_RESTRICT out, const float* SAMK_RESTRICT source, int n) {
    int i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    for (; i < n; ++i) out[i] = Rounded<Float16>::from(source[i]);
}

// Rounded<BFloat16>, in the lower halves of 32-bit elements.
inline __m256i rounded_to_bfloat16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), is_nan);
}

inline void round_to(BFloat16* SAMK_RESTRICT out, const float* SAMK_RESTRICT source, int n) {
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256i low = rounded_to_bfloat16(_mm256_loadu_ps(source + i));
        const __m256i high = rounded_to_bfloat16(_mm256_loadu_ps(source + i + 8));
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), packed);
    }
    for (; i < n; ++i) out[i] = Rounded<BFloat16>::from(source[i]);
}
#endif

inline char* address(const Cell& cell, int64_t offset) {
    return static_cast<char*>(cell.pointer) + offset * size_of(cell.dtype);
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
    static constexpr DType value = DType::Float32;
};
template <>
struct DTypeOf<double> {
    static constexpr DType value = DType::Float64;
};

// The tile at `offset` as T: the tensor's own memory where the types agree, else `buffer`.
template <class T>
inline const T* load(const Cell& cell, int64_t offset, int n, T* buffer) {
    const char* source = address(cell, offset);
    if (cell.dtype == DTypeOf<T>::value) return reinterpret_cast<const T*>(source);
    switch (cell.dtype) {
        case DType::Float32: convert(reinterpret_cast<const float*>(source), buffer, n); break;
        case DType::Float64: convert(reinterpret_cast<const double*>(source), buffer, n); break;
        case DType::BFloat16: convert(reinterpret_cast<const BFloat16*>(source), buffer, n); break;
        case DType::Float16: convert(reinterpret_cast<const Float16*>(source), buffer, n); break;
        case DType::None: break;
    }
    return buffer;
}

// As load, to be changed in place and stored again.
template <class T>
inline T* load_mutable(const Cell& cell, int64_t offset, int n, T* buffer) {
    return const_cast<T*>(load(cell, offset, n, buffer));
}

inline void stream(char* SAMK_RESTRICT out, const char* SAMK_RESTRICT source, int64_t bytes) {
#ifdef SAMK_SSE2
    if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        int64_t i = 0;
        for (; i + 64 <= bytes; i += 64)
            for (int part = 0; part < 64; part += 16)
                _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + part),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + part)));
        if (i < bytes) memcpy(out + i, source + i, size_t(bytes - i));
        return;
    }
#endif
    memcpy(out, source, size_t(bytes));
}

inline void copy_bytes(char* out, const char* source, int64_t bytes, bool streaming) {
    if (streaming)
        stream(out, source, bytes);
    else
        memcpy(out, source, size_t(bytes));
}

// Streaming stores are weakly ordered: no thread may pass on data it has streamed before this.
inline void finish_streaming() {
#ifdef SAMK_SSE2
    _mm_sfence();
#endif
}

// Writes a tile back. Does nothing where `values` already is the tensor's memory.
template <class T>
inline void store(const Cell& cell, int64_t offset, int n, const T* values, bool streaming = false) {
    char* out = address(cell, offset);
    if (reinterpret_cast<const char*>(values) == out) return;
    switch (cell.dtype) {
        case DType::Float32:
            if (DTypeOf<T>::value == DType::Float32)
                copy_bytes(out, reinterpret_cast<const char*>(values), int64_t(n) * 4, streaming);
            else
                round_to(reinterpret_cast<float*>(out), values, n);
            break;
        case DType::Float64:
            if (DTypeOf<T>::value == DType::Float64)
                copy_bytes(out, reinterpret_cast<const char*>(values), int64_t(n) * 8, streaming);
            else
                round_to(reinterpret_cast<double*>(out), values, n);
            break;
        case DType::BFloat16: round_to(reinterpret_cast<BFloat16*>(out), values, n); break;
        case DType::Float16: round_to(reinterpret_cast<Float16*>(out), values, n); break;
        case DType::None: break;
    }
}
