// Sixteen floats in one 512-bit register. Included only by kernels_avx512.cpp, inside its unnamed namespace.
#pragma once

using V = __m512;
using Shift = __m512i;  // lane numbers of a shift over two registers

constexpr const char* kName = "avx512";
constexpr int kDenseRows = 8, kMaxSingle = 14, kMaxShift = 14, kMaxPart = 8, kMaxMasked = 5, kMaxDense = 3;
constexpr int kGemmRows = 6, kGemmVectors = 4;  // of a tile of the small dense product

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float x) { return _mm512_set1_ps(x); }
inline V loadu(const float* p) { return _mm512_loadu_ps(p); }
inline void storeu(float* p, V v) { _mm512_storeu_ps(p, v); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V max_nan(V limit, V x) { return _mm512_max_ps(limit, x); }  // x where x is NaN
inline V min_nan(V limit, V x) { return _mm512_min_ps(limit, x); }
inline V max_either(V a, V b) {  // NaN where either is
    return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
inline V keep_lanes(V v, uint16_t mask) { return _mm512_maskz_mov_ps(mask, v); }
inline V keep_positive(V v, uint16_t mask) { return _mm512_maskz_max_ps(mask, zero(), v); }  // relu; NaN stays
inline V load_lanes(const float* p, uint16_t mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline V gather(const float* base, const int32_t* index) {  // 0 where the index is negative
    __m512i i = _mm512_loadu_si512(index);
    __mmask16 inside = _mm512_cmpge_epi32_mask(i, _mm512_setzero_si512());
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, i, base, 4);
}
inline V gather(const float* base, const uint16_t* index) {
    return _mm512_i32gather_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index))), base, 4);
}
// v[lane[i]] in the lanes of keep, else 0
inline V take_lanes(V v, const int32_t* lane, uint16_t keep) { return _mm512_maskz_permutexvar_ps(keep, _mm512_loadu_si512(lane), v); }
inline Shift make_shift(int dx) {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_and_si512(_mm512_add_epi32(lane, _mm512_set1_epi32(dx)), _mm512_set1_epi32(31));
}
// lane i is v[i + dx], or the neighbour's lane where that is outside v
inline V shift_lanes(V v, V neighbour, Shift s, int) { return _mm512_permutex2var_ps(v, s, neighbour); }
inline V even_lanes(V a, V b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), b);
}
inline V odd_lanes(V a, V b) {
    return _mm512_permutex2var_ps(a, _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31), b);
}
inline float sum_lanes(V v) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}

// For activations, norms and small products.
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
inline V root(V a) { return _mm512_sqrt_ps(a); }
inline V absolute(V a) { return _mm512_abs_ps(a); }
inline V flip(V a, V sign) {  // a, its sign changed where sign is negative
    return _mm512_xor_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
inline V select_lt(V a, V b, V yes, V no) { return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes); }
inline V round_even(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V scale2(V a, V n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n whole in [-150, 128]
// of a positive normal number: mantissa in [1, 2) and exponent
inline V exponent(V a) { return _mm512_getexp_ps(a); }
inline V mantissa(V a) { return _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero); }
inline V load_lanes_or(V other, const float* p, uint16_t mask) { return _mm512_mask_loadu_ps(other, mask, p); }
inline __m128 max4(__m128 a, __m128 b) { return _mm_blendv_ps(_mm_max_ps(a, b), a, _mm_cmpunord_ps(a, a)); }
inline float max_lanes(V v) {  // NaN where any is
    const V half = max_either(v, _mm512_shuffle_f32x4(v, v, 0x4E));
    __m128 q = max4(_mm512_castps512_ps128(half), _mm512_extractf32x4_ps(half, 1));
    q = max4(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(max4(q, _mm_shuffle_ps(q, q, 1)));
}
inline void store_lanes(float* p, V v, uint16_t mask) { _mm512_mask_storeu_ps(p, mask, v); }

struct D {  // sixteen doubles
    __m512d a, b;
};
inline D dset1(double x) { return {_mm512_set1_pd(x), _mm512_set1_pd(x)}; }
inline D dload(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline void dstore(double* p, D v) {
    _mm512_storeu_pd(p, v.a);
    _mm512_storeu_pd(p + 8, v.b);
}
inline D widen(V v) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))}; }
inline D dadd(D x, D y) { return {_mm512_add_pd(x.a, y.a), _mm512_add_pd(x.b, y.b)}; }
inline D dsub(D x, D y) { return {_mm512_sub_pd(x.a, y.a), _mm512_sub_pd(x.b, y.b)}; }
inline D dfma(D x, D y, D z) { return {_mm512_fmadd_pd(x.a, y.a, z.a), _mm512_fmadd_pd(x.b, y.b, z.b)}; }
inline double dsum(D v) {
    const __m512d h = _mm512_add_pd(v.a, v.b);
    const __m256d q = _mm256_add_pd(_mm512_castpd512_pd256(h), _mm512_extractf64x4_pd(h, 1));
    const __m128d p = _mm_add_pd(_mm256_castpd256_pd128(q), _mm256_extractf128_pd(q, 1));
    return _mm_cvtsd_f64(_mm_add_sd(p, _mm_unpackhi_pd(p, p)));
}
