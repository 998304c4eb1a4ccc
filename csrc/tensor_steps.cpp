#include "tensor_steps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>

namespace sparseprune {
namespace {

constexpr int kOperands = 3;
constexpr int64_t kStaged = 1024;  // floats of a block that is copied to the stack first

struct Dim {
    int64_t size = 1;
    int64_t stride[kOperands] = {0, 0, 0};  // [0] is the output's, where there is one
};

// The dimensions that some operands share, outermost first, at least two: the last two are a block's rows and columns.
struct Loop {
    int rank = 0;
    Dim dim[kMaxRank + 3];
    Dim& rows() { return dim[rank - 2]; }
    Dim& cols() { return dim[rank - 1]; }
    const Dim& rows() const { return dim[rank - 2]; }
    const Dim& cols() const { return dim[rank - 1]; }
    int64_t elements() const {
        int64_t n = 1;
        for (int d = 0; d < rank; ++d) n *= dim[d].size;
        return n;
    }
};

bool merges(const Dim& outer, const Dim& inner) {
    for (int i = 0; i < kOperands; ++i)
        if (outer.stride[i] != inner.stride[i] * inner.size) return false;
    return true;
}

// Sizes of 1 go, the steps of operand `by` fall, neighbours become one where every operand allows it.
Loop make_loop(const Dim* dims, int count, int by = 0) {
    Dim kept[kMaxRank + 3];
    int n = 0;
    for (int d = 0; d < count; ++d) {
        if (dims[d].size == 1) continue;
        int at = n++;
        for (; at > 0 && std::abs(kept[at - 1].stride[by]) < std::abs(dims[d].stride[by]); --at) kept[at] = kept[at - 1];
        kept[at] = dims[d];
    }
    Loop loop;
    for (int d = 0; d < n; ++d) {
        if (loop.rank > 0 && merges(loop.cols(), kept[d])) {
            const int64_t size = loop.cols().size * kept[d].size;
            loop.cols() = kept[d];
            loop.cols().size = size;
        } else {
            loop.dim[loop.rank++] = kept[d];
        }
    }
    Loop padded;
    for (int missing = loop.rank; missing < 2; ++missing) padded.dim[padded.rank++] = Dim{};
    for (int d = 0; d < loop.rank; ++d) padded.dim[padded.rank++] = loop.dim[d];
    if (loop.rank == 0) padded.cols() = {1, {1, 1, 1}};  // one element is a contiguous row of one
    return padded;
}

// Dimensions [first, end) of up to three operands, the output before the inputs.
int collect(std::initializer_list<const Strided*> operands, int first, int end, Dim* dims) {
    for (int d = first; d < end; ++d) {
        const size_t at = static_cast<size_t>(d);
        int i = 0;
        for (const Strided* s : operands) dims[d - first].stride[i++] = s->stride[at];
        dims[d - first].size = (*operands.begin())->size[at];
    }
    return end - first;
}

Loop shared_loop(std::initializer_list<const Strided*> operands, int first, int end, int by = 0) {
    Dim dims[kMaxRank + 3];
    const int count = collect(operands, first, end, dims);
    return make_loop(dims, count, by);
}

void move_to(Loop& loop, int d, int to) {
    for (; d < to; ++d) std::swap(loop.dim[d], loop.dim[d + 1]);
}

// Makes the rows of a block the dimension, other than its columns, where operand i has the smallest step.
void choose_rows(Loop& loop, int i) {
    int best = loop.rank - 2;
    for (int d = 0; d < loop.rank - 1; ++d)
        if (loop.dim[d].size > 1 && (loop.dim[best].size == 1 || std::abs(loop.dim[d].stride[i]) < std::abs(loop.dim[best].stride[i])))
            best = d;
    move_to(loop, best, loop.rank - 2);
}

// The dimension where operand i has step 1, or -1.
int unit_dim(const Loop& loop, int i) {
    for (int d = loop.rank - 1; d >= 0; --d)
        if (loop.dim[d].size > 1 && loop.dim[d].stride[i] == 1) return d;
    return -1;
}

struct Block {
    int64_t offset[kOperands];
    int64_t row, col;  // of its first element
    int64_t rows, cols;
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// This thread's blocks. A dimension is cut evenly; more often where there are few blocks for the threads.
template <class F>
void for_blocks(const Loop& loop, int64_t block_rows, int64_t block_cols, int64_t least_cols, Part part, F f) {
    const Dim &rows = loop.rows(), &cols = loop.cols();
    int64_t outer = 1;
    for (int d = 0; d < loop.rank - 2; ++d) outer *= loop.dim[d].size;
    int64_t row_cuts = divide_up(rows.size, block_rows), col_cuts = divide_up(cols.size, block_cols);
    if (part.count > 1) {
        const int64_t wanted = 4 * part.count;
        row_cuts = std::clamp(divide_up(wanted, outer * col_cuts), row_cuts, rows.size);
        col_cuts = std::max(col_cuts, std::min(divide_up(wanted, outer * row_cuts), divide_up(cols.size, least_cols)));
    }
    const int64_t units = outer * row_cuts * col_cuts;
    int64_t u = part.begin(units);
    const int64_t stop = part.end(units);
    if (u == stop) return;
    int64_t c = u % col_cuts, r = u / col_cuts % row_cuts, rest = u / col_cuts / row_cuts;
    int64_t index[kMaxRank + 3] = {}, base[kOperands] = {0, 0, 0};  // of the outer dimensions
    for (int d = loop.rank - 3; d >= 0; --d) {
        index[d] = rest % loop.dim[d].size;
        rest /= loop.dim[d].size;
        for (int i = 0; i < kOperands; ++i) base[i] += index[d] * loop.dim[d].stride[i];
    }
    const auto cut = [](int64_t size, int64_t at, int64_t cuts) { return cuts == 1 ? size * at : size * at / cuts; };
    for (; u < stop; ++u) {
        Block b;
        b.row = cut(rows.size, r, row_cuts);
        b.rows = cut(rows.size, r + 1, row_cuts) - b.row;
        b.col = cut(cols.size, c, col_cuts);
        b.cols = cut(cols.size, c + 1, col_cuts) - b.col;
        for (int i = 0; i < kOperands; ++i) b.offset[i] = base[i] + b.row * rows.stride[i] + b.col * cols.stride[i];
        f(b);
        if (++c < col_cuts) continue;
        c = 0;
        if (++r < row_cuts) continue;
        r = 0;
        for (int d = loop.rank - 3; d >= 0; --d) {
            for (int i = 0; i < kOperands; ++i) base[i] += loop.dim[d].stride[i];
            if (++index[d] < loop.dim[d].size) break;
            for (int i = 0; i < kOperands; ++i) base[i] -= loop.dim[d].stride[i] * loop.dim[d].size;
            index[d] = 0;
        }
    }
}

// All rows of columns of a small loop, in order: f(offsets).
template <class F>
void for_segments(const Loop& loop, F f) {
    int64_t index[kMaxRank + 3] = {}, offset[kOperands] = {0, 0, 0};
    for (;;) {
        f(offset);
        int d = loop.rank - 2;
        for (; d >= 0; --d) {
            for (int i = 0; i < kOperands; ++i) offset[i] += loop.dim[d].stride[i];
            if (++index[d] < loop.dim[d].size) break;
            for (int i = 0; i < kOperands; ++i) offset[i] -= loop.dim[d].stride[i] * loop.dim[d].size;
            index[d] = 0;
        }
        if (d < 0) return;
    }
}

// ---- copies

struct Step {  // between rows and between columns
    int64_t row, col;
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SPARSEPRUNE_SHUFFLE 1
#endif
#endif

// out[r][c] = in[c][r], 4 by 4
inline void transpose4(const float* in, int64_t in_col, float* out, int64_t out_row) {
#ifdef SPARSEPRUNE_SHUFFLE
    typedef float F4 __attribute__((vector_size(16)));
    F4 a, b, c, d;
    std::memcpy(&a, in, 16);
    std::memcpy(&b, in + in_col, 16);
    std::memcpy(&c, in + 2 * in_col, 16);
    std::memcpy(&d, in + 3 * in_col, 16);
    const F4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const F4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    a = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
    b = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    c = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
    d = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
    std::memcpy(out, &a, 16);
    std::memcpy(out + out_row, &b, 16);
    std::memcpy(out + 2 * out_row, &c, 16);
    std::memcpy(out + 3 * out_row, &d, 16);
#else
    for (int64_t r = 0; r < 4; ++r)
        for (int64_t c = 0; c < 4; ++c) out[r * out_row + c] = in[c * in_col + r];
#endif
}

// two planes interleaved, as a pixel shuffle does
void interleave(const float* __restrict a, const float* __restrict b, float* __restrict out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        out[2 * i] = a[i];
        out[2 * i + 1] = b[i];
    }
}

// in has step 1 along rows, out along columns; tiles of 16 by 16 use each cache line that they touch.
void transpose_block(const float* in, int64_t in_col, float* out, int64_t out_row, int64_t rows, int64_t cols) {
    if (cols == 2 && out_row == 2) return interleave(in, in + in_col, out, rows);
    for (int64_t r0 = 0; r0 < rows; r0 += 16)
        for (int64_t c0 = 0; c0 < cols; c0 += 16) {
            const int64_t r1 = std::min(rows, r0 + 16), c1 = std::min(cols, c0 + 16);
            const int64_t r4 = r0 + (r1 - r0) / 4 * 4, c4 = c0 + (c1 - c0) / 4 * 4;
            for (int64_t c = c0; c < c4; c += 4)
                for (int64_t r = r0; r < r4; r += 4) transpose4(in + c * in_col + r, in_col, out + r * out_row + c, out_row);
            for (int64_t r = r0; r < r1; ++r)
                for (int64_t c = r < r4 ? c4 : c0; c < c1; ++c) out[r * out_row + c] = in[c * in_col + r];
        }
}

void copy_block(const float* in, Step from, float* out, Step to, int64_t rows, int64_t cols) {
    if (to.col == 1 && from.col != 1 && from.col != 0 && from.row == 1) return transpose_block(in, from.col, out, to.row, rows, cols);
    for (int64_t r = 0; r < rows; ++r, in += from.row, out += to.row) {
        if (to.col == 1 && from.col == 1) {
            if (cols >= 16) std::memcpy(out, in, static_cast<size_t>(cols) * sizeof(float));
            else
                for (int64_t c = 0; c < cols; ++c) out[c] = in[c];
        } else if (to.col == 1 && from.col == 0) {
            std::fill_n(out, cols, *in);
        } else {
            for (int64_t c = 0; c < cols; ++c) out[c * to.col] = in[c * from.col];
        }
    }
}

Step step(const Loop& loop, int i) { return {loop.rows().stride[i], loop.cols().stride[i]}; }

bool contiguous_or_repeated(int64_t stride) { return stride == 1 || stride == 0; }

// ---- elementwise

// Runs `rows` over blocks: where an operand does not lie in rows, or rows are short, through copies on the stack.
// compute(pointers, strides between rows and columns of each operand, rows, columns): columns have step 1, or 0 for an input.
template <int inputs, class F>
void elementwise(Loop loop, const float* const* in, float* out, Part part, F compute) {
    bool staged = loop.cols().stride[0] != 1 || (loop.cols().size < kLanes && loop.rows().size > 1);
    int worst = 0;
    for (int i = 1; i <= inputs; ++i)
        if (!contiguous_or_repeated(loop.cols().stride[i])) worst = i;
    if (worst) choose_rows(loop, worst);
    const bool copies = staged || worst;
    const int64_t block_cols = copies ? 64 : 4096;
    const int64_t cols = std::min(loop.cols().size, block_cols);
    const int64_t block_rows = (copies ? kStaged : 4096) / cols;
    for_blocks(loop, block_rows, block_cols, 64, part, [&](const Block& b) {
        alignas(64) float tile[inputs + 1][kStaged];
        const float* from[inputs];
        float* to = out + b.offset[0];
        Step steps[inputs + 1];
        for (int i = 0; i <= inputs; ++i) steps[i] = step(loop, i);
        for (int i = 0; i < inputs; ++i) {
            from[i] = in[i] + b.offset[i + 1];
            if (!copies || (!staged && contiguous_or_repeated(steps[i + 1].col))) continue;
            copy_block(from[i], steps[i + 1], tile[i + 1], {b.cols, 1}, b.rows, b.cols);
            from[i] = tile[i + 1];
            steps[i + 1] = {b.cols, 1};
        }
        if (!staged) return compute(from, to, steps, b.rows, b.cols);
        for (Step& s : steps) s = {0, 1};
        compute(from, tile[0], steps, 1, b.rows * b.cols);
        copy_block(tile[0], {b.cols, 1}, to, step(loop, 0), b.rows, b.cols);
    });
}

void binary_steps(const Kernels& k, int op, const Loop& loop, const float* a, const float* b, float* out, const Activation& act, Part part) {
    const BinaryRow row = k.binary_row[op];
    const bool fits = act.fits_epilogue();
    const Activation inside = fits ? act : Activation{};
    const float* const in[] = {a, b};
    elementwise<2>(loop, in, out, part, [&](const float* const* from, float* to, const Step* steps, int64_t rows, int64_t cols) {
        for (int64_t r = 0; r < rows; ++r) {
            float* y = to + r * steps[0].row;
            row(from[0] + r * steps[1].row, steps[1].col, from[1] + r * steps[2].row, steps[2].col, y, cols, inside);
            if (!fits) k.act_row(y, y, cols, act);
        }
    });
}

}  // namespace

void copy_strided(const Strided& from, const float* in, const Strided& to, float* out, Part part) {
    Loop loop = shared_loop({&to, &from}, 0, to.rank);
    const bool transposed = !contiguous_or_repeated(loop.cols().stride[1]);
    if (transposed) choose_rows(loop, 1);
    const int64_t block_cols = transposed ? 64 : 4096;
    const int64_t block_rows = std::max<int64_t>(16, 4096 / std::min(loop.cols().size, block_cols));
    for_blocks(loop, block_rows, block_cols, 64, part, [&](const Block& b) {
        copy_block(in + from.offset + b.offset[1], step(loop, 1), out + to.offset + b.offset[0], step(loop, 0), b.rows, b.cols);
    });
}

void binary(const Kernels& k, Binary op, const Strided& a, const float* pa, const Strided& b, const float* pb, const Strided& to,
            float* out, const Activation& act, Part part) {
    static_assert(static_cast<int>(Binary::minimum) + 1 == kPreluRow && kPreluRow + 1 == kBinaryRows, "the order of Kernels::binary_row");
    binary_steps(k, static_cast<int>(op), shared_loop({&to, &a, &b}, 0, to.rank), pa + a.offset, pb + b.offset, out + to.offset, act, part);
}

void activate(const Kernels& k, const Strided& from, const float* in, const Strided& to, float* out, const Activation& act, Part part) {
    const float* const inputs[] = {in + from.offset};
    elementwise<1>(shared_loop({&to, &from}, 0, to.rank), inputs, out + to.offset, part,
                   [&](const float* const* x, float* y, const Step* steps, int64_t rows, int64_t cols) {
                       for (int64_t r = 0; r < rows; ++r) {
                           const float* row = x[0] + r * steps[1].row;
                           float* to_row = y + r * steps[0].row;
                           if (steps[1].col == 0) {  // repeated
                               std::fill_n(to_row, cols, *row);
                               row = to_row;
                           }
                           k.act_row(row, to_row, cols, act);
                       }
                   });
}

void prelu(const Kernels& k, const Strided& from, const float* in, const std::vector<float>& scale, const Strided& to, float* out, Part part) {
    Strided slope = to;
    slope.stride.fill(0);
    if (scale.size() > 1) slope.stride[1] = 1;
    binary_steps(k, kPreluRow, shared_loop({&to, &from, &slope}, 0, to.rank), in + from.offset, scale.data(), out + to.offset, {}, part);
}

// ---- copies through index maps

namespace {

using Map = const std::vector<int32_t>*;  // null: the identity

struct Run {  // columns [begin, end) of the output from consecutive ones of the input, or the fill value
    int64_t begin, end, from;
};

constexpr int kMaxRuns = 8;

// The map as a few runs; 0 where it has more.
int find_runs(Map map, int64_t size, Run* runs) {
    if (!map) {
        runs[0] = {0, size, 0};
        return 1;
    }
    int count = 0;
    for (int64_t i = 0; i < size; ++i) {
        const int64_t from = (*map)[static_cast<size_t>(i)];
        if (count > 0) {
            Run& last = runs[count - 1];
            if (last.from < 0 ? from < 0 : from == last.from + (i - last.begin)) {
                last.end = i + 1;
                continue;
            }
        }
        if (count == kMaxRuns) return 0;
        runs[count++] = {i, i + 1, from < 0 ? -1 : from};
    }
    return count;
}

// The same as a multiple of the index and a constant; false where it is not.
bool is_affine(const std::vector<int32_t>& map, int64_t& start, int64_t& step) {
    start = map[0];
    step = map.size() > 1 ? int64_t{map[1]} - map[0] : 1;
    for (size_t i = 0; i < map.size(); ++i)
        if (map[i] < 0 || map[i] != start + static_cast<int64_t>(i) * step) return false;
    return true;
}

struct MappedLoop {
    Loop loop;  // operands: output, input
    Map maps[kMaxRank + 3];
    int64_t start = 0;   // of the input, from dimensions that need no loop
    bool inside = true;  // false: all is the fill value
};

// By falling output step; dimensions that need no map merge.
MappedLoop make_mapped_loop(const Strided& from, const IndexMaps& maps, const Strided& to) {
    MappedLoop m;
    Dim dims[kMaxRank];
    Map dim_maps[kMaxRank];
    int count = 0;
    for (int d = 0; d < to.rank; ++d) {
        const size_t i = static_cast<size_t>(d);
        Dim dim{to.size[i], {to.stride[i], from.stride[i], 0}};
        Map map = maps[i].empty() ? nullptr : &maps[i];
        int64_t start = 0, step = 1;
        if (map && is_affine(*map, start, step)) {
            m.start += start * dim.stride[1];
            dim.stride[1] *= step;
            map = nullptr;
        }
        if (dim.size == 1) {  // what is left of its maps is the fill value
            m.inside = m.inside && !map;
            continue;
        }
        int at = count++;
        for (; at > 0 && std::abs(dims[at - 1].stride[0]) < std::abs(dim.stride[0]); --at) {
            dims[at] = dims[at - 1];
            dim_maps[at] = dim_maps[at - 1];
        }
        dims[at] = dim;
        dim_maps[at] = map;
    }
    int merged = 0;
    for (int d = 0; d < count; ++d) {
        if (merged > 0 && !dim_maps[merged - 1] && !dim_maps[d] && merges(dims[merged - 1], dims[d])) {
            const int64_t size = dims[merged - 1].size * dims[d].size;
            dims[merged - 1] = dims[d];
            dims[merged - 1].size = size;
        } else {
            dims[merged] = dims[d];
            dim_maps[merged++] = dim_maps[d];
        }
    }
    Loop& loop = m.loop;
    for (int missing = merged; missing < 2; ++missing) {
        m.maps[loop.rank] = nullptr;
        loop.dim[loop.rank++] = {1, {1, 1, 0}};
    }
    for (int d = 0; d < merged; ++d) {
        m.maps[loop.rank] = dim_maps[d];
        loop.dim[loop.rank++] = dims[d];
    }
    return m;
}

int64_t mapped(Map map, int64_t i) { return map ? (*map)[static_cast<size_t>(i)] : i; }

}  // namespace

void copy_mapped(const Strided& from, const float* in, const IndexMaps& maps, float fill, const Strided& to, float* out, Part part) {
    MappedLoop mapped_loop = make_mapped_loop(from, maps, to);
    Loop& loop = mapped_loop.loop;
    const Map* loop_maps = mapped_loop.maps;
    const Map row_map = loop_maps[loop.rank - 2], col_map = loop_maps[loop.rank - 1];
    Run runs[kMaxRuns];
    const int run_count = find_runs(col_map, loop.cols().size, runs);
    const Step from_step = step(loop, 1), to_step = step(loop, 0);
    // the input's part of a block's offset goes through the maps: operand 2 counts the outer indices
    int64_t outer_size = 1;
    for (int d = loop.rank - 3; d >= 0; --d) {
        loop.dim[d].stride[2] = outer_size;
        outer_size *= loop.dim[d].size;
    }
    const int64_t block_rows = std::max<int64_t>(1, 4096 / std::min<int64_t>(loop.cols().size, 4096));
    for_blocks(loop, block_rows, 4096, 64, part, [&](const Block& b) {
        int64_t start = from.offset + mapped_loop.start, rest = b.offset[2];
        bool inside = mapped_loop.inside;
        for (int d = loop.rank - 3; d >= 0; --d) {
            const int64_t index = mapped(loop_maps[d], rest % loop.dim[d].size);
            rest /= loop.dim[d].size;
            inside = inside && index >= 0;
            start += index * loop.dim[d].stride[1];
        }
        int64_t last = -1;
        for (int64_t r = 0; r < b.rows; ++r) {
            float* row = out + to.offset + b.offset[0] + r * to_step.row;
            const int64_t index = mapped(row_map, b.row + r);
            if (inside && index >= 0 && index == last) {  // enlarging repeats rows
                copy_block(row - to_step.row, to_step, row, to_step, 1, b.cols);
                continue;
            }
            last = index;
            if (!inside || index < 0) {
                for (int64_t c = 0; c < b.cols; ++c) row[c * to_step.col] = fill;
                continue;
            }
            const float* from_row = in + start + index * from_step.row;
            for (int i = 0; i < run_count; ++i) {
                const int64_t begin = std::max(runs[i].begin, b.col), end = std::min(runs[i].end, b.col + b.cols);
                if (begin >= end) continue;
                float* at = row + (begin - b.col) * to_step.col;
                if (runs[i].from < 0) copy_block(&fill, {0, 0}, at, to_step, 1, end - begin);
                else copy_block(from_row + (runs[i].from + begin - runs[i].begin) * from_step.col, from_step, at, to_step, 1, end - begin);
            }
            if (run_count > 0) continue;
            const int32_t* map = col_map->data() + b.col;
            for (int64_t c = 0; c < b.cols; ++c) row[c * to_step.col] = map[c] < 0 ? fill : from_row[map[c] * from_step.col];
        }
    });
}

// ---- reductions, softmax, norms

namespace {

constexpr int64_t kColumns = 128;  // columns that are reduced together
constexpr int64_t kTurned = 32;    // rows of a tile of them

// `count` floats `stride` apart as a row: themselves, or a copy in `buffer`. Longer ones are cut by the caller.
const float* as_row(const float* in, int64_t stride, int64_t count, float* buffer) {
    if (stride == 1) return in;
    for (int64_t i = 0; i < count; ++i) buffer[i] = in[i * stride];
    return buffer;
}

// f(pointer, count): the elements of a line of operand i in rows, which f may not change.
template <class F>
void for_rows(const Loop& line, int i, const float* in, F f) {
    const int64_t stride = line.cols().stride[i], size = line.cols().size;
    for_segments(line, [&](const int64_t* offset) {
        const float* from = in + offset[i];
        if (stride == 1) return f(from, size);
        float buffer[kStaged];
        for (int64_t at = 0; at < size; at += kStaged) {
            const int64_t count = std::min(kStaged, size - at);
            f(as_row(from + at * stride, stride, count, buffer), count);
        }
    });
}

// f(pointer): every element of a line of operand i, in order
template <class F>
void for_each_element(const Loop& line, F f) {
    for_segments(line, [&](const int64_t* offset) {
        int64_t at[kOperands] = {offset[0], offset[1], offset[2]};
        for (int64_t c = 0; c < line.cols().size; ++c) {
            f(at);
            for (int i = 0; i < kOperands; ++i) at[i] += line.cols().stride[i];
        }
    });
}

// Lines lie across each other: one of the kept dimensions has step 1 in the input, the lines do not. Makes it the columns.
bool by_columns(Loop& kept, int i, const Loop& line, int line_i) {
    const int unit = unit_dim(kept, i);
    if (line.cols().stride[line_i] == 1 || unit < 0) return false;
    move_to(kept, unit, kept.rank - 1);
    return true;
}

float reduce_line(const Kernels& k, Reduction kind, const Loop& line, const float* in, double count) {
    if (kind == Reduction::mean || kind == Reduction::sum) {
        double sum = 0.0;
        for_rows(line, 0, in, [&](const float* row, int64_t n) { sum += k.sum_row(row, n); });
        return static_cast<float>(kind == Reduction::mean ? sum / count : sum);
    }
    const bool largest = kind == Reduction::max;
    float best = largest ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
    for_rows(line, 0, in, [&](const float* row, int64_t n) {
        const float v = largest ? k.max_row(row, n) : k.min_row(row, n);
        if (std::isnan(v) || (largest ? v > best : v < best)) best = v;
    });
    return best;
}

void reduce_columns(const Kernels& k, Reduction kind, const Loop& line, const float* in, int64_t cols, double count, float* result) {
    if (kind == Reduction::mean || kind == Reduction::sum) {
        double sum[kColumns] = {};
        for_segments(line, [&](const int64_t* at) { k.sum_columns(in + at[0], line.cols().stride[0], line.cols().size, cols, sum); });
        for (int64_t c = 0; c < cols; ++c) result[c] = static_cast<float>(kind == Reduction::mean ? sum[c] / count : sum[c]);
        return;
    }
    const BinaryRow row = k.binary_row[static_cast<int>(kind == Reduction::max ? Binary::maximum : Binary::minimum)];
    const float infinity = std::numeric_limits<float>::infinity();
    std::fill_n(result, cols, kind == Reduction::max ? -infinity : infinity);
    for_each_element(line, [&](const int64_t* at) { row(result, 1, in + at[0], 1, result, cols, {}); });
}

}  // namespace

void reduce(const Kernels& k, Reduction kind, const Strided& from, const float* in, const Strided& to, float* out, Part part) {
    Loop kept = shared_loop({&to, &from}, 0, to.rank);
    const Loop line = shared_loop({&from}, to.rank, from.rank);
    const double count = static_cast<double>(line.elements());
    const bool columns = by_columns(kept, 1, line, 0);
    const Step from_step = step(kept, 1), to_step = step(kept, 0);
    for_blocks(kept, columns ? 1 : 16, columns ? kColumns : 64, columns ? 16 : 1, part, [&](const Block& b) {
        const float* x = in + from.offset + b.offset[1];
        float* y = out + to.offset + b.offset[0];
        if (columns) {
            float result[kColumns];
            reduce_columns(k, kind, line, x, b.cols, count, result);
            copy_block(result, {0, 1}, y, to_step, 1, b.cols);
            return;
        }
        for (int64_t r = 0; r < b.rows; ++r)
            for (int64_t c = 0; c < b.cols; ++c)
                y[r * to_step.row + c * to_step.col] = reduce_line(k, kind, line, x + r * from_step.row + c * from_step.col, count);
    });
}

namespace {

void softmax_line(const Kernels& k, const float* in, int64_t in_step, float* out, int64_t out_step, int64_t size) {
    const BinaryRow multiply = k.binary_row[static_cast<int>(Binary::mul)];
    if (in_step == 1 && out_step == 1) {
        const float inverse = static_cast<float>(1.0 / k.exp_row(in, k.max_row(in, size), out, size));
        multiply(out, 1, &inverse, 0, out, size, {});
        return;
    }
    float buffer[kStaged], result[kStaged];
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t at = 0; at < size; at += kStaged) {
        const int64_t count = std::min(kStaged, size - at);
        const float v = k.max_row(as_row(in + at * in_step, in_step, count, buffer), count);
        if (v > most || std::isnan(v)) most = v;
    }
    double sum = 0.0;
    for (int64_t at = 0; at < size; at += kStaged) {
        const int64_t count = std::min(kStaged, size - at);
        sum += k.exp_row(as_row(in + at * in_step, in_step, count, buffer), most, result, count);
        copy_block(result, {0, 1}, out + at * out_step, {0, out_step}, 1, count);
    }
    const float inverse = static_cast<float>(1.0 / sum);
    for (int64_t i = 0; i < size; ++i) out[i * out_step] *= inverse;
}

void softmax_columns(const Kernels& k, const float* in, int64_t in_step, float* out, Step to, int64_t size, int64_t cols) {
    float most[kColumns], inverse[kColumns], row[kColumns];
    double sum[kColumns] = {};
    std::fill_n(most, cols, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < size; ++i)
        k.binary_row[static_cast<int>(Binary::maximum)](most, 1, in + i * in_step, 1, most, cols, {});
    for (int64_t i = 0; i < size; ++i) {
        float* y = to.col == 1 ? out + i * to.row : row;
        k.exp_columns(in + i * in_step, most, y, cols, sum);
        if (to.col != 1) copy_block(row, {0, 1}, out + i * to.row, to, 1, cols);
    }
    for (int64_t c = 0; c < cols; ++c) inverse[c] = static_cast<float>(1.0 / sum[c]);
    for (int64_t i = 0; i < size; ++i) {
        float* y = out + i * to.row;
        if (to.col == 1) k.binary_row[static_cast<int>(Binary::mul)](y, 1, inverse, 1, y, cols, {});
        else
            for (int64_t c = 0; c < cols; ++c) y[c * to.col] *= inverse[c];
    }
}

}  // namespace

void softmax(const Kernels& k, const Strided& from, const float* in, const Strided& to, float* out, Part part) {
    const size_t last = static_cast<size_t>(to.rank - 1);
    const Loop line = shared_loop({&to, &from}, to.rank - 1, to.rank);
    Loop kept = shared_loop({&to, &from}, 0, to.rank - 1);
    const int64_t size = to.size[last];
    const bool columns = by_columns(kept, 1, line, 1);
    for_blocks(kept, columns ? 1 : 16, columns ? kColumns : 16, columns ? 16 : 1, part, [&](const Block& b) {
        const float* x = in + from.offset + b.offset[1];
        float* y = out + to.offset + b.offset[0];
        const Step from_step = step(kept, 1), to_step = step(kept, 0);
        if (columns) return softmax_columns(k, x, from.stride[last], y, {to.stride[last], to_step.col}, size, b.cols);
        for (int64_t r = 0; r < b.rows; ++r)
            for (int64_t c = 0; c < b.cols; ++c)
                softmax_line(k, x + r * from_step.row + c * from_step.col, line.cols().stride[1],
                             y + r * to_step.row + c * to_step.col, line.cols().stride[0], size);
    });
}

namespace {

// out = (in - mean) / deviation * scale + bias over lines. Operands: out, in, and the index into scale and bias.
struct Normalize {
    const Kernels& k;
    Loop kept, line;
    const float *scale, *bias;
    double eps;
    const float* in;
    float* out;
    double count = 0;

