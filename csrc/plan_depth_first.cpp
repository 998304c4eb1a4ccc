// Which layers run depth first (depth_first.h), and how. Nothing here changes a result: a pixel's additions keep their order.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <set>

#include "depth_first.h"
#include "plan_builder.h"

namespace sparseprune {

// A layer that may be part of a group.
struct PlanBuilder::BandNode {
    enum Kind { conv, pool, add, activation, alias } kind;
    int index;  // of the node
    Layout out;
    ConvShape shape;
    Choice choice;
};

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kMemoryRate = 10e9, kCacheRate = 50e9;  // bytes a second and thread: beyond the second-level cache, inside it
constexpr double kMultiplyRate = 20e9;                   // kept weights times pixels a second and thread
constexpr double kBarrier = 2e-6, kCall = 0.3e-6;        // seconds
constexpr int64_t kMostBands = 64;                       // an image
constexpr int64_t kMostInAll = 256;                      // of all images that differ in how they are shared out
constexpr int64_t kPatience = 10000000;                  // bands times layers looked at: a plan must not take long, whatever comes
constexpr size_t kLongest = 32;                          // nodes of a group

int64_t cache_bytes() {
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return std::clamp<int64_t>(size, 1 << 20, 4 << 20);
}

struct BandWindow {
    int64_t channels, pitch, plane;
};

// A value as a step sees it: rows of one image.
struct Operand {
    int window = -1;
    int64_t channel = 0;  // of the window
    Ref ref;
    Layout layout{};
};

struct BandStep {
    size_t layer = 0;  // of the schedule
    int index = 0;     // of the node
    const Node* node = nullptr;
    std::shared_ptr<const ConvPlan> conv;
    Operand x, second, out;  // second: what is added, ref.kind none where nothing is
    std::map<std::pair<int64_t, int64_t>, std::vector<Tile>> tiles;  // by rows
};

struct BandGroup {
    std::vector<BandStep> steps;
    Schedule schedule;
    std::vector<BandWindow> windows;
    std::vector<std::vector<Ref>> window_refs;  // by thread
    std::vector<Ref> scratch;                   // by thread
    std::vector<Operand> whole;                 // values that other groups read: their zero rows are written here
};

}  // namespace

// What a group is, before anything is packed.
struct PlanBuilder::Group {
    size_t begin = 0, end = 0;  // of the nodes looked at
    std::vector<int> values;    // of the graph
    std::map<int, int> local;   // and back
    std::vector<BandLayer> layers;
    std::vector<BandValue> band_values;
    std::vector<int> roots;     // of each window
    int64_t bands = 0;  // an image
    Schedule schedule;
    double cost = 0;
};

Layout PlanBuilder::band_layout(int value) const {
    const auto found = band_layouts_.find(value);
    return found == band_layouts_.end() ? values_[static_cast<size_t>(value)].layout : found->second;
}

std::optional<PlanBuilder::BandNode> PlanBuilder::band_node(size_t index) {
    const Node& node = graph_.nodes[index];
    node_ = static_cast<int>(index);
    value_ = static_cast<int>(graph_.inputs.size() + index);
    if (shape().size() != 4) return std::nullopt;
    BandNode b{BandNode::alias, node_, layout_of(shape(), false), {}, {}};
    if (b.out.kind != LayoutKind::rows) return std::nullopt;
    const auto alike = [&](size_t i) { return input_shape(node, i) == shape() && band_layout(node.inputs[i]).same_as(b.out); };
    const auto readable = [&] {
        const Layout in = band_layout(node.inputs[0]);
        return input_shape(node, 0).size() == 4 && (in.kind == LayoutKind::rows || in.kind == LayoutKind::external);
    };
    switch (node.op) {
        case Op::conv: {
            if (node.dims != 2 || !readable() || (node.inputs.size() > 1 && !alike(1))) return std::nullopt;
            b.kind = BandNode::conv;
            b.shape = conv_shape(node, band_layout(node.inputs[0]), b.out);
            b.choice = choose(b.shape, graph_.weights[static_cast<size_t>(node.weight)]);
            const Form form = b.choice.form;
            if (form != Form::direct && form != Form::phases && form != Form::halo) return std::nullopt;
            return b;
        }
        case Op::max_pool:
        case Op::avg_pool:
            b.kind = BandNode::pool;
            return node.dims == 2 && readable() ? std::optional(b) : std::nullopt;
        case Op::add:
            b.kind = BandNode::add;
            return alike(0) && alike(1) && node.act.fits_epilogue() && node.act.keeps_zero() ? std::optional(b) : std::nullopt;
        case Op::act:
            b.kind = BandNode::activation;
            return alike(0) && node.act.keeps_zero() ? std::optional(b) : std::nullopt;
        case Op::slice: {
            const SliceRange range = slice_range(node, input_shape(node, 0)[static_cast<size_t>(node.axis)]);
            return node.axis == 1 && (node.step == 1 || range.count == 1) && band_layout(node.inputs[0]).kind == LayoutKind::rows
                       ? std::optional(b)
                       : std::nullopt;
        }
        case Op::concat: {
            if (node.axis != 1) return std::nullopt;
            int64_t channel = 0;
            for (int value : node.inputs) {
                const auto place = places_.find(value);
                if (place == places_.end() || place->second.concat != node_ || place->second.channel != channel) return std::nullopt;
                channel += shape_of(value)[1];
            }
            return b;
        }
        default: return std::nullopt;
    }
}

