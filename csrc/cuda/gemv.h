// Kernel (c): a linear layer of at most 4 inputs, a warp a row; activations (N, K).
//
// The inputs lie in shared memory as float32, the N of one column side by side, so one read brings them all. A row's
// entries are read in fours: 16-bit columns and values of the activations' type. Rows are sorted by kept weights and dealt
// out in that order. Each lane adds ascending columns; the lanes' sums are added by a butterfly, always the same way.
#pragma once
#include "geometry.h"

namespace sparseprune::cuda {

constexpr int kGemvMost = 65535;  // columns; number K itself reads zeros

struct GemvArgs {
    Epilogue epilogue;
    const void* x;            // (n, k)
    void* y;                  // (n, rows)
    const uint16_t* columns;  // fours
    const void* values;       // T, fours
    const int* starts;        // [rows + 1], in fours
    const int* order;         // [rows]: the output of each row
    int n, k, rows;
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T v[4];
};

// N: 1, 2 or 4 inputs; shared: (k + 1) * N floats.
template <class T, int N, class Ctx>
SPARSEPRUNE_HD void gemv_body(Ctx& ctx, const GemvArgs& a) {
    float* shared = static_cast<float*>(ctx.shared());
    const T* x = static_cast<const T*>(a.x);
    for (int i = ctx.thread(); i <= a.k; i += ctx.threads())
        SPARSEPRUNE_UNROLL
        for (int n = 0; n < N; ++n)
            shared[i * N + n] = i < a.k && n < a.n ? to_float(x[static_cast<int64_t>(n) * a.k + i]) : 0.0f;
    ctx.sync();

    const int lane = ctx.thread() % 32, warps = ctx.threads() / 32;
    const Four<uint16_t>* columns = reinterpret_cast<const Four<uint16_t>*>(a.columns);
    const Four<T>* values = static_cast<const Four<T>*>(a.values);
    for (int row = ctx.block_x() + ctx.blocks_x() * (ctx.thread() / 32); row < a.rows; row += ctx.blocks_x() * warps) {
        float sum[N];
        SPARSEPRUNE_UNROLL
        for (int n = 0; n < N; ++n) sum[n] = 0;
        const int end = a.starts[row + 1];
        for (int i = a.starts[row] + lane; i < end; i += 32) {
            const Four<uint16_t> column = ctx.stream(columns + i);
            const Four<T> value = ctx.stream(values + i);
            SPARSEPRUNE_UNROLL
            for (int e = 0; e < 4; ++e)
                SPARSEPRUNE_UNROLL
                for (int n = 0; n < N; ++n) sum[n] = ctx.fma(to_float(value.v[e]), shared[column.v[e] * N + n], sum[n]);
        }
        SPARSEPRUNE_UNROLL
        for (int step = 16; step > 0; step /= 2)
            SPARSEPRUNE_UNROLL
            for (int n = 0; n < N; ++n) sum[n] += ctx.shuffle_xor(sum[n], step);
        if (lane == 0) {
            const int out = a.order[row];
            SPARSEPRUNE_UNROLL
            for (int n = 0; n < N; ++n)
                if (n < a.n) finish(a.epilogue, static_cast<T*>(a.y), static_cast<int64_t>(n) * a.rows + out, out, sum[n]);
        }
    }
}

}  // namespace sparseprune::cuda
