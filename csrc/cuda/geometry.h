// Where a strip of output pixels finds its inputs. Images lie one after the other in a padded plane whose gaps are shared:
// the zeros to the right of one row are those to the left of the next, the zeros below one image are those above the next.
// A tap is then one constant shift of an input's number, and nothing needs a border case but the load.
#pragma once
#include "portable.h"

namespace sparseprune::cuda {

// A convolution; a linear layer of N inputs is one of N pixels: n = 1, h = 1, w = N, 1x1.
struct Geometry {
    int n, c, h, w;        // input; c over all groups
    int out_c, oh, ow;     // output
    int kh, kw, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
    int pitch, rows;       // of the padded plane: w and h with their gaps
    int pixels;            // n * oh * ow
    int span;              // inputs, gaps included, that a strip of `strip` output pixels spans at most
    int strip;
};

SPARSEPRUNE_HD int largest(int a, int b) { return a > b ? a : b; }

// The gap that one axis needs: what is padded before, what windows reach beyond the end, and windows in order.
SPARSEPRUNE_HD int gap(int size, int out, int kernel, int stride, int pad, int dilation) {
    const int reach = dilation * (kernel - 1) + 1;
    return largest(largest(pad, (out - 1) * stride - pad + reach - size), largest(0, (out - 1) * stride - size + 1));
}

// The padded plane's number of output pixel p's first tap. Negative inside the first image's padding.
SPARSEPRUNE_HD int first_input(const Geometry& g, int p) {
    const int x = p % g.ow, line = p / g.ow, y = line % g.oh, n = line / g.oh;
    return (n * g.rows + y * g.stride_h - g.pad_h) * g.pitch + x * g.stride_w - g.pad_w;
}

// The shift of tap (ky, kx) = (tap / kw, tap % kw).
SPARSEPRUNE_HD int tap_shift(const Geometry& g, int tap) {
    return tap / g.kw * g.dil_h * g.pitch + tap % g.kw * g.dil_w;
}

// Where number `at` of the padded plane lies in image n at (y, x); n = -1 where it is a gap.
struct Place {
    int n, y, x;
};
SPARSEPRUNE_HD Place place(const Geometry& g, int at) {
    if (at < 0) return {-1, 0, 0};
    const unsigned pitch = static_cast<unsigned>(g.pitch), rows = static_cast<unsigned>(g.rows);
    const unsigned line = static_cast<unsigned>(at) / pitch, x = static_cast<unsigned>(at) - line * pitch;
    const unsigned n = line / rows, y = line - n * rows;
    const bool inside = x < static_cast<unsigned>(g.w) && y < static_cast<unsigned>(g.h) && n < static_cast<unsigned>(g.n);
    return {inside ? static_cast<int>(n) : -1, static_cast<int>(y), static_cast<int>(x)};
}

// How the epilogue ends: act(sum + bias + residual).
struct Epilogue {
    const void* bias = nullptr;      // (out_c) of the output's type, or none
    const void* residual = nullptr;  // as the output lies, or none
    int act = 0;                   // 0 none, 1 relu, 2 leaky_relu (low is its slope), 3 clamp to [low, high]
    float low = 0, high = 0;
};

SPARSEPRUNE_HD float activate(const Epilogue& e, float x) {
    if (e.act == 1) return x < 0 ? 0.0f : x;  // so written, NaN passes
    if (e.act == 2) return x > 0 ? x : e.low * x;
    if (e.act == 3) return x < e.low ? e.low : x > e.high ? e.high : x;
    return x;
}

// In elements: of an image, a channel, a pixel of an image; pixels lie in rows without gaps.
struct Strides {
    int64_t n, c, pixel;
};

SPARSEPRUNE_HD int64_t offset(const Geometry& g, const Strides& s, const Place& at) {
    return at.n * s.n + (static_cast<int64_t>(at.y) * g.w + at.x) * s.pixel;
}

SPARSEPRUNE_HD int64_t out_offset(const Geometry& g, const Strides& s, int p) {
    const int plane = g.oh * g.ow, n = p / plane;
    return n * s.n + (p - n * plane) * s.pixel;
}

template <class T>
SPARSEPRUNE_HD void finish(const Epilogue& e, T* y, int64_t at, int channel, float sum) {
    if (e.bias != nullptr) sum += to_float(static_cast<const T*>(e.bias)[channel]);
    if (e.residual != nullptr) sum += to_float(static_cast<const T*>(e.residual)[at]);
    y[at] = from_float<T>(activate(e, sum));
}

}  // namespace sparseprune::cuda