// The value whose planes hold this one inside nodes [begin, end), and at which channel.
std::pair<int, int64_t> PlanBuilder::band_root(int value, size_t begin, size_t end) const {
    const int first = static_cast<int>(graph_.inputs.size());
    const auto inside = [&](int node) { return node >= static_cast<int>(begin) && node < static_cast<int>(end); };
    for (int64_t channel = 0;;) {
        const Node* node = inside(value - first) ? &graph_.nodes[static_cast<size_t>(value - first)] : nullptr;
        const auto place = places_.find(value);
        if (node && node->op == Op::slice) {
            channel += slice_range(*node, shape_of(node->inputs[0])[1]).start;
            value = node->inputs[0];
        } else if (node && place != places_.end() && inside(place->second.concat)) {
            channel += place->second.channel;
            value = first + place->second.concat;
        } else {
            return {value, channel};
        }
    }
}

double PlanBuilder::traffic(int64_t bytes) const {
    const bool far = bytes > threads() * cache_bytes() / 2;
    return static_cast<double>(bytes) / threads() / (far ? kMemoryRate : kCacheRate);
}

// Seconds that a layer on its own spends on moving data.
double PlanBuilder::cost_alone(const BandNode& b) const {
    if (b.kind == BandNode::alias) return 0;
    const Node& node = graph_.nodes[static_cast<size_t>(b.index)];
    double seconds = kBarrier + 2 * traffic(b.out.size() * 4);
    for (int value : node.inputs) seconds += traffic(band_layout(value).size() * 4);
    if (b.kind == BandNode::conv && b.choice.form != Form::direct) {
        const int64_t copy = b.shape.in.size() * (b.choice.form == Form::halo ? 5 : 4);
        seconds += kBarrier + 3 * traffic(copy);
    }
    return seconds;
}

namespace {

// Rows of the input that output rows read.
BandInput conv_rows(const ConvShape& s, const Choice& choice, int value) {
    if (choice.form == Form::direct) return {value, 1, s.min_qy, s.max_qy, s.min_qy < 0 || s.max_qy > 0};
    int64_t first = INT64_MAX, last = 0;  // of a phase; the copy holds as many rows of each
    for (const Tap& t : s.taps) {
        first = std::min(first, t.py);
        last = std::max(last, t.py);
    }
    const int64_t stride = s.window.stride[0];
    return {value, stride, stride * s.min_qy + first, stride * s.max_qy + last, false};
}

// Floats of one row of a copy, of one channel: all phases.
int64_t copy_row(const ConvShape& s, const Choice& choice) {
    std::set<std::pair<int64_t, int64_t>> phases;
    for (const Tap& t : s.taps) phases.emplace(t.py, t.px);
    const int64_t pitch = choice.form == Form::halo ? round_up(s.out.w + s.max_qx - s.min_qx, 16) : s.out.pitch;
    return static_cast<int64_t>(phases.size()) * pitch;
}

// Convolutions with many groups are copied and multiplied some groups at a time: the copy stays in the first-level cache.
// plane: 0 where no row of a layer is read.
int64_t copied_groups(const ConvShape& s, int64_t plane, WeightKind kind) {
    constexpr int64_t kFloats = 6144;  // half a first-level cache
    return kind != WeightKind::single ? s.groups : std::clamp<int64_t>(kFloats / std::max<int64_t>(1, plane * s.channels_per_group), 1, s.groups);
}

int64_t kept_weights(const Weight& w) { return w.sparse ? w.sparse->kept() : w.rows() * w.cols(); }

}  // namespace

