// Sixteen floats in two 256-bit registers. Included only by kernels_avx2.cpp, inside its unnamed namespace.
#pragma once

struct V {
    __m256 a, b;
};
struct Shift {  // over registers: lane numbers of a rotation, and which lanes come from the register after
    __m256i lane;
    __m256 next;
};

constexpr const char* kName = "avx2";
constexpr int kDenseRows = 6, kMaxSingle = 7, kMaxShift = 4, kMaxPart = 0, kMaxMasked = 2, kMaxDense = 1;
constexpr int kGemmRows = 6, kGemmVectors = 1;  // of a tile of the small dense product

inline V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V loadu(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void storeu(float* p, V v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V max_nan(V limit, V x) { return {_mm256_max_ps(limit.a, x.a), _mm256_max_ps(limit.b, x.b)}; }  // x where x is NaN
inline V min_nan(V limit, V x) { return {_mm256_min_ps(limit.a, x.a), _mm256_min_ps(limit.b, x.b)}; }
inline __m256 max8(__m256 a, __m256 b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
inline V max_either(V x, V y) { return {max8(x.a, y.a), max8(x.b, y.b)}; }  // NaN where either is
inline __m256 lane_mask(unsigned bits) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), bit), bit));
}
inline V keep_lanes(V v, uint16_t mask) {
    if (mask == 0xFFFF) return v;
    return {_mm256_and_ps(v.a, lane_mask(mask & 255u)), _mm256_and_ps(v.b, lane_mask(mask >> 8))};
}
inline V keep_positive(V v, uint16_t mask) { return keep_lanes(max_nan(zero(), v), mask); }  // relu; NaN stays
inline V load_lanes(const float* p, uint16_t mask) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(lane_mask(mask & 255u))),
            _mm256_maskload_ps(p + 8, _mm256_castps_si256(lane_mask(mask >> 8)))};
}
inline __m256 gather8(const float* base, const int32_t* index) {
    __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    __m256 inside = _mm256_castsi256_ps(_mm256_cmpgt_epi32(i, _mm256_set1_epi32(-1)));
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), base, i, inside, 4);
}
inline V gather(const float* base, const int32_t* index) { return {gather8(base, index), gather8(base, index + 8)}; }
inline __m256 gather8(const float* base, const uint16_t* index) {
    return _mm256_i32gather_ps(base, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index))), 4);
}
inline V gather(const float* base, const uint16_t* index) { return {gather8(base, index), gather8(base, index + 8)}; }
inline __m256 take8(V v, const int32_t* lane, unsigned keep) {
    const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lane));
    const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));  // the sign is set for lanes 8 to 15
    const __m256 x = _mm256_blendv_ps(_mm256_permutevar8x32_ps(v.a, i), _mm256_permutevar8x32_ps(v.b, i), high);
    return _mm256_and_ps(x, lane_mask(keep));
}
// v[lane[i]] in the lanes of keep, else 0
inline V take_lanes(V v, const int32_t* lane, uint16_t keep) { return {take8(v, lane, keep & 255u), take8(v, lane + 8, keep >> 8)}; }
inline Shift make_shift(int dx) {
    const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(dx & 7));
    return {lane, _mm256_castsi256_ps(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(7)))};  // of a lane number three bits count
}
// three registers in a row: the lanes of the first two, moved by the shift
inline V shift8(__m256 x, __m256 y, __m256 z, const Shift& s) {
    const __m256 middle = _mm256_permutevar8x32_ps(y, s.lane);
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(x, s.lane), middle, s.next),
            _mm256_blendv_ps(middle, _mm256_permutevar8x32_ps(z, s.lane), s.next)};
}
inline V shift_lanes(V v, V neighbour, const Shift& s, int dx) {
    if (dx >= 8) return shift8(v.b, neighbour.a, neighbour.b, s);
    if (dx >= 0) return shift8(v.a, v.b, neighbour.a, s);
    return dx >= -8 ? shift8(neighbour.b, v.a, v.b, s) : shift8(neighbour.a, neighbour.b, v.a, s);
}
inline V even_lanes(V x, V y) {
    auto even = [](__m256 p, __m256 q) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(p, q, 0x88)), 0xD8));
    };
    return {even(x.a, x.b), even(y.a, y.b)};
}
inline V odd_lanes(V x, V y) {
    auto odd = [](__m256 p, __m256 q) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(p, q, 0xDD)), 0xD8));
    };
    return {odd(x.a, x.b), odd(y.a, y.b)};
}
inline float sum_lanes(V v) {
    __m256 h = _mm256_add_ps(v.a, v.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

// For activations, norms and small products.
inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V root(V x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
inline V absolute(V x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline V flip(V x, V s) {  // x, its sign changed where s is negative
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(x.a, _mm256_and_ps(s.a, sign)), _mm256_xor_ps(x.b, _mm256_and_ps(s.b, sign))};
}
inline V select_lt(V x, V y, V yes, V no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
inline V round_even(V x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 scale8(__m256 x, __m256 n) {  // in two steps: 2^n itself may not be a normal number
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
    const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
}
inline V scale2(V x, V n) { return {scale8(x.a, n.a), scale8(x.b, n.b)}; }  // x * 2^n, n whole in [-150, 128]
inline __m256 exponent8(__m256 x) {
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(127)));
}
inline __m256 mantissa8(__m256 x) {
    return _mm256_or_ps(_mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFF))), _mm256_set1_ps(1.0f));
}
// of a positive normal number: mantissa in [1, 2) and exponent
inline V exponent(V x) { return {exponent8(x.a), exponent8(x.b)}; }
inline V mantissa(V x) { return {mantissa8(x.a), mantissa8(x.b)}; }
inline V load_lanes_or(V other, const float* p, uint16_t mask) {
    const V v = load_lanes(p, mask);
    return {_mm256_blendv_ps(other.a, v.a, lane_mask(mask & 255u)), _mm256_blendv_ps(other.b, v.b, lane_mask(mask >> 8))};
}
inline __m128 max4(__m128 a, __m128 b) { return _mm_blendv_ps(_mm_max_ps(a, b), a, _mm_cmpunord_ps(a, a)); }
inline float max_lanes(V v) {  // NaN where any is
    const __m256 half = max8(v.a, v.b);
    __m128 q = max4(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = max4(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(max4(q, _mm_shuffle_ps(q, q, 1)));
}
inline void store_lanes(float* p, V v, uint16_t mask) {
    _mm256_maskstore_ps(p, _mm256_castps_si256(lane_mask(mask & 255u)), v.a);
    _mm256_maskstore_ps(p + 8, _mm256_castps_si256(lane_mask(mask >> 8)), v.b);
}

struct D {  // sixteen doubles
    __m256d q[4];
};
#define SPARSEPRUNE_QUARTERS(expr)                   \
    D out;                                           \
    for (int i = 0; i < 4; ++i) out.q[i] = (expr);   \
    return out
inline D dset1(double x) { SPARSEPRUNE_QUARTERS(_mm256_set1_pd(x)); }
inline D dload(const double* p) { SPARSEPRUNE_QUARTERS(_mm256_loadu_pd(p + 4 * i)); }
inline void dstore(double* p, D v) {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, v.q[i]);
}
inline D widen(V v) {
    return {{_mm256_cvtps_pd(_mm256_castps256_ps128(v.a)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.a, 1)),
             _mm256_cvtps_pd(_mm256_castps256_ps128(v.b)), _mm256_cvtps_pd(_mm256_extractf128_ps(v.b, 1))}};
}
inline D dadd(D x, D y) { SPARSEPRUNE_QUARTERS(_mm256_add_pd(x.q[i], y.q[i])); }
inline D dsub(D x, D y) { SPARSEPRUNE_QUARTERS(_mm256_sub_pd(x.q[i], y.q[i])); }
inline D dfma(D x, D y, D z) { SPARSEPRUNE_QUARTERS(_mm256_fmadd_pd(x.q[i], y.q[i], z.q[i])); }
#undef SPARSEPRUNE_QUARTERS
inline double dsum(D v) {
    const __m256d h = _mm256_add_pd(_mm256_add_pd(v.q[0], v.q[1]), _mm256_add_pd(v.q[2], v.q[3]));
    const __m128d p = _mm_add_pd(_mm256_castpd256_pd128(h), _mm256_extractf128_pd(h, 1));
    return _mm_cvtsd_f64(_mm_add_sd(p, _mm_unpackhi_pd(p, p)));
}
