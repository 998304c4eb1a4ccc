// Sparse and dense SpMM over tiles of pixels. Included inside an unnamed namespace, after one vec_*.h.
// in: packed input, reached through float offsets; out: (rows, plane). T: vectors a tile, U: accumulators a vector.
#pragma once

inline V activate(V v, KernelAct act) {
    if (act != KernelAct::none) v = max_nan(zero(), v);
    if (act == KernelAct::relu6) v = min_nan(set1(6.0f), v);
    return v;
}

// Bias, residual, activation; lanes that are no pixel become zero, which later readers rely on.
inline void store_vector(const SpmmJob& job, const Tile& tile, int64_t row, int t, V v) {
    const int64_t at = row * job.plane + tile.out + t * kLanes;
    if (job.bias) v = add(v, set1(job.bias[row]));
    if (job.residual) v = add(v, loadu(job.residual + at));
    v = keep_lanes(activate(v, job.act), job.masks[tile.masks + t]);
    storeu(job.out + at, v);
}

// sum of entries [e, end) into acc[T], U independent chains to hide the latency of the FMA
template <int T, int U>
inline void accumulate(const float* in, const Entry* e, const Entry* end, V* acc) {
    V part[U][T];
    for (int u = 0; u < U; ++u)
        for (int t = 0; t < T; ++t) part[u][t] = zero();
    for (; e + U <= end; e += U) {
        for (int u = 0; u < U; ++u) {
            const float* p = in + e[u].offset;
            const V w = set1(e[u].value);
            for (int t = 0; t < T; ++t) part[u][t] = fma(w, loadu(p + t * kLanes), part[u][t]);
        }
    }
    if (U > 1) {
        for (; e < end; ++e) {
            const float* p = in + e->offset;
            const V w = set1(e->value);
            for (int t = 0; t < T; ++t) part[0][t] = fma(w, loadu(p + t * kLanes), part[0][t]);
        }
    }
    for (int t = 0; t < T; ++t) {
        acc[t] = part[0][t];
        if (U == 2) acc[t] = add(part[0][t], part[U - 1][t]);
        if (U == 4) acc[t] = add(add(part[0][t], part[1 % U][t]), add(part[2 % U][t], part[U - 1][t]));
    }
}

template <int T, int U>
void single_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
        V acc[T];
        accumulate<T, U>(in, job.entries + job.start[row], job.entries + job.start[row + 1], acc);
        for (int t = 0; t < T; ++t) store_vector(job, tile, row, t, acc[t]);
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
template <int T>
void shifted_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    const int groups = job.groups;
    for (int64_t row = job.row_begin; row < job.row_end; ++row) {
        const int64_t* start = job.start + row * groups;
        V out[T];
        accumulate<T, 1>(in, job.entries + start[0], job.entries + start[1], out);  // group 0 has shift 0
        for (int g = 1; g < groups; ++g) {
            if (start[g] == start[g + 1]) continue;
            V acc[T];
            accumulate<T, 1>(in, job.entries + start[g], job.entries + start[g + 1], acc);
            add_shifted<T>(out, acc, job.shifts[g], job.row_edges);
        }
        for (int t = 0; t < T; ++t) store_vector(job, tile, row, t, out[t]);
    }
}

// Four rows, columns of one mask: a loaded vector serves every row that keeps the column.
template <int T, int M>
inline const int32_t* masked_columns(const float* in, const int32_t* word, int count, V (*acc)[T]) {
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
void masked_rows(const SpmmJob& job, const Tile& tile) {
    const float* in = job.in + tile.in;
    for (int64_t row = job.row_begin; row < job.row_end; row += 4) {
        V acc[4][T];
        for (int r = 0; r < 4; ++r)
            for (int t = 0; t < T; ++t) acc[r][t] = zero();
        const int32_t* word = job.stream + job.stream_start[row / 4];
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
        for (int64_t r = 0; r < 4 && row + r < job.row_end; ++r)
            for (int t = 0; t < T; ++t) store_vector(job, tile, row + r, t, acc[r][t]);
    }
}

template <int T>
void dense_rows(const SpmmJob& job, const Tile& tile) {
    constexpr int R = kDenseRows;
    const int64_t blocks_per_group = (job.dense_rows_per_group + R - 1) / R;
    int64_t row = job.row_begin;
    while (row < job.row_end) {
        const int64_t group = row / job.dense_rows_per_group, in_group = row % job.dense_rows_per_group;
        const int64_t block = group * blocks_per_group + in_group / R;
        const float* in = job.in + tile.in + group * job.dense_group_offset;
        const float* w = job.dense + block * job.dense_cols * R;
        V acc[R][T];
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) acc[r][t] = zero();
        for (int64_t k = 0; k < job.dense_cols; ++k, w += R) {
            const float* p = in + job.dense_offsets[k];
            V x[T];
            for (int t = 0; t < T; ++t) x[t] = loadu(p + t * kLanes);
            for (int r = 0; r < R; ++r) {
                const V wr = set1(w[r]);
                for (int t = 0; t < T; ++t) acc[r][t] = fma(wr, x[t], acc[r][t]);
            }
        }
        int64_t end = (group + 1) * job.dense_rows_per_group;
        if (end > row + R) end = row + R;
        if (end > job.row_end) end = job.row_end;
        for (int r = 0; r < R && row + r < end; ++r)
            for (int t = 0; t < T; ++t) store_vector(job, tile, row + r, t, acc[r][t]);
        row = end;
    }
}