// The group of nodes [begin, end), with the fewest bands whose windows fit the cache; nothing where it cannot be, or none fits.
// wanted: so many, if it is not 0. too_large is set where even the smallest bands do not fit.
std::optional<PlanBuilder::Group> PlanBuilder::band_group(const std::vector<BandNode>& nodes, size_t begin, size_t end, int64_t wanted,
                                                          bool& too_large) const {
    const int first = static_cast<int>(graph_.inputs.size());
    const size_t base = static_cast<size_t>(nodes[0].index);
    Group g;
    g.begin = begin;
    g.end = end;
    const auto node_of = [&](size_t i) -> const Node& { return graph_.nodes[base + i]; };
    std::set<int> whole;  // roots that others read
    const auto number = [&](int value) {
        const auto [at, is_new] = g.local.emplace(value, static_cast<int>(g.values.size()));
        if (is_new) g.values.push_back(value);
        return at->second;
    };
    const auto root = [&](int value) { return band_root(value, base + begin, base + end).first; };
    for (size_t i = begin; i < end; ++i) {
        const int value = first + static_cast<int>(base + i);
        const auto users = consumers_.find(value);
        bool outside = i + 1 == end || users == consumers_.end();
        if (!outside) outside = users->second.back() >= static_cast<int>(base + end);
        if (outside || places_.count(root(value))) whole.insert(root(value));
    }
    for (size_t i = begin; i < end; ++i) {
        const Node& node = node_of(i);
        if (node.op == Op::concat)  // of parts that are made here
            for (int value : node.inputs)
                if (value < first + static_cast<int>(base + begin)) return std::nullopt;
        BandLayer layer{number(first + static_cast<int>(base + i)), {}};
        for (size_t k = 0; k < node.inputs.size(); ++k) {
            const int value = number(node.inputs[k]);
            if (nodes[i].kind == BandNode::conv && k == 0) layer.inputs.push_back(conv_rows(nodes[i].shape, nodes[i].choice, value));
            else if (nodes[i].kind == BandNode::pool)
                layer.inputs.push_back({value, node.window.stride[0], -node.window.padding[0],
                                        (node.window.kernel[0] - 1) * node.window.dilation[0] - node.window.padding[0], false});
            else layer.inputs.push_back({value, 1, 0, 0, false});
        }
        g.layers.push_back(std::move(layer));
    }
    std::map<int, int> windows;  // by root
    for (int value : g.values) {
        const int r = root(value);
        const bool inner = r >= first + static_cast<int>(base + begin) && !whole.count(r);
        int window = -1;
        if (inner) {
            window = windows.emplace(r, static_cast<int>(g.roots.size())).first->second;
            if (window == static_cast<int>(g.roots.size())) g.roots.push_back(r);
        }
        g.band_values.push_back({shape_of(value)[2], window});
    }
    // A value that others read has its zero rows written beside: nobody may read them here.
    const auto made_whole = [&](int value) {
        return root(g.values[static_cast<size_t>(value)]) >= first + static_cast<int>(base + begin) &&
               g.band_values[static_cast<size_t>(value)].window < 0;
    };
    for (const BandLayer& layer : g.layers)
        for (const BandInput& in : layer.inputs)
            if (in.border && made_whole(in.value)) return std::nullopt;
    const Shape& last = shape_of(first + static_cast<int>(base + end) - 1);
    const int64_t images = last[0], step = threads() / std::gcd(images, static_cast<int64_t>(threads()));
    const auto possible = [&](int64_t bands) {
        g.bands = bands;
        band_work_ += (many_images(images, threads()) ? threads() : images) * bands * static_cast<int64_t>(g.layers.size());
        g.schedule = make_schedule(g.layers, g.band_values, static_cast<int>(g.roots.size()), images, bands, threads());
        for (size_t l = 0; l < g.layers.size(); ++l) {
            const BandValue& out = g.band_values[static_cast<size_t>(g.layers[l].output)];
            if (made_whole(g.layers[l].output) && !computes_once(g.schedule, l, out.height)) return false;
        }
        return true;
    };
    const auto multiple = [&](int64_t most) { return std::max(step, most / step * step); };
    const int64_t forced = wanted > 0 ? wanted : plan_.options_.bands > 0 ? multiple(std::min(last[2], plan_.options_.bands)) : 0;
    if (forced > 0) return possible(forced) ? std::optional(std::move(g)) : std::nullopt;  // whatever it costs
    if (band_work_ > kPatience) return std::nullopt;
    const int64_t shared = many_images(images, threads()) ? threads() : images;  // bands of so many images are made
    const int64_t most = multiple(std::min({last[2], kMostBands, kMostInAll / shared}));
    if (most > std::min(kMostBands, last[2]) || most * shared > kMostInAll || !possible(most)) return std::nullopt;
    too_large = !cost_of(nodes, g);
    for (int64_t bands = step; bands < most && !too_large; bands += std::max(step, bands / 4 / step * step))
        if (possible(bands) && cost_of(nodes, g)) return g;
    return !too_large && possible(most) && cost_of(nodes, g) ? std::optional(std::move(g)) : std::nullopt;
}

