// Sixteen floats in plain C++, for any processor. Included only by kernels_scalar.cpp, inside its unnamed namespace.
#pragma once

struct V {
    float f[16];
};
using Shift = int;

constexpr const char* kName = "scalar";
constexpr int kDenseRows = 4, kMaxSingle = 4, kMaxShift = 4, kMaxPart = 2, kMaxMasked = 2, kMaxDense = 1;
constexpr int kGemmRows = 1, kGemmVectors = 4;  // of a tile of the small dense product: sums that stay in memory

#define SPARSEPRUNE_LANES(expr)             \
    V out;                                  \
    for (int i = 0; i < 16; ++i) out.f[i] = (expr); \
    return out

inline V zero() { SPARSEPRUNE_LANES(0.0f); }
inline V set1(float x) { SPARSEPRUNE_LANES(x); }
inline V loadu(const float* p) { SPARSEPRUNE_LANES(p[i]); }
inline void storeu(float* p, const V& v) {
    for (int i = 0; i < 16; ++i) p[i] = v.f[i];
}
inline V add(const V& a, const V& b) { SPARSEPRUNE_LANES(a.f[i] + b.f[i]); }
inline V fma(const V& a, const V& b, const V& c) { SPARSEPRUNE_LANES(a.f[i] * b.f[i] + c.f[i]); }
inline V max_nan(const V& limit, const V& x) { SPARSEPRUNE_LANES(x.f[i] < limit.f[i] ? limit.f[i] : x.f[i]); }  // keeps NaN
inline V min_nan(const V& limit, const V& x) { SPARSEPRUNE_LANES(limit.f[i] < x.f[i] ? limit.f[i] : x.f[i]); }
inline V max_either(const V& a, const V& b) { SPARSEPRUNE_LANES(a.f[i] > b.f[i] || a.f[i] != a.f[i] ? a.f[i] : b.f[i]); }
inline V keep_lanes(const V& v, uint16_t mask) { SPARSEPRUNE_LANES((mask >> i) & 1 ? v.f[i] : 0.0f); }
inline V keep_positive(V v, uint16_t mask) { return keep_lanes(max_nan(zero(), v), mask); }  // relu; NaN stays
inline V load_lanes(const float* p, uint16_t mask) { SPARSEPRUNE_LANES((mask >> i) & 1 ? p[i] : 0.0f); }
inline V gather(const float* base, const int32_t* index) { SPARSEPRUNE_LANES(index[i] < 0 ? 0.0f : base[index[i]]); }
inline V gather(const float* base, const uint16_t* index) { SPARSEPRUNE_LANES(base[index[i]]); }
// v[lane[i]] in the lanes of keep, else 0
inline V take_lanes(const V& v, const int32_t* lane, uint16_t keep) { SPARSEPRUNE_LANES((keep >> i) & 1 ? v.f[lane[i]] : 0.0f); }
inline Shift make_shift(int dx) { return dx; }
inline V shift_lanes(const V& v, const V& n, Shift, int dx) {
    SPARSEPRUNE_LANES(i + dx < 0 ? n.f[i + dx + 16] : i + dx > 15 ? n.f[i + dx - 16] : v.f[i + dx]);
}
inline V even_lanes(const V& a, const V& b) { SPARSEPRUNE_LANES(i < 8 ? a.f[2 * i] : b.f[2 * i - 16]); }
inline V odd_lanes(const V& a, const V& b) { SPARSEPRUNE_LANES(i < 8 ? a.f[2 * i + 1] : b.f[2 * i - 15]); }
inline float sum_lanes(const V& v) {
    float s[8];
    for (int i = 0; i < 8; ++i) s[i] = v.f[i] + v.f[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// For activations, norms and small products.
inline uint32_t bits_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits;
}
inline float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
inline V sub(const V& a, const V& b) { SPARSEPRUNE_LANES(a.f[i] - b.f[i]); }
inline V mul(const V& a, const V& b) { SPARSEPRUNE_LANES(a.f[i] * b.f[i]); }
inline V div(const V& a, const V& b) { SPARSEPRUNE_LANES(a.f[i] / b.f[i]); }
inline V root(const V& a) { SPARSEPRUNE_LANES(__builtin_sqrtf(a.f[i])); }  // an instruction, by -fno-math-errno
inline V absolute(const V& a) { SPARSEPRUNE_LANES(__builtin_fabsf(a.f[i])); }
inline V flip(const V& a, const V& sign) {  // a, its sign changed where sign is negative
    SPARSEPRUNE_LANES(from_bits(bits_of(a.f[i]) ^ (bits_of(sign.f[i]) & 0x80000000u)));
}
inline V select_lt(const V& a, const V& b, const V& yes, const V& no) { SPARSEPRUNE_LANES(a.f[i] < b.f[i] ? yes.f[i] : no.f[i]); }
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits for a fraction
inline V round_even(const V& a) { SPARSEPRUNE_LANES((a.f[i] + kRounder) - kRounder); }  // |a| < 2^22
inline float power2(int32_t n) { return from_bits(static_cast<uint32_t>(n + 127) << 23); }
inline float scale_one(float a, float n) {  // in two steps: 2^n itself may not be a normal number
    const int32_t whole = static_cast<int32_t>(bits_of(n + kRounder) - bits_of(kRounder));
    return a * power2(whole >> 1) * power2(whole - (whole >> 1));
}
inline V scale2(const V& a, const V& n) { SPARSEPRUNE_LANES(scale_one(a.f[i], n.f[i])); }  // a * 2^n, n whole in [-150, 128]
// of a positive normal number: mantissa in [1, 2) and exponent
inline V exponent(const V& a) { SPARSEPRUNE_LANES(static_cast<float>(static_cast<int32_t>(bits_of(a.f[i]) >> 23) - 127)); }
inline V mantissa(const V& a) { SPARSEPRUNE_LANES(from_bits((bits_of(a.f[i]) & 0x7FFFFFu) | 0x3F800000u)); }
inline V load_lanes_or(const V& other, const float* p, uint16_t mask) { SPARSEPRUNE_LANES((mask >> i) & 1 ? p[i] : other.f[i]); }
inline float max_lanes(const V& v) {  // NaN where any is
    float most = v.f[0];
    for (int i = 1; i < 16; ++i) most = v.f[i] > most || v.f[i] != v.f[i] ? v.f[i] : most;
    return most;
}
inline void store_lanes(float* p, const V& v, uint16_t mask) {
    for (int i = 0; i < 16; ++i)
        if ((mask >> i) & 1) p[i] = v.f[i];
}
#undef SPARSEPRUNE_LANES

struct D {  // sixteen doubles
    double f[16];
};
#define SPARSEPRUNE_DOUBLES(expr)                   \
    D out;                                          \
    for (int i = 0; i < 16; ++i) out.f[i] = (expr); \
    return out
inline D dset1(double x) { SPARSEPRUNE_DOUBLES(x); }
inline D dload(const double* p) { SPARSEPRUNE_DOUBLES(p[i]); }
inline void dstore(double* p, const D& v) {
    for (int i = 0; i < 16; ++i) p[i] = v.f[i];
}
inline D widen(const V& v) { SPARSEPRUNE_DOUBLES(static_cast<double>(v.f[i])); }
inline D dadd(const D& x, const D& y) { SPARSEPRUNE_DOUBLES(x.f[i] + y.f[i]); }
inline D dsub(const D& x, const D& y) { SPARSEPRUNE_DOUBLES(x.f[i] - y.f[i]); }
inline D dfma(const D& x, const D& y, const D& z) { SPARSEPRUNE_DOUBLES(x.f[i] * y.f[i] + z.f[i]); }
#undef SPARSEPRUNE_DOUBLES
inline double dsum(const D& v) {
    double s[4];
    for (int i = 0; i < 4; ++i) s[i] = (v.f[i] + v.f[i + 8]) + (v.f[i + 4] + v.f[i + 12]);
    return (s[0] + s[2]) + (s[1] + s[3]);
}
