// Moving activations: im2col panels, padded or phase-split plane copies, adds. Included after one vec_*.h.
#pragma once

void im2col(const Im2colJob& job) {
    for (int64_t c = job.channel_begin; c < job.channel_end; ++c) {
        const float* plane = job.in + c * job.in_plane;
        for (int64_t tap = 0; tap < job.taps; ++tap) {
            float* out = job.panel + (c * job.taps + tap) * job.panel_plane;
            const Piece* end = job.pieces + job.first_piece[tap + 1];
            for (const Piece* p = job.pieces + job.first_piece[tap]; p < end; ++p) {
                const V x = take_lanes(load_lanes(plane + p->start, p->read), p->lane, p->keep);
                if (p->write == 0xFFFF) storeu(out + p->at, x);
                else store_lanes(out + p->at, x, p->write);
            }
        }
    }
}

inline uint16_t first_lanes(int64_t count) { return count >= 16 ? 0xFFFF : static_cast<uint16_t>((1u << count) - 1u); }

// How a loop over rows of any length reads and writes: whole vectors, then what is left.
struct Whole {
    static V load(const float* p) { return loadu(p); }
    static void store(float* p, V v) { storeu(p, v); }
    static V keep(V v) { return v; }
};
struct Lanes {
    uint16_t mask;
    V load(const float* p) const { return load_lanes(p, mask); }
    void store(float* p, V v) const { store_lanes(p, v, mask); }
    V keep(V v) const { return keep_lanes(v, mask); }
};
template <class F>
inline void for_vectors(int64_t count, F f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) f(i, Whole{});
    if (i < count) f(i, Lanes{first_lanes(count - i)});
}

// bits of [begin, end) within lanes 0..15
inline uint16_t lane_bits(int64_t begin, int64_t end) {
    const unsigned low = begin <= 0 ? 0u : begin >= 16 ? 16u : static_cast<unsigned>(begin);
    const unsigned high = end <= 0 ? 0u : end >= 16 ? 16u : static_cast<unsigned>(end);
    return high <= low ? 0 : static_cast<uint16_t>(((1u << high) - 1u) & ~((1u << low) - 1u));
}

// Sixteen elements from a row, `stride` apart: lanes outside [0, count) are zero and not read.
inline V load_strided(const float* row, int64_t first, int64_t count, int64_t stride) {
    const float* from = row + first * stride;
    if (stride == 1) return load_lanes(from, lane_bits(-first, count - first));
    const int64_t begin = -2 * first, end = 2 * (count - first) - 1;  // floats inside the row
    const V low = load_lanes(from, lane_bits(begin, end));
    return even_lanes(low, load_lanes(from + kLanes, lane_bits(begin - kLanes, end - kLanes)));
}

void copy_rows(const RowCopy& job) {
    const int64_t total = job.lead + job.count + job.tail;
    const int64_t whole = job.stride <= 2 ? total / kLanes * kLanes : 0;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const int64_t first = i - job.lead;  // element of lane 0
        const bool inside = first >= 0 && first + kLanes < job.count;
        const float* in = job.in;
        float* out = job.out + i;
        for (int64_t r = 0; r < job.rows; ++r, in += job.in_pitch, out += job.out_pitch) {
            const float* from = in + first * job.stride;
            if (!inside) storeu(out, load_strided(in, first, job.count, job.stride));
            else storeu(out, job.stride == 1 ? loadu(from) : even_lanes(loadu(from), loadu(from + kLanes)));
        }
    }
    for (int64_t r = 0; r < job.rows; ++r) {
        for (int64_t i = whole; i < total; ++i) {
            const int64_t element = i - job.lead;
            job.out[r * job.out_pitch + i] = element >= 0 && element < job.count ? job.in[r * job.in_pitch + element * job.stride] : 0.0f;
        }
    }
}

template <bool even, bool odd>
void split_vectors(const SplitRows& job) {
    for (int64_t v = 0; v < job.out_pitch; v += kLanes) {
        const uint16_t low = lane_bits(0, job.width - 2 * v), high = lane_bits(0, job.width - 2 * v - kLanes);
        for (int64_t p = 0; p < job.planes; ++p) {
            const float* in = job.in + p * job.in_plane + 2 * v;
            const int64_t out = p * job.out_plane + v;
            for (int64_t r = 0; r < job.rows; ++r) {
                const V a = load_lanes(in + r * job.in_pitch, low), b = load_lanes(in + r * job.in_pitch + kLanes, high);
                if (even) storeu(job.even + out + r * job.out_pitch, even_lanes(a, b));
                if (odd) storeu(job.odd + out + r * job.out_pitch, odd_lanes(a, b));
            }
        }
    }
}

void split_rows(const SplitRows& job) {
    if (!job.odd) split_vectors<true, false>(job);
    else if (!job.even) split_vectors<false, true>(job);
    else split_vectors<true, true>(job);
}

void add_row(const float* a, const float* b, float* out, int64_t count, Activation act) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        V v = loadu(a + i);
        if (b) v = add(v, loadu(b + i));
        storeu(out + i, activate(v, act));
    }
    for (; i < count; ++i) {
        out[i] = finish_scalar(b ? a[i] + b[i] : a[i], 0, nullptr, nullptr, act);
    }
}
