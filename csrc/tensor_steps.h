// Steps over values of any rank, described by sizes and strides: what does not need to know that it works on planes.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "graph.h"
#include "steps.h"

namespace sparseprune {

// Where the elements of a value lie: element (i0, i1, …) is at offset + sum of i * stride. A stride of 0 repeats.
struct Strided {
    int rank = 0;
    std::array<int64_t, kMaxRank> size{}, stride{};
    int64_t offset = 0;
    int64_t elements() const {
        int64_t n = 1;
        for (int d = 0; d < rank; ++d) n *= size[static_cast<size_t>(d)];
        return n;
    }
};

// For each dimension of the output, the input's index for each of its indices, or -1 for the fill value. An empty one is the identity.
using IndexMaps = std::array<std::vector<int32_t>, kMaxRank>;

// All of them: `part` is this thread's part of the output; only elements are written, never what lies between rows.

// out[i] = in[i]: same sizes.
void copy_strided(const Strided& from, const float* in, const Strided& to, float* out, Part part);
// out[i0, i1, …] = in[map0[i0], map1[i1], …], or fill. `from` has the input's strides; its sizes are not read.
void copy_mapped(const Strided& from, const float* in, const IndexMaps& maps, float fill, const Strided& to, float* out, Part part);
// out = act(a op b): a and b have the output's sizes, with strides of 0 where they broadcast.
void binary(const Kernels& k, Binary op, const Strided& a, const float* pa, const Strided& b, const float* pb, const Strided& to,
            float* out, const Activation& act, Part part);
// out = act(in): same sizes; in place where both are the same.
void activate(const Kernels& k, const Strided& from, const float* in, const Strided& to, float* out, const Activation& act, Part part);
// x where x > 0, else scale[i1] * x; scale has one element or as many as dimension 1.
void prelu(const Kernels& k, const Strided& from, const float* in, const std::vector<float>& scale, const Strided& to, float* out, Part part);
// `from` has the kept dimensions first (as many and as large as `to`'s), then the reduced ones. Sums are double.
void reduce(const Kernels& k, Reduction kind, const Strided& from, const float* in, const Strided& to, float* out, Part part);
// Over the last dimension of both (the caller permutes the strides).
void softmax(const Kernels& k, const Strided& from, const float* in, const Strided& to, float* out, Part part);
// Over the last `axes` dimensions. scale and bias may be null.
void layer_norm(const Kernels& k, int axes, double eps, const float* scale, const float* bias, const Strided& from, const float* in,
                const Strided& to, float* out, Part part);
// (N, C, …): mean and variance over each image's channels of a group and all that follows.
void group_norm(const Kernels& k, int64_t groups, double eps, const float* scale, const float* bias, const Strided& from,
                const float* in, const Strided& to, float* out, Part part);
// a (…, M, K) times b (…, K, N), all three with the same leading sizes (strides of 0 broadcast). The K, N of b have any strides.
// scratch: matmul_scratch floats of this thread's own.
int64_t matmul_scratch(const Strided& a, const Strided& b);
void matmul(const Kernels& k, const Strided& a, const float* pa, const Strided& b, const float* pb, const Strided& to, float* out,
            float* scratch, Part part);
// (N, C, H, W). step: input pixels between two samples, by axis, as torch computes them (float32 arithmetic, as torch's).
struct Bilinear {
    struct Axis {
        std::vector<int32_t> low, high;  // by output index
        std::vector<float> weight;       // of high
    } y, x;
};
Bilinear bilinear_axes(int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, double scale_h, double scale_w, bool align_corners);
void resize_bilinear(const Kernels& k, const Bilinear& axes, const Strided& from, const float* in, const Strided& to, float* out, Part part);

}  // namespace sparseprune
