#include "steps.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sparseprune {
namespace {

int64_t tail(const Layout& l) { return l.kind == LayoutKind::rows ? l.pitch - l.w : 0; }

void finish_row(const Layout& l, float* row) { std::fill_n(row + l.w, tail(l), 0.0f); }

// floats of one image of one channel that lie together, padding lanes included
int64_t image_floats(const Layout& l) { return l.kind == LayoutKind::rows ? l.h * l.pitch : l.h * l.w; }

}  // namespace

void copy_value(const Kernels& k, const Layout& from, const float* in, const Layout& to, float* out, Part part) {
    const int64_t begin = part.begin(to.c), end = part.end(to.c);
    for (int64_t c = begin; c < end; ++c)
        for (int64_t n = 0; n < to.n; ++n) {
            if (to.h * to.w == 1) {
                out[to.at(n, c, 0)] = in[from.at(n, c, 0)];
                std::fill_n(out + to.at(n, c, 0) + 1, tail(to), 0.0f);
                continue;
            }
            k.copy_rows({in + from.at(n, c, 0), out + to.at(n, c, 0), to.h, from.pitch, to.pitch, 1, 0, to.w, tail(to)});
        }
    zero_margins(to, out, begin, end);
}

void flatten_value(const Layout& from, const float* in, const Layout& to, float* out, Part part) {
    for (int64_t c = part.begin(from.c); c < part.end(from.c); ++c)
        for (int64_t n = 0; n < from.n; ++n)
            for (int64_t y = 0; y < from.h; ++y) {
                const float* row = in + from.at(n, c, y);
                float* to_row = out + to.at(n, (c * from.h + y) * from.w, 0);
                for (int64_t x = 0; x < from.w; ++x) to_row[x * to.plane] = row[x];
            }
}

void add_values(const Kernels& k, const Layout& la, const float* a, const Layout& lb, const float* b, const Layout& lo,
                float* out, const Activation& act, Part part) {
    const int64_t begin = part.begin(lo.c), end = part.end(lo.c);
    const auto at_b = [&](int64_t n, int64_t c, int64_t y) { return b ? b + lb.at(n, c, y) : nullptr; };
    if (lo.plane == 1 && la.plane == 1 && (!b || lb.plane == 1)) {
        for (int64_t n = 0; n < lo.n; ++n)
            k.add_row(a + la.at(n, begin, 0), at_b(n, begin, 0), out + lo.at(n, begin, 0), end - begin, act);
        return;
    }
    const bool alike = la.same_as(lo) && (!b || lb.same_as(lo));
    for (int64_t c = begin; c < end; ++c)
        for (int64_t n = 0; n < lo.n; ++n) {
            if (alike) {
                k.add_row(a + la.at(n, c, 0), at_b(n, c, 0), out + lo.at(n, c, 0), image_floats(lo), act);
                continue;
            }
            for (int64_t y = 0; y < lo.h; ++y) {
                k.add_row(a + la.at(n, c, y), at_b(n, c, y), out + lo.at(n, c, y), lo.w, act);
                finish_row(lo, out + lo.at(n, c, y));
            }
        }
    zero_margins(lo, out, begin, end);
}

namespace {

struct Span {
    int64_t first, rows;  // first window row inside the image, and how many are
};

Span rows_inside(int64_t start, int64_t kernel, int64_t dilation, int64_t height) {
    int64_t skip = start < 0 ? (-start + dilation - 1) / dilation : 0;
    int64_t rows = 0;
    for (int64_t r = skip; r < kernel && start + r * dilation < height; ++r) ++rows;
    return {start + skip * dilation, rows};
}

// torch's rule: the divisor counts the window clipped to the padded image, or to the image
float average_divisor(const Node& node, const Layout& from, int64_t oy, int64_t ox) {
    if (node.divisor != 0) return static_cast<float>(node.divisor);
    const Window& w = node.window;
    const auto extent = [&](int axis, int64_t o, int64_t size) {
        const int64_t before = w.padding[axis * 2], after = w.padding[axis * 2 + 1];
        int64_t start = o * w.stride[axis] - before;
        int64_t end = std::min(start + w.kernel[axis], size + after);
        if (!node.count_include_pad) {
            start = std::max<int64_t>(start, 0);
            end = std::min(end, size);
        }
        return end - start;
    };
    return static_cast<float>(extent(0, oy, from.h) * extent(1, ox, from.w));
}

}  // namespace