    const float* at(const float* array, int64_t index) const { return array ? array + index : nullptr; }

    void run(Part part) {
        count = static_cast<double>(line.elements());
        if (by_columns(kept, 1, line, 1)) {
            for_blocks(kept, 1, kColumns, 16, part, [&](const Block& b) { columns(b); });
            return;
        }
        // few lines: every thread finds the mean and deviation of all of them, and writes its share of each
        const int64_t lines = kept.elements();
        const bool together = lines < 2 * part.count && lines % part.count != 0;
        for_blocks(kept, 16, 16, 1, together ? Part{0, 1} : part, [&](const Block& b) {
            for (int64_t r = 0; r < b.rows; ++r)
                for (int64_t c = 0; c < b.cols; ++c) {
                    int64_t offset[kOperands];
                    for (int i = 0; i < kOperands; ++i)
                        offset[i] = b.offset[i] + r * kept.rows().stride[i] + c * kept.cols().stride[i];
                    one(offset, together ? part : Part{0, 1});
                }
        });
    }

    void one(const int64_t* offset, Part part) const {
        const float* x = in + offset[1];
        double sum = 0.0, squares = 0.0;
        for_rows(line, 1, x, [&](const float* row, int64_t n) { sum += k.sum_row(row, n); });
        const double mean = sum / count;
        for_rows(line, 1, x, [&](const float* row, int64_t n) { squares += k.square_row(row, n, mean); });
        const float m = static_cast<float>(mean), factor = static_cast<float>(1.0 / std::sqrt(squares / count + eps));
        const Dim& cols = line.cols();
        const int64_t begin = part.begin(line.elements()), end = part.end(line.elements());
        const bool direct = cols.stride[0] == 1 && cols.stride[1] == 1 && contiguous_or_repeated(cols.stride[2]);
        int64_t first = 0;  // element of the segment's first column
        for_segments(line, [&](const int64_t* at_line) {
            const int64_t c0 = std::max<int64_t>(begin - first, 0), c1 = std::min(end - first, cols.size);
            first += cols.size;
            const float* from = x + at_line[1];
            float* to = out + offset[0] + at_line[0];
            const int64_t index = offset[2] + at_line[2];
            for (int64_t c = c0; c < c1; c += direct ? c1 - c0 : 256) {
                const int64_t n = direct ? c1 - c : std::min<int64_t>(256, c1 - c), param = index + c * cols.stride[2];
                if (direct) {
                    k.norm_row(from + c, to + c, n, m, factor, at(scale, param), at(bias, param), cols.stride[2]);
                    continue;
                }
                float rows[4][256];
                const float* row = as_row(from + c * cols.stride[1], cols.stride[1], n, rows[0]);
                const float* s = scale ? as_row(scale + param, cols.stride[2], n, rows[1]) : nullptr;
                const float* b = bias ? as_row(bias + param, cols.stride[2], n, rows[2]) : nullptr;
                k.norm_row(row, rows[3], n, m, factor, s, b, 1);
                copy_block(rows[3], {0, 1}, to + c * cols.stride[0], {0, cols.stride[0]}, 1, n);
            }
        });
    }

