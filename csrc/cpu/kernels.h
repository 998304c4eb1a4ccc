// What the core and the per-ISA kernels share: plain structs and one table of functions. No SIMD type crosses this file.
// A "vector" is always 16 floats (one cache line), whatever the instruction set; layouts are therefore the same on all.
#pragma once
#include <stdint.h>

namespace sparseprune {

constexpr int64_t kLanes = 16;

enum class Act : int32_t {
    none, relu, relu6, leaky_relu, clamp, hardsigmoid, hardswish, sigmoid, silu, tanh, elu, gelu, gelu_tanh, mish, softplus,
    exp, sqrt, rsqrt, reciprocal, abs, neg, square
};

struct Activation {  // docs/program.md says what alpha and beta are
    Act kind = Act::none;
    float alpha = 0, beta = 0;
    // What the kernels of products and sums apply themselves; act_row applies the others afterwards.
    bool fits_epilogue() const { return kind == Act::leaky_relu ? alpha >= 0 && alpha <= 1 : kind <= Act::clamp; }
    bool keeps_zero() const {  // padding lanes, which are zero, stay zero
        switch (kind) {
            case Act::sigmoid:
            case Act::hardsigmoid:
            case Act::exp:
            case Act::rsqrt:
            case Act::reciprocal:
            case Act::softplus: return false;
            case Act::clamp: return alpha <= 0 && beta >= 0;
            default: return true;
        }
    }
};

// A run of `count` vectors of output pixels, contiguous in the packed input and in the output.
struct Tile {
    int64_t in;      // float offset into the packed input
    int64_t out;     // float offset into an output plane
    int32_t count;   // vectors
    int32_t masks;   // index of the first vector's mask
    int32_t sides = 0;  // kInRow where it is a part of a row of pixels, and which neighbours the row has beside it
};
enum Sides : int32_t { kLeft = 1, kRight = 2, kInRow = 4 };

struct Entry {       // one kept weight
    int32_t offset;  // float offset of its input, relative to the tile's
    float value;
};

struct __attribute__((packed)) NarrowEntry {  // the same in six bytes, where inputs are cache lines of one 4 MiB window
    float value;
    uint16_t line;  // cache lines from the window's start
};

// What every SpMM kernel is told: out[row][pixels of the tile] = act(sum weight * in + bias + residual).
struct SpmmJob {
    const float* in;
    float* out;              // already at the first row's plane 0
    const float* bias;       // rows, or null
    const float* residual;   // rows of pixels as in out, or null
    int64_t plane, residual_plane;  // floats between two rows' planes in out, in residual
    int64_t row_begin, row_end;
    const Tile* tiles;
    int64_t tile_count;
    const uint16_t* masks;   // lanes that are real pixels; the others are stored as zero
    Activation act;
    // single rows: entries of row r, shift group g are [start[r*groups + g], start[r*groups + g + 1])
    const int64_t* start;
    const Entry* entries;         // one of the two is set
    const NarrowEntry* narrow;    // relative to in + narrow_base
    int64_t narrow_base;
    int32_t groups;
    const int32_t* shifts;        // lane shift of each group; out[x] += acc[x + shift]
    const uint16_t* row_edges;    // by vector of a tile: 0 where a row of pixels starts
    const uint16_t* tap_masks;    // flat planes, one group a tap: lanes whose tap is inside the image, groups * tile vectors; or null
    int32_t unroll;               // 1, 2 or 4 accumulators a vector; entries come in multiples of it
    // groups of 4 rows, columns sorted by mask: stream_start[block * stream_groups + group] is the first of words (count << 4 | mask),
    // each followed by, for each of count columns, its offset and popcount(mask) values; 0 ends
    const int64_t* stream_start;
    int64_t stream_blocks, stream_groups;  // blocks of columns, whose inputs stay in the first-level cache from group to group
    const int32_t* stream;
    // dense: values[block][k][R], column offsets shared by all rows of a group of the convolution
    const float* dense;
    const int32_t* dense_offsets;
    int64_t dense_cols;
    int64_t dense_rows_per_group;  // rows of one convolution group; a block never spans two
    int64_t dense_group_offset;    // floats between the inputs of two groups
};

// A linear layer for one input: out[row] = act(sum value * x[col] + bias + residual).
struct DotJob {
    const float* x;
    float* out;
    const float *bias, *residual;  // or null
    int64_t row_begin, row_end;
    Activation act;
    const float* value;    // kept weights by row, or all of them
    const int64_t* start;  // sparse: the first of each row, and the end
    const uint16_t* col16; // one of the two is set; sixteen more columns follow the last
    const int32_t* col32;
    int64_t cols;          // dense
};

// Sixteen floats of a panel's column, some of which come from floats of a plane that lie together.
struct Piece {
    int32_t start;        // of the sixteen that are read, from the plane's first float
    int32_t at;           // of the sixteen that are written, from the column's first float
    uint16_t read, keep;  // which are read; which are not zero
    uint16_t write;       // which are written; a later piece may write some of them again
    int32_t lane[16];     // by written float: which of the read ones
};

// im2col: panel[k] from planes
struct Im2colJob {
    const float* in;
    int64_t in_plane;
    float* panel;
    int64_t panel_plane;         // floats between two columns of the panel
    int64_t taps;
    const Piece* pieces;
    const int32_t* first_piece;  // by tap; and the end
    int64_t channel_begin, channel_end;
};

// Copies rows of a plane, or every second (…) column of them, with zeros around.
struct RowCopy {
    const float* in;
    float* out;
    int64_t rows, in_pitch, out_pitch;
    int64_t stride;        // between two read elements
    int64_t lead, count, tail;  // zeros, elements, zeros written a row
};

// Every second column of rows of some planes, with zeros up to out_pitch: even ones to one place, odd ones to another.
struct SplitRows {
    const float* in;
    float *even, *odd;     // one may be null
    int64_t planes, in_plane, out_plane;  // floats between planes
    int64_t rows, in_pitch, out_pitch;
    int64_t width;         // of an input row; nothing beyond it is read
};

struct PoolRow {           // one output row of a max or average pooling
    const float* in;       // first row of the window
    int64_t row_pitch;     // floats between its rows (dilation included)
    int64_t rows;          // rows inside the image
    int64_t in_width;
    int64_t kernel, stride, dilation, left;  // horizontal window
    float* out;
    int64_t out_width;
    float* scratch;        // pool_scratch(…) floats
};

constexpr int64_t pool_scratch(int64_t in_width, int64_t out_width, int64_t kernel, int64_t stride, int64_t dilation, int64_t left) {
    const int64_t read = (out_width + 16) * stride + (kernel - 1) * dilation + 48;
    const int64_t written = left + in_width + 32;
    return ((read > written ? read : written) + 15) / 16 * 16;
}

// out[rows][cols] = a[rows][k] b[k][cols], or += where accumulate.
struct GemmJob {
    const float* a;
    int64_t a_row, a_k;    // strides
    const float* b;
    int64_t b_row;         // rows of whole vectors: what lies beyond cols is read
    float* out;
    int64_t out_row;       // only cols floats of a row are written
    int64_t rows, k, cols;
    bool accumulate;
};

using BinaryRow = void (*)(const float* a, int64_t a_step, const float* b, int64_t b_step, float* out, int64_t count, Activation act);
constexpr int kBinaryRows = 7;
constexpr int kPreluRow = 6;

struct Kernels {
    const char* name;
    int32_t dense_rows;                    // R of the dense kernel
    int32_t max_single, max_shift, max_masked, max_dense;  // most vectors a tile may have
    int32_t max_part;                      // with lane shifts, where a row is longer than max_shift; 0: cannot be
    void (*single)(const SpmmJob&);        // any unroll; groups > 1: with lane shifts
    void (*masked)(const SpmmJob&);
    void (*dense)(const SpmmJob&);
    void (*dot_sparse)(const DotJob&);
    void (*dot_dense)(const DotJob&);
    void (*im2col)(const Im2colJob&);
    void (*copy_rows)(const RowCopy&);
    void (*split_rows)(const SplitRows&);
    void (*add_row)(const float* a, const float* b, float* out, int64_t count, Activation act);  // b may be null
    void (*max_pool_row)(const PoolRow&);
    void (*sum_pool_row)(const PoolRow&);  // sums; the caller scales
    double (*sum_row)(const float* in, int64_t count);
    // Rows of any number of elements; nothing beyond them is read or written. in == out is allowed.
    void (*act_row)(const float* in, float* out, int64_t count, Activation act);  // every activation
    // out = act(a op b), act.fits_epilogue(); by enum Binary, the last one is prelu: a where a > 0, else b * a. A step of 0 repeats one element.
    BinaryRow binary_row[kBinaryRows];
    float (*max_row)(const float* in, int64_t count);  // NaN where any is
    float (*min_row)(const float* in, int64_t count);
    double (*square_row)(const float* in, int64_t count, double mean);              // sum of (in - mean)^2
    double (*exp_row)(const float* in, float minus, float* out, int64_t count);     // out = exp(in - minus); returns its sum
    // out = (in - mean) * factor * scale + bias: of the row, or of each element (step 1); scale and bias may be null
    void (*norm_row)(const float* in, float* out, int64_t count, float mean, float factor, const float* scale, const float* bias, int64_t step);
    // The same by column, where `rows` rows are `row` floats apart: sum[i] += ...
    void (*sum_columns)(const float* in, int64_t row, int64_t rows, int64_t count, double* sum);
    void (*square_columns)(const float* in, int64_t row, int64_t rows, const double* mean, int64_t count, double* sum);
    // and of one row
    void (*exp_columns)(const float* in, const float* minus, float* out, int64_t count, double* sum);
    void (*norm_columns)(const float* in, float* out, int64_t count, const float* mean, const float* factor, float scale, float bias);
    void (*lerp_row)(const float* a, const float* b, float weight, float* out, int64_t count);  // a * (1 - weight) + b * weight
    void (*lerp_gather)(const float* in, const int32_t* low, const int32_t* high, const float* weight, float* out, int64_t count);
    void (*gemm)(const GemmJob&);
};

const Kernels* kernels_scalar();
#if defined(__x86_64__)
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
#elif defined(__aarch64__)
const Kernels* kernels_neon();
#endif

}  // namespace sparseprune
