// Sparse and dense SpMM over tiles of pixels. Included inside an unnamed namespace, after one vec_*.h.
// in: packed input, reached through float offsets; out: (rows, plane). T: vectors a tile, U: accumulators a vector.
#pragma once

// For what is called from many places: a V that is no register would travel through memory.
#define SPARSEPRUNE_INLINE inline __attribute__((always_inline))

// The activations that fit the epilogue; ifs rather than a switch, which becomes an indirect jump.
inline V activate(V v, const Activation& act) {
    if (act.kind == Act::none) return v;
    if (act.kind == Act::relu) return max_nan(zero(), v);
    if (act.kind == Act::leaky_relu) return max_nan(mul(set1(act.alpha), v), v);
    const bool six = act.kind == Act::relu6;
    return min_nan(set1(six ? 6.0f : act.beta), max_nan(set1(six ? 0.0f : act.alpha), v));
}

// Where a tile's results go. A copy, so that the compiler need not read the job again after every store.
struct Target {
    float* out;
    const float *bias, *residual;
    int64_t plane, residual_plane;
    const uint16_t* masks;
    Activation act;
};
inline Target target_of(const SpmmJob& job, const Tile& tile) {
    return {job.out + tile.out, job.bias, job.residual ? job.residual + tile.out : nullptr, job.plane, job.residual_plane,
            job.masks + tile.masks, job.act};
}

// What a row's sum starts from.
inline V bias_of(const Target& to, int64_t row) { return to.bias ? set1(to.bias[row]) : zero(); }

// Residual, activation; lanes that are no pixel become zero, which later readers rely on.
template <int T>
inline void store_row(const Target& to, int64_t row, V* v) {
    float* out = to.out + row * to.plane;
    if (to.residual) {
        const float* residual = to.residual + row * to.residual_plane;
        for (int t = 0; t < T; ++t) v[t] = add(v[t], loadu(residual + t * kLanes));
    }
    if (to.act.kind == Act::relu) {
        for (int t = 0; t < T; ++t) storeu(out + t * kLanes, keep_positive(v[t], to.masks[t]));
        return;
    }
    if (to.act.kind != Act::none) {
        for (int t = 0; t < T; ++t) v[t] = activate(v[t], to.act);
    }
    for (int t = 0; t < T; ++t) storeu(out + t * kLanes, keep_lanes(v[t], to.masks[t]));
}

inline int64_t offset_of(const Entry& e) { return e.offset; }
inline int64_t offset_of(const NarrowEntry& e) { return static_cast<int64_t>(e.line) * kLanes; }

template <class E>
inline const E* entries_of(const SpmmJob& job);
template <>
inline const Entry* entries_of<Entry>(const SpmmJob& job) { return job.entries; }
template <>
inline const NarrowEntry* entries_of<NarrowEntry>(const SpmmJob& job) { return job.narrow; }

// first + the sum of entries [e, end) into acc[T], U independent chains to hide the latency of the FMA
template <int T, int U, class E>
inline void accumulate(const float* in, const E* e, const E* end, V first, V* acc) {
    V part[U][T];
    for (int u = 0; u < U; ++u)
        for (int t = 0; t < T; ++t) part[u][t] = u ? zero() : first;
    for (; e < end; e += U) {  // their number is a multiple of U
        for (int u = 0; u < U; ++u) {
            const float* p = in + offset_of(e[u]);
            const V w = set1(e[u].value);
            for (int t = 0; t < T; ++t) part[u][t] = fma(w, loadu(p + t * kLanes), part[u][t]);
        }
    }
    for (int t = 0; t < T; ++t) {
        acc[t] = part[0][t];
        if (U == 2) acc[t] = add(part[0][t], part[U - 1][t]);
        if (U == 4) acc[t] = add(add(part[0][t], part[1 % U][t]), add(part[2 % U][t], part[U - 1][t]));
    }
}

template <int T, int U, class E>
void single_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    const E* entries = entries_of<E>(job);
    const Target to = target_of(job, tile);
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
        V acc[T];
        accumulate<T, U>(in, entries + job.start[row], entries + job.start[row + 1], bias_of(to, row), acc);
        store_row<T>(to, row, acc);
    }
}

