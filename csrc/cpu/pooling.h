// Pooling, one output row at a time: the window's rows are combined first, over whole vectors, then its columns.
#pragma once

struct Maximum {
    static float none() { return -__builtin_inff(); }
    static V combine(V a, V b) { return max_either(a, b); }
};

struct Sum {
    static float none() { return 0.0f; }
    static V combine(V a, V b) { return add(a, b); }
};

// scratch[left + x] = the window's rows combined at column x; the operator's neutral element around.
template <class Op>
inline void combine_rows(const PoolRow& job, int64_t width) {
    const V none = set1(Op::none());
    for (int64_t x = 0; x < width; x += kLanes) storeu(job.scratch + x, none);
    if (job.rows == 0) return;
    for (int64_t x = 0; x < job.in_width; x += kLanes) {
        const uint16_t lanes = first_lanes(job.in_width - x);
        V v = load_lanes(job.in + x, lanes);
        for (int64_t r = 1; r < job.rows; ++r) v = Op::combine(load_lanes(job.in + r * job.row_pitch + x, lanes), v);
        float* to = job.scratch + job.left + x;
        if (lanes == 0xFFFF) {
            storeu(to, v);
        } else {
            float last[kLanes];
            storeu(last, v);
            for (int64_t i = 0; i < job.in_width - x; ++i) to[i] = last[i];
        }
    }
}

template <class Op>
inline V window_vector(const PoolRow& job, int64_t x) {
    const float* from = job.scratch + x * job.stride;
    V v = set1(Op::none());
    for (int64_t k = 0; k < job.kernel; ++k, from += job.dilation) {
        V next;
        if (job.stride == 1) {
            next = loadu(from);
        } else if (job.stride == 2) {
            next = even_lanes(loadu(from), loadu(from + kLanes));
        } else {
            float lane[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) lane[i] = from[i * job.stride];
            next = loadu(lane);
        }
        v = Op::combine(next, v);
    }
    return v;
}

// Elements first, first + stride, ... of a row; those outside of it do not count.
template <class Op>
inline V pool_load(const float* row, int64_t first, int64_t width, int64_t stride) {
    const float* from = row + first;
    const bool inside = first >= 0 && first + stride * kLanes <= width;
    if (stride == 1) return inside ? loadu(from) : load_lanes_or(set1(Op::none()), from, lane_bits(-first, width - first));
    if (inside) return even_lanes(loadu(from), loadu(from + kLanes));
    const V none = set1(Op::none());
    const V low = load_lanes_or(none, from, lane_bits(-first, width - first));
    return even_lanes(low, load_lanes_or(none, from + kLanes, lane_bits(-first - kLanes, width - first - kLanes)));
}

// Small windows, straight from the rows.
template <class Op>
inline void pool_small(const PoolRow& job) {
    const V none = set1(Op::none());
    for_vectors(job.out_width, [&](int64_t x, auto lanes) {
        V v = none;
        for (int64_t k = 0; k < job.kernel; ++k) {
            const int64_t first = x * job.stride + k * job.dilation - job.left;
            V column = none;
            for (int64_t r = 0; r < job.rows; ++r) {
                const V next = pool_load<Op>(job.in + r * job.row_pitch, first, job.in_width, job.stride);
                column = r == 0 ? next : Op::combine(next, column);
            }
            v = Op::combine(column, v);
        }
        lanes.store(job.out + x, v);
    });
}

// The window's rows combined, at sixteen columns from i; those outside of the row do not count.
template <class Op>
inline V pool_column(const PoolRow& job, int64_t i) {
    const V none = set1(Op::none());
    const bool inside = i + kLanes <= job.in_width;
    const uint16_t lanes = lane_bits(0, job.in_width - i);
    V v = none;
    for (int64_t r = 0; r < job.rows; ++r) {
        const float* from = job.in + r * job.row_pitch + i;
        const V next = inside ? loadu(from) : load_lanes_or(none, from, lanes);
        v = r == 0 ? next : Op::combine(next, v);
    }
    return v;
}

// Two columns apart, and two (from column 2x) or three (from 2x - 1) columns wide.
template <class Op>
inline void pool_pairs(const PoolRow& job) {
    const bool three = job.kernel == 3;
    const Shift back = make_shift(-1);
    V before = set1(Op::none());
    for_vectors(job.out_width, [&](int64_t x, auto out) {
        const V low = pool_column<Op>(job, 2 * x), high = pool_column<Op>(job, 2 * x + kLanes);
        const V odd = odd_lanes(low, high);
        V v = even_lanes(low, high);
        if (three) v = Op::combine(v, shift_lanes(odd, before, back, -1));
        out.store(job.out + x, Op::combine(odd, v));
        before = odd;
    });
}

template <class Op>
inline void pool_row(const PoolRow& job) {
    const bool pairs = job.stride == 2 && job.dilation == 1 && (job.kernel == 2 || job.kernel == 3) && job.left == job.kernel - 2;
    if (pairs) return pool_pairs<Op>(job);
    if (job.kernel <= 3 && job.rows <= 3 && job.stride <= 2) return pool_small<Op>(job);
    combine_rows<Op>(job, pool_scratch(job.in_width, job.out_width, job.kernel, job.stride, job.dilation, job.left));
    for (int64_t x = 0; x < job.out_width; x += kLanes) {
        const V v = window_vector<Op>(job, x);
        if (x + kLanes <= job.out_width) {
            storeu(job.out + x, v);
        } else {
            float last[kLanes];
            storeu(last, v);
            for (int64_t i = 0; x + i < job.out_width; ++i) job.out[x + i] = last[i];
        }
    }
}

void max_pool_row(const PoolRow& job) { pool_row<Maximum>(job); }
void sum_pool_row(const PoolRow& job) { pool_row<Sum>(job); }