    void columns(const Block& b) const {
        const float* x = in + b.offset[1];
        float* y = out + b.offset[0];
        double sum[kColumns] = {}, squares[kColumns] = {};
        float mean[kColumns], factor[kColumns];
        const int64_t row_step = line.cols().stride[1], rows = line.cols().size;
        for_segments(line, [&](const int64_t* at_line) { k.sum_columns(x + at_line[1], row_step, rows, b.cols, sum); });
        for (int64_t c = 0; c < b.cols; ++c) sum[c] /= count;
        for_segments(line, [&](const int64_t* at_line) { k.square_columns(x + at_line[1], row_step, rows, sum, b.cols, squares); });
        for (int64_t c = 0; c < b.cols; ++c) {
            mean[c] = static_cast<float>(sum[c]);
            factor[c] = static_cast<float>(1.0 / std::sqrt(squares[c] / count + eps));
        }
        // straight to the output where its columns lie together, else through a tile, which is then turned
        const Step to_step{kept.cols().stride[0], line.cols().stride[0]};
        const int64_t param_col = kept.cols().stride[2], param_row = line.cols().stride[2];
        const bool direct = to_step.row == 1 && param_col == 0;
        alignas(64) float tile[kTurned * kColumns];
        for_segments(line, [&](const int64_t* at_line) {
            for (int64_t first = 0; first < rows; first += kTurned) {
                const int64_t n = std::min(kTurned, rows - first);
                const float* from = x + at_line[1] + first * row_step;
                float* to = y + at_line[0] + first * to_step.col;
                for (int64_t r = 0; r < n; ++r) {
                    const int64_t index = b.offset[2] + at_line[2] + (first + r) * param_row;
                    float* row = direct ? to + r * to_step.col : tile + r * kColumns;
                    const bool alike = param_col == 0;
                    k.norm_columns(from + r * row_step, row, b.cols, mean, factor, scale && alike ? scale[index] : 1.0f,
                                   bias && alike ? bias[index] : 0.0f);
                    for (int64_t c = 0; c < b.cols && !alike; ++c)
                        row[c] = row[c] * (scale ? scale[index + c * param_col] : 1.0f) + (bias ? bias[index + c * param_col] : 0.0f);
                }
                if (!direct) copy_block(tile, {1, kColumns}, to, to_step, b.cols, n);
            }
        });
    }
};

}  // namespace

void layer_norm(const Kernels& k, int axes, double eps, const float* scale, const float* bias, const Strided& from, const float* in,
                const Strided& to, float* out, Part part) {
    Strided index = to;
    int64_t stride = 1;
    for (int d = to.rank - 1; d >= 0; --d) {
        const size_t i = static_cast<size_t>(d);
        index.stride[i] = d >= to.rank - axes ? stride : 0;
        stride *= to.size[i];
    }
    const int kept = to.rank - axes;
    Normalize{k, shared_loop({&to, &from, &index}, 0, kept), shared_loop({&to, &from, &index}, kept, to.rank, 1), scale, bias, eps,
              in + from.offset, out + to.offset}.run(part);
}

void group_norm(const Kernels& k, int64_t groups, double eps, const float* scale, const float* bias, const Strided& from,
                const float* in, const Strided& to, float* out, Part part) {
    const int64_t channels = to.size[1] / groups;
    Dim kept[2], line[kMaxRank];
    kept[0] = {to.size[0], {to.stride[0], from.stride[0], 0}};
    kept[1] = {groups, {to.stride[1] * channels, from.stride[1] * channels, channels}};
    int count = 0;
    line[count++] = {channels, {to.stride[1], from.stride[1], 1}};
    for (int d = 2; d < to.rank; ++d) {
        const size_t i = static_cast<size_t>(d);
        line[count++] = {to.size[i], {to.stride[i], from.stride[i], 0}};
    }
    Normalize{k, make_loop(kept, 2), make_loop(line, count, 1), scale, bias, eps, in + from.offset, out + to.offset}.run(part);
}

// ---- products

namespace {

constexpr int64_t kPanel = 64;      // columns of b that are packed together
constexpr int64_t kDepth = 512;     // and their rows
constexpr int64_t kTileRows = 48;   // of a result that does not lie in rows

struct Matrix {
    int64_t rows, cols, row, col;  // sizes and strides
};
Matrix last_two(const Strided& s) {
    const size_t r = static_cast<size_t>(s.rank - 2);
    return {s.size[r], s.size[r + 1], s.stride[r], s.stride[r + 1]};
}
Matrix transposed(const Matrix& m) { return {m.cols, m.rows, m.col, m.row}; }

// Rows [0, depth) of `cols` columns, each row kPanel floats, zeros after the last column.
void pack_panel(const float* b, const Matrix& mb, int64_t depth, int64_t cols, float* panel) {
    const int64_t padded = divide_up(cols, kLanes) * kLanes;
    copy_block(b, {mb.row, mb.col}, panel, {kPanel, 1}, depth, cols);
    if (padded > cols)
        for (int64_t k = 0; k < depth; ++k) std::fill_n(panel + k * kPanel + cols, padded - cols, 0.0f);
}

}  // namespace

int64_t matmul_scratch(const Strided& a, const Strided&) {
    return std::min(last_two(a).cols, kDepth) * kPanel;
}

void matmul(const Kernels& k, const Strided& a, const float* pa, const Strided& b, const float* pb, const Strided& to, float* out,
            float* scratch, Part part) {
    Matrix ma = last_two(a), mb = last_two(b), mc = last_two(to);
    const Strided *left = &a, *right = &b;
    pa += a.offset;
    pb += b.offset;
    out += to.offset;
    if (mc.col != 1 && mc.row == 1) {  // the transposed product lies in rows
        const Matrix turned = transposed(ma);
        ma = transposed(mb);
        mb = turned;
        mc = transposed(mc);
        std::swap(left, right);
        std::swap(pa, pb);
    }
    const int64_t m = mc.rows, n = mc.cols, depth = ma.cols;
    int64_t batch = 1;
    for (int d = 0; d < to.rank - 2; ++d) batch *= to.size[static_cast<size_t>(d)];
    const auto offset_of = [&](const Strided& s, int64_t index) {
        int64_t offset = 0;
        for (int d = to.rank - 3; d >= 0; --d) {
            const size_t i = static_cast<size_t>(d);
            offset += index % to.size[i] * s.stride[i];
            index /= to.size[i];
        }
        return offset;
    };
    // one or two rows against rows of b: dot products, nothing is packed
    if (m <= 2 && mb.row == 1 && mb.col == depth && ma.col == 1 && mc.col == 1) {
        const int64_t cuts = divide_up(n, 16), units = batch * cuts;
        for (int64_t u = part.begin(units); u < part.end(units); ++u) {
            const int64_t index = u / cuts, first = u % cuts * 16, end = std::min(n, first + 16);
            for (int64_t r = 0; r < m; ++r) {
                DotJob job{};
                job.x = pa + offset_of(*left, index) + r * ma.row;
                job.out = out + offset_of(to, index) + r * mc.row;
                job.row_begin = first;
                job.row_end = end;
                job.value = pb + offset_of(*right, index);
                job.cols = depth;
                k.dot_dense(job);
            }
        }
        return;
    }
    // units: images, panels of columns, blocks of rows (one, unless there are few panels for the threads)
    const int64_t panels = divide_up(n, kPanel), six = divide_up(m, 6);
    const int64_t cuts = part.count == 1 ? 1 : std::clamp<int64_t>(divide_up(4 * part.count, batch * panels), 1, six);
    const int64_t units = batch * panels * cuts, stop = part.end(units);
    for (int64_t u = part.begin(units); u < stop;) {
        const int64_t index = u / cuts / panels, col = u / cuts % panels * kPanel, cols = std::min(kPanel, n - col);
        const int64_t next = std::min(stop, (u / cuts + 1) * cuts);
        const int64_t row0 = six * (u % cuts) / cuts * 6, row1 = std::min(m, six * (next - u / cuts * cuts) / cuts * 6);
        u = next;
        const float* left_at = pa + offset_of(*left, index);
        const float* right_at = pb + offset_of(*right, index) + col * mb.col;
        float* out_at = out + offset_of(to, index) + col * mc.col;
        const bool whole = mb.col == 1 && cols % kLanes == 0;  // read where it is
        for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
            const int64_t slice = std::min(kDepth, depth - k0);
            const float* panel = right_at + k0 * mb.row;
            if (!whole) {
                pack_panel(panel, mb, slice, cols, scratch);
                panel = scratch;
            }
            GemmJob job{left_at + row0 * ma.row + k0 * ma.col, ma.row, ma.col, panel, whole ? mb.row : kPanel, out_at + row0 * mc.row,
                        mc.row, row1 - row0, slice, cols, k0 > 0};
            if (mc.col == 1) {
                k.gemm(job);
                continue;
            }
            for (int64_t row = row0; row < row1; row += kTileRows) {
                alignas(64) float tile[kTileRows * kPanel];
                job.rows = std::min(kTileRows, row1 - row);
                job.a = left_at + row * ma.row + k0 * ma.col;
                job.out = tile;
                job.out_row = kPanel;
                float* at = out_at + row * mc.row;
                if (job.accumulate) copy_block(at, {mc.row, mc.col}, tile, {kPanel, 1}, job.rows, cols);
                k.gemm(job);
                copy_block(tile, {kPanel, 1}, at, {mc.row, mc.col}, job.rows, cols);
            }
        }
    }
}