// Adds acc shifted by dx lanes along each row of pixels; zeros come in at the row's ends.
template <int T>
inline void add_shifted(V* out, const V* acc, int dx, const uint16_t* edges) {
    const Shift s = make_shift(dx);
    for (int t = 0; t < T; ++t) {
        V neighbour = zero();
        if (dx > 0 && t + 1 < T) neighbour = keep_lanes(acc[t + 1 < T ? t + 1 : t], edges[t + 1]);
        if (dx < 0 && t > 0) neighbour = keep_lanes(acc[t > 0 ? t - 1 : 0], edges[t]);
        out[t] = add(out[t], shift_lanes(acc[t], neighbour, s, dx));
    }
}

// One aligned load for each kept weight and vector: the taps of one horizontal shift are summed first, then moved sideways.
template <int T, int U, class E>
void shifted_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    const E* entries = entries_of<E>(job);
    const Target to = target_of(job, tile);
    const int groups = job.groups;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
        const int64_t* start = job.start + row * groups;
        V out[T];
        accumulate<T, U>(in, entries + start[0], entries + start[1], bias_of(to, row), out);  // group 0 has shift 0
        for (int g = 1; g < groups; ++g) {
            if (start[g] == start[g + 1]) continue;
            V acc[T];
            accumulate<T, U>(in, entries + start[g], entries + start[g + 1], zero(), acc);
            add_shifted<T>(out, acc, job.shifts[g], job.row_edges);
        }
        store_row<T>(to, row, out);
    }
}

// The same over a part of a row, where a whole one has too many vectors: L and R neighbours are summed too, for their lanes.
template <int T, int L, int R, class E>
void part_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    const E* entries = entries_of<E>(job);
    const Target to = target_of(job, tile);
    const int groups = job.groups;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
        const int64_t* start = job.start + row * groups;
        V out[T];
        accumulate<T, 1>(in, entries + start[0], entries + start[1], bias_of(to, row), out);
        for (int g = 1; g < groups; ++g) {
            if (start[g] == start[g + 1]) continue;
            V acc[T + 2];  // acc[1] is of the tile's first vector
            acc[0] = acc[T + 1] = zero();
            accumulate<L + T + R, 1>(in - L * kLanes, entries + start[g], entries + start[g + 1], zero(), acc + 1 - L);
            const int dx = job.shifts[g];
            const Shift s = make_shift(dx);
            for (int t = 0; t < T; ++t) out[t] = add(out[t], shift_lanes(acc[t + 1], acc[dx > 0 ? t + 2 : t], s, dx));
        }
        store_row<T>(to, row, out);
    }
}

// The same over a whole flat plane, one group a tap: what a tap would read outside the image is masked.
template <int T, int U, class E>
void tap_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    const E* entries = entries_of<E>(job);
    const Target to = target_of(job, tile);
    const int groups = job.groups;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
        const int64_t* start = job.start + row * groups;
        V out[T];
        accumulate<T, U>(in, entries + start[0], entries + start[1], bias_of(to, row), out);
        for (int g = 1; g < groups; ++g) {
            if (start[g] == start[g + 1]) continue;
            V acc[T];
            accumulate<T, U>(in, entries + start[g], entries + start[g + 1], zero(), acc);
            const int dx = job.shifts[g];
            const Shift s = make_shift(dx);
            const uint16_t* masks = job.tap_masks + g * T;
            for (int t = 0; t < T; ++t) {
                V neighbour = zero();
                if (dx > 0 && t + 1 < T) neighbour = acc[t + 1 < T ? t + 1 : t];
                if (dx < 0 && t > 0) neighbour = acc[t > 0 ? t - 1 : 0];
                out[t] = add(out[t], keep_lanes(shift_lanes(acc[t], neighbour, s, dx), masks[t]));
            }
        }
        store_row<T>(to, row, out);
    }
}

// Four rows, columns of one mask: a loaded vector serves every row that keeps the column.
template <int T, int M>
SPARSEPRUNE_INLINE const int32_t* masked_columns(const float* in, const int32_t* word, int count, V (*acc)[T]) {
    for (int i = 0; i < count; ++i) {
        const float* p = in + *word++;
        V x[T];
        for (int t = 0; t < T; ++t) x[t] = loadu(p + t * kLanes);
        for (int r = 0; r < 4; ++r) {
            if (!((M >> r) & 1)) continue;
            float value;
            __builtin_memcpy(&value, word++, 4);
            const V w = set1(value);
            for (int t = 0; t < T; ++t) acc[r][t] = fma(w, x[t], acc[r][t]);
        }
    }
    return word;
}

