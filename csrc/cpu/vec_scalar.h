// Sixteen floats in plain C++, for any processor. Included only by kernels_scalar.cpp, inside its unnamed namespace.
#pragma once

struct V {
    float f[16];
};
using Shift = int;

constexpr const char* kName = "scalar";
constexpr int kDenseRows = 4, kMaxSingle = 4, kMaxShift = 4, kMaxMasked = 2, kMaxDense = 1;

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
inline V load_lanes(const float* p, uint16_t mask) { SPARSEPRUNE_LANES((mask >> i) & 1 ? p[i] : 0.0f); }
inline V gather(const float* base, const int32_t* index) { SPARSEPRUNE_LANES(index[i] < 0 ? 0.0f : base[index[i]]); }
inline Shift make_shift(int dx) { return dx; }
inline V shift_lanes(const V& v, const V& n, Shift, int dx) {
    SPARSEPRUNE_LANES(i + dx < 0 ? n.f[i + dx + 16] : i + dx > 15 ? n.f[i + dx - 16] : v.f[i + dx]);
}
inline V even_lanes(const V& a, const V& b) { SPARSEPRUNE_LANES(i < 8 ? a.f[2 * i] : b.f[2 * i - 16]); }
inline float sum_lanes(const V& v) {
    float s[8];
    for (int i = 0; i < 8; ++i) s[i] = v.f[i] + v.f[i + 8];
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}
#undef SPARSEPRUNE_LANES
