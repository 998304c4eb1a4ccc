// Sixteen floats in four 128-bit registers. Included only by kernels_neon.cpp, inside its unnamed namespace.
#pragma once

struct V {
    float32x4_t a, b, c, d;
};
using Shift = uint8x16x4_t;  // byte numbers of a shift over two vectors

// Of 32 registers at most 24 hold sums.
constexpr const char* kName = "neon";
constexpr int kDenseRows = 4, kMaxSingle = 6, kMaxShift = 4, kMaxPart = 0, kMaxMasked = 1, kMaxDense = 1;
constexpr int kGemmRows = 4, kGemmVectors = 1;  // of a tile of the small dense product

// f of each quarter of x; of x and y; of x, y and z
#define SPARSEPRUNE_X(f) return {f(x.a), f(x.b), f(x.c), f(x.d)}
#define SPARSEPRUNE_XY(f) return {f(x.a, y.a), f(x.b, y.b), f(x.c, y.c), f(x.d, y.d)}
#define SPARSEPRUNE_XYZ(f) return {f(x.a, y.a, z.a), f(x.b, y.b, z.b), f(x.c, y.c, z.c), f(x.d, y.d, z.d)}

inline V set1(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {v, v, v, v};
}
inline V zero() { return set1(0.0f); }
// Not vld1q and vst1q, which GCC 12 does not look into.
inline float32x4_t load4(const float* p) {
    float32x4_t v;
    __builtin_memcpy(&v, p, 16);
    return v;
}
inline void store4(float* p, float32x4_t v) { __builtin_memcpy(p, &v, 16); }
inline V loadu(const float* p) { return {load4(p), load4(p + 4), load4(p + 8), load4(p + 12)}; }
inline void storeu(float* p, V v) {
    store4(p, v.a);
    store4(p + 4, v.b);
    store4(p + 8, v.c);
    store4(p + 12, v.d);
}
inline V add(V x, V y) { SPARSEPRUNE_XY(vaddq_f32); }
inline float32x4_t fma4(float32x4_t x, float32x4_t y, float32x4_t z) { return vfmaq_f32(z, x, y); }
inline V fma(V x, V y, V z) { SPARSEPRUNE_XYZ(fma4); }
// Not vmaxq: x where x is NaN or the two are equal, also where the limit is NaN.
inline float32x4_t at_least4(float32x4_t limit, float32x4_t x) { return vbslq_f32(vcgtq_f32(limit, x), limit, x); }
inline float32x4_t at_most4(float32x4_t limit, float32x4_t x) { return vbslq_f32(vcltq_f32(limit, x), limit, x); }
inline V max_nan(V x, V y) { SPARSEPRUNE_XY(at_least4); }
inline V min_nan(V x, V y) { SPARSEPRUNE_XY(at_most4); }
inline V max_either(V x, V y) { SPARSEPRUNE_XY(vmaxq_f32); }  // NaN where either is

