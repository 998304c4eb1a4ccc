// The activations of a vector, without libm. Included after one vec_*.h.
// Their error bounds are the table of tests/native/fuzz_tensor.cpp: a few ulp each, gelu 5e-7 * max(1, |x|).
#pragma once

template <int N>
SPARSEPRUNE_INLINE V polynomial(V x, const float (&c)[N]) {  // c[0] is of the highest power
    V p = set1(c[0]);
    for (int i = 1; i < N; ++i) p = fma(p, x, set1(c[i]));
    return p;
}

// exp(x) = 2^n * (1 + q), |q| < 0.42 (Cephes). Outside [-104, 89] the result is 0 or infinite anyway; NaN stays.
struct Exp {
    V n, q;
};
SPARSEPRUNE_INLINE Exp reduce_exp(V x) {
    constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    x = min_nan(set1(89.0f), max_nan(set1(-104.0f), x));
    const V n = round_even(mul(x, set1(1.44269504088896341f)));
    const V r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
    return {n, fma(polynomial(r, c), mul(r, r), r)};
}
SPARSEPRUNE_INLINE V exp_of(V x) {
    const Exp e = reduce_exp(x);
    return scale2(add(e.q, set1(1.0f)), e.n);
}
SPARSEPRUNE_INLINE V expm1_of(V x) {  // x at most 88
    const Exp e = reduce_exp(x);
    const V power = scale2(set1(1.0f), e.n);
    return fma(e.q, power, sub(power, set1(1.0f)));
}

SPARSEPRUNE_INLINE V log_of(V x) {  // x normal, at least 1 (Cephes)
    constexpr float c[] = {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                           -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
    const V one = set1(1.0f), m = mantissa(x), big = set1(1.41421356f);
    const V e = add(exponent(x), select_lt(big, m, one, zero()));
    const V f = sub(select_lt(big, m, mul(m, set1(0.5f)), m), one), z = mul(f, f);
    V y = mul(polynomial(f, c), mul(f, z));
    y = fma(e, set1(-2.12194440e-4f), y);
    y = fma(z, set1(-0.5f), y);
    return fma(e, set1(0.693359375f), add(f, y));
}
SPARSEPRUNE_INLINE V log1p_of(V x) {  // x >= 0: what 1 + x rounded away is added again
    const V one = set1(1.0f), u = add(one, x);
    return add(log_of(u), div(sub(x, sub(u, one)), u));
}

SPARSEPRUNE_INLINE V sigmoid_of(V x) {
    const V one = set1(1.0f);
    return div(one, add(one, exp_of(flip(x, set1(-1.0f)))));
}
SPARSEPRUNE_INLINE V tanh_of(V x) {  // Cephes
    constexpr float c[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
    const V one = set1(1.0f), a = absolute(x), z = mul(x, x);
    const V small = fma(mul(polynomial(z, c), z), x, x);
    const V large = sub(one, div(set1(2.0f), add(exp_of(add(a, a)), one)));
    return select_lt(a, set1(0.625f), small, flip(large, x));
}
SPARSEPRUNE_INLINE V erf_of(V x) {  // a rational approximation of [-4, 4]; beyond, 1 is the nearest float. Not for NaN.
    constexpr float p[] = {-2.72614225801306e-10f, 2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f,
                           -7.34990630326855e-04f, -2.95459980854025e-03f, -1.60960333262415e-02f};
    constexpr float q[] = {-1.45660718464996e-05f, -2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f,
                           -1.42647390514189e-02f};
    const V z = mul(x, x);
    const V inside = div(mul(x, polynomial(z, p)), polynomial(z, q));
    return select_lt(absolute(x), set1(3.9f), inside, flip(set1(1.0f), x));
}

SPARSEPRUNE_INLINE V relu6_of(V x) { return min_nan(set1(6.0f), max_nan(zero(), x)); }

template <Act kind>
SPARSEPRUNE_INLINE V act_of(V x, float alpha, float beta) {
    const V one = set1(1.0f);
    switch (kind) {
        case Act::none: return x;
        case Act::relu: return max_nan(zero(), x);
        case Act::relu6: return relu6_of(x);
        case Act::leaky_relu: return select_lt(zero(), x, x, mul(set1(alpha), x));
        case Act::clamp: return min_nan(set1(beta), max_nan(set1(alpha), x));
        case Act::hardsigmoid: return mul(relu6_of(add(x, set1(3.0f))), set1(1.0f / 6.0f));
        case Act::hardswish: return mul(x, mul(relu6_of(add(x, set1(3.0f))), set1(1.0f / 6.0f)));
        case Act::sigmoid: return sigmoid_of(x);
        case Act::silu: return div(x, add(one, exp_of(flip(x, set1(-1.0f)))));
        case Act::tanh: return tanh_of(x);
        case Act::elu: return select_lt(zero(), x, x, mul(set1(alpha), expm1_of(x)));
        case Act::gelu: return mul(mul(x, set1(0.5f)), add(one, erf_of(mul(x, set1(0.70710678118654752f)))));
        case Act::gelu_tanh: {  // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
            const V u = mul(x, fma(mul(x, x), set1(-2.0f * 0.79788456080286536f * 0.044715f), set1(-2.0f * 0.79788456080286536f)));
            return div(x, add(one, exp_of(u)));
        }
        case Act::mish: {  // tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)
            const V e = exp_of(x), n = mul(e, add(e, set1(2.0f)));
            return select_lt(set1(20.0f), x, x, mul(x, div(n, add(n, set1(2.0f)))));
        }
        case Act::softplus: return select_lt(set1(20.0f), x, x, log1p_of(exp_of(x)));
        case Act::exp: return exp_of(x);
        case Act::sqrt: return root(x);
        case Act::rsqrt: return div(one, root(x));
        case Act::reciprocal: return div(one, x);
        case Act::abs: return absolute(x);
        case Act::neg: return flip(x, set1(-1.0f));
        case Act::square: return mul(x, x);
    }
    return x;
}

template <Act kind>
inline void act_loop(const float* in, float* out, int64_t count, float alpha, float beta) {
    for_vectors(count, [=](int64_t i, auto lanes) { lanes.store(out + i, act_of<kind>(lanes.load(in + i), alpha, beta)); });
}

void act_row(const float* in, float* out, int64_t count, Activation act) {
    switch (act.kind) {
#define SPARSEPRUNE_ACT(name) \
    case Act::name: return act_loop<Act::name>(in, out, count, act.alpha, act.beta);
        SPARSEPRUNE_ACT(none) SPARSEPRUNE_ACT(relu) SPARSEPRUNE_ACT(relu6) SPARSEPRUNE_ACT(leaky_relu) SPARSEPRUNE_ACT(clamp)
        SPARSEPRUNE_ACT(hardsigmoid) SPARSEPRUNE_ACT(hardswish) SPARSEPRUNE_ACT(sigmoid) SPARSEPRUNE_ACT(silu) SPARSEPRUNE_ACT(tanh)
        SPARSEPRUNE_ACT(elu) SPARSEPRUNE_ACT(gelu) SPARSEPRUNE_ACT(gelu_tanh) SPARSEPRUNE_ACT(mish) SPARSEPRUNE_ACT(softplus)
        SPARSEPRUNE_ACT(exp) SPARSEPRUNE_ACT(sqrt) SPARSEPRUNE_ACT(rsqrt) SPARSEPRUNE_ACT(reciprocal) SPARSEPRUNE_ACT(abs)
        SPARSEPRUNE_ACT(neg) SPARSEPRUNE_ACT(square)
#undef SPARSEPRUNE_ACT
    }
}