template <int T>
SPARSEPRUNE_INLINE void masked_sums(const float* in, const int32_t* word, V (*acc)[T]) {
    while (const int32_t head = *word++) {
        const int count = head >> 4;
        switch (head & 15) {
#define SPARSEPRUNE_MASK(m) \
    case m: word = masked_columns<T, m>(in, word, count, acc); break;
            SPARSEPRUNE_MASK(1) SPARSEPRUNE_MASK(2) SPARSEPRUNE_MASK(3) SPARSEPRUNE_MASK(4) SPARSEPRUNE_MASK(5)
            SPARSEPRUNE_MASK(6) SPARSEPRUNE_MASK(7) SPARSEPRUNE_MASK(8) SPARSEPRUNE_MASK(9) SPARSEPRUNE_MASK(10)
            SPARSEPRUNE_MASK(11) SPARSEPRUNE_MASK(12) SPARSEPRUNE_MASK(13) SPARSEPRUNE_MASK(14) SPARSEPRUNE_MASK(15)
#undef SPARSEPRUNE_MASK
            default: break;
        }
    }
}

// Block of columns by block; the sums wait in the output.
template <int T>
void masked_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    const Target to = target_of(job, tile);
    for (int64_t block = 0; block < job.stream_blocks; ++block) {
        const int64_t* start = job.stream_start + block * job.stream_groups;
        for (int64_t row = job.row_begin; row < job.row_end; row += 4) {
            V acc[4][T];
            for (int r = 0; r < 4; ++r) {
                const int64_t at = row + r < job.row_end ? row + r : row;
                const V first = block ? zero() : bias_of(to, at);
                for (int t = 0; t < T; ++t) acc[r][t] = block ? loadu(to.out + at * to.plane + t * kLanes) : first;
            }
            masked_sums<T>(in, job.stream + start[row / 4], acc);
            for (int r = 0; r < 4 && row + r < job.row_end; ++r) {
                if (block + 1 == job.stream_blocks) {
                    store_row<T>(to, row + r, acc[r]);
                } else {
                    for (int t = 0; t < T; ++t) storeu(to.out + (row + r) * to.plane + t * kLanes, acc[r][t]);
                }
            }
        }
    }
}

template <int T>
void dense_rows(const SpmmJob& job, const Tile& tile) {
    constexpr int R = kDenseRows;
    const Target to = target_of(job, tile);
    const int64_t blocks_per_group = (job.dense_rows_per_group + R - 1) / R;
    int64_t row = job.row_begin;
    while (row < job.row_end) {
        const int64_t group = row / job.dense_rows_per_group, in_group = row % job.dense_rows_per_group;
        const int64_t block = group * blocks_per_group + in_group / R;
        const float* in = job.in + tile.in + group * job.dense_group_offset;
        const float* w = job.dense + block * job.dense_cols * R;
        int64_t end = (group + 1) * job.dense_rows_per_group;
        if (end > row + R) end = row + R;
        if (end > job.row_end) end = job.row_end;
        V acc[R][T];
        for (int r = 0; r < R; ++r) {
            const V first = row + r < end ? bias_of(to, row + r) : zero();
            for (int t = 0; t < T; ++t) acc[r][t] = first;
        }
        for (int64_t k = 0; k < job.dense_cols; ++k, w += R) {
            const float* p = in + job.dense_offsets[k];
            V x[T];
            for (int t = 0; t < T; ++t) x[t] = loadu(p + t * kLanes);
            for (int r = 0; r < R; ++r) {
                const V wr = set1(w[r]);
                for (int t = 0; t < T; ++t) acc[r][t] = fma(wr, x[t], acc[r][t]);
            }
        }
        for (int r = 0; r < R && row + r < end; ++r)
            store_row<T>(to, row + r, acc[r]);
        row = end;
    }
}

using TileKernel = void (*)(const SpmmJob&, const Tile&);