// A single output column needs no stride, however large it is declared.
static int64_t column_stride(const Node& node, const Layout& to) { return to.w == 1 ? 1 : node.window.stride[1]; }

int64_t pool_line(const Node& node, const Layout& from, const Layout& to) {
    const Window& w = node.window;
    return pool_scratch(from.w, to.w, w.kernel[1], column_stride(node, to), w.dilation[1], w.padding[2]);
}

void pool_rows(const Kernels& k, const Node& node, const Layout& from, const float* in, const Layout& to, float* out, float* scratch,
               int64_t begin, int64_t end) {
    const Window& w = node.window;
    for (int64_t y = begin; y < end; ++y) {
        const Span span = rows_inside(y * w.stride[0] - w.padding[0], w.kernel[0], w.dilation[0], from.h);
        float* row = out + y * to.pitch;
        const PoolRow job{in + span.first * from.pitch, from.pitch * w.dilation[0], span.rows, from.w, w.kernel[1],
                          column_stride(node, to), w.dilation[1], w.padding[2], row, to.w, scratch};
        if (node.op == Op::max_pool) {
            k.max_pool_row(job);
        } else {
            k.sum_pool_row(job);
            for (int64_t x = 0; x < to.w; ++x) row[x] /= average_divisor(node, from, y, x);
        }
        finish_row(to, row);
    }
}

void pool_value(const Kernels& k, const Node& node, const Layout& from, const float* in, const Layout& to, float* out,
                float* scratch, Part part) {
    const int64_t begin = part.begin(to.c), end = part.end(to.c);
    for (int64_t c = begin; c < end; ++c)
        for (int64_t n = 0; n < to.n; ++n)
            pool_rows(k, node, from, in + from.at(n, c, 0), to, out + to.at(n, c, 0), scratch, 0, to.h);
    zero_margins(to, out, begin, end);
}

namespace {

float adaptive_cell(const Kernels& k, bool average, const Layout& from, const float* plane, int64_t y0, int64_t y1, int64_t x0,
                    int64_t x1) {
    if (average) {
        double sum = 0.0;
        for (int64_t y = y0; y < y1; ++y) sum += k.sum_row(plane + y * from.pitch + x0, x1 - x0);
        return static_cast<float>(sum / static_cast<double>((y1 - y0) * (x1 - x0)));
    }
    float best = -std::numeric_limits<float>::infinity();
    for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) {
            const float v = plane[y * from.pitch + x];
            if (v > best || std::isnan(v)) best = v;
        }
    return best;
}

}  // namespace

void adaptive_pool_value(const Kernels& k, const Node& node, const Layout& from, const float* in, const Layout& to, float* out,
                         Part part) {
    const int64_t begin = part.begin(to.c), end = part.end(to.c);
    const auto first = [](int64_t i, int64_t size, int64_t parts) { return i * size / parts; };
    const auto last = [](int64_t i, int64_t size, int64_t parts) { return ((i + 1) * size + parts - 1) / parts; };
    const bool whole = node.op == Op::adaptive_avg_pool && to.h * to.w == 1;  // the lanes between rows are zero
    for (int64_t c = begin; c < end; ++c)
        for (int64_t n = 0; n < to.n; ++n) {
            if (whole) {
                const double sum = k.sum_row(in + from.at(n, c, 0), (from.h - 1) * from.pitch + from.w);
                float* out_row = out + to.at(n, c, 0);
                *out_row = static_cast<float>(sum / static_cast<double>(from.h * from.w));
                finish_row(to, out_row);
                continue;
            }
            for (int64_t y = 0; y < to.h; ++y) {
                float* row = out + to.at(n, c, y);
                for (int64_t x = 0; x < to.w; ++x)
                    row[x] = adaptive_cell(k, node.op == Op::adaptive_avg_pool, from, in + from.at(n, c, 0), first(y, from.h, to.h),
                                           last(y, from.h, to.h), first(x, from.w, to.w), last(x, from.w, to.w));
                finish_row(to, row);
            }
        }
    zero_margins(to, out, begin, end);
}

