// Rows of tensors of any rank: elementwise operators, sums, norms, softmax, interpolation, small products. Included after activations.h.
// Each result depends on its own elements only, never on where its row begins or how long it is: threads may cut rows anywhere.
#pragma once

struct Add {
    static V of(V a, V b) { return add(a, b); }
};
struct Subtract {
    static V of(V a, V b) { return sub(a, b); }
};
struct Multiply {
    static V of(V a, V b) { return mul(a, b); }
};
struct Divide {
    static V of(V a, V b) { return div(a, b); }
};
struct Larger {
    static V of(V a, V b) { return max_either(a, b); }
};
struct Smaller {
    static V of(V a, V b) {
        const V minus = set1(-1.0f);
        return flip(max_either(flip(a, minus), flip(b, minus)), minus);
    }
};
struct Prelu {
    static V of(V a, V b) { return select_lt(zero(), a, a, mul(b, a)); }
};

template <class Op, bool one_a, bool one_b>
inline void binary_loop(const float* a, const float* b, float* out, int64_t count, const Activation& act) {
    const V a0 = set1(*a), b0 = set1(*b);
    for_vectors(count, [=](int64_t i, auto lanes) {
        lanes.store(out + i, activate(Op::of(one_a ? a0 : lanes.load(a + i), one_b ? b0 : lanes.load(b + i)), act));
    });
}

template <class Op>
void binary_row(const float* a, int64_t a_step, const float* b, int64_t b_step, float* out, int64_t count, Activation act) {
    if (count <= 0) return;
    if (a_step && b_step) binary_loop<Op, false, false>(a, b, out, count, act);
    else if (a_step) binary_loop<Op, false, true>(a, b, out, count, act);
    else if (b_step) binary_loop<Op, true, false>(a, b, out, count, act);
    else binary_loop<Op, true, true>(a, b, out, count, act);
}

double sum_row(const float* in, int64_t count) {
    D even = dset1(0.0), odd = even;
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        even = dadd(even, widen(loadu(in + i)));
        odd = dadd(odd, widen(loadu(in + i + kLanes)));
    }
    for (; i < count; i += kLanes) even = dadd(even, widen(load_lanes(in + i, first_lanes(count - i))));
    return dsum(dadd(even, odd));
}

float max_row(const float* in, int64_t count) {
    V best = set1(-__builtin_inff());
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) best = max_either(loadu(in + i), best);
    if (i < count) best = max_either(load_lanes_or(best, in + i, first_lanes(count - i)), best);
    return max_lanes(best);
}

float min_row(const float* in, int64_t count) {
    const V minus = set1(-1.0f);
    V best = set1(-__builtin_inff());  // of the negated row
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) best = max_either(flip(loadu(in + i), minus), best);
    if (i < count) best = max_either(flip(load_lanes_or(flip(best, minus), in + i, first_lanes(count - i)), minus), best);
    return -max_lanes(best);
}

double square_row(const float* in, int64_t count, double mean) {
    const D m = dset1(mean);
    D sum = dset1(0.0);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const D d = dsub(widen(loadu(in + i)), m);
        sum = dfma(d, d, sum);
    }
    double total = dsum(sum);
    for (; i < count; ++i) total += (static_cast<double>(in[i]) - mean) * (static_cast<double>(in[i]) - mean);
    return total;
}

double exp_row(const float* in, float minus, float* out, int64_t count) {
    const V m = set1(minus);
    D sum = dset1(0.0);
    for_vectors(count, [&](int64_t i, auto lanes) {
        const V e = lanes.keep(exp_of(sub(lanes.load(in + i), m)));
        lanes.store(out + i, e);
        sum = dadd(sum, widen(e));
    });
    return dsum(sum);
}

inline V normalized(V x, V mean, V factor, V scale, V bias) { return fma(mul(sub(x, mean), factor), scale, bias); }

void norm_row(const float* in, float* out, int64_t count, float mean, float factor, const float* scale, const float* bias, int64_t step) {
    const V m = set1(mean), f = set1(factor), one = set1(scale && !step ? *scale : 1.0f), none = set1(bias && !step ? *bias : 0.0f);
    for_vectors(count, [=](int64_t i, auto lanes) {
        const V s = scale && step ? lanes.load(scale + i) : one, b = bias && step ? lanes.load(bias + i) : none;
        lanes.store(out + i, normalized(lanes.load(in + i), m, f, s, b));
    });
}

void sum_columns(const float* in, int64_t row, int64_t rows, int64_t count, double* sum) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        D total = dload(sum + i);
        for (int64_t r = 0; r < rows; ++r) total = dadd(total, widen(loadu(in + r * row + i)));
        dstore(sum + i, total);
    }
    for (; i < count; ++i)
        for (int64_t r = 0; r < rows; ++r) sum[i] += static_cast<double>(in[r * row + i]);
}