using TileKernel = void (*)(const SpmmJob&, const Tile&);

#define SPARSEPRUNE_UP_TO(name, most, T, U) (T <= most ? name<(T <= most ? T : 1), U> : nullptr)
#define SPARSEPRUNE_UP_TO1(name, most, T) (T <= most ? name<(T <= most ? T : 1)> : nullptr)

void run_single(const SpmmJob& job) {
    static constexpr TileKernel plain[] = {
        SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 1, 1),  SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 2, 1),
        SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 3, 1),  SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 4, 1),
        SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 5, 1),  SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 6, 1),
        SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 7, 1),  SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 8, 1),
        SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 9, 1),  SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 10, 1),
        SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 11, 1), SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 12, 1),
        SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 13, 1), SPARSEPRUNE_UP_TO(single_rows, kMaxSingle, 14, 1)};
    static constexpr TileKernel unrolled2[] = {single_rows<1, 2>, single_rows<2, 2>, single_rows<3, 2>, single_rows<4, 2>};
    static constexpr TileKernel unrolled4[] = {single_rows<1, 4>, single_rows<2, 4>, single_rows<3, 4>, single_rows<4, 4>};
    static constexpr TileKernel shifted[] = {
        SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 1),  SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 2),
        SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 3),  SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 4),
        SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 5),  SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 6),
        SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 7),  SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 8),
        SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 9),  SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 10),
        SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 11), SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 12),
        SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 13), SPARSEPRUNE_UP_TO1(shifted_rows, kMaxShift, 14)};
    const TileKernel* table = job.groups > 1   ? shifted
                              : job.unroll == 4 ? unrolled4
                              : job.unroll == 2 ? unrolled2
                                                : plain;
    for (int64_t i = 0; i < job.tile_count; ++i) table[job.tiles[i].count - 1](job, job.tiles[i]);
}

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

inline float finish_scalar(float v, int64_t row, const float* bias, const float* residual, KernelAct act) {
    if (bias) v += bias[row];
    if (residual) v += residual[row];
    if (act != KernelAct::none && v < 0.0f) v = 0.0f;
    if (act == KernelAct::relu6 && v > 6.0f) v = 6.0f;
    return v;
}

void dot_sparse(const int64_t* start, const int32_t* col, const float* value, const float* x, int64_t row_begin,
                int64_t row_end, const float* bias, const float* residual, float* out, KernelAct act) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        int64_t i = start[row];
        const int64_t end = start[row + 1];
        V acc = zero(), acc2 = zero();
        for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
            acc = fma(loadu(value + i), gather(x, col + i), acc);
            acc2 = fma(loadu(value + i + kLanes), gather(x, col + i + kLanes), acc2);
        }
        if (i + kLanes <= end) {
            acc = fma(loadu(value + i), gather(x, col + i), acc);
            i += kLanes;
        }
        float sum = sum_lanes(add(acc, acc2));
        for (; i < end; ++i) sum += value[i] * x[col[i]];
        out[row] = finish_scalar(sum, row, bias, residual, act);
    }
}

void dot_dense(const float* value, int64_t cols, const float* x, int64_t row_begin, int64_t row_end, const float* bias,
               const float* residual, float* out, KernelAct act) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const float* w = value + row * cols;
        V acc[4] = {zero(), zero(), zero(), zero()};
        int64_t i = 0;
        for (; i + 4 * kLanes <= cols; i += 4 * kLanes)
            for (int u = 0; u < 4; ++u) acc[u] = fma(loadu(w + i + u * kLanes), loadu(x + i + u * kLanes), acc[u]);
        for (; i + kLanes <= cols; i += kLanes) acc[0] = fma(loadu(w + i), loadu(x + i), acc[0]);
        float sum = sum_lanes(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
        for (; i < cols; ++i) sum += w[i] * x[i];
        out[row] = finish_scalar(sum, row, bias, residual, act);
    }
}