// ---- bilinear interpolation

namespace {

Bilinear::Axis bilinear_axis(int64_t in, int64_t out, double scale, bool align_corners) {
    Bilinear::Axis axis;
    float step = 0.0f;  // as torch's area_pixel_compute_scale
    if (align_corners) step = out > 1 ? static_cast<float>(in - 1) / static_cast<float>(out - 1) : 0.0f;
    else step = scale > 0.0 ? static_cast<float>(1.0 / scale) : static_cast<float>(in) / static_cast<float>(out);
    for (int64_t i = 0; i < out; ++i) {
        int64_t low = i, high = i;
        float weight = 0.0f;
        if (in != out) {  // torch copies where the sizes are equal, whatever the scale
            const float at = static_cast<float>(i);
            const float source = align_corners ? step * at : std::max(step * (at + 0.5f) - 0.5f, 0.0f);
            low = std::min(static_cast<int64_t>(source), in - 1);
            high = std::min(low + 1, in - 1);
            weight = std::clamp(source - static_cast<float>(low), 0.0f, 1.0f);
        }
        axis.low.push_back(static_cast<int32_t>(low));
        axis.high.push_back(static_cast<int32_t>(high));
        axis.weight.push_back(weight);
    }
    return axis;
}

}  // namespace

Bilinear bilinear_axes(int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, double scale_h, double scale_w, bool align_corners) {
    return {bilinear_axis(in_h, out_h, scale_h, align_corners), bilinear_axis(in_w, out_w, scale_w, align_corners)};
}

