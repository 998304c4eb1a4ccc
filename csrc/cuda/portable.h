// What lets the same kernel source compile for the GPU and, in the emulated tests, for the host.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SPARSEPRUNE_HD __host__ __device__ __forceinline__
#else
#define SPARSEPRUNE_HD inline
#endif
#ifdef __CUDA_ARCH__
#define SPARSEPRUNE_UNROLL _Pragma("unroll")
#define SPARSEPRUNE_ROLLED _Pragma("unroll 1")
#else
#define SPARSEPRUNE_UNROLL
#define SPARSEPRUNE_ROLLED
#endif

namespace sparseprune::cuda {

template <class To, class From>
SPARSEPRUNE_HD To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// 16-bit storage; arithmetic is float32. The layouts are those of __half and __nv_bfloat16.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

SPARSEPRUNE_HD float to_float(float x) { return x; }
SPARSEPRUNE_HD float to_float(BFloat x) { return bits_as<float>(uint32_t{x.bits} << 16); }
SPARSEPRUNE_HD float to_float(Half x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#else
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 1023u;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) return bits_as<float>(sign) + (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
    return bits_as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

// Round to nearest even; NaN stays NaN.
template <class T>
SPARSEPRUNE_HD T from_float(float x);
template <>
SPARSEPRUNE_HD float from_float<float>(float x) { return x; }
template <>
SPARSEPRUNE_HD BFloat from_float<BFloat>(float x) {
    const uint32_t b = bits_as<uint32_t>(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(b >> 16 | 64)};
    return {static_cast<uint16_t>((b + 0x7fffu + (b >> 16 & 1)) >> 16)};
}
template <>
SPARSEPRUNE_HD Half from_float<Half>(float x) {
#ifdef __CUDA_ARCH__
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const uint32_t b = bits_as<uint32_t>(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {  // below the normal range: the FPU rounds to a multiple of 2^-24
        const float shifted = bits_as<float>(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u))};
    }
    return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13)};
#endif
}

// The nearest value of 10 mantissa bits, ties away from zero (cvt.rna.tf32.f32), as a float32.
SPARSEPRUNE_HD uint32_t to_tf32(uint32_t x) {
#if defined(__CUDA_ARCH__)
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(bits_as<float>(x)));
    return y;
#else
    if ((x & 0x7f800000u) == 0x7f800000u) return x;
    return (x + 0x1000u) & 0xffffe000u;
#endif
}

// Four words that are read or written at once.
struct alignas(16) Words4 {
    uint32_t w[4];
};
struct alignas(8) Words2 {
    uint32_t w[2];
};

SPARSEPRUNE_HD int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace sparseprune::cuda
