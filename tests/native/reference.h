// The oracle: one plain loop in double for each operator, with the float32 error bound of its result.
#pragma once
#include <cmath>
#include <vector>

#include "graph.h"

struct Reference {
    std::vector<double> value, bound;
};

// Every activation as torch defines it.
inline double act_reference(const sparseprune::Activation& act, double x) {
    using sparseprune::Act;
    const double alpha = static_cast<double>(act.alpha), beta = static_cast<double>(act.beta);
    const auto clamp = [](double v, double low, double high) { return std::isnan(v) ? v : std::fmin(std::fmax(v, low), high); };
    switch (act.kind) {
        case Act::none: return x;
        case Act::relu: return x < 0 ? 0 : x;
        case Act::relu6: return clamp(x, 0, 6);
        case Act::leaky_relu: return x > 0 ? x : alpha * x;
        case Act::clamp: return clamp(x, alpha, beta);
        case Act::hardsigmoid: return clamp(x + 3, 0, 6) / 6;
        case Act::hardswish: return x * clamp(x + 3, 0, 6) / 6;
        case Act::sigmoid: return 1 / (1 + std::exp(-x));
        case Act::silu: return x / (1 + std::exp(-x));
        case Act::tanh: return std::tanh(x);
        case Act::elu: return x > 0 ? x : alpha * std::expm1(x);
        case Act::gelu: return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
        case Act::gelu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
        case Act::mish: return x > 20 ? x : x * std::tanh(std::log1p(std::exp(x)));
        case Act::softplus: return x > 20 ? x : std::log1p(std::exp(x));
        case Act::exp: return std::exp(x);
        case Act::sqrt: return std::sqrt(x);
        case Act::rsqrt: return 1 / std::sqrt(x);
        case Act::reciprocal: return 1 / x;
        case Act::abs: return std::fabs(x);
        case Act::neg: return -x;
        case Act::square: return x * x;
    }
    return x;
}

// x: contiguous (N, C, H, W); weight dense; y: act(conv + bias + residual).
// |y - y64| <= (kept + 4) * eps * (sum |w*x| + |b| + |r|); the activations add nothing (those of the epilogue are 1-Lipschitz and exact).
inline Reference conv_reference(const sparseprune::Node& node, const std::vector<float>& weight, int64_t out_channels,
                                const float* x, const std::vector<int64_t>& in, const std::vector<int64_t>& out,
                                const float* residual) {
    using namespace sparseprune;
    const Window& w = node.window;
    const int64_t cin = in[1] / node.groups, per_group = out_channels / node.groups;
    const int64_t taps = w.kernel[0] * w.kernel[1];
    Reference ref;
    for (int64_t n = 0; n < out[0]; ++n)
        for (int64_t o = 0; o < out_channels; ++o)
            for (int64_t y = 0; y < out[2]; ++y)
                for (int64_t xo = 0; xo < out[3]; ++xo) {
                    double sum = 0, magnitude = 0;
                    int64_t kept = 0;
                    for (int64_t c = 0; c < cin; ++c)
                        for (int64_t ky = 0; ky < w.kernel[0]; ++ky)
                            for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
                                const double v = weight[static_cast<size_t>((o * cin + c) * taps + ky * w.kernel[1] + kx)];
                                if (v == 0) continue;
                                ++kept;
                                const int64_t iy = y * w.stride[0] - w.padding[0] + ky * w.dilation[0];
                                const int64_t ix = xo * w.stride[1] - w.padding[2] + kx * w.dilation[1];
                                if (iy < 0 || iy >= in[2] || ix < 0 || ix >= in[3]) continue;
                                const double p = v * static_cast<double>(x[((n * in[1] + o / per_group * cin + c) * in[2] + iy) * in[3] + ix]);
                                sum += p;
                                magnitude += std::fabs(p);
                            }
                    if (node.bias) {
                        sum += static_cast<double>((*node.bias)[static_cast<size_t>(o)]);
                        magnitude += std::fabs(static_cast<double>((*node.bias)[static_cast<size_t>(o)]));
                    }
                    if (residual) {
                        const double r = residual[((n * out_channels + o) * out[2] + y) * out[3] + xo];
                        sum += r;
                        magnitude += std::fabs(r);
                    }
                    sum = act_reference(node.act, sum);
                    ref.value.push_back(sum);
                    ref.bound.push_back(static_cast<double>(kept + 4) * 0x1p-23 * magnitude + 1e-37);
                }
    return ref;
}
