// Kernel (b): weights of whole 16x16 or 32x32 blocks, or of 8x1, 16x1 or 32x1 vectors, on tensor cores (mma.sync);
// activations (pixels, C), that is channels_last.
//
// A block of threads owns a strip of 64 output pixels; a warp 32 rows of the weight, in 32 / R groups of R. One chunk of
// channels of the strip's inputs after the other lies in shared memory, a pixel's channels side by side, in the padded plane
// of geometry.h; it serves all taps. Pixels are the rows (M) of the product, the weight's rows its columns (N).
//
// The unit of work is a *step*: R rows times as many columns as 32 bytes hold (16, or 8 of float32), all of one group.
//   blocks:  the columns are neighbouring channels of one tap: ldmatrix reads their inputs, 16 pixels at a time.
//   vectors: the columns are any kept ones: each lane reads its own.
// Weights are packed in the order in which a lane needs them: for each step, for each 8 rows, lane l's two words. Word j
// holds row l / 4 and columns l % 4 + 4 j (float32), or 2 (l % 4) + 8 j and the next one (16 bits); 16 rows lie together, so
// that one 16-byte load brings four words. Accumulators are float32. A product is added step after step.
#pragma once
#include "geometry.h"

namespace sparseprune::cuda {

enum class Math { half, bfloat, tf32, tf32x3 };  // tf32x3: float32 from three products of TF32 parts

constexpr int kStrip = 64, kWarpRows = 32, kStepBytes = 32, kBlockWarps = 8, kPadBytes = 16;

template <Math M>
struct Element {
    using type = float;
};
template <>
struct Element<Math::half> {
    using type = Half;
};
template <>
struct Element<Math::bfloat> {
    using type = BFloat;
};

struct BlocksArgs {
    Geometry g;
    Epilogue epilogue;
    Strides in, out;  // in.c is 1
    const void* x;
    void* y;
    const uint32_t* weights;  // step after step
    const uint32_t* columns;  // blocks: one word a step, vectors: one a column; see column_code
    const int* starts;        // [row groups * chunks + 1]: first step
    const int* order;         // [row groups]: first output channel, in rows; -1: none
    int chunk;                // channels in shared memory at once; a multiple of 16 bytes
    int chunks, row_groups;   // row groups padded to whole blocks of threads
};

// A column of a chunk: its tap and its byte within the pixel's channels. The bytes after a pixel's channels are zeros: the
// columns that fill up a step are there.
SPARSEPRUNE_HD uint32_t column_code(int tap, int byte) { return static_cast<uint32_t>(tap) << 16 | static_cast<uint32_t>(byte); }

constexpr int kMostTaps = 64;

SPARSEPRUNE_HD int pixel_bytes(int chunk, int element) { return chunk * element + kPadBytes; }
SPARSEPRUNE_HD int blocks_shared(int span, int chunk, int element) {
    return kMostTaps * 4 + 2 * span * pixel_bytes(chunk, element);
}

// Words of one step: two a lane for each 8 rows, twice that where the parts that TF32 drops are there too.
template <Math M, int R>
constexpr int step_words = R / 8 * 64 * (M == Math::tf32x3 ? 2 : 1);

template <class T, class Ctx>
SPARSEPRUNE_HD void blocks_load(Ctx& ctx, const BlocksArgs& a, char* buffer, int low, int chunk_index) {
    constexpr int per_piece = 16 / static_cast<int>(sizeof(T));
    const Geometry& g = a.g;
    const int begin = chunk_index * a.chunk, pieces = a.chunk / per_piece, stride = pixel_bytes(a.chunk, sizeof(T));
    for (int i = ctx.thread(); i < g.span * pieces; i += ctx.threads()) {
        const int pixel = i / pieces, c = (i - pixel * pieces) * per_piece;
        const Place at = place(g, low + pixel);
        const bool inside = at.n >= 0 && begin + c < g.c;
        const T* from = static_cast<const T*>(a.x);
        if (inside) from += offset(g, a.in, at) + begin + c;
        ctx.copy16(buffer + pixel * stride + c * static_cast<int>(sizeof(T)), from, inside);
    }
}

// The weights of a step that this lane holds: words[part][8 rows][2].
template <Math M, int R>
struct Fragments {
    static constexpr int parts = M == Math::tf32x3 ? 2 : 1;
    uint32_t words[parts][R / 8][2];