void pixel_shuffle_value(const Layout& from, const float* in, const std::array<int64_t, 2>& factor, const Layout& to, float* out, Part part) {
    const int64_t rh = factor[0], rw = factor[1];
    for (int64_t i = part.begin(to.n * to.c); i < part.end(to.n * to.c); ++i) {
        const int64_t n = i % to.n, c = i / to.n;
        for (int64_t y = 0; y < to.h; ++y) {
            float* row = out + to.at(n, c, y);
            for (int64_t j = 0; j < rw; ++j) {
                const float* source = in + from.at(n, c * rh * rw + y % rh * rw + j, y / rh);
                const int64_t count = (to.w - j + rw - 1) / rw;
                if (rw == 2 && j == 0 && to.w % 2 == 0) {  // both at once: the compiler interleaves them
                    const float* second = in + from.at(n, c * rh * rw + y % rh * rw + 1, y / rh);
                    for (int64_t x = 0; x < count; ++x) {
                        row[2 * x] = source[x];
                        row[2 * x + 1] = second[x];
                    }
                    break;
                }
                for (int64_t x = 0; x < count; ++x) row[x * rw + j] = source[x];
            }
        }
    }
}

namespace {

struct Rows {
    int64_t begin, end;
};

// Rows r of a phase, of [first, first + count), that are inside the image: 0 <= stride * (r + min_qy) + py < h.
Rows phase_rows(const ConvShape& s, int64_t py, int64_t first, int64_t count) {
    const int64_t stride = s.window.stride[0], above = -stride * s.min_qy - py;
    const int64_t top = std::clamp<int64_t>(above > 0 ? (above + stride - 1) / stride : 0, first, first + count);
    const int64_t below = s.in.h - 1 - py < 0 ? 0 : (s.in.h - 1 - py) / stride - s.min_qy + 1;
    return {top, std::max(top, std::min(first + count, below))};
}

// in: phase column 0 of the first row to be copied, of the first channel
void copy_phase(const Kernels& k, const ConvPlan& plan, int64_t px, const float* in, int64_t rows, float* out, int64_t channels) {
    const ConvShape& s = plan.shape;
    const PhaseCopy& copy = plan.copy;
    const int64_t sx = s.window.stride[1], pitch = s.window.stride[0] * s.in.pitch;
    // columns j with 0 <= sx * (j + first_column) + px < w
    const int64_t before = -sx * copy.first_column - px;
    const int64_t lead = std::clamp<int64_t>(before > 0 ? (before + sx - 1) / sx : 0, 0, copy.pitch);
    const int64_t stop = s.in.w - 1 - px < 0 ? 0 : (s.in.w - 1 - px) / sx - copy.first_column + 1;
    const int64_t count = std::max<int64_t>(0, std::min(copy.pitch, stop) - lead);
    const float* from = count ? in + sx * (lead + copy.first_column) + px : in;
    for (int64_t c = 0; c < channels; ++c)
        k.copy_rows({from + c * s.in.plane, out + c * copy.plane, rows, pitch, copy.pitch, sx, lead, count, copy.pitch - lead - count});
}

}  // namespace

void copy_phases(const Kernels& k, const ConvPlan& plan, const float* in, int64_t first, int64_t count, float* out, int64_t channels) {
    const ConvShape& s = plan.shape;
    const PhaseCopy& copy = plan.copy;
    const bool split = s.window.stride[1] == 2 && copy.first_column == 0;
    for (size_t ph = 0; ph < copy.phases.size(); ++ph) {
        const auto [py, px] = copy.phases[ph];
        float* to = out + static_cast<int64_t>(ph) * copy.phase;
        const Rows rows = phase_rows(s, py, first, count);
        for (int64_t c = 0; c < channels && rows.begin > first; ++c) std::fill_n(to + c * copy.plane, (rows.begin - first) * copy.pitch, 0.0f);
        for (int64_t c = 0; c < channels && rows.end < first + count; ++c)
            std::fill_n(to + c * copy.plane + (rows.end - first) * copy.pitch, (first + count - rows.end) * copy.pitch, 0.0f);
        const auto other = std::find(copy.phases.begin(), copy.phases.end(), std::array<int64_t, 2>{py, 1 - px});
        const bool pair = split && other != copy.phases.end();
        if (rows.begin == rows.end || (pair && other < copy.phases.begin() + static_cast<int64_t>(ph))) continue;  // done with the other
        const float* from = in + (s.window.stride[0] * (rows.begin + s.min_qy) + py) * s.in.pitch;
        to += (rows.begin - first) * copy.pitch;
        if (!split) {
            copy_phase(k, plan, px, from, rows.end - rows.begin, to, channels);
            continue;
        }
        float* second = pair ? to + (other - copy.phases.begin() - static_cast<int64_t>(ph)) * copy.phase : nullptr;
        k.split_rows({from, px == 0 ? to : second, px == 0 ? second : to, channels, s.in.plane, copy.plane, rows.end - rows.begin,
                      s.window.stride[0] * s.in.pitch, copy.pitch, s.in.w});
    }
}

