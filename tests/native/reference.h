// The oracle: one plain loop in double for each operator, with the float32 error bound of its result.
#pragma once
#include <cmath>
#include <vector>

#include "graph.h"

struct Reference {
    std::vector<double> value, bound;
};

// x: contiguous (N, C, H, W); weight dense; y: act(conv + bias + residual).
// |y - y64| <= (kept + 4) * eps * (sum |w*x| + |b| + |r|); the activations add nothing (they are 1-Lipschitz and exact).
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
                    if (node.act != Act::none) sum = sum < 0 ? 0 : sum;
                    if (node.act == Act::relu6) sum = sum > 6 ? 6 : sum;
                    ref.value.push_back(sum);
                    ref.bound.push_back(static_cast<double>(kept + 4) * 0x1p-23 * magnitude + 1e-37);
                }
    return ref;
}
