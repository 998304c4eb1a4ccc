#include "pack.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "errors.h"

namespace sparseprune::cuda {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 2;

void within(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) throw ValueError(message(name, "=", value, " must be between ", low, " and ", high));
}

int narrow(const char* name, int64_t value) {
    within(name, value, 0, kMost);
    return static_cast<int>(value);
}

int axis(const char* name, int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    within("stride", stride, 1, 1 << 20);
    within("padding", pad, 0, 1 << 20);
    within("dilation", dilation, 1, 1 << 20);
    within("kernel size", kernel, 1, 1 << 10);
    within(name, size, 1, kMost);
    const int64_t free = size + 2 * pad - dilation * (kernel - 1) - 1;
    if (free < 0) throw ValueError(message(name, "=", size, " is smaller than the kernel, ", dilation * (kernel - 1) + 1 - 2 * pad));
    return static_cast<int>(free / stride + 1);
}

// Rows, most entries first; equal ones in their order.
std::vector<int> by_size(const std::vector<int64_t>& sizes) {
    std::vector<int> order(sizes.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sizes[static_cast<size_t>(a)] > sizes[static_cast<size_t>(b)]; });
    return order;
}

// One matrix of rows x (channel, tap): what the packers read. Column ids ascend as (channel, tap).
struct Entry {
    int channel, tap;
    float value;
};
std::vector<Entry> row_entries(const Csr& w, int64_t row, int taps) {
    std::vector<Entry> out;
    for (int64_t i = w.row_start[static_cast<size_t>(row)]; i < w.row_start[static_cast<size_t>(row) + 1]; ++i) {
        const int col = w.col[static_cast<size_t>(i)];
        out.push_back({col / taps, col % taps, w.value[static_cast<size_t>(i)]});
    }
    return out;
}

uint32_t half_word(Math math, float x) {
    return math == Math::half ? from_float<Half>(x).bits : from_float<BFloat>(x).bits;
}

int even_chunk(int channels, int64_t most, int multiple) {
    if (most < multiple) return 0;
    const int64_t chunks = (channels + most - 1) / most;
    const int64_t even = (channels + chunks - 1) / chunks;
    const int64_t rounded = (even + multiple - 1) / multiple * multiple;
    return static_cast<int>(std::min(rounded, most / multiple * multiple));
}

}  // namespace

Geometry geometry(const Layer& l, int strip) {
    Geometry g{};
    within("groups", l.groups, 1, kMost);
    if (l.c % l.groups || l.out_c % l.groups)
        throw ValueError(message("groups=", l.groups, " does not divide ", l.c, " input and ", l.out_c, " output channels"));
    g.n = narrow("N", l.n), g.c = narrow("C", l.c), g.out_c = narrow("out channels", l.out_c);
    within("N", l.n, 1, kMost), within("C", l.c, 1, kMost), within("out channels", l.out_c, 1, kMost);
    g.oh = axis("H", l.h, l.kh, l.stride_h, l.pad_h, l.dil_h), g.ow = axis("W", l.w, l.kw, l.stride_w, l.pad_w, l.dil_w);
    g.h = static_cast<int>(l.h), g.w = static_cast<int>(l.w), g.kh = static_cast<int>(l.kh), g.kw = static_cast<int>(l.kw);
    g.stride_h = static_cast<int>(l.stride_h), g.stride_w = static_cast<int>(l.stride_w);
    g.pad_h = static_cast<int>(l.pad_h), g.pad_w = static_cast<int>(l.pad_w);
    g.dil_h = static_cast<int>(l.dil_h), g.dil_w = static_cast<int>(l.dil_w), g.groups = static_cast<int>(l.groups);
    g.pitch = narrow("row of the padded plane", int64_t{g.w} + gap(g.w, g.ow, g.kw, g.stride_w, g.pad_w, g.dil_w));
    g.rows = narrow("rows of the padded plane", int64_t{g.h} + gap(g.h, g.oh, g.kh, g.stride_h, g.pad_h, g.dil_h));
    narrow("padded plane", (l.n + 1) * g.rows > kMost ? kMost + 1 : (l.n + 1) * g.rows * g.pitch);
    g.pixels = narrow("output pixels", l.n * g.oh > kMost ? kMost + 1 : l.n * g.oh * g.ow);
    g.strip = strip;
    const int reach = tap_shift(g, g.kh * g.kw - 1);
    int64_t span = 1;
    for (int64_t p = 0; p < g.pixels; p += strip) {
        const int last = static_cast<int>(std::min<int64_t>(p + strip, g.pixels) - 1);
        span = std::max<int64_t>(span, first_input(g, last) + reach - first_input(g, static_cast<int>(p)) + 1);
    }
    g.span = narrow("span", span | 1);  // odd: planes of neighbouring channels start in different banks
    return g;
}