void resize_bilinear(const Kernels& k, const Bilinear& axes, const Strided& from, const float* in, const Strided& to, float* out, Part part) {
    const int64_t height = to.size[2], width = to.size[3], planes = to.size[0] * to.size[1];
    constexpr int64_t kLine = 1024;  // columns of a row that are interpolated together
    const int64_t cuts = part.count == 1 ? 1 : std::clamp<int64_t>(divide_up(4 * part.count, planes), 1, height);
    const int64_t units = planes * cuts;
    for (int64_t u = part.begin(units); u < part.end(units); ++u) {
        const int64_t plane = u / cuts, n = plane / to.size[1], c = plane % to.size[1];
        const float* x = in + from.offset + n * from.stride[0] + c * from.stride[1];
        float* y = out + to.offset + n * to.stride[0] + c * to.stride[1];
        const int64_t row0 = height * (u % cuts) / cuts, row1 = height * (u % cuts + 1) / cuts;
        for (int64_t col = 0; col < width; col += kLine) {
            const size_t first = static_cast<size_t>(col);
            const int64_t cols = std::min(kLine, width - col);
            alignas(64) float line[3][kLine];
            int32_t held[2] = {-1, -1};  // the input rows that the first two lines hold, interpolated along the row
            const auto line_of = [&](int32_t row, int32_t other) -> const float* {
                for (int i = 0; i < 2; ++i)
                    if (held[i] == row) return line[i];
                const int slot = held[0] == other ? 1 : 0;
                held[slot] = row;
                const float* at = x + row * from.stride[2];
                const int32_t *low = axes.x.low.data() + first, *high = axes.x.high.data() + first;
                const float* weight = axes.x.weight.data() + first;
                if (from.stride[3] == 1) {
                    k.lerp_gather(at, low, high, weight, line[slot], cols);
                } else {
                    for (int64_t i = 0; i < cols; ++i)
                        line[slot][i] = at[low[i] * from.stride[3]] * (1.0f - weight[i]) + at[high[i] * from.stride[3]] * weight[i];
                }
                return line[slot];
            };
            for (int64_t row = row0; row < row1; ++row) {
                const size_t r = static_cast<size_t>(row);
                const int32_t low = axes.y.low[r], high = axes.y.high[r];
                const float* upper = line_of(low, high);
                const float* lower = line_of(high, low);
                float* to_row = y + row * to.stride[2] + col * to.stride[3];
                const bool direct = to.stride[3] == 1;
                k.lerp_row(upper, lower, axes.y.weight[r], direct ? to_row : line[2], cols);
                if (!direct) copy_block(line[2], {0, 1}, to_row, {0, to.stride[3]}, 1, cols);
            }
        }
    }
}

}  // namespace sparseprune