void copy_phases(const Kernels& k, const ConvPlan& plan, const float* in, float* out, Part part) {
    const ConvShape& s = plan.shape;
    const int64_t begin = part.begin(s.in.c), end = part.end(s.in.c);
    for (int64_t n = 0; n < s.in.n; ++n)
        copy_phases(k, plan, in + s.in.at(n, begin, 0), 0, plan.copy.rows, out + begin * plan.copy.plane + n * plan.copy.rows * plan.copy.pitch,
                    end - begin);
}

void fill_panel(const Kernels& k, const ConvPlan& plan, size_t chunk, const float* in, float* out, int64_t channel_begin,
                int64_t channel_end) {
    const size_t taps = plan.shape.taps.size();
    const Im2colJob job{in, plan.shape.in.plane, out, plan.panel_plane, static_cast<int64_t>(taps), plan.pieces.data(),
                        plan.first_piece.data() + chunk * taps, channel_begin, channel_end};
    k.im2col(job);
}

namespace {

// Cuts [0, prefix.back()) into `parts` of about equal weight: returns the part's bounds as indices into prefix.
std::vector<size_t> balanced(const std::vector<int64_t>& prefix, int parts) {
    std::vector<size_t> cuts{0};
    for (int p = 1; p < parts; ++p) {
        const int64_t goal = prefix.back() * p / parts;
        size_t at = static_cast<size_t>(std::lower_bound(prefix.begin(), prefix.end(), goal) - prefix.begin());
        if (at > 0 && at < prefix.size() && goal - prefix[at - 1] < prefix[at] - goal) --at;
        cuts.push_back(std::clamp(at, cuts.back(), prefix.size() - 1));
    }
    cuts.push_back(prefix.size() - 1);
    return cuts;
}

double worst(const std::vector<int64_t>& prefix, const std::vector<size_t>& cuts) {
    int64_t most = 0;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) most = std::max(most, prefix[cuts[i + 1]] - prefix[cuts[i]]);
    return prefix.back() ? static_cast<double>(most) / static_cast<double>(prefix.back()) : 0.0;
}

}  // namespace

// Threads form a grid of pixel parts times row parts. Balance decides first, then the bytes that a thread reads.
std::vector<Share> share_work(const ConvPlan& plan, size_t chunk, int threads) {
    const size_t tile0 = plan.chunk_tiles[chunk], tile1 = plan.chunk_tiles[chunk + 1];
    std::vector<int64_t> pixels{0}, rows;
    for (size_t t = tile0; t < tile1; ++t) pixels.push_back(pixels.back() + plan.tiles[t].count);
    // a row costs its kept weights, and about three more to store it
    for (size_t i = 0; i < plan.weight.cuts.size(); ++i) rows.push_back(plan.weight.cost[i] + 3 * plan.weight.cuts[i]);
    const double input = static_cast<double>(plan.packed_floats ? plan.packed_floats : plan.shape.in.size()) * 4;
    const double weights = static_cast<double>(plan.weight.bytes());
    double best = 1e300;
    std::vector<size_t> tile_cuts, row_cuts;
    for (int tp = 1; tp <= threads; ++tp) {
        if (threads % tp != 0) continue;
        const auto tc = balanced(pixels, tp), rc = balanced(rows, threads / tp);
        const double balance = worst(pixels, tc) * worst(rows, rc) * threads;  // 1 is perfect
        const double bytes = (input / tp + weights * tp / threads) / (input + weights);
        const double score = balance + 0.1 * bytes;
        if (score < best) {
            best = score;
            tile_cuts = tc;
            row_cuts = rc;
        }
    }
    std::vector<Share> shares;
    for (size_t p = 0; p + 1 < tile_cuts.size(); ++p)
        for (size_t r = 0; r + 1 < row_cuts.size(); ++r)
            shares.push_back({plan.tiles.data() + tile0 + tile_cuts[p], static_cast<int64_t>(tile_cuts[p + 1] - tile_cuts[p]),
                              plan.weight.cuts[row_cuts[r]], plan.weight.cuts[row_cuts[r + 1]]});
    return shares;
}

