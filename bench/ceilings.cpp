// What one core can do, in GFLOP/s: FMAs in registers, FMAs with a memory operand (aligned, or misaligned by three floats) at random
// places of buffers of several sizes, T vectors a place. Sparse kernels live between the last two.
// Build and run: g++ -O3 -march=native -std=c++17 bench/ceilings.cpp -o ceilings && ./ceilings
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#ifndef __AVX512F__
#error "this benchmark measures AVX-512 kernels: build it with -march=native on a processor that has AVX-512"
#endif

using Clock = std::chrono::steady_clock;
static volatile float sink;

template <int T>
static double loads(const float* in, const std::vector<int>& offset, int misaligned) {
    double best = 1e9;
    for (int repeat = 0; repeat < 60; ++repeat) {
        const auto start = Clock::now();
        __m512 acc[T];
        for (auto& a : acc) a = _mm512_setzero_ps();
        const __m512 w = _mm512_set1_ps(0.5f);
        for (const int o : offset) {
            const float* p = in + o + misaligned;
            for (int t = 0; t < T; ++t) acc[t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(p + 16 * t), acc[t]);
        }
        for (int t = 1; t < T; ++t) acc[0] = _mm512_add_ps(acc[0], acc[t]);
        sink = _mm512_reduce_add_ps(acc[0]);
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
    }
    return 2.0 * 16 * T * static_cast<double>(offset.size()) / best / 1e9;
}

static double registers() {
    double best = 1e9;
    for (int repeat = 0; repeat < 20; ++repeat) {
        const auto start = Clock::now();
        __m512 a[12];
        for (int i = 0; i < 12; ++i) a[i] = _mm512_set1_ps(static_cast<float>(i));
        __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.001f);
        for (int i = 0; i < 100000; ++i)
            for (auto& v : a) {
                v = _mm512_fmadd_ps(v, b, c);
                asm volatile("" : "+v"(v));
            }
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
        for (const auto& v : a) sink = _mm512_reduce_add_ps(v);
    }
    return 2.0 * 16 * 12 * 100000 / best / 1e9;
}

template <int T>
static void row(const float* buffer, int kib, std::mt19937& random) {
    std::vector<int> offset(20000);
    for (int& o : offset) o = static_cast<int>(random() % static_cast<unsigned>(kib * 16 / T)) * T * 16;
    std::printf("  T=%d %5.0f / %5.0f", T, loads<T>(buffer, offset, 0), loads<T>(buffer, offset, 3));
}

int main() {
    std::printf("FMA in registers: %.0f GFLOP/s\n", registers());
    std::mt19937 random(1);
    std::vector<float> memory((9 << 20) / 4 + 1024, 1.0f);
    float* buffer = reinterpret_cast<float*>((reinterpret_cast<size_t>(memory.data()) + 63) / 64 * 64);
    for (const int kib : {16, 32, 64, 128, 512, 1024, 8192}) {
        std::printf("%5d KiB, aligned / misaligned:", kib);
        row<1>(buffer, kib, random);
        row<2>(buffer, kib, random);
        row<4>(buffer, kib, random);
        row<7>(buffer, kib, random);
        std::printf("\n");
    }
}