#define SPARSEPRUNE_UP_TO(most, T, ...) (T <= most ? __VA_ARGS__ : nullptr)
#define SPARSEPRUNE_SINGLE(name, most, T, U, E) SPARSEPRUNE_UP_TO(most, T, name<(T <= most ? T : 1), U, E>)
#define SPARSEPRUNE_FOUR(name, most, U, E) \
    SPARSEPRUNE_SINGLE(name, most, 1, U, E), SPARSEPRUNE_SINGLE(name, most, 2, U, E), SPARSEPRUNE_SINGLE(name, most, 3, U, E), \
        SPARSEPRUNE_SINGLE(name, most, 4, U, E)
#define SPARSEPRUNE_FOURTEEN(name, most, E) \
    SPARSEPRUNE_FOUR(name, most, 1, E), SPARSEPRUNE_SINGLE(name, most, 5, 1, E), SPARSEPRUNE_SINGLE(name, most, 6, 1, E), \
        SPARSEPRUNE_SINGLE(name, most, 7, 1, E), SPARSEPRUNE_SINGLE(name, most, 8, 1, E), SPARSEPRUNE_SINGLE(name, most, 9, 1, E), \
        SPARSEPRUNE_SINGLE(name, most, 10, 1, E), SPARSEPRUNE_SINGLE(name, most, 11, 1, E), SPARSEPRUNE_SINGLE(name, most, 12, 1, E), \
        SPARSEPRUNE_SINGLE(name, most, 13, 1, E), SPARSEPRUNE_SINGLE(name, most, 14, 1, E)

// Tables by (unroll, vectors): one row of fourteen for unroll 1, four each for 2 and 4.
template <class E>
inline TileKernel single_kernel(const SpmmJob& job, int vectors, int sides) {
    static constexpr TileKernel plain[] = {SPARSEPRUNE_FOURTEEN(single_rows, kMaxSingle, E)};
    static constexpr TileKernel plain2[] = {SPARSEPRUNE_FOUR(single_rows, kMaxSingle, 2, E)};
    static constexpr TileKernel plain4[] = {SPARSEPRUNE_FOUR(single_rows, kMaxSingle, 4, E)};
    static constexpr TileKernel shifted[] = {SPARSEPRUNE_FOURTEEN(shifted_rows, kMaxShift, E)};
    static constexpr TileKernel taps[] = {SPARSEPRUNE_FOURTEEN(tap_rows, kMaxShift, E)};
    static constexpr TileKernel taps2[] = {SPARSEPRUNE_FOUR(tap_rows, kMaxShift, 2, E)};
    static constexpr TileKernel taps4[] = {SPARSEPRUNE_FOUR(tap_rows, kMaxShift, 4, E)};
#define SPARSEPRUNE_PART(T) \
    SPARSEPRUNE_UP_TO(kMaxPart, T, part_rows<(T <= kMaxPart ? T : 1), 0, 0, E>), SPARSEPRUNE_UP_TO(kMaxPart, T, part_rows<(T <= kMaxPart ? T : 1), 1, 0, E>), \
        SPARSEPRUNE_UP_TO(kMaxPart, T, part_rows<(T <= kMaxPart ? T : 1), 0, 1, E>), SPARSEPRUNE_UP_TO(kMaxPart, T, part_rows<(T <= kMaxPart ? T : 1), 1, 1, E>)
    static constexpr TileKernel part[] = {SPARSEPRUNE_PART(1), SPARSEPRUNE_PART(2), SPARSEPRUNE_PART(3), SPARSEPRUNE_PART(4),
                                          SPARSEPRUNE_PART(5), SPARSEPRUNE_PART(6), SPARSEPRUNE_PART(7), SPARSEPRUNE_PART(8)};
#undef SPARSEPRUNE_PART
    if (sides & kInRow) return part[(vectors - 1) * 4 + (sides & (kLeft | kRight))];
    if (job.tap_masks) return (job.unroll == 4 ? taps4 : job.unroll == 2 ? taps2 : taps)[vectors - 1];
    if (job.groups > 1) return shifted[vectors - 1];
    return (job.unroll == 4 ? plain4 : job.unroll == 2 ? plain2 : plain)[vectors - 1];
}

void run_single(const SpmmJob& job) {
    for (int64_t i = 0; i < job.tile_count; ++i) {
        const Tile& tile = job.tiles[i];
        if (!job.narrow) {
            single_kernel<Entry>(job, tile.count, tile.sides)(job, tile);
            continue;
        }
        Tile window = tile;
        window.in += job.narrow_base;
        single_kernel<NarrowEntry>(job, tile.count, tile.sides)(job, window);
    }
}