inline float32x4_t keep4(float32x4_t v, uint32x4_t mask, uint32x4_t bits) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vtstq_u32(mask, bits)));
}
inline V keep_lanes(V v, uint16_t mask) {
    if (mask == 0xFFFF) return v;
    const uint32x4_t all = vdupq_n_u32(mask), bits = {1, 2, 4, 8};
    return {keep4(v.a, all, bits), keep4(v.b, all, vshlq_n_u32(bits, 4)), keep4(v.c, all, vshlq_n_u32(bits, 8)),
            keep4(v.d, all, vshlq_n_u32(bits, 12))};
}
inline V keep_positive(V v, uint16_t mask) { return keep_lanes(max_nan(zero(), v), mask); }  // relu; NaN stays
// There are no masked loads and stores: one lane at a time where a quarter is not whole, so that nothing else is touched.
// Out of line, for they are long; vectors travel in registers.
#define SPARSEPRUNE_CALLED __attribute__((noinline))
inline float32x4_t load4_or(float32x4_t v, const float* p, unsigned bits) {
    if (bits == 15) return load4(p);
    if (bits & 1) v = vld1q_lane_f32(p, v, 0);
    if (bits & 2) v = vld1q_lane_f32(p + 1, v, 1);
    if (bits & 4) v = vld1q_lane_f32(p + 2, v, 2);
    if (bits & 8) v = vld1q_lane_f32(p + 3, v, 3);
    return v;
}
inline void store4_lanes(float* p, float32x4_t v, unsigned bits) {
    if (bits == 15) return store4(p, v);
    if (bits & 1) vst1q_lane_f32(p, v, 0);
    if (bits & 2) vst1q_lane_f32(p + 1, v, 1);
    if (bits & 4) vst1q_lane_f32(p + 2, v, 2);
    if (bits & 8) vst1q_lane_f32(p + 3, v, 3);
}
SPARSEPRUNE_CALLED V load_some(V other, const float* p, unsigned mask) {
    return {load4_or(other.a, p, mask & 15), load4_or(other.b, p + 4, mask >> 4 & 15), load4_or(other.c, p + 8, mask >> 8 & 15),
            load4_or(other.d, p + 12, mask >> 12)};
}
SPARSEPRUNE_CALLED void store_some(float* p, V v, unsigned mask) {
    store4_lanes(p, v.a, mask & 15);
    store4_lanes(p + 4, v.b, mask >> 4 & 15);
    store4_lanes(p + 8, v.c, mask >> 8 & 15);
    store4_lanes(p + 12, v.d, mask >> 12);
}
#undef SPARSEPRUNE_CALLED
inline V load_lanes_or(V other, const float* p, uint16_t mask) { return mask == 0xFFFF ? loadu(p) : load_some(other, p, mask); }
inline V load_lanes(const float* p, uint16_t mask) { return load_lanes_or(zero(), p, mask); }
inline void store_lanes(float* p, V v, uint16_t mask) {
    if (mask == 0xFFFF) storeu(p, v);
    else store_some(p, v, mask);
}
inline float32x4_t gather4(const float* base, const int32_t* index) {
    float32x4_t v = vdupq_n_f32(0.0f);
    if (index[0] >= 0) v = vld1q_lane_f32(base + index[0], v, 0);
    if (index[1] >= 0) v = vld1q_lane_f32(base + index[1], v, 1);
    if (index[2] >= 0) v = vld1q_lane_f32(base + index[2], v, 2);
    if (index[3] >= 0) v = vld1q_lane_f32(base + index[3], v, 3);
    return v;
}
inline V gather(const float* base, const int32_t* index) {  // 0 where the index is negative
    return {gather4(base, index), gather4(base, index + 4), gather4(base, index + 8), gather4(base, index + 12)};
}
inline float32x4_t gather4(const float* base, const uint16_t* index) {
    float32x4_t v = vld1q_dup_f32(base + index[0]);
    v = vld1q_lane_f32(base + index[1], v, 1);
    v = vld1q_lane_f32(base + index[2], v, 2);
    return vld1q_lane_f32(base + index[3], v, 3);
}
inline V gather(const float* base, const uint16_t* index) {
    return {gather4(base, index), gather4(base, index + 4), gather4(base, index + 8), gather4(base, index + 12)};
}

// A table of four registers is a whole vector. Bytes are numbered modulo 128: from 64 on they are the neighbour's, on either side.
inline Shift make_shift(int dx) {
    const uint8x16_t byte = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const uint8x16_t first = vaddq_u8(byte, vdupq_n_u8(static_cast<uint8_t>(4 * dx))), all = vdupq_n_u8(127);
    return {{vandq_u8(first, all), vandq_u8(vaddq_u8(first, vdupq_n_u8(16)), all), vandq_u8(vaddq_u8(first, vdupq_n_u8(32)), all),
             vandq_u8(vaddq_u8(first, vdupq_n_u8(48)), all)}};
}
inline uint8x16x4_t bytes_of(V v) {
    return {{vreinterpretq_u8_f32(v.a), vreinterpretq_u8_f32(v.b), vreinterpretq_u8_f32(v.c), vreinterpretq_u8_f32(v.d)}};
}
inline float32x4_t take4(const uint8x16x4_t& v, const int32_t* lane) {
    uint32x4_t i;
    __builtin_memcpy(&i, lane, 16);
    i = vaddq_u32(vmulq_n_u32(i, 0x04040404u), vdupq_n_u32(0x03020100u));  // lanes to bytes
    return vreinterpretq_f32_u8(vqtbl4q_u8(v, vreinterpretq_u8_u32(i)));
}
// v[lane[i]] in the lanes of keep, else 0
inline V take_lanes(V v, const int32_t* lane, uint16_t keep) {
    const uint8x16x4_t all = bytes_of(v);
    return keep_lanes({take4(all, lane), take4(all, lane + 4), take4(all, lane + 8), take4(all, lane + 12)}, keep);
}
inline float32x4_t look_up(const uint8x16x4_t& v, const uint8x16x4_t& neighbour, uint8x16_t at) {
    return vreinterpretq_f32_u8(vqtbx4q_u8(vqtbl4q_u8(v, at), neighbour, veorq_u8(at, vdupq_n_u8(64))));
}
// lane i is v[i + dx], or the neighbour's lane where that is outside v
inline V shift_lanes(V v, V neighbour, const Shift& s, int) {
    const uint8x16x4_t own = bytes_of(v), next = bytes_of(neighbour);
    return {look_up(own, next, s.val[0]), look_up(own, next, s.val[1]), look_up(own, next, s.val[2]), look_up(own, next, s.val[3])};
}
inline V even_lanes(V x, V y) { return {vuzp1q_f32(x.a, x.b), vuzp1q_f32(x.c, x.d), vuzp1q_f32(y.a, y.b), vuzp1q_f32(y.c, y.d)}; }
inline V odd_lanes(V x, V y) { return {vuzp2q_f32(x.a, x.b), vuzp2q_f32(x.c, x.d), vuzp2q_f32(y.a, y.b), vuzp2q_f32(y.c, y.d)}; }
inline float sum_lanes(V v) {
    const float32x4_t q = vaddq_f32(vaddq_f32(v.a, v.c), vaddq_f32(v.b, v.d));
    return vaddv_f32(vadd_f32(vget_low_f32(q), vget_high_f32(q)));
}