// Sets the group's cost; false where its bands are too large for the cache.
bool PlanBuilder::cost_of(const std::vector<BandNode>& nodes, Group& g) const {
    int64_t held = 0, scratch = 0, weights = 0;
    for (size_t w = 0; w < g.roots.size(); ++w) {
        const Layout l = band_layout(g.roots[w]);
        held += l.c * l.pitch * g.schedule.capacity[w] * 4;
    }
    double seconds = kBarrier, moved = 0, ideal = 0, busiest = 0;
    int64_t calls = 0;
    for (size_t t = 0; t < g.schedule.threads.size(); ++t)
        calls = std::max(calls, static_cast<int64_t>(g.schedule.threads[t].size() * g.layers.size()) * g.schedule.repeats[t]);
    const int64_t images = band_layout(g.values[0]).n;
    for (size_t i = 0; i < g.layers.size(); ++i) {
        const BandNode& b = nodes[g.begin + i];
        const double height = static_cast<double>(b.out.h * images), rows = static_cast<double>(g.schedule.busiest[i]);
        double row_seconds = static_cast<double>(b.out.c * b.out.pitch) * 8 / kCacheRate;
        if (b.kind == BandNode::alias) row_seconds = 0;
        if (b.kind == BandNode::conv) {
            const Weight& weight = graph_.weights[static_cast<size_t>(graph_.nodes[static_cast<size_t>(b.index)].weight)];
            const int64_t kept = kept_weights(weight);
            weights += b.choice.kind == WeightKind::dense ? weight.rows() * weight.cols() * 4 : kept * 6;
            row_seconds += static_cast<double>(kept * b.out.w) / kMultiplyRate;
            if (b.choice.form != Form::direct) {
                const int64_t span = b.shape.max_qy - b.shape.min_qy, plane = copy_row(b.shape, b.choice) * (g.schedule.most[i] + span);
                const int64_t at_once = copied_groups(b.shape, plane, b.choice.kind), row = b.shape.in.c * copy_row(b.shape, b.choice) * 4;
                scratch = std::max(scratch, at_once * b.shape.channels_per_group * plane * 4);
                moved += (at_once < b.shape.groups ? 1.0 : 3.0) * static_cast<double>(row) * (rows + static_cast<double>(span * calls) / static_cast<double>(g.layers.size()));
            }
        }
        ideal += row_seconds * height / threads();
        busiest += row_seconds * rows;
    }
    std::set<int> seen;
    const int here = static_cast<int>(graph_.inputs.size()) + nodes[g.begin].index;
    for (size_t v = 0; v < g.values.size(); ++v) {
        if (g.band_values[v].window >= 0) continue;
        const auto [root, channel] = band_root(g.values[v], static_cast<size_t>(nodes[g.begin].index), static_cast<size_t>(nodes[g.end - 1].index) + 1);
        if (!seen.insert(root).second) continue;
        const Layout l = band_layout(root);
        const bool written = root >= here;
        seconds += (written ? 2 : 1) * traffic(l.size() * 4);
        held += l.c * l.pitch * 4 * (l.h / g.bands + 2);
    }
    const int64_t budget = cache_bytes() * 3 / 4;
    if (held + scratch + weights > budget)  // every band reads them anew
        seconds += static_cast<double>(calls / static_cast<int64_t>(g.layers.size()) - 1) * static_cast<double>(weights) / kMemoryRate;
    g.cost = seconds + moved / kCacheRate + (busiest - ideal) + static_cast<double>(calls) * kCall;
    return held + scratch + std::min(weights, budget / 2) <= budget;
}

