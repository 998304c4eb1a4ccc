// Pooling, one output row at a time: the window's rows are combined first, over whole vectors, then its columns.
#pragma once


inline float max_keep_nan(float a, float b) { return (a > b || a != a) ? a : b; }

// scratch = the window's rows combined; `none` where no row is inside the image
template <class Combine>
inline void combine_rows(const PoolRow& job, float none, const Combine& combine) {
    for (int64_t x = 0; x < job.in_width; ++x) job.scratch[x] = job.rows > 0 ? job.in[x] : none;
    for (int64_t r = 1; r < job.rows; ++r) {
        const float* in = job.in + r * job.row_pitch;
        for (int64_t x = 0; x < job.in_width; ++x) job.scratch[x] = combine(job.scratch[x], in[x]);
    }
}

void max_pool_row(const PoolRow& job) {
    combine_rows(job, -__builtin_inff(), max_keep_nan);
    for (int64_t x = 0; x < job.out_width; ++x) {
        float best = -__builtin_inff();
        for (int64_t k = 0; k < job.kernel; ++k) {
            const int64_t at = x * job.stride - job.left + k * job.dilation;
            if (at >= 0 && at < job.in_width) best = max_keep_nan(job.scratch[at], best);
        }
        job.out[x] = best;
    }
}

void sum_pool_row(const PoolRow& job) {
    combine_rows(job, 0.0f, [](float a, float b) { return a + b; });
    for (int64_t x = 0; x < job.out_width; ++x) {
        float sum = 0.0f;
        for (int64_t k = 0; k < job.kernel; ++k) {
            const int64_t at = x * job.stride - job.left + k * job.dilation;
            if (at >= 0 && at < job.in_width) sum += job.scratch[at];
        }
        job.out[x] = sum;
    }
}

double sum_row(const float* in, int64_t count) {
    double sum = 0.0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(in[i]);
    return sum;
}
