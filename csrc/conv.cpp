#include "conv.h"

#include <algorithm>
#include <climits>
#include <map>
#include <set>

#include "errors.h"

namespace sparseprune {
namespace {

constexpr int64_t kPanelBytes = 2 << 20;  // one chunk of an im2col panel stays in the second-level cache

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

int32_t narrow_offset(int64_t x) {
    if (x > INT32_MAX || x < INT32_MIN) throw ValueError(message("a layer's packed input of ", x, " floats exceeds 2^31"));
    return static_cast<int32_t>(x);
}

bool pointwise(const ConvShape& s) {
    return s.taps.size() == 1 && s.min_qx == 0 && s.min_qy == 0 && s.window.stride[0] == 1 && s.window.stride[1] == 1;
}

bool same_plane(const ConvShape& s) {
    return s.in.kind == s.out.kind && s.in.n == s.out.n && s.in.h == s.out.h && s.in.w == s.out.w;
}

bool lane_shifts_fit(const ConvShape& s) { return s.min_qx >= -15 && s.max_qx <= 15; }

bool direct_fits(const ConvShape& s) {
    if (!same_plane(s) || s.window.stride[0] != 1 || s.window.stride[1] != 1) return false;
    if (s.out.kind == LayoutKind::flat) return pointwise(s);
    return s.out.kind == LayoutKind::rows && lane_shifts_fit(s) && -s.min_qy <= s.in.margin && s.max_qy <= s.in.margin;
}

// Tiles are whole planes: all images together, or one by one where an image is whole vectors.
int64_t tap_vectors(const ConvShape& s) {
    const int64_t pixels = s.out.h * s.out.w;
    return pixels % 16 == 0 ? pixels / 16 : s.out.n == 1 ? (pixels + 15) / 16 : 0;
}

bool taps_fit(const ConvShape& s, const Kernels& k) {
    if (!same_plane(s) || s.out.kind != LayoutKind::flat || s.window.stride[0] != 1 || s.window.stride[1] != 1) return false;
    if (pointwise(s)) return false;
    const int64_t far = std::max(s.max_qy * s.out.w + s.max_qx, -(s.min_qy * s.out.w + s.min_qx));
    const int64_t vectors = tap_vectors(s);
    if (s.max_qx - s.min_qx >= s.out.w) return false;  // two taps of one flat shift could not be told apart
    return far <= 15 && vectors >= 1 && vectors <= k.max_shift;
}

bool phases_fit(const ConvShape& s) {
    if (s.out.kind != LayoutKind::rows || !lane_shifts_fit(s)) return false;
    const int64_t available = (s.in.w + s.window.stride[1] - 1) / s.window.stride[1];  // columns of the widest phase
    return std::min(s.out.w - 1 + s.max_qx, available - 1) < s.out.pitch;
}

}  // namespace

std::vector<int> vector_counts(const ConvShape& s, Form form, WeightKind kind, const Kernels& k) {
    const int64_t vr = s.out.row_vectors();
    const bool shifted = (form == Form::direct || form == Form::phases) && (s.max_qx != 0 || s.min_qx != 0);
    const int most = kind == WeightKind::single ? (shifted ? k.max_shift : k.max_single)
               : kind == WeightKind::masked ? k.max_masked : k.max_dense;
    std::vector<int> counts;
    if (form == Form::taps) return {static_cast<int>(tap_vectors(s))};
    if (shifted) {
        for (int64_t t = vr; t <= most; t += vr) counts.push_back(static_cast<int>(t));
        for (int t = std::min(4, k.max_part); vr > most && t <= k.max_part && t > 0; ++t) counts.push_back(t);
        return counts;
    }
    for (int t : {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14})
        if (t <= most) counts.push_back(t);
    return counts;
}

namespace {

// ---- tiles ----

uint16_t lanes(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : static_cast<uint16_t>((1u << count) - 1); }

// Cuts `vectors` into tiles of at most `most`, multiples of `step`, as even as they come.
void add_run(std::vector<Tile>& tiles, int64_t in, int64_t out, int64_t vectors, int64_t most, int64_t step, int64_t mask) {
    const int64_t units = vectors / step, per = std::max<int64_t>(1, most / step), parts = (units + per - 1) / per;
    int64_t done = 0;
    for (int64_t p = 0; p < parts; ++p) {
        const int64_t count = (units * (p + 1) / parts - units * p / parts) * step;
        tiles.push_back({in + done * 16, out + done * 16, static_cast<int32_t>(count), static_cast<int32_t>(mask + done), 0});
        done += count;
    }
}

void make_masks(ConvPlan& p) {
    const Layout& out = p.shape.out;
    narrow_offset((out.kind == LayoutKind::flat ? out.n * out.h * out.w : out.h * out.pitch) / 16);  // tiles number masks by int32
    if (out.kind == LayoutKind::flat) {
        const int64_t pixels = out.n * out.h * out.w;
        for (int64_t v = 0; v * 16 < pixels; ++v) p.masks.push_back(lanes(pixels - v * 16));
        return;
    }
    for (int64_t y = 0; y < out.h; ++y)
        for (int64_t v = 0; v < out.row_vectors(); ++v) p.masks.push_back(lanes(out.w - v * 16));
}

// Whole rows where the lanes are shifted along them.
int64_t tile_step(const ConvPlan& p) {
    const bool shifted = p.choice.form != Form::halo && (p.shape.max_qx != 0 || p.shape.min_qx != 0);
    return shifted ? p.shape.out.row_vectors() : 1;
}

// The tiles of rows [begin, end) of one image, in rows layout.
void add_rows(std::vector<Tile>& tiles, const ConvPlan& p, int64_t in, int64_t in_pitch, int64_t out, int64_t begin, int64_t end) {
    const int64_t most = p.choice.vectors, vr = p.shape.out.row_vectors(), pitch = p.shape.out.pitch, step = tile_step(p);
    if (step > most) {  // lane shifts over parts of a row
        for (int64_t y = begin; y < end; ++y) {
            const size_t first = tiles.size();
            add_run(tiles, in + y * in_pitch, out + y * pitch, vr, most, 1, y * vr);
            for (size_t t = first; t < tiles.size(); ++t)
                tiles[t].sides = kInRow | (t > first ? kLeft : 0) | (t + 1 < tiles.size() ? kRight : 0);
        }
        return;
    }
    if (in_pitch == pitch) return add_run(tiles, in + begin * pitch, out + begin * pitch, (end - begin) * vr, most, step, begin * vr);
    for (int64_t y = begin; y < end; ++y) add_run(tiles, in + y * in_pitch, out + y * pitch, vr, most, step, y * vr);
}

void make_tiles(ConvPlan& p, int64_t in_offset, int64_t in_image, int64_t in_pitch) {
    const Layout& out = p.shape.out;
    if (out.kind == LayoutKind::flat) {
        add_run(p.tiles, in_offset, 0, static_cast<int64_t>(p.masks.size()), p.choice.vectors, 1, 0);
    } else {
        for (int64_t n = 0; n < out.n; ++n) add_rows(p.tiles, p, in_offset + n * in_image, in_pitch, out.at(n, 0, 0), 0, out.h);
    }
    p.chunk_tiles = {0, p.tiles.size()};
}

void make_edges(ConvPlan& p) {
    for (int64_t t = 0; t < 16; ++t) p.edges.push_back(t % p.shape.out.row_vectors() == 0 ? 0 : 0xFFFF);
}

// ---- columns: where weight column (channel, tap) of a group finds its input ----

template <class Offset>
std::vector<Column> make_columns(const ConvShape& s, const Offset& offset) {
    std::vector<Column> columns;
    columns.reserve(static_cast<size_t>(s.groups * s.columns()));
    for (int64_t c = 0; c < s.groups * s.channels_per_group; ++c)
        for (size_t t = 0; t < s.taps.size(); ++t) columns.push_back(offset(c, s.taps[t], static_cast<int64_t>(t)));
    return columns;
}

std::vector<Column> plan_direct(ConvPlan& p) {
    const ConvShape& s = p.shape;
    make_masks(p);
    make_tiles(p, s.in.offset, s.in.image, s.in.pitch);
    return make_columns(s, [&](int64_t c, const Tap& tap, int64_t) {
        return Column{narrow_offset(c * s.in.plane + tap.qy * s.in.pitch), static_cast<int32_t>(tap.qx)};
    });
}

std::vector<Column> plan_taps(ConvPlan& p) {
    const ConvShape& s = p.shape;
    const Layout& out = s.out;
    const int64_t vectors = tap_vectors(s), pixels = out.h * out.w;
    for (int64_t v = 0; v < vectors; ++v) p.masks.push_back(lanes(pixels - v * 16));
    for (int64_t n = 0; n < out.n; ++n) p.tiles.push_back({n * out.image, n * out.image, static_cast<int32_t>(vectors), 0, 0});
    p.chunk_tiles = {0, p.tiles.size()};
    return make_columns(s, [&](int64_t c, const Tap& tap, int64_t) {
        return Column{narrow_offset(c * s.in.plane), static_cast<int32_t>(tap.qy * out.w + tap.qx)};
    });
}

// Which lanes of a tile each group's tap serves.
void make_tap_masks(ConvPlan& p) {
    const ConvShape& s = p.shape;
    const int64_t vectors = tap_vectors(s), w = s.out.w, h = s.out.h;
    for (const int32_t shift : p.weight.shifts) {
        for (int64_t v = 0; v < vectors; ++v) {
            uint16_t mask = 0;
            for (int64_t lane = 0; lane < 16; ++lane) {
                const int64_t y = (v * 16 + lane) / w, x = (v * 16 + lane) % w;
                for (const Tap& t : s.taps) {
                    if (t.qy * w + t.qx != shift) continue;
                    if (y < h && y + t.qy >= 0 && y + t.qy < h && x + t.qx >= 0 && x + t.qx < w) mask = static_cast<uint16_t>(mask | 1u << lane);
                }
            }
            p.tap_masks.push_back(mask);
        }
    }
}

std::vector<Column> plan_copy(ConvPlan& p, int64_t rows) {
    const ConvShape& s = p.shape;
    const bool halo = p.choice.form == Form::halo;
    PhaseCopy& copy = p.copy;
    std::map<std::pair<int64_t, int64_t>, int64_t> numbers;
    for (const Tap& tap : s.taps)
        if (numbers.emplace(std::pair{tap.py, tap.px}, static_cast<int64_t>(copy.phases.size())).second)
            copy.phases.push_back({tap.py, tap.px});
    std::vector<int64_t> phase_of;  // by tap
    for (const Tap& tap : s.taps) phase_of.push_back(numbers.at({tap.py, tap.px}));
    copy.rows = rows ? rows : s.out.h + s.max_qy - s.min_qy;
    copy.pitch = halo ? round_up(s.out.w + s.max_qx - s.min_qx, 16) : s.out.pitch;
    copy.first_column = halo ? s.min_qx : 0;
    copy.phase = s.out.n * copy.rows * copy.pitch;
    copy.plane = odd_lines(static_cast<int64_t>(copy.phases.size()) * copy.phase);
    p.packed_floats = s.in.c * copy.plane + 64;
    make_masks(p);
    make_tiles(p, 0, copy.rows * copy.pitch, copy.pitch);
    return make_columns(s, [&](int64_t c, const Tap& tap, int64_t t) {
        const int64_t at = c * copy.plane + phase_of[static_cast<size_t>(t)] * copy.phase + (tap.qy - s.min_qy) * copy.pitch;
        return halo ? Column{narrow_offset(at + tap.qx - s.min_qx), 0} : Column{narrow_offset(at), static_cast<int32_t>(tap.qx)};
    });
}

// The input offset of output pixel (n, y, x) for a tap, or -1.
int64_t source(const ConvShape& s, const Tap& tap, int64_t n, int64_t y, int64_t x) {
    const int64_t iy = (y + tap.qy) * s.window.stride[0] + tap.py, ix = (x + tap.qx) * s.window.stride[1] + tap.px;
    return iy < 0 || iy >= s.in.h || ix < 0 || ix >= s.in.w ? -1 : s.in.at(n, 0, iy) + ix;
}

// Sixteen floats of a panel's column of `size`, from float `at` on: of the first `count` the sources, -1 for zero; zeros follow,
// which the next pieces may overwrite. They are read from as few places as there are.
void add_pieces(std::vector<Piece>& pieces, const int32_t* source, int64_t count, int64_t at, int64_t size) {
    const int64_t skip = std::max<int64_t>(0, -at);
    uint16_t write = 0, left = 0;
    for (int64_t l = skip; l < std::min<int64_t>(16, size - at); ++l) {
        write = static_cast<uint16_t>(write | 1u << (l - skip));
        if (l < count && source[l] >= 0) left = static_cast<uint16_t>(left | 1u << (l - skip));
    }
    while (write) {
        Piece piece{left ? INT32_MAX : 0, narrow_offset(at + skip), 0, 0, write, {}};
        for (int l = 0; l < 16; ++l)
            if (left >> l & 1) piece.start = std::min(piece.start, source[l + skip]);
        for (int l = 0; l < 16; ++l) {
            if (!(left >> l & 1) || source[l + skip] - piece.start >= 16) continue;
            piece.lane[l] = source[l + skip] - piece.start;
            piece.keep = static_cast<uint16_t>(piece.keep | 1u << l);
            piece.read = static_cast<uint16_t>(piece.read | 1u << piece.lane[l]);
        }
        left = static_cast<uint16_t>(left & ~piece.keep);
        pieces.push_back(piece);
        write = left;  // what is still missing
    }
}

// The pieces of vectors [first, end) for one tap: vector by vector, or row by row where rows are short; what takes fewer.
std::vector<Piece> make_pieces(const ConvShape& s, const Tap& tap, int64_t first, int64_t end) {
    const Layout& out = s.out;
    const bool flat = out.kind == LayoutKind::flat;
    const int64_t length = flat ? out.w : out.row_vectors() * 16, size = (end - first) * 16, rows = out.n * out.h;
    const auto from = [&](int64_t at, int64_t count) {  // sources of a run of the column of all vectors
        std::array<int32_t, 16> sources;
        for (int64_t l = 0; l < 16; ++l) {
            const int64_t row = (at + l) / length, x = (at + l) % length;
            sources[static_cast<size_t>(l)] =
                l < count && row < rows && x < out.w ? narrow_offset(source(s, tap, row / out.h, row % out.h, x)) : -1;
        }
        return sources;
    };
    std::vector<Piece> by_vector, by_row;
    for (int64_t v = first; v < end; ++v) add_pieces(by_vector, from(v * 16, 16).data(), 16, (v - first) * 16, size);
    if (!flat || out.w > 16) return by_vector;
    for (int64_t row = first * 16 / out.w; row < rows && row * out.w < end * 16; ++row)
        add_pieces(by_row, from(row * out.w, out.w).data(), out.w, row * out.w - first * 16, size);
    return by_row.size() < by_vector.size() ? by_row : by_vector;
}

void add_chunk_pieces(ConvPlan& p, int64_t first, int64_t end) {
    for (const Tap& tap : p.shape.taps) {
        p.first_piece.push_back(narrow_offset(static_cast<int64_t>(p.pieces.size())));
        const std::vector<Piece> pieces = make_pieces(p.shape, tap, first, end);
        p.pieces.insert(p.pieces.end(), pieces.begin(), pieces.end());
    }
}

std::vector<Column> plan_panel(ConvPlan& p) {
    const ConvShape& s = p.shape;
    const Layout& out = s.out;
    make_masks(p);
    const int64_t per_image = static_cast<int64_t>(p.masks.size());
    const int64_t vectors = out.kind == LayoutKind::flat ? per_image : out.n * per_image;
    const int64_t cols = s.groups * s.columns();
    const int64_t fit = std::max<int64_t>(1, kPanelBytes / 64 / cols);
    const int64_t chunk = std::min(vectors, std::max<int64_t>(fit / p.choice.vectors, 1) * p.choice.vectors);
    p.panel_plane = odd_lines(chunk * 16);
    p.packed_floats = cols * p.panel_plane;
    p.chunk_tiles = {0};
    for (int64_t first = 0; first < vectors; first += chunk) {
        const int64_t end = std::min(first + chunk, vectors);
        for (int64_t v = first; v < end;) {  // a run ends with the image in rows layout, where zero rows follow
            const int64_t n = out.kind == LayoutKind::flat ? 0 : v / per_image, in_image = v - n * per_image;
            const int64_t stop = std::min(end, (n + 1) * per_image);
            add_run(p.tiles, (v - first) * 16, out.at(n, 0, 0) + in_image * 16, stop - v, p.choice.vectors, 1, in_image);
            v = stop;
        }
        p.chunk_tiles.push_back(p.tiles.size());
        add_chunk_pieces(p, first, end);
    }
    p.first_piece.push_back(narrow_offset(static_cast<int64_t>(p.pieces.size())));
    const int64_t taps = static_cast<int64_t>(s.taps.size());
    return make_columns(s, [&](int64_t c, const Tap&, int64_t t) { return Column{narrow_offset((c * taps + t) * p.panel_plane), 0}; });
}

}  // namespace

std::vector<Tile> row_tiles(const ConvPlan& p, int64_t begin, int64_t end) {
    std::vector<Tile> tiles;
    add_rows(tiles, p, 0, p.choice.form == Form::direct ? p.shape.in.pitch : p.copy.pitch, 0, begin, end);
    return tiles;
}

ConvShape conv_shape(const Node& node, const Layout& in, const Layout& out) {
    ConvShape s{in, out, node.window, node.groups, in.c / node.groups, {}, 0, 0, 0, 0};
    if (node.op == Op::linear) s.window = Window{};
    const Window& w = s.window;
    for (int64_t ky = 0; ky < w.kernel[0]; ++ky)
        for (int64_t kx = 0; kx < w.kernel[1]; ++kx) {
            const int64_t y = ky * w.dilation[0] - w.padding[0], x = kx * w.dilation[1] - w.padding[2];
            Tap t{0, floor_div(y, w.stride[0]), 0, floor_div(x, w.stride[1])};
            t.py = y - t.qy * w.stride[0];
            t.px = x - t.qx * w.stride[1];
            s.taps.push_back(t);
        }
    const auto by_x = [](const Tap& a, const Tap& b) { return a.qx < b.qx; };
    const auto by_y = [](const Tap& a, const Tap& b) { return a.qy < b.qy; };
    s.min_qx = std::min_element(s.taps.begin(), s.taps.end(), by_x)->qx;
    s.max_qx = std::max_element(s.taps.begin(), s.taps.end(), by_x)->qx;
    s.min_qy = std::min_element(s.taps.begin(), s.taps.end(), by_y)->qy;
    s.max_qy = std::max_element(s.taps.begin(), s.taps.end(), by_y)->qy;
    return s;
}

int64_t direct_margin(const Node& node, const Shape& in, const Shape& out) {
    if (node.op != Op::conv || node.dims != 2 || in[3] <= 8 || in[2] != out[2] || in[3] != out[3]) return 0;
    const Window& w = node.window;
    if (w.stride[0] != 1 || w.stride[1] != 1) return 0;
    const int64_t below = (w.kernel[0] - 1) * w.dilation[0] - w.padding[0];
    const int64_t margin = std::max<int64_t>({0, w.padding[0], below});
    return margin <= 8 ? margin : 0;  // further than that the zero rows cost more than a copy
}

bool choice_fits(const ConvShape& s, const Choice& c, const Kernels& k) {
    const bool shifted = s.max_qx != 0 || s.min_qx != 0;
    if ((c.form == Form::direct || c.form == Form::phases) && shifted) {
        if (c.kind != WeightKind::single || (s.out.row_vectors() > k.max_shift && k.max_part == 0)) return false;
    }
    switch (c.form) {
        case Form::direct: return direct_fits(s);
        case Form::phases: return phases_fit(s);
        case Form::halo: return s.out.kind == LayoutKind::rows;
        case Form::panel: return s.out.kind == LayoutKind::rows || s.out.kind == LayoutKind::flat;
        case Form::taps: return c.kind == WeightKind::single && taps_fit(s, k);
        case Form::dot: return false;
    }
    return false;
}

std::vector<Choice> conv_choices(const ConvShape& s, double density, const Kernels& k) {
    const bool depthwise = s.channels_per_group == 1 && s.groups > 1;
    const int64_t vectors = s.out.kind == LayoutKind::flat ? (s.out.n * s.out.h * s.out.w + 15) / 16
                                                           : s.out.n * s.out.h * s.out.row_vectors();
    std::vector<WeightKind> kinds;
    if (density > 0.6 && !depthwise) kinds = {WeightKind::dense, WeightKind::masked, WeightKind::single};
    else if (density > 0.25 && !depthwise) kinds = {WeightKind::masked, WeightKind::single, WeightKind::dense};
    else if (density > 0.07 && !depthwise) kinds = {WeightKind::single, WeightKind::masked};
    else kinds = {WeightKind::single};
    const bool panel_small = s.groups * s.columns() * vectors * 64 <= 4 * kPanelBytes;
    std::vector<Choice> out;
    for (WeightKind kind : kinds)
        for (Form form : {Form::direct, Form::taps, Form::phases, Form::halo, Form::panel}) {
            if (form == Form::panel && s.out.kind == LayoutKind::rows && !panel_small) continue;
            if (form == Form::phases && direct_fits(s)) continue;
            if (form == Form::halo && pointwise(s) && direct_fits(s)) continue;
            if (form == Form::panel && pointwise(s) && direct_fits(s)) continue;
            if (!choice_fits(s, {form, kind, 1}, k)) continue;
            std::vector<int> counts = vector_counts(s, form, kind, k);
            while (counts.size() > 1 && counts[counts.size() - 2] >= vectors) counts.pop_back();
            // the default tile is the widest at hand up to eight vectors: enough chains, still in the first-level cache
            std::stable_sort(counts.begin(), counts.end(), [](int a, int b) {
                return std::abs(a - 7) < std::abs(b - 7);
            });
            for (int t : counts) out.push_back({form, kind, t});
        }
    return out;
}

namespace {

// Few vectors: more accumulators each, or the additions would wait for one another. Where a row has few weights of one shift, filling
// them up to a multiple would cost more. Settled by shape and weight, for it settles the order of additions.
int unroll_of(const ConvPlan& p, const Weight& weight, const std::vector<Column>& columns) {
    std::set<int32_t> shifts{0};  // as in the packed weight: group 0 is there even without columns
    for (const Column& c : columns) shifts.insert(c.shift);
    if (p.choice.kind != WeightKind::single || (shifts.size() > 1 && p.choice.form != Form::taps)) return 1;
    const size_t vectors = p.masks.size();
    const int64_t kept = weight.sparse ? weight.sparse->kept() : weight.rows() * weight.cols();
    const int64_t together = kept / (std::max<int64_t>(1, weight.rows()) * static_cast<int64_t>(shifts.size()));
    return std::min(vectors <= 1 ? 4 : vectors <= 4 ? 2 : 1, together < 2 ? 1 : together < 6 ? 2 : 4);
}

// Columns of a block. The taps of a halo share cache lines, so many columns' inputs stay in the first-level cache; where they do not, keeping
// sums in the output costs more than it gains.
int64_t block_columns(const ConvPlan& p) {
    return p.choice.form == Form::halo && p.shape.taps.size() > 1 ? 384 : std::max<int64_t>(1, p.shape.columns());
}

}  // namespace

ConvPlan plan_conv(const ConvShape& shape, const Weight& weight, const Choice& choice, const Kernels& kernels, int64_t copy_rows) {
    ConvPlan p;
    p.choice = choice;
    p.residual_plane = shape.out.plane;
    const std::vector<int> counts = vector_counts(shape, choice.form, choice.kind, kernels);
    if (std::find(counts.begin(), counts.end(), choice.vectors) == counts.end()) {
        throw ValueError(message("vectors=", choice.vectors, " does not fit form=", form_name(choice.form)));
    }
    p.shape = shape;
    std::vector<Column> columns;
    switch (choice.form) {
        case Form::direct: columns = plan_direct(p); break;
        case Form::phases:
        case Form::halo: columns = plan_copy(p, copy_rows); break;
        case Form::panel: columns = plan_panel(p); break;
        case Form::taps: columns = plan_taps(p); break;
        case Form::dot: throw ValueError("form=dot has no tiles");
    }
    p.unroll = unroll_of(p, weight, columns);
    p.weight = pack_weight(choice.kind, weight, shape.groups, columns, kernels.dense_rows, p.unroll, block_columns(p));
    make_edges(p);
    if (choice.form == Form::taps) make_tap_masks(p);
    return p;
}

}  // namespace sparseprune
