// Kernel (a): unstructured and 4x1 weights on CUDA cores; activations (N, C, H, W), or channels_last, or (pixels, C).
//
// A block of threads owns a strip of 32 * T output pixels and, a warp, `kRows` rows of the weight. The strip's inputs, one
// chunk of channels after the other, lie in shared memory as the padded plane of geometry.h has them; two buffers, so that
// the next chunk is on its way while this one is used. A kept weight is (shift, value): lane l reads pixels l, l + 32, ...
// at its own first input plus that shift, which no bank conflict can slow down, and the value is the same for all lanes.
// Products are added in ascending (channel, tap) order in float32.
#pragma once
#include "geometry.h"

namespace sparseprune::cuda {

constexpr int kRows = 8;  // accumulators a lane: kRows * T, for 4x1 twice that: 4 groups of 4 rows
constexpr int kSpmmWarps = 8;

// V rows share an entry. A record holds two entries, so that one or three 16-byte loads bring both.
//   V = 1: shift0 value0 shift1 value1          V = 4: shift0 shift1 - - | values of 0 | values of 1
template <int V>
struct Records {
    static constexpr int words = V == 1 ? 4 : 12;
    static constexpr int groups = V == 1 ? kRows : 4;  // a warp's
    static constexpr int rows = groups * V;
};

struct SpmmArgs {
    Geometry g;
    Epilogue epilogue;
    Strides in, out;
    const void* x;
    void* y;
    const uint32_t* records;  // warp tile after warp tile, chunk after chunk, group after group
    const int* starts;        // [tiles * chunks + 1]: first record
    const int* counts;        // [tiles * chunks][groups]: records
    const int* order;         // [tiles * rows]: the output channel of each row; -1: none
    int chunk;                // channels in shared memory at once
    int chunks;               // of each convolution group
    int tiles;                // of rows, each convolution group's padded to whole blocks of threads
};

// Elements of one buffer: a chunk's planes and one of zeros, which padding entries read.
SPARSEPRUNE_HD int spmm_buffer(int span, int chunk) { return span * (chunk + 1); }

template <class T, class Ctx>
SPARSEPRUNE_HD void spmm_load(Ctx& ctx, const SpmmArgs& a, T* buffer, int low, int group, int chunk_index) {
    const Geometry& g = a.g;
    const int per_group = g.c / g.groups, begin = chunk_index * a.chunk;
    const int channels = per_group - begin < a.chunk ? per_group - begin : a.chunk;
    const T* x = static_cast<const T*>(a.x);
    const int64_t first = (group * per_group + begin) * a.in.c;
    if (a.in.c != 1) {  // neighbouring threads take neighbouring pixels
        for (int i = ctx.thread(); i < g.span; i += ctx.threads()) {
            const Place at = place(g, low + i);
            const bool inside = at.n >= 0;
            const T* from = inside ? x + first + offset(g, a.in, at) : x;
            for (int c = 0; c < channels; ++c) ctx.copy(buffer + c * g.span + i, from + (inside ? c * a.in.c : 0), inside);
        }
    } else {  // neighbouring lanes take neighbouring channels
        for (int i = ctx.thread() / 32; i < g.span; i += ctx.threads() / 32) {
            const Place at = place(g, low + i);
            const bool inside = at.n >= 0;
            const T* from = inside ? x + first + offset(g, a.in, at) : x;
            for (int c = ctx.thread() % 32; c < channels; c += 32) ctx.copy(buffer + c * g.span + i, from + (inside ? c : 0), inside);
        }
    }
}

template <class T, int V, int TILE, class Ctx>
SPARSEPRUNE_HD void spmm_body(Ctx& ctx, const SpmmArgs& a) {
    using R = Records<V>;
    const Geometry& g = a.g;
    T* shared = static_cast<T*>(ctx.shared());
    const int size = spmm_buffer(g.span, a.chunk);
    const int lane = ctx.thread() % 32, warp = ctx.thread() / 32;
    const int tile = ctx.block_y() * (ctx.threads() / 32) + warp;
    const int tiles_a_group = a.tiles / g.groups, group = ctx.block_y() * (ctx.threads() / 32) / tiles_a_group;
    const int strip = ctx.block_x() * (32 * TILE), low = first_input(g, strip);

    int first[TILE];
    SPARSEPRUNE_UNROLL
    for (int t = 0; t < TILE; ++t) {
        const int p = strip + t * 32 + lane;
        first[t] = first_input(g, p < g.pixels ? p : g.pixels - 1) - low;
    }
    for (int i = ctx.thread(); i < 2 * g.span; i += ctx.threads())
        shared[(i < g.span ? 0 : size) + a.chunk * g.span + i % g.span] = from_float<T>(0.0f);
    float sum[R::rows][TILE];
    SPARSEPRUNE_UNROLL
    for (int r = 0; r < R::rows; ++r)
        SPARSEPRUNE_UNROLL
        for (int t = 0; t < TILE; ++t) sum[r][t] = 0;

    spmm_load(ctx, a, shared, low, group, 0);
    ctx.commit();
    for (int k = 0; k < a.chunks; ++k) {
        ctx.wait_all();
        ctx.sync();  // chunk k is there for all; nobody reads chunk k - 1 any more
        if (k + 1 < a.chunks) spmm_load(ctx, a, shared + (k + 1) % 2 * size, low, group, k + 1);
        ctx.commit();
        const T* x = shared + k % 2 * size;
        const int at = tile * a.chunks + k;
        const uint32_t* record = a.records + static_cast<int64_t>(a.starts[at]) * R::words;
        const int mine = a.counts[at * R::groups + (lane < R::groups ? lane : 0)];
        SPARSEPRUNE_UNROLL
        for (int r = 0; r < R::groups; ++r) {
            const int count = ctx.shuffle(mine, r);
            SPARSEPRUNE_ROLLED
            for (int i = 0; i < count; ++i, record += R::words) {
                const Words4 head = ctx.read4(record);
                SPARSEPRUNE_UNROLL
                for (int e = 0; e < 2; ++e) {
                    const T* from = x + static_cast<int>(head.w[V == 1 ? 2 * e : e]);
                    if constexpr (V == 1) {
                        const float value = bits_as<float>(head.w[2 * e + 1]);
                        SPARSEPRUNE_UNROLL
                        for (int t = 0; t < TILE; ++t) sum[r][t] = ctx.fma(value, to_float(from[first[t]]), sum[r][t]);
                    } else {
                        const Words4 values = ctx.read4(record + 4 + 4 * e);
                        SPARSEPRUNE_UNROLL
                        for (int t = 0; t < TILE; ++t) {
                            const float input = to_float(from[first[t]]);
                            SPARSEPRUNE_UNROLL
                            for (int v = 0; v < V; ++v)
                                sum[r * V + v][t] = ctx.fma(bits_as<float>(values.w[v]), input, sum[r * V + v][t]);
                        }
                    }
                }
            }
        }
    }
    ctx.wait_all();

    T* y = static_cast<T*>(a.y);
    SPARSEPRUNE_UNROLL
    for (int t = 0; t < TILE; ++t) {
        const int p = strip + t * 32 + lane;
        if (p >= g.pixels) continue;
        const int64_t at = out_offset(g, a.out, p);
        SPARSEPRUNE_UNROLL
        for (int r = 0; r < R::rows; ++r) {
            const int channel = a.order[tile * R::rows + r];
            if (channel >= 0) finish(a.epilogue, y, at + channel * a.out.c, channel, sum[r][t]);
        }
    }
}

}  // namespace sparseprune::cuda