#define SPARSEPRUNE_UP_TO1(name, most, T) (T <= most ? name<(T <= most ? T : 1)> : nullptr)

void run_masked(const SpmmJob& job) {
    static constexpr TileKernel table[] = {
        SPARSEPRUNE_UP_TO1(masked_rows, kMaxMasked, 1), SPARSEPRUNE_UP_TO1(masked_rows, kMaxMasked, 2),
        SPARSEPRUNE_UP_TO1(masked_rows, kMaxMasked, 3), SPARSEPRUNE_UP_TO1(masked_rows, kMaxMasked, 4),
        SPARSEPRUNE_UP_TO1(masked_rows, kMaxMasked, 5)};
    for (int64_t i = 0; i < job.tile_count; ++i) table[job.tiles[i].count - 1](job, job.tiles[i]);
}

void run_dense(const SpmmJob& job) {
    static constexpr TileKernel table[] = {SPARSEPRUNE_UP_TO1(dense_rows, kMaxDense, 1),
                                           SPARSEPRUNE_UP_TO1(dense_rows, kMaxDense, 2),
                                           SPARSEPRUNE_UP_TO1(dense_rows, kMaxDense, 3)};
    for (int64_t i = 0; i < job.tile_count; ++i) table[job.tiles[i].count - 1](job, job.tiles[i]);
}

inline float finish_scalar(float v, int64_t row, const float* bias, const float* residual, const Activation& act) {
    if (bias) v += bias[row];
    if (residual) v += residual[row];
    if (act.kind == Act::none) return v;
    if (act.kind == Act::relu) return v < 0.0f ? 0.0f : v;
    if (act.kind == Act::leaky_relu) return v < act.alpha * v ? act.alpha * v : v;
    const float low = act.kind == Act::relu6 ? 0.0f : act.alpha, high = act.kind == Act::relu6 ? 6.0f : act.beta;
    const float raised = v < low ? low : v;
    return high < raised ? high : raised;
}

template <class Column>
void dot_rows(const DotJob& job, const Column* col) {
    const float *value = job.value, *x = job.x;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
        int64_t i = job.start[row];
        const int64_t end = job.start[row + 1];
        V acc = zero(), acc2 = zero();
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
            acc = fma(loadu(value + i), gather(x, col + i), acc);
            acc2 = fma(loadu(value + i + kLanes), gather(x, col + i + kLanes), acc2);
        }
        for (; i < end; i += kLanes) {  // beyond the end are the next row's columns, or the padding
            const uint16_t lanes = end - i >= kLanes ? 0xFFFF : static_cast<uint16_t>((1u << (end - i)) - 1u);
            acc = fma(load_lanes(value + i, lanes), keep_lanes(gather(x, col + i), lanes), acc);
        }
        job.out[row] = finish_scalar(sum_lanes(add(acc, acc2)), row, job.bias, job.residual, job.act);
    }
}

void dot_sparse(const DotJob& job) {
    if (job.col16) dot_rows(job, job.col16);
    else dot_rows(job, job.col32);
}

// R rows at once: as many streams from memory, and the input is loaded once.
template <int R>
inline void dot_block(const DotJob& job, int64_t row) {
    const float *w = job.value + row * job.cols, *x = job.x;
    V acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
    int64_t i = 0;
    for (; i + 2 * kLanes <= job.cols; i += 2 * kLanes)
        for (int u = 0; u < 2; ++u) {
            const V in = loadu(x + i + u * kLanes);
            for (int r = 0; r < R; ++r) acc[r][u] = fma(loadu(w + r * job.cols + i + u * kLanes), in, acc[r][u]);
        }
    for (int r = 0; r < R; ++r) {
        float sum = sum_lanes(add(acc[r][0], acc[r][1]));
        for (int64_t c = i; c < job.cols; ++c) sum += w[r * job.cols + c] * x[c];
        job.out[row + r] = finish_scalar(sum, row + r, job.bias, job.residual, job.act);
    }
}

void dot_dense(const DotJob& job) {
    int64_t row = job.row_begin;
    for (; row + 4 <= job.row_end; row += 4) dot_block<4>(job, row);
    for (; row < job.row_end; ++row) dot_block<1>(job, row);
}