int spmm_chunk(const Geometry& g, int element, int64_t bytes) {
    return even_chunk(g.c / g.groups, bytes / (2 * int64_t{g.span} * element) - 1, 1);
}

int blocks_chunk(const Geometry& g, int element, int64_t bytes) {
    if (g.groups != 1 || g.c * element % 16 != 0 || g.kh * g.kw > kMostTaps) return 0;
    int64_t most = ((bytes - kMostTaps * 4) / (2 * int64_t{g.span}) - kPadBytes) / element;
    most = std::min<int64_t>(most, 16384 / element);  // a column's byte has 16 bits
    return even_chunk(g.c, most, 16);
}

PackedSpmm pack_spmm(const Csr& weight, const Geometry& g, int v, int chunk) {
    const int channels = g.c / g.groups, taps = g.kh * g.kw, per_group = g.out_c / g.groups;
    const int rows = v == 1 ? Records<1>::rows : Records<4>::rows, groups = rows / v;
    PackedSpmm out;
    out.chunk = chunk, out.chunks = ceil_div(channels, chunk);
    const int tiles_a_group = ceil_div(ceil_div(per_group, rows), kSpmmWarps) * kSpmmWarps;
    out.tiles = narrow("row tiles", int64_t{tiles_a_group} * g.groups);
    const int units_a_group = ceil_div(per_group, v);
    int64_t records = 0;
    for (int cg = 0; cg < g.groups; ++cg) {
        std::vector<std::map<int, std::vector<float>>> units(static_cast<size_t>(units_a_group));  // by column
        std::vector<int64_t> sizes;
        for (int u = 0; u < units_a_group; ++u) {
            for (int r = 0; r < v && u * v + r < per_group; ++r)
                for (const Entry& e : row_entries(weight, cg * per_group + u * v + r, taps)) {
                    std::vector<float>& values = units[static_cast<size_t>(u)][e.channel * taps + e.tap];
                    values.resize(static_cast<size_t>(v));
                    values[static_cast<size_t>(r)] = e.value;
                }
            sizes.push_back(static_cast<int64_t>(units[static_cast<size_t>(u)].size()));
        }
        const std::vector<int> order = by_size(sizes);
        for (int tile = 0; tile < tiles_a_group; ++tile) {
            for (int i = 0; i < rows; ++i) {
                const int place = tile * groups + i / v;
                const int row = place < units_a_group ? order[static_cast<size_t>(place)] * v + i % v : per_group;
                out.order.push_back(row < per_group ? cg * per_group + row : -1);
            }
            for (int k = 0; k < out.chunks; ++k) {
                out.starts.push_back(narrow("records", records));
                for (int i = 0; i < groups; ++i) {
                    const int place = tile * groups + i;
                    int count = 0;
                    if (place < units_a_group) {
                        const auto& unit = units[static_cast<size_t>(order[static_cast<size_t>(place)])];
                        std::vector<std::pair<uint32_t, std::vector<float>>> found;
                        for (auto at = unit.lower_bound(k * chunk * taps); at != unit.end() && at->first < (k + 1) * chunk * taps; ++at)
                            found.emplace_back((at->first / taps - k * chunk) * g.span + tap_shift(g, at->first % taps), at->second);
                        // the plane of zeros: a filled-up record adds nothing, not even NaN
                        if (found.size() % 2) found.emplace_back(chunk * g.span, std::vector<float>(static_cast<size_t>(v)));
                        for (size_t f = 0; f < found.size(); f += 2) {
                            if (v == 1) {
                                for (size_t e = f; e < f + 2; ++e) out.records.insert(out.records.end(), {found[e].first, bits_as<uint32_t>(found[e].second[0])});
                            } else {
                                out.records.insert(out.records.end(), {found[f].first, found[f + 1].first, 0, 0});
                                for (size_t e = f; e < f + 2; ++e)
                                    for (const float value : found[e].second) out.records.push_back(bits_as<uint32_t>(value));
                            }
                        }
                        count = static_cast<int>(found.size() / 2);
                    }
                    out.counts.push_back(count);
                    records += count;
                }
            }
        }
    }
    out.starts.push_back(narrow("records", records));
    return out;
}