// Cuts a run of layers into groups and single layers, so that least is moved; builds all of them. Returns how many nodes it built.
size_t PlanBuilder::build_depth_first(size_t index) {
    if (plan_.options_.bands < 0) return 0;
    band_layouts_.clear();
    std::vector<BandNode> nodes;
    while (index + nodes.size() < graph_.nodes.size()) {
        const std::optional<BandNode> b = band_node(index + nodes.size());
        if (!b) break;
        band_layouts_[value_] = b->out;
        nodes.push_back(*b);
    }
    if (nodes.empty()) return 0;
    struct Cut {
        size_t end = 0;
        int64_t bands = 0;
    };
    std::vector<double> best(nodes.size() + 1, 0);
    std::vector<Cut> cuts(nodes.size());
    bool too_large = false;
    for (size_t i = nodes.size(); i-- > 0;) {
        best[i] = cost_alone(nodes[i]) + best[i + 1] + (plan_.options_.bands > 0 ? 1.0 : 0.0);
        too_large = false;
        for (size_t end = i + 1; end <= std::min(nodes.size(), i + kLongest) && !too_large; ++end) {
            if (end == i + 1 && (nodes[i].kind != BandNode::conv || nodes[i].choice.form == Form::direct)) continue;  // nothing to gain
            if (nodes[end - 1].kind == BandNode::alias) continue;
            const std::optional<Group> g = band_group(nodes, i, end, 0, too_large);
            if (!g || g->cost + best[end] >= best[i]) continue;
            best[i] = g->cost + best[end];
            cuts[i] = {end, g->bands};
        }
    }
    for (size_t i = 0; i < nodes.size();) {
        if (cuts[i].end) {
            build_group(nodes, *band_group(nodes, i, cuts[i].end, cuts[i].bands, too_large));
            i = cuts[i].end;
            continue;
        }
        node_ = nodes[i].index;
        value_ = static_cast<int>(graph_.inputs.size()) + node_;
        values_.push_back(build_node(graph_.nodes[static_cast<size_t>(node_)]));
        ++i;
    }
    return nodes.size();
}

