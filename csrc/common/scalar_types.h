// Element types of the kernels and their conversions: single instructions on a GPU, and elsewhere written without
// branches, so that loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "config.h"

namespace samk {

enum class DType : uint8_t { None = 0, Float32 = 1, Float64 = 2, BFloat16 = 3, Float16 = 4 };

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

SAMK_HOST_DEVICE int size_of(DType dtype) {
    return dtype == DType::Float64 ? 8 : dtype == DType::Float32 ? 4 : dtype == DType::None ? 0 : 2;
}

SAMK_HOST_DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

SAMK_HOST_DEVICE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

SAMK_HOST_DEVICE float to_float(float value) { return value; }
SAMK_HOST_DEVICE double to_float(double value) { return value; }
SAMK_HOST_DEVICE float to_float(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

SAMK_HOST_DEVICE float to_float(Float16 value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const uint32_t normal = magnitude + (112u << 23);
    // A subnormal half is a multiple of 2^-24: put its bits under the exponent of 2^-14 and take the leading one away.
    const uint32_t subnormal = bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
    const uint32_t infinite = magnitude | 0x7f800000u;
    const uint32_t unsigned_bits = exponent == 0 ? subnormal : exponent == 0x0f800000u ? infinite : normal;
    return float_of(unsigned_bits | (uint32_t(value.bits & 0x8000u) << 16));
#endif
}

// Conversions to a storage type round to nearest, ties to even, as PyTorch's do.
template <class Storage>
struct Rounded;

template <>
struct Rounded<float> {
    template <class T>
    static SAMK_HOST_DEVICE float from(T value) {
        return float(value);
    }
};

template <>
struct Rounded<double> {
    template <class T>
    static SAMK_HOST_DEVICE double from(T value) {
        return double(value);
    }
};

template <>
struct Rounded<BFloat16> {
    template <class T>
    static SAMK_HOST_DEVICE BFloat16 from(T value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        BFloat16 result;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(float(value)));
        return result;
#else
        const uint32_t bits = bits_of(float(value));
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        return BFloat16{uint16_t(is_nan ? 0x7fc0u : rounded)};
#endif
    }
};

template <>
struct Rounded<Float16> {
    template <class T>
    static SAMK_HOST_DEVICE Float16 from(T value) {
#ifdef __CUDA_ARCH__
        Float16 result;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(float(value)));
        return result;
#else
        const uint32_t bits = bits_of(float(value));
        const uint32_t sign = (bits >> 16) & 0x8000u;
        const uint32_t magnitude = bits & 0x7fffffffu;
        const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
        // Adding 0.5 moves a number below 2^-14 so far right that the adder itself rounds it to a multiple of 2^-24.
        const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const uint32_t result = magnitude >= (143u << 23) ? special : magnitude < (113u << 23) ? subnormal : normal;
        return Float16{uint16_t(result | sign)};
#endif
    }
};

}  // namespace samk