void square_columns(const float* in, int64_t row, int64_t rows, const double* mean, int64_t count, double* sum) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const D m = dload(mean + i);
        D total = dload(sum + i);
        for (int64_t r = 0; r < rows; ++r) {
            const D d = dsub(widen(loadu(in + r * row + i)), m);
            total = dadd(total, dfma(d, d, dset1(0.0)));  // rounded as below: columns may be cut anywhere
        }
        dstore(sum + i, total);
    }
    for (; i < count; ++i)
        for (int64_t r = 0; r < rows; ++r) {
            const double d = static_cast<double>(in[r * row + i]) - mean[i];
            sum[i] += d * d;
        }
}

void exp_columns(const float* in, const float* minus, float* out, int64_t count, double* sum) {
    for_vectors(count, [=](int64_t i, auto lanes) {
        lanes.store(out + i, exp_of(sub(lanes.load(in + i), lanes.load(minus + i))));
    });
    sum_columns(out, 0, 1, count, sum);
}

void norm_columns(const float* in, float* out, int64_t count, const float* mean, const float* factor, float scale, float bias) {
    const V s = set1(scale), b = set1(bias);
    for_vectors(count, [=](int64_t i, auto lanes) {
        lanes.store(out + i, normalized(lanes.load(in + i), lanes.load(mean + i), lanes.load(factor + i), s, b));
    });
}

inline V lerp(V a, V b, V weight) { return fma(b, weight, mul(a, sub(set1(1.0f), weight))); }

void lerp_row(const float* a, const float* b, float weight, float* out, int64_t count) {
    const V w = set1(weight);
    for_vectors(count, [=](int64_t i, auto lanes) { lanes.store(out + i, lerp(lanes.load(a + i), lanes.load(b + i), w)); });
}

void lerp_gather(const float* in, const int32_t* low, const int32_t* high, const float* weight, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) storeu(out + i, lerp(gather(in, low + i), gather(in, high + i), loadu(weight + i)));
    if (i == count) return;
    int32_t l[kLanes], h[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
        l[j] = i + j < count ? low[i + j] : -1;
        h[j] = i + j < count ? high[i + j] : -1;
    }
    const uint16_t lanes = first_lanes(count - i);
    store_lanes(out + i, lerp(gather(in, l), gather(in, h), load_lanes(weight + i, lanes)), lanes);
}

// R rows and T vectors of the product: one chain of additions in the order of k for each element, whatever R and T are.
template <int R, int T>
inline void gemm_tile(const GemmJob& job, int64_t row, int64_t col) {
    const float* a = job.a + row * job.a_row;
    const float* b = job.b + col;
    float* out = job.out + row * job.out_row + col;
    const uint16_t last = first_lanes(job.cols - col - (T - 1) * kLanes);
    V acc[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t)
            acc[r][t] = job.accumulate ? load_lanes(out + r * job.out_row + t * kLanes, t + 1 < T ? 0xFFFF : last) : zero();
    for (int64_t k = 0; k < job.k; ++k, a += job.a_k, b += job.b_row) {
        V x[T];
        for (int t = 0; t < T; ++t) x[t] = loadu(b + t * kLanes);
        for (int r = 0; r < R; ++r) {
            const V w = set1(a[r * job.a_row]);
            for (int t = 0; t < T; ++t) acc[r][t] = fma(w, x[t], acc[r][t]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) store_lanes(out + r * job.out_row + t * kLanes, acc[r][t], t + 1 < T ? 0xFFFF : last);
}

template <int T>
inline void gemm_columns(const GemmJob& job, int64_t col) {
    constexpr int R = kGemmRows;
    int64_t row = 0;
    for (; row + R <= job.rows; row += R) gemm_tile<R, T>(job, row, col);
    if (R > 2)
        for (; row + 2 <= job.rows; row += 2) gemm_tile<2, T>(job, row, col);
    for (; row < job.rows; ++row) gemm_tile<1, T>(job, row, col);
}

void gemm(const GemmJob& job) {
    constexpr int T = kGemmVectors;
    int64_t col = 0;
    while (col < job.cols) {
        const int64_t left = (job.cols - col + kLanes - 1) / kLanes, take = left < T ? left : T;
        if (take == 4) gemm_columns<(T >= 4 ? 4 : 1)>(job, col);
        else if (take == 3) gemm_columns<(T >= 3 ? 3 : 1)>(job, col);
        else if (take == 2) gemm_columns<(T >= 2 ? 2 : 1)>(job, col);
        else gemm_columns<1>(job, col);
        col += take * kLanes;
    }
}