namespace {

using Pointers = PlanBuilder::Pointers;

// Where row 0 of the first channel would be, were all rows there.
const float* row0(const BandGroup& g, const Pointers& ptr, const Run& run, int id, const Band& band, int64_t image, const Operand& o) {
    if (o.window < 0) return o.ref.kind == Ref::none ? nullptr : ptr.in(run, o.ref) + o.layout.offset + image * o.layout.image;
    const auto w = static_cast<size_t>(o.window);
    return ptr.in(run, g.window_refs[static_cast<size_t>(id)][w]) + o.channel * g.windows[w].plane -
           band.windows[w].rows.begin * g.windows[w].pitch;
}
float* writable(const float* p) { return const_cast<float*>(p); }

void move_windows(const BandGroup& g, const Pointers& ptr, const Run& run, int id, const Band& band) {
    for (size_t w = 0; w < g.windows.size(); ++w) {
        const WindowRows& rows = band.windows[w];
        const int64_t pitch = g.windows[w].pitch;
        float* plane = ptr.out(run, g.window_refs[static_cast<size_t>(id)][w]);
        for (int64_t c = 0; c < g.windows[w].channels; ++c, plane += g.windows[w].plane) {
            if (rows.kept_at > 0 && rows.kept > 0) std::copy_n(plane + rows.kept_at * pitch, rows.kept * pitch, plane);
            std::fill_n(plane + (rows.above.begin - rows.rows.begin) * pitch, rows.above.size() * pitch, 0.0f);
            std::fill_n(plane + (rows.below.begin - rows.rows.begin) * pitch, rows.below.size() * pitch, 0.0f);
        }
    }
}

void run_conv(const Kernels& k, const BandStep& step, Range rows, const float* x, const float* residual, float* out, float* scratch) {
    const ConvPlan& plan = *step.conv;
    const ConvShape& s = plan.shape;
    const std::vector<Tile>& tiles = step.tiles.at({rows.begin, rows.end});
    const float* bias = step.node->bias ? step.node->bias->data() : nullptr;
    Share share{tiles.data(), static_cast<int64_t>(tiles.size()), 0, plan.weight.cuts.back()};
    if (plan.choice.form == Form::direct) return multiply_and_activate(k, plan, share, x, bias, residual, out, step.node->act);
    const int64_t at_once = copied_groups(s, plan.copy.plane, plan.choice.kind);
    for (int64_t group = 0; group < s.groups; group += at_once) {
        const int64_t end = std::min(s.groups, group + at_once), channel = group * s.channels_per_group;
        copy_phases(k, plan, x + channel * s.in.plane, rows.begin, rows.size() + s.max_qy - s.min_qy, scratch,
                    end * s.channels_per_group - channel);
        share.row_begin = group * (s.out.c / s.groups);
        share.row_end = end * (s.out.c / s.groups);
        multiply_and_activate(k, plan, share, scratch - channel * plan.copy.plane - rows.begin * plan.copy.pitch, bias, residual, out,
                              step.node->act);
    }
}

void run_step(const Kernels& k, const BandStep& step, Range rows, const float* x, const float* second, float* out, float* scratch) {
    const Layout &from = step.x.layout, &to = step.out.layout;
    const int64_t first = rows.begin * to.pitch, count = rows.size() * to.pitch;
    if (step.conv) return run_conv(k, step, rows, x, second, out, scratch);
    for (int64_t c = 0; c < to.c; ++c, x += from.plane, out += to.plane) {
        if (step.node->op == Op::add) k.add_row(x + first, second + c * step.second.layout.plane + first, out + first, count, step.node->act);
        else if (step.node->op == Op::act) k.act_row(x + first, out + first, count, step.node->act);
        else pool_rows(k, *step.node, from, x, to, out, scratch, rows.begin, rows.end);
    }
}

void run_group(const BandGroup& g, const Kernels& k, const Pointers& ptr, const Run& run, int id, int threads) {
    const Part part{id, threads};
    for (const Operand& o : g.whole) zero_margins(o.layout, ptr.out(run, o.ref), part.begin(o.layout.c), part.end(o.layout.c));
    float* scratch = ptr.out(run, g.scratch[static_cast<size_t>(id)]);
    const bool timed = run.node_seconds && id == 0 && g.steps.size() > 1;
    const auto row = [&](const Band& band, int64_t image, const Operand& o) { return row0(g, ptr, run, id, band, image, o); };
    for (int64_t repeat = 0; repeat < g.schedule.repeats[static_cast<size_t>(id)]; ++repeat)
        for (const Band& band : g.schedule.threads[static_cast<size_t>(id)]) {
            const int64_t image = band.image + repeat;
            move_windows(g, ptr, run, id, band);
            for (const BandStep& step : g.steps) {
                const Range rows = band.rows[step.layer];
                if (rows.size() == 0) continue;
                const auto start = timed ? Clock::now() : Clock::time_point();
                run_step(k, step, rows, row(band, image, step.x), row(band, image, step.second), writable(row(band, image, step.out)), scratch);
                if (timed) run.node_seconds[step.index] += std::chrono::duration<double>(Clock::now() - start).count();
            }
        }
}

}  // namespace

// A buffer for each thread: together, or each behind a page of its own for the tests.
std::vector<Ref> PlanBuilder::own_buffers(int64_t floats) {
    std::vector<Ref> refs;
    floats = round_up(floats, 16);
    Ref all;
    if (!plan_.options_.guarded) all = new_buffer(floats * threads());
    for (int t = 0; t < threads(); ++t) {
        refs.push_back(plan_.options_.guarded ? new_buffer(floats) : all);
        if (!plan_.options_.guarded) refs.back().offset = t * floats;
    }
    return refs;
}

