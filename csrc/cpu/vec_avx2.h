// Sixteen floats in two 256-bit registers. Included only by kernels_avx2.cpp, inside its unnamed namespace.
#pragma once

struct V {
    __m256 a, b;
};
using Shift = int;

constexpr const char* kName = "avx2";
constexpr int kDenseRows = 6, kMaxSingle = 7, kMaxShift = 4, kMaxMasked = 2, kMaxDense = 1;

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
inline Shift make_shift(int dx) { return dx; }
inline V shift_lanes(V v, V neighbour, Shift, int dx) {
    alignas(32) float row[48];
    storeu(row + 16, v);
    storeu(dx < 0 ? row : row + 32, neighbour);
    return loadu(row + 16 + dx);
}
inline V even_lanes(V x, V y) {
    auto even = [](__m256 p, __m256 q) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_shuffle_ps(p, q, 0x88)), 0xD8));
    };
    return {even(x.a, x.b), even(y.a, y.b)};
}
inline float sum_lanes(V v) {
    __m256 h = _mm256_add_ps(v.a, v.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