// The end of rows from `begin` on whose weights stay in the second-level cache from tile to tile.
static int64_t rows_until(const PackedWeight& w, int64_t begin) {
    constexpr int64_t kBytes = 1 << 19;
    const int64_t rows = kBytes * w.cuts.back() / std::max<int64_t>(1, w.bytes());
    const auto past = std::upper_bound(w.cuts.begin(), w.cuts.end(), begin + rows);
    return std::max(*(past - 1), *std::upper_bound(w.cuts.begin(), w.cuts.end() - 1, begin));
}

void multiply(const Kernels& k, const ConvPlan& plan, const Share& share, const float* packed, const float* bias,
              const float* residual, float* out, const Activation& act) {
    const PackedWeight& w = plan.weight;
    SpmmJob job{};
    job.in = packed;
    job.out = out;
    job.bias = bias;
    job.residual = residual;
    job.plane = plan.shape.out.plane;
    job.residual_plane = plan.residual_plane;
    job.tiles = share.tiles;
    job.tile_count = share.tile_count;
    job.masks = plan.masks.data();
    job.act = act;
    job.start = w.start.data();
    job.entries = w.entries.data();
    job.narrow = w.narrow.empty() ? nullptr : w.narrow.data();
    job.narrow_base = w.narrow_base;
    job.tap_masks = plan.tap_masks.empty() ? nullptr : plan.tap_masks.data();
    job.groups = static_cast<int32_t>(w.shifts.size());
    job.shifts = w.shifts.data();
    job.row_edges = plan.edges.data();
    job.unroll = plan.unroll;
    job.stream_start = w.start.data();
    job.stream_blocks = w.blocks;
    job.stream_groups = (w.cuts.back() + 3) / 4;
    job.stream = w.stream.data();
    job.dense = w.dense.data();
    job.dense_offsets = w.dense_offsets.data();
    job.dense_cols = static_cast<int64_t>(w.dense_offsets.size());
    job.dense_rows_per_group = w.dense_rows_per_group;
    job.dense_group_offset = w.dense_group_offset;
    const auto kernel = w.kind == WeightKind::single ? k.single : w.kind == WeightKind::masked ? k.masked : k.dense;
    for (job.row_end = share.row_begin; job.row_end < share.row_end;) {
        job.row_begin = job.row_end;
        job.row_end = share.tile_count > 1 ? std::min(share.row_end, rows_until(w, job.row_begin)) : share.row_end;
        kernel(job);
    }
}

void multiply_and_activate(const Kernels& k, const ConvPlan& plan, const Share& share, const float* packed, const float* bias,
                           const float* residual, float* out, const Activation& act) {
    if (act.fits_epilogue()) return multiply(k, plan, share, packed, bias, residual, out, act);
    for (int64_t t = 0; t < share.tile_count; ++t) {
        const Tile& tile = share.tiles[t];
        multiply(k, plan, {&tile, 1, share.row_begin, share.row_end}, packed, bias, residual, out, {});
        for (int64_t row = share.row_begin; row < share.row_end; ++row) {
            float* to = out + row * plan.shape.out.plane + tile.out;
            k.act_row(to, to, tile.count * kLanes, act);
            if (act.keeps_zero()) continue;
            for (int64_t v = 0; v < tile.count; ++v) {
                const uint16_t mask = plan.masks[static_cast<size_t>(tile.masks + v)];
                for (int64_t i = 0; mask != 0xFFFF && i < kLanes; ++i)
                    if (!(mask >> i & 1)) to[v * kLanes + i] = 0.0f;
            }
        }
    }
}

}  // namespace sparseprune