    template <class Ctx>
    SPARSEPRUNE_HD void read(Ctx& ctx, const uint32_t* step, int lane) {
        SPARSEPRUNE_UNROLL
        for (int part = 0; part < parts; ++part) {
            const uint32_t* from = step + part * (R / 8 * 64);
            if constexpr (R == 8) {
                const Words2 two = ctx.read2(from + lane * 2);
                words[part][0][0] = two.w[0], words[part][0][1] = two.w[1];
            } else {
                SPARSEPRUNE_UNROLL
                for (int half = 0; half < R / 16; ++half) {
                    const Words4 four = ctx.read4(from + half * 128 + lane * 4);
                    words[part][2 * half][0] = four.w[0], words[part][2 * half][1] = four.w[1];
                    words[part][2 * half + 1][0] = four.w[2], words[part][2 * half + 1][1] = four.w[3];
                }
            }
        }
    }
};

// The inputs of 16 pixels and a step's columns: four words a lane. Row l / 4 (words 0, 2) or l / 4 + 8 (1, 3); columns as
// the weights have them, j = 0 in words 0 and 1.
struct Inputs {
    uint32_t w[4];
};

template <class Ctx>
SPARSEPRUNE_HD uint32_t pair16(Ctx& ctx, const char* pixel, int first, int second) {
    return ctx.load16(pixel + first) | static_cast<uint32_t>(ctx.load16(pixel + second)) << 16;
}

template <Math M, int N, class Ctx>
SPARSEPRUNE_HD void multiply(Ctx& ctx, float (&sum)[N][4], const Inputs& raw, const Fragments<M, N * 8>& weights) {
    if constexpr (M == Math::half || M == Math::bfloat) {
        SPARSEPRUNE_UNROLL
        for (int n = 0; n < N; ++n) ctx.template mma16<M == Math::bfloat>(sum[n], raw.w, weights.words[0][n]);
    } else {
        uint32_t big[4], small[4], finite[4];
        SPARSEPRUNE_UNROLL
        for (int i = 0; i < 4; ++i) {
            big[i] = to_tf32(raw.w[i]);
            const bool inf = (big[i] & 0x7f800000u) == 0x7f800000u;  // or NaN: only the product of the big parts has it
            small[i] = inf ? 0 : to_tf32(bits_as<uint32_t>(bits_as<float>(raw.w[i]) - bits_as<float>(big[i])));
            finite[i] = inf ? 0 : big[i];
        }
        SPARSEPRUNE_UNROLL
        for (int n = 0; n < N; ++n) {
            if constexpr (M == Math::tf32x3) {  // the small products first
                ctx.mma8(sum[n], small, weights.words[0][n]);
                ctx.mma8(sum[n], finite, weights.words[1][n]);
            }
            ctx.mma8(sum[n], big, weights.words[0][n]);
        }
    }
}

template <Math M, int R, bool VECTORS, class Ctx>
SPARSEPRUNE_HD void blocks_body(Ctx& ctx, const BlocksArgs& a) {
    using T = typename Element<M>::type;
    constexpr int element = static_cast<int>(sizeof(T)), groups = kWarpRows / R, tiles = kStrip / 16;
    constexpr int columns = kStepBytes / element;  // of a step
    const Geometry& g = a.g;
    const int lane = ctx.thread() % 32, warp = ctx.block_y() * (ctx.threads() / 32) + ctx.thread() / 32;
    const int strip = ctx.block_x() * kStrip, low = first_input(g, strip);
    const int stride = pixel_bytes(a.chunk, element), size = g.span * stride;
    int* shifts = static_cast<int*>(ctx.shared());  // by tap, in bytes
    char* buffers = static_cast<char*>(ctx.shared()) + kMostTaps * 4;

    for (int i = ctx.thread(); i < g.kh * g.kw; i += ctx.threads()) shifts[i] = tap_shift(g, i) * stride;
    for (int i = ctx.thread(); i < 2 * g.span * (kPadBytes / 4); i += ctx.threads())
        ctx.store32(buffers + i / (kPadBytes / 4) * stride + a.chunk * element + i % (kPadBytes / 4) * 4, 0);
    // Blocks: lane l tells ldmatrix where row l % 16 of a tile lies, in its first or second 16 bytes.
    // Vectors: the lane reads rows l / 4 and l / 4 + 8 itself.
    constexpr int rows = VECTORS ? 2 : 1;
    int first[tiles][rows];
    SPARSEPRUNE_UNROLL
    for (int t = 0; t < tiles; ++t)
        SPARSEPRUNE_UNROLL
        for (int i = 0; i < rows; ++i) {
            const int p = strip + 16 * t + (VECTORS ? lane / 4 + 8 * i : lane % 16);
            first[t][i] = (first_input(g, p < g.pixels ? p : g.pixels - 1) - low) * stride + (VECTORS ? 0 : lane / 16 * 16);
        }
    float sum[groups][tiles][R / 8][4];
    SPARSEPRUNE_UNROLL
    for (int i = 0; i < groups * tiles * (R / 8) * 4; ++i)
        sum[i / (tiles * (R / 8) * 4)][i / (R / 8 * 4) % tiles][i / 4 % (R / 8)][i % 4] = 0;

    blocks_load<T>(ctx, a, buffers, low, 0);
    ctx.commit();
    for (int k = 0; k < a.chunks; ++k) {
        ctx.wait_all();
        ctx.sync();
        if (k + 1 < a.chunks) blocks_load<T>(ctx, a, buffers + (k + 1) % 2 * size, low, k + 1);
        ctx.commit();
        const char* x = buffers + k % 2 * size;
        SPARSEPRUNE_UNROLL
        for (int group = 0; group < groups; ++group) {
            const int at = (warp * groups + group) * a.chunks + k, begin = a.starts[at], end = a.starts[at + 1];
            Fragments<M, R> next;
            if (begin < end) next.read(ctx, a.weights + static_cast<int64_t>(begin) * step_words<M, R>, lane);
            SPARSEPRUNE_ROLLED
            for (int step = begin; step < end; ++step) {
                const Fragments<M, R> now = next;  // the next step's are on their way while this one is multiplied
                if (step + 1 < end) next.read(ctx, a.weights + static_cast<int64_t>(step + 1) * step_words<M, R>, lane);
                if constexpr (!VECTORS) {
                    const uint32_t code = ctx.read(a.columns + step);
                    const int shift = shifts[code >> 16] + static_cast<int>(code & 0xffff);
                    SPARSEPRUNE_UNROLL
                    for (int t = 0; t < tiles; ++t) {
                        Inputs in;
                        ctx.ldmatrix(in.w, x + first[t][0] + shift);
                        multiply<M, R / 8>(ctx, sum[group][t], in, now);
                    }
                } else {
                    constexpr int own = element == 4 ? 2 : 4;  // columns of a step that a lane reads
                    int shift[own];
                    SPARSEPRUNE_UNROLL
                    for (int i = 0; i < own; ++i) {
                        const int column = element == 4 ? lane % 4 + 4 * i : 2 * (lane % 4) + i % 2 + 8 * (i / 2);
                        const uint32_t code = ctx.read(a.columns + static_cast<int64_t>(step) * columns + column);
                        shift[i] = shifts[code >> 16] + static_cast<int>(code & 0xffff);
                    }
                    SPARSEPRUNE_UNROLL
                    for (int t = 0; t < tiles; ++t) {
                        Inputs in;
                        SPARSEPRUNE_UNROLL
                        for (int i = 0; i < 4; ++i) {
                            const char* pixel = x + first[t][i % 2];
                            if constexpr (element == 4) in.w[i] = ctx.load32(pixel + shift[i / 2]);
                            else in.w[i] = pair16(ctx, pixel, shift[i / 2 * 2], shift[i / 2 * 2 + 1]);
                        }
                        multiply<M, R / 8>(ctx, sum[group][t], in, now);
                    }
                }
            }
        }
    }
    ctx.wait_all();

    T* y = static_cast<T*>(a.y);
    SPARSEPRUNE_UNROLL
    for (int group = 0; group < groups; ++group) {
        const int base = a.order[warp * groups + group];
        if (base < 0) continue;
        SPARSEPRUNE_UNROLL
        for (int t = 0; t < tiles; ++t)
            SPARSEPRUNE_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int p = strip + 16 * t + lane / 4 + 8 * i;
                if (p >= g.pixels) continue;
                const int64_t at = out_offset(g, a.out, p);
                SPARSEPRUNE_UNROLL
                for (int n = 0; n < R / 8; ++n)
                    SPARSEPRUNE_UNROLL
                    for (int j = 0; j < 2; ++j) {
                        const int channel = base + 8 * n + lane % 4 * 2 + j;
                        if (channel < g.out_c) finish(a.epilogue, y, at + channel * a.out.c, channel, sum[group][t][n][2 * i + j]);
                    }
            }
    }
}

}  // namespace sparseprune::cuda
