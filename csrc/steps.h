// What the steps of a plan do: plain functions over layouts, each told which part is its own.
#pragma once
#include "conv.h"
#include "cpu/kernels.h"
#include "graph.h"
#include "layout.h"

namespace sparseprune {

struct Part {  // thread `id` of `count`
    int id, count;
    int64_t begin(int64_t total) const { return total * id / count; }
    int64_t end(int64_t total) const { return total * (id + 1) / count; }
};

// Same (N, C, H, W), another layout.
void copy_value(const Kernels& k, const Layout& from, const float* in, const Layout& to, float* out, Part part);
// (N, C, H, W) to (N, C*H*W)
void flatten_value(const Layout& from, const float* in, const Layout& to, float* out, Part part);
// out = act(a + b); b may be null
void add_values(const Kernels& k, const Layout& la, const float* a, const Layout& lb, const float* b, const Layout& lo,
                float* out, const Activation& act, Part part);
// scratch: pool_line floats
int64_t pool_line(const Node& node, const Layout& from, const Layout& to);
// Output rows [begin, end) of one plane; in, out: its first rows.
void pool_rows(const Kernels& k, const Node& node, const Layout& from, const float* in, const Layout& to, float* out, float* scratch,
               int64_t begin, int64_t end);
void pool_value(const Kernels& k, const Node& node, const Layout& from, const float* in, const Layout& to, float* out,
                float* scratch, Part part);
void adaptive_pool_value(const Kernels& k, const Node& node, const Layout& from, const float* in, const Layout& to, float* out,
                         Part part);

// (N, C*rh*rw, H, W) to (N, C, H*rh, W*rw), what is beyond the output left out; elements only
void pixel_shuffle_value(const Layout& from, const float* in, const std::array<int64_t, 2>& factor, const Layout& to, float* out, Part part);

// The packed input of a convolution: phase copy, or chunk `chunk` of the panel.
void copy_phases(const Kernels& k, const ConvPlan& plan, const float* in, float* out, Part part);
// `count` rows from `first` of all phases of one image; in: the first channel's first row.
void copy_phases(const Kernels& k, const ConvPlan& plan, const float* in, int64_t first, int64_t count, float* out, int64_t channels);
void fill_panel(const Kernels& k, const ConvPlan& plan, size_t chunk, const float* in, float* out, int64_t channel_begin, int64_t channel_end);

// Which tiles and rows a thread computes, for each (chunk, thread).
struct Share {
    const Tile* tiles;
    int64_t tile_count, row_begin, row_end;
};
std::vector<Share> share_work(const ConvPlan& plan, size_t chunk, int threads);
void multiply(const Kernels& k, const ConvPlan& plan, const Share& share, const float* packed, const float* bias,
              const float* residual, float* out, const Activation& act);
// The same with any activation: those that the kernels do not know follow tile by tile, while it is in the cache.
void multiply_and_activate(const Kernels& k, const ConvPlan& plan, const Share& share, const float* packed, const float* bias,
                           const float* residual, float* out, const Activation& act);

}  // namespace sparseprune