void PlanBuilder::build_group(const std::vector<BandNode>& nodes, const Group& g) {
    const int first = static_cast<int>(graph_.inputs.size());
    const auto begin = static_cast<size_t>(nodes[g.begin].index), end = static_cast<size_t>(nodes[g.end - 1].index) + 1;
    auto group = std::make_shared<BandGroup>();
    group->schedule = g.schedule;
    std::vector<Ref> used;
    for (size_t w = 0; w < g.roots.size(); ++w) {
        const Layout l = band_layout(g.roots[w]);
        group->windows.push_back({l.c, l.pitch, odd_lines(g.schedule.capacity[w] * l.pitch)});
    }
    group->window_refs.resize(static_cast<size_t>(threads()));
    for (const BandWindow& w : group->windows) {
        const std::vector<Ref> refs = own_buffers(w.channels * w.plane);
        for (size_t t = 0; t < refs.size(); ++t) group->window_refs[t].push_back(refs[t]);
    }
    for (const auto& refs : group->window_refs) used.insert(used.end(), refs.begin(), refs.end());
    const auto operand = [&](int value) {
        Operand o;
        const auto local = g.local.find(value);
        o.window = g.band_values[static_cast<size_t>(local->second)].window;
        o.layout = values_[static_cast<size_t>(value)].layout;
        if (o.window < 0) {
            o.ref = values_[static_cast<size_t>(value)].ref;
            used.push_back(o.ref);
            return o;
        }
        o.channel = band_root(value, begin, end).second;
        o.layout.plane = group->windows[static_cast<size_t>(o.window)].plane;
        return o;
    };
    int64_t scratch = 16;
    for (size_t i = g.begin; i < g.end; ++i) {
        const BandNode& b = nodes[i];
        const Node& node = graph_.nodes[static_cast<size_t>(b.index)];
        node_ = b.index;
        value_ = first + b.index;
        const bool inner = g.band_values[static_cast<size_t>(g.local.at(value_))].window >= 0;
        if (b.kind == BandNode::alias) {
            if (inner) values_.push_back({b.out, {}});
            else if (node.op == Op::concat) values_.push_back({b.out, concat_buffer(node_, b.out)});
            else values_.push_back(build_slice(node));
            continue;
        }
        values_.push_back({b.out, inner ? Ref{} : output_buffer(b.out)});
        BandStep step;
        step.layer = i - g.begin;
        step.index = b.index;
        step.node = &node;
        step.x = operand(node.inputs[0]);
        if (node.inputs.size() > 1) step.second = operand(node.inputs[1]);
        step.out = operand(value_);
        if (!inner) group->whole.push_back(step.out);
        if (b.kind == BandNode::pool) scratch = std::max(scratch, pool_line(node, step.x.layout, step.out.layout));
        if (b.kind == BandNode::conv) {
            ConvShape s = b.shape;
            s.in.n = s.out.n = 1;
            s.in.plane = step.x.layout.plane;
            s.out.plane = step.out.layout.plane;
            const int64_t copied = g.schedule.most[step.layer] + s.max_qy - s.min_qy;
            ConvPlan plan = plan_conv(s, graph_.weights[static_cast<size_t>(node.weight)], b.choice, kernels(), copied);
            plan.residual_plane = step.second.layout.plane;
            for (const auto& own : g.schedule.threads)
                for (const Band& band : own) {
                    const Range rows = band.rows[step.layer];
                    auto& tiles = step.tiles[{rows.begin, rows.end}];
                    if (tiles.empty()) tiles = row_tiles(plan, rows.begin, rows.end);
                }
            if (b.choice.form != Form::direct)
                scratch = std::max(scratch, copied_groups(s, plan.copy.plane, b.choice.kind) * s.channels_per_group * plan.copy.plane + 64);
            plan_.weight_bytes_ += plan.weight.bytes();
            step.conv = std::make_shared<const ConvPlan>(std::move(plan));
        }
        group->steps.push_back(std::move(step));
    }
    group->scratch = own_buffers(scratch);
    used.insert(used.end(), group->scratch.begin(), group->scratch.end());
    plan_.groups_.push_back({static_cast<int64_t>(begin), static_cast<int64_t>(end)});
    add_step(used, [group, k = &kernels(), ptr = pointers(), count = threads()](const Run& run, int id) {
        run_group(*group, *k, ptr, run, id, count);
    });
    plan_.steps_.back().first = static_cast<int>(begin);
}

}  // namespace sparseprune