// For activations, norms and small products.
inline V sub(V x, V y) { SPARSEPRUNE_XY(vsubq_f32); }
inline V mul(V x, V y) { SPARSEPRUNE_XY(vmulq_f32); }
inline V div(V x, V y) { SPARSEPRUNE_XY(vdivq_f32); }
inline V root(V x) { SPARSEPRUNE_X(vsqrtq_f32); }
inline V absolute(V x) { SPARSEPRUNE_X(vabsq_f32); }
inline float32x4_t flip4(float32x4_t x, float32x4_t s) {
    const uint32x4_t sign = vandq_u32(vreinterpretq_u32_f32(s), vdupq_n_u32(0x80000000u));
    return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), sign));
}
inline V flip(V x, V y) { SPARSEPRUNE_XY(flip4); }  // x, its sign changed where y is negative
inline V select_lt(V x, V y, V yes, V no) {
    return {vbslq_f32(vcltq_f32(x.a, y.a), yes.a, no.a), vbslq_f32(vcltq_f32(x.b, y.b), yes.b, no.b),
            vbslq_f32(vcltq_f32(x.c, y.c), yes.c, no.c), vbslq_f32(vcltq_f32(x.d, y.d), yes.d, no.d)};
}
inline V round_even(V x) { SPARSEPRUNE_X(vrndnq_f32); }
inline float32x4_t power4(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
inline float32x4_t scale4(float32x4_t x, float32x4_t n) {  // in two steps: 2^n itself may not be a normal number
    const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(x, power4(half)), power4(vsubq_s32(whole, half)));
}
inline V scale2(V x, V y) { SPARSEPRUNE_XY(scale4); }  // x * 2^y, y whole in [-150, 128]
inline float32x4_t exponent4(float32x4_t x) {
    return vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_f32(x), 23)), vdupq_n_s32(127)));
}
inline float32x4_t mantissa4(float32x4_t x) {
    return vreinterpretq_f32_u32(vorrq_u32(vandq_u32(vreinterpretq_u32_f32(x), vdupq_n_u32(0x7FFFFF)), vdupq_n_u32(0x3F800000)));
}
// of a positive normal number: mantissa in [1, 2) and exponent
inline V exponent(V x) { SPARSEPRUNE_X(exponent4); }
inline V mantissa(V x) { SPARSEPRUNE_X(mantissa4); }
inline float max_lanes(V v) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.a, v.b), vmaxq_f32(v.c, v.d))); }  // NaN where any is
#undef SPARSEPRUNE_X
#undef SPARSEPRUNE_XY
#undef SPARSEPRUNE_XYZ

struct D {  // sixteen doubles
    float64x2_t q[8];
};
#define SPARSEPRUNE_PAIRS(expr)                      \
    D out;                                           \
    for (int i = 0; i < 8; ++i) out.q[i] = (expr);   \
    return out
inline D dset1(double x) { SPARSEPRUNE_PAIRS(vdupq_n_f64(x)); }
inline D dload(const double* p) { SPARSEPRUNE_PAIRS(vld1q_f64(p + 2 * i)); }
inline void dstore(double* p, D v) {
    for (int i = 0; i < 8; ++i) vst1q_f64(p + 2 * i, v.q[i]);
}
inline D widen(V v) {
    return {{vcvt_f64_f32(vget_low_f32(v.a)), vcvt_high_f64_f32(v.a), vcvt_f64_f32(vget_low_f32(v.b)), vcvt_high_f64_f32(v.b),
             vcvt_f64_f32(vget_low_f32(v.c)), vcvt_high_f64_f32(v.c), vcvt_f64_f32(vget_low_f32(v.d)), vcvt_high_f64_f32(v.d)}};
}
inline D dadd(D x, D y) { SPARSEPRUNE_PAIRS(vaddq_f64(x.q[i], y.q[i])); }
inline D dsub(D x, D y) { SPARSEPRUNE_PAIRS(vsubq_f64(x.q[i], y.q[i])); }
inline D dfma(D x, D y, D z) { SPARSEPRUNE_PAIRS(vfmaq_f64(z.q[i], x.q[i], y.q[i])); }
#undef SPARSEPRUNE_PAIRS
inline double dsum(D v) {
    const float64x2_t low = vaddq_f64(vaddq_f64(v.q[0], v.q[4]), vaddq_f64(v.q[2], v.q[6]));
    const float64x2_t high = vaddq_f64(vaddq_f64(v.q[1], v.q[5]), vaddq_f64(v.q[3], v.q[7]));
    return vaddvq_f64(vaddq_f64(low, high));
}
