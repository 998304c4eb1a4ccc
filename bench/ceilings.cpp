// What one core can do, in GFLOP/s: FMAs in registers, FMAs with a memory operand (aligned, or misaligned by three floats) at random
// places of buffers of several sizes, T vectors a place. Sparse kernels live between the last two.
// Build and run: g++ -O3 -march=native -std=c++17 -pthread bench/ceilings.cpp -o ceilings && ./ceilings
// ./ceilings --json THREADS: the ceilings that bench/layers.py divides by, while so many threads all do the same: GFLOP/s a thread
// (memory operands aligned, the best T, in buffers of 16 KiB, 512 KiB and 8 MiB), and how many GB/s all of them read together
// from buffers of so many MiB.
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#ifndef __AVX512F__
#error "this benchmark measures AVX-512 kernels: build it with -march=native on a processor that has AVX-512"
#endif

using Clock = std::chrono::steady_clock;
static thread_local volatile float sink;

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
        const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.001f);
        // variables, no array: it would live in memory, and its stores would count
        __m512 v0 = c, v1 = c, v2 = c, v3 = c, v4 = c, v5 = c, v6 = c, v7 = c, v8 = c, v9 = c, v10 = c, v11 = c;
        const auto step = [&](__m512& v) {
            v = _mm512_fmadd_ps(v, b, c);
            asm volatile("" : "+v"(v));
        };
        for (int i = 0; i < 100000; ++i)
            step(v0), step(v1), step(v2), step(v3), step(v4), step(v5), step(v6), step(v7), step(v8), step(v9), step(v10), step(v11);
        best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
        sink = _mm512_reduce_add_ps(v0 + v1 + v2 + v3 + v4 + v5 + v6 + v7 + v8 + v9 + v10 + v11);
    }
    return 2.0 * 16 * 12 * 100000 / best / 1e9;
}

// Bytes a second, in 1e9.
static double reads(const float* in, size_t floats) {
    double best = 1e9, spent = 0;
    for (int repeat = 0; repeat < 2 || (spent < 0.02 && repeat < 1000); ++repeat) {
        const auto start = Clock::now();
        __m512 acc[8];
        for (auto& a : acc) a = _mm512_setzero_ps();
        for (size_t i = 0; i + 128 <= floats; i += 128)
            for (size_t t = 0; t < 8; ++t) acc[t] = _mm512_add_ps(acc[t], _mm512_load_ps(in + i + 16 * t));
        for (int t = 1; t < 8; ++t) acc[0] = _mm512_add_ps(acc[0], acc[t]);
        sink = _mm512_reduce_add_ps(acc[0]);
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        best = std::min(best, seconds);
        spent += seconds;
    }
    return static_cast<double>(floats) * 4 / best / 1e9;
}

template <int T>
static std::vector<int> places(int kib, std::mt19937& random) {
    std::vector<int> offset(20000);
    for (int& o : offset) o = static_cast<int>(random() % static_cast<unsigned>(kib * 16 / T)) * T * 16;
    return offset;
}

template <int T>
static void row(const float* buffer, int kib, std::mt19937& random) {
    const std::vector<int> offset = places<T>(kib, random);
    std::printf("  T=%d %5.0f / %5.0f", T, loads<T>(buffer, offset, 0), loads<T>(buffer, offset, 3));
}

// ---- as JSON, several threads at once ----

static float* new_buffer(size_t bytes) {  // huge pages where there are any: the caches count, not the translation
    const size_t huge = size_t{2} << 20;
    bytes = (bytes + huge - 1) / huge * huge;
    void* memory = std::aligned_alloc(huge, bytes);
    if (!memory) std::abort();
    madvise(memory, bytes, MADV_HUGEPAGE);
    std::memset(memory, 0, bytes);
    return static_cast<float*>(memory);
}

// The sum over threads of what each measures; they start together.
template <class Measure>
static double together(int threads, const Measure& measure) {
    std::vector<double> found(static_cast<size_t>(threads));
    std::vector<std::thread> running;
    std::atomic<int> ready{0};
    for (int id = 0; id < threads; ++id)
        running.emplace_back([&, id] {
            ++ready;
            while (ready < threads) std::this_thread::yield();
            found[static_cast<size_t>(id)] = measure(id);
        });
    double sum = 0;
    for (int id = 0; id < threads; ++id) {
        running[static_cast<size_t>(id)].join();
        sum += found[static_cast<size_t>(id)];
    }
    return sum;
}

static double loads_at(const float* buffer, int kib, unsigned seed) {
    std::mt19937 random(seed);
    return std::max({loads<1>(buffer, places<1>(kib, random), 0), loads<2>(buffer, places<2>(kib, random), 0),
                     loads<4>(buffer, places<4>(kib, random), 0), loads<7>(buffer, places<7>(kib, random), 0), loads<14>(buffer, places<14>(kib, random), 0)});
}

static int json(int threads) {
    const size_t most = 1024;  // MiB
    std::vector<float*> buffers;
    for (int id = 0; id < threads; ++id) buffers.push_back(new_buffer((most << 20) / static_cast<size_t>(threads) + (9 << 20)));
    const auto buffer = [&](int id) { return buffers[static_cast<size_t>(id)]; };
    std::printf("{\"threads\": %d, \"fma\": %.1f", threads, together(threads, [](int) { return registers(); }) / threads);
    const char* const levels[] = {"l1", "l2", "l3"};
    const int kib[] = {16, 512, 8192};
    for (int i = 0; i < 3; ++i)
        std::printf(", \"%s\": %.1f", levels[i],
                    together(threads, [&](int id) { return loads_at(buffer(id), kib[i], static_cast<unsigned>(id)); }) / threads);
    std::printf(", \"read\": {");
    for (size_t mib = 1; mib <= most; mib *= 4)
        std::printf("%s\"%zu\": %.1f", mib > 1 ? ", " : "", mib,
                    together(threads, [&](int id) { return reads(buffer(id), (mib << 18) / static_cast<size_t>(threads)); }));
    std::printf("}}\n");
    return 0;
}

int main(int count, char** arguments) {
    if (count == 3 && std::string(arguments[1]) == "--json" && std::atoi(arguments[2]) > 0) return json(std::atoi(arguments[2]));
    if (count > 1) {
        std::fprintf(stderr, "usage: %s [--json THREADS]\n", arguments[0]);
        return 2;
    }
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