PackedGemv pack_gemv(const Csr& weight, int64_t columns, Math math) {
    within("columns", columns, 1, kGemvMost);
    const size_t rows = weight.row_start.size() - 1;
    std::vector<int64_t> sizes;
    for (size_t r = 0; r < rows; ++r) sizes.push_back(weight.row_start[r + 1] - weight.row_start[r]);
    PackedGemv out;
    out.order = by_size(sizes);
    const auto add = [&](int64_t column, float value) {
        out.columns.push_back(static_cast<uint16_t>(column));
        const uint32_t word = math == Math::half || math == Math::bfloat ? half_word(math, value) : bits_as<uint32_t>(value);
        const int bytes = math == Math::half || math == Math::bfloat ? 2 : 4;
        for (int i = 0; i < bytes; ++i) out.values.push_back(static_cast<uint8_t>(word >> 8 * i));
    };
    for (const int row : out.order) {
        out.starts.push_back(narrow("entries", static_cast<int64_t>(out.columns.size() / 4)));
        const auto r = static_cast<size_t>(row);
        for (int64_t i = weight.row_start[r]; i < weight.row_start[r + 1]; ++i) add(weight.col[static_cast<size_t>(i)], weight.value[static_cast<size_t>(i)]);
        while (out.columns.size() % 4) add(columns, 0.0f);  // reads a zero
    }
    out.starts.push_back(narrow("entries", static_cast<int64_t>(out.columns.size() / 4)));
    return out;
}

PackedBlocks pack_blocks(const Csr& weight, const Geometry& g, Math math, int rows, bool vectors, int chunk) {
    const int taps = g.kh * g.kw, element = math == Math::half || math == Math::bfloat ? 2 : 4, width = kStepBytes / element;
    const int parts = math == Math::tf32x3 ? 2 : 1, block = vectors ? 1 : width;
    PackedBlocks out;
    out.chunk = chunk, out.chunks = ceil_div(g.c, chunk);
    const int found = ceil_div(g.out_c, rows), a_block = kBlockWarps * kWarpRows / rows;
    out.row_groups = found + (kWarpRows / rows - found % (kWarpRows / rows)) % (kWarpRows / rows);
    out.row_groups = narrow("row groups", ceil_div(out.row_groups, a_block) * a_block);

    // Of each group, by chunk, tap and channel: its rows' values. Without vectors, a step's channels are all there if one is.
    using Columns = std::map<std::pair<int, int>, std::vector<float>>;  // (tap, channel of the chunk)
    std::vector<std::vector<Columns>> all(static_cast<size_t>(found), std::vector<Columns>(static_cast<size_t>(out.chunks)));
    std::vector<int64_t> sizes(static_cast<size_t>(found));
    for (int r = 0; r < g.out_c; ++r)
        for (const Entry& e : row_entries(weight, r, taps)) {
            Columns& columns = all[static_cast<size_t>(r / rows)][static_cast<size_t>(e.channel / chunk)];
            const int channel = e.channel % chunk, begin = channel / block * block;
            for (int c = begin; c < begin + block; ++c) columns[{e.tap, c}].resize(static_cast<size_t>(rows));
            columns[{e.tap, channel}][static_cast<size_t>(r % rows)] = e.value;
        }
    for (int i = 0; i < found; ++i)
        for (const Columns& columns : all[static_cast<size_t>(i)]) sizes[static_cast<size_t>(i)] += ceil_div(static_cast<int>(columns.size()), width);
    const std::vector<int> order = by_size(sizes);

    int64_t steps = 0;
    for (int i = 0; i < out.row_groups; ++i) {
        out.order.push_back(i < found ? order[static_cast<size_t>(i)] * rows : -1);
        for (int k = 0; k < out.chunks; ++k) {
            out.starts.push_back(narrow("steps", steps));
            if (i >= found) continue;
            const Columns& columns = all[static_cast<size_t>(order[static_cast<size_t>(i)])][static_cast<size_t>(k)];
            for (auto at = columns.begin(); at != columns.end(); ++steps) {
                std::vector<std::vector<float>> values(static_cast<size_t>(width), std::vector<float>(static_cast<size_t>(rows)));
                if (!vectors) out.columns.push_back(column_code(at->first.first, at->first.second * element));
                for (int c = 0; c < width; ++c) {
                    const bool kept = at != columns.end();
                    if (vectors) out.columns.push_back(kept ? column_code(at->first.first, at->first.second * element) : column_code(0, chunk * element));
                    if (kept) values[static_cast<size_t>(c)] = at++->second;
                }
                const auto value = [&](int column, int row) { return values[static_cast<size_t>(column)][static_cast<size_t>(row)]; };
                const auto word = [&](int part, int lane, int eight, int j) -> uint32_t {
                    const int row = 8 * eight + lane / 4;
                    if (element == 2) {
                        const int column = 2 * (lane % 4) + 8 * j;
                        return half_word(math, value(column, row)) | half_word(math, value(column + 1, row)) << 16;
                    }
                    const float x = value(lane % 4 + 4 * j, row);
                    const uint32_t big = to_tf32(bits_as<uint32_t>(x));
                    if (part == 0) return big;
                    return (big & 0x7f800000u) == 0x7f800000u ? 0 : to_tf32(bits_as<uint32_t>(x - bits_as<float>(big)));
                };
                const int together = rows == 8 ? 1 : 2;  // eights whose words lie side by side
                for (int part = 0; part < parts; ++part)
                    for (int e = 0; e < rows / 8; e += together)
                        for (int lane = 0; lane < 32; ++lane)
                            for (int j = 0; j < 2 * together; ++j) out.weights.push_back(word(part, lane, e + j / 2, j % 2));
            }
        }
    }
    out.starts.push_back(narrow("steps", steps));
    return out;
}

double fill(const Csr& weight, int64_t in_channels, int64_t taps, int rows, int columns) {
    const int64_t all = static_cast<int64_t>(weight.row_start.size()) - 1;
    const int64_t across = (in_channels + columns - 1) / columns * taps;
    int64_t places = 0;
    std::vector<int64_t> seen(static_cast<size_t>(across), -1);
    for (int64_t r = 0; r < all; ++r)
        for (int64_t i = weight.row_start[static_cast<size_t>(r)]; i < weight.row_start[static_cast<size_t>(r) + 1]; ++i) {
            const int64_t col = weight.col[static_cast<size_t>(i)], channel = col / taps, tap = col % taps;
            int64_t& last = seen[static_cast<size_t>(channel / columns * taps + tap)];
            if (last == r / rows) continue;
            last = r / rows;
            const int64_t width = std::min<int64_t>(columns, in_channels - channel / columns * columns);
            const int64_t height = std::min<int64_t>(rows, all - r / rows * rows);
            places += width * height;
        }
    return places ? static_cast<double>(weight.col.size()) / static_cast<double>(places) : 1.0;
}

}  // namespace sparseprune::cuda
