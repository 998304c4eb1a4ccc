#include "plan.h"

#include <algorithm>
#include <chrono>
#include <numeric>

#include "errors.h"
#include "parallel.h"
#include "plan_builder.h"

namespace sparseprune {

const float* PlanBuilder::Pointers::in(const Run& run, Ref r) const {
    switch (r.kind) {
        case Ref::none: return nullptr;
        case Ref::input: return run.inputs[r.index] + r.offset;
        case Ref::constant: return plan->graph_->nodes[static_cast<size_t>(r.index)].bias->data() + r.offset;
        case Ref::output:
        case Ref::buffer: break;
    }
    return out(run, r);
}

float* PlanBuilder::Pointers::out(const Run& run, Ref r) const {
    return (r.kind == Ref::output ? run.outputs[r.index] : run.arena + plan->buffers_[static_cast<size_t>(r.index)].offset) + r.offset;
}

void PlanBuilder::build() {
    choose_margins();
    place_in_concats();
    for (size_t i = 0; i < graph_.inputs.size(); ++i)
        values_.push_back({external_layout(plan_.shapes_[i]), {Ref::input, static_cast<int>(i)}});
    for (size_t i = 0; i < graph_.nodes.size(); ++i)
        for (int v : graph_.nodes[i].inputs) consumers_[v].push_back(static_cast<int>(i));
    for (int v : graph_.outputs) consumers_[v].push_back(static_cast<int>(graph_.nodes.size()));
    for (size_t i = 0; i < graph_.nodes.size();) {
        if (const size_t built = build_depth_first(i)) {
            i += built;
            continue;
        }
        node_ = static_cast<int>(i);
        value_ = static_cast<int>(graph_.inputs.size() + i);
        values_.push_back(build_node(graph_.nodes[i]));
        ++i;
    }
    for (size_t i = 0; i < graph_.outputs.size(); ++i) {
        const Value& v = values_[static_cast<size_t>(graph_.outputs[i])];
        node_ = std::max(0, graph_.outputs[i] - static_cast<int>(graph_.inputs.size()));
        const Shape& shape = plan_.shapes_[static_cast<size_t>(graph_.outputs[i])];
        copy_to(v, shape, external_layout(shape), {Ref::output, static_cast<int>(i)});
    }
    plan_.arena_floats_ = place_buffers(plan_.buffers_, plan_.options_.guard());
}

// All values of one size share their rows of zeros, so that adds and residuals see equal layouts.
void PlanBuilder::choose_margins() {
    for (size_t i = 0; i < graph_.nodes.size(); ++i) {
        const Node& node = graph_.nodes[i];
        if (node.op != Op::conv) continue;
        const Shape& in = shape_of(node.inputs[0]);
        const int64_t m = direct_margin(node, in, shape_of(static_cast<int>(graph_.inputs.size() + i)));
        if (m > 0) {
            int64_t& margin = margins_[{in[2], in[3]}];
            margin = std::max(margin, m);
        }
    }
}

Layout PlanBuilder::layout_of(const Shape& shape, bool may_pack) const {
    const int64_t w = shape.size() > 2 ? shape.back() : 1, h = shape.size() == 4 ? shape[2] : 1;
    const auto found = margins_.find({h, w});
    return internal_layout(shape, found == margins_.end() ? 0 : found->second, may_pack);
}

Ref PlanBuilder::new_buffer(int64_t floats) {
    const int step = static_cast<int>(plan_.steps_.size());
    plan_.buffers_.push_back({floats, step, step});
    return {Ref::buffer, static_cast<int>(plan_.buffers_.size()) - 1};
}

void PlanBuilder::add_step(const std::vector<Ref>& used, Body body) {
    const int step = static_cast<int>(plan_.steps_.size());
    for (const Ref& r : used)
        if (r.kind == Ref::buffer) plan_.buffers_[static_cast<size_t>(r.index)].last_step = step;
    plan_.steps_.push_back({node_, node_, std::move(body)});
}

PlanBuilder::Value PlanBuilder::copy_to(const Value& from, const Shape& shape, const Layout& to, Ref ref) {
    const auto ptr = pointers();
    if (from.layout.same_as(to) && to.kind == LayoutKind::external) {
        add_step({from.ref, ref}, [ptr, from, ref, size = to.size(), count = threads()](const Run& run, int id) {
            const Part part{id, count};
            std::copy(ptr.in(run, from.ref) + part.begin(size), ptr.in(run, from.ref) + part.end(size), ptr.out(run, ref) + part.begin(size));
        });
    } else if (to.h * to.w == 1 && to.n > 1) {  // a transposition
        add_step({from.ref, ref}, [ptr, from, a = strided(from.layout, shape), b = strided(to, shape), to, ref, count = threads()](
                                      const Run& run, int id) {
            copy_strided(a, ptr.in(run, from.ref), b, ptr.out(run, ref), {id, count});
            zero_rest(to, ptr.out(run, ref), Part{id, count}.begin(to.c), Part{id, count}.end(to.c));
        });
    } else {
        add_step({from.ref, ref}, [ptr, from, to, ref, k = &kernels(), count = threads()](const Run& run, int id) {
            copy_value(*k, from.layout, ptr.in(run, from.ref), to, ptr.out(run, ref), {id, count});
        });
    }
    return {to, ref};
}

// The value in exactly this layout, copied where it is not.
PlanBuilder::Value PlanBuilder::in_layout(const Value& v, const Shape& shape, const Layout& wanted) {
    if (v.layout.same_as(wanted)) return v;
    return copy_to(v, shape, wanted, new_buffer(wanted.size()));
}

PlanBuilder::Value PlanBuilder::build_node(const Node& node) {
    switch (node.op) {
        case Op::conv:
        case Op::linear: return build_conv(node);
        case Op::add: return build_add(node);
        case Op::sub:
        case Op::mul:
        case Op::div:
        case Op::maximum:
        case Op::minimum: return build_binary(node);
        case Op::act: return build_activation(node);
        case Op::prelu: return build_prelu(node);
        case Op::flatten: return build_flatten(node);
        case Op::constant: return {external_layout(shape()), {Ref::constant, node_}};
        case Op::reshape: return build_reshape(node);
        case Op::permute: return build_permute(node);
        case Op::expand: return build_expand(node);
        case Op::slice: return build_slice(node);
        case Op::index_select:
        case Op::roll:
        case Op::channel_shuffle:
        case Op::pad: return build_mapped(node);
        case Op::concat: return build_concat(node);
        case Op::resize: return build_resize(node);
        case Op::pixel_shuffle: return build_pixel_shuffle(node);
        case Op::reduce: return build_reduce(node);
        case Op::softmax: return build_softmax(node);
        case Op::layer_norm:
        case Op::group_norm: return build_norm(node);
        case Op::matmul: return build_matmul(node);
        case Op::max_pool:
        case Op::avg_pool: return build_pool(node);
        case Op::adaptive_avg_pool:
        case Op::adaptive_max_pool: return build_adaptive(node);
    }
    throw ValueError("op is unknown");
}

PlanBuilder::Value PlanBuilder::build_flatten(const Node& node) {
    const Value a = input(node, 0);
    if (a.layout.kind == LayoutKind::external) return {external_layout(shape()), a.ref};
    const Layout out = layout_of(shape(), true);
    if (a.layout.h * a.layout.w == 1 && a.layout.same_as(out)) return a;
    const Ref ref = new_buffer(out.size());
    const auto ptr = pointers();
    add_step({a.ref, ref}, [ptr, a, out, ref, count = threads()](const Run& run, int id) {
        flatten_value(a.layout, ptr.in(run, a.ref), out, ptr.out(run, ref), {id, count});
    });
    return {out, ref};
}

PlanBuilder::Value PlanBuilder::build_pool(const Node& node) {
    const Value a = input(node, 0);
    const Layout out = layout_of(shape_of(value_), true);
    const Ref ref = output_buffer(out);
    const int64_t line = pool_line(node, a.layout, out);
    const Ref scratch = new_buffer(line * threads());
    const auto ptr = pointers();
    add_step({a.ref, ref, scratch}, [ptr, a, out, ref, scratch, line, n = &node, k = &kernels(), count = threads()](
                                        const Run& run, int id) {
        pool_value(*k, *n, a.layout, ptr.in(run, a.ref), out, ptr.out(run, ref), ptr.out(run, scratch) + id * line, {id, count});
    });
    return {out, ref};
}

PlanBuilder::Value PlanBuilder::build_adaptive(const Node& node) {
    const Value a = input(node, 0);
    const Layout out = layout_of(shape_of(value_), true);
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    add_step({a.ref, ref}, [ptr, a, out, ref, n = &node, k = &kernels(), count = threads()](const Run& run, int id) {
        adaptive_pool_value(*k, *n, a.layout, ptr.in(run, a.ref), out, ptr.out(run, ref), {id, count});
    });
    return {out, ref};
}

bool PlanBuilder::is_dot(const Node& node, const Layout& in) const {
    const Shape& out = shape_of(value_);
    if (in.n >= kFewImages || in.h * in.w != 1 || node.groups != 1) return false;
    if (node.op == Op::linear) return true;
    return out.back() == 1 && out[out.size() - 2 + (out.size() == 3 ? 1 : 0)] == 1 && node.window.kernel[0] == 1 &&
           node.window.kernel[1] == 1 && node.window.padding == std::array<int64_t, 4>{0, 0, 0, 0};
}

PlanBuilder::Value PlanBuilder::build_conv(const Node& node) {
    const Weight& weight = graph_.weights[static_cast<size_t>(node.weight)];
    if (is_dot(node, input(node, 0).layout)) return build_dot(node, weight);
    const Layout out = layout_of(shape_of(value_), false);
    Value x = input(node, 0);
    // n >= kFewImages linear: features as planes
    if (node.op == Op::linear) x = in_layout(x, input_shape(node, 0), make_layout(LayoutKind::flat, shape_of(node.inputs[0]), 0));
    const ConvShape conv = conv_shape(node, x.layout, out);
    const auto plan = std::make_shared<const ConvPlan>(plan_conv(conv, weight, choose(conv, weight), kernels()));
    plan_.weight_bytes_ += plan->weight.bytes();
    Value residual = node.inputs.size() > 1 ? in_layout(input(node, 1), shape(), out) : Value{out, {}};
    const Ref ref = output_buffer(out);
    if (plan->choice.form == Form::phases || plan->choice.form == Form::halo) x = add_copy(plan, x);
    if (plan->choice.form == Form::panel) {
        add_panels(node, plan, x, residual, ref);
    } else {
        add_multiply(node, plan, share_work(*plan, 0, threads()), x, residual, ref, true);
    }
    return {out, ref};
}

Choice PlanBuilder::choose(const ConvShape& shape, const Weight& weight) {
    const size_t node = static_cast<size_t>(node_);
    const int64_t total = weight.rows() * weight.cols();
    const int64_t kept = weight.sparse ? weight.sparse->kept() : total;
    plan_.candidates_[node] = conv_choices(shape, static_cast<double>(kept) / static_cast<double>(total), kernels());
    Choice choice = plan_.candidates_[node][0];
    if (node < wanted_.size() && wanted_[node] && may_take(shape, *wanted_[node])) choice = fitting(shape, *wanted_[node]);
    plan_.choices_[node] = choice;
    return choice;
}

// A wanted choice is a hint: from a file, or tuned for another shape. Only what this layer would offer itself is taken.
bool PlanBuilder::may_take(const ConvShape& shape, const Choice& wanted) const {
    if (plan_.options_.any_choice) return choice_fits(shape, wanted, kernels());
    for (const Choice& c : plan_.candidates_[static_cast<size_t>(node_)])
        if (c.form == wanted.form && c.kind == wanted.kind) return true;
    return false;
}

// Keeps form and kind, which settle the rounding, and takes the nearest tile that this shape allows.
Choice PlanBuilder::fitting(const ConvShape& shape, Choice wanted) {
    const std::vector<int> counts = vector_counts(shape, wanted.form, wanted.kind, kernels());
    int best = counts[0];
    for (int c : counts)
        if (std::abs(c - wanted.vectors) < std::abs(best - wanted.vectors)) best = c;
    wanted.vectors = best;
    return wanted;
}

PlanBuilder::Value PlanBuilder::add_copy(const std::shared_ptr<const ConvPlan>& plan, const Value& x) {
    const Ref ref = new_buffer(plan->packed_floats);
    const auto ptr = pointers();
    add_step({x.ref, ref}, [ptr, plan, x, ref, k = &kernels(), count = threads()](const Run& run, int id) {
        copy_phases(*k, *plan, ptr.in(run, x.ref), ptr.out(run, ref), {id, count});
    });
    return {x.layout, ref};
}

// Where threads share rows of the weight, few of them make a panel each: its lines need not travel between cores.
void PlanBuilder::add_panels(const Node& node, const std::shared_ptr<const ConvPlan>& plan, const Value& x, const Value& residual, Ref ref) {
    constexpr int kFewThreads = 4;
    std::vector<Ref> panels;
    for (size_t chunk = 0; chunk + 1 < plan->chunk_tiles.size(); ++chunk) {
        const std::vector<Share> shares = share_work(*plan, chunk, threads());
        const auto tiles = static_cast<int64_t>(plan->chunk_tiles[chunk + 1] - plan->chunk_tiles[chunk]);
        const bool own = threads() > 1 && threads() <= kFewThreads && shares[0].tile_count == tiles;
        if (panels.empty() || own != (panels.size() > 1))
            panels = own ? own_buffers(plan->packed_floats) : std::vector<Ref>{new_buffer(plan->packed_floats)};
        if (!own) add_panel(plan, chunk, x, panels[0]);
        if (!own) add_multiply(node, plan, shares, {x.layout, panels[0]}, residual, ref, chunk == 0);
        else add_own_panels(node, plan, chunk, shares, panels, x, residual, ref);
    }
}

void PlanBuilder::add_panel(const std::shared_ptr<const ConvPlan>& plan, size_t chunk, const Value& x, Ref panel) {
    const auto ptr = pointers();
    add_step({x.ref, panel}, [ptr, plan, chunk, x, panel, k = &kernels(), count = threads()](const Run& run, int id) {
        const Part part{id, count};
        const int64_t channels = plan->shape.in.c;
        fill_panel(*k, *plan, chunk, ptr.in(run, x.ref), ptr.out(run, panel), part.begin(channels), part.end(channels));
    });
}

void PlanBuilder::add_own_panels(const Node& node, const std::shared_ptr<const ConvPlan>& plan, size_t chunk, const std::vector<Share>& shares,
                                 const std::vector<Ref>& panels, const Value& x, const Value& residual, Ref ref) {
    const auto ptr = pointers();
    const float* bias = node.bias ? node.bias->data() : nullptr;
    std::vector<Ref> used{x.ref, residual.ref, ref};
    used.insert(used.end(), panels.begin(), panels.end());
    add_step(used, [=, act = node.act, k = &kernels(), count = threads()](const Run& run, int id) {
        const Share& share = shares[static_cast<size_t>(id)];
        const ConvShape& s = plan->shape;
        const Part part{id, count};
        float* out = ptr.out(run, ref);
        float* panel = ptr.out(run, panels[static_cast<size_t>(id)]);
        if (chunk == 0) zero_margins(s.out, out, part.begin(s.out.c), part.end(s.out.c));
        if (share.row_begin == share.row_end) return;
        const int64_t rows = s.out.c / s.groups, first = share.row_begin / rows, last = (share.row_end - 1) / rows;  // groups
        fill_panel(*k, *plan, chunk, ptr.in(run, x.ref), panel, first * s.channels_per_group, (last + 1) * s.channels_per_group);
        multiply_and_activate(*k, *plan, share, panel, bias, ptr.in(run, residual.ref), out, act);
    });
}

void PlanBuilder::add_multiply(const Node& node, const std::shared_ptr<const ConvPlan>& plan, const std::vector<Share>& shares,
                               const Value& packed, const Value& residual, Ref ref, bool first) {
    const auto ptr = pointers();
    const float* bias = node.bias ? node.bias->data() : nullptr;
    add_step({packed.ref, residual.ref, ref}, [=, act = node.act, k = &kernels(), count = threads()](
                                                  const Run& run, int id) {
        float* out = ptr.out(run, ref);
        const Layout& layout = plan->shape.out;
        const Part part{id, count};
        if (first) zero_margins(layout, out, part.begin(layout.c), part.end(layout.c));
        multiply_and_activate(*k, *plan, shares[static_cast<size_t>(id)], ptr.in(run, packed.ref), bias, ptr.in(run, residual.ref), out, act);
    });
}

namespace {

// Rows of about equal kept weight for each thread.
std::vector<int64_t> dot_cuts(const DotWeight& weight, int64_t rows, int threads) {
    std::vector<int64_t> cuts{0};
    int64_t row = 0;
    for (int t = 1; t < threads; ++t) {
        if (weight.start.empty()) row = rows * t / threads;
        else
            while (row < rows && weight.start[static_cast<size_t>(row)] < weight.start.back() * t / threads) ++row;
        cuts.push_back(row);
    }
    cuts.push_back(rows);
    return cuts;
}

}  // namespace

// One dot product for each image and output: the weight is read once for each image, the input stays in the cache.
PlanBuilder::Value PlanBuilder::build_dot(const Node& node, const Weight& weight) {
    const Layout out = make_layout(LayoutKind::packed, shape_of(value_), 0);
    Value x = input(node, 0);
    if (x.layout.plane != 1) x = in_layout(x, input_shape(node, 0), make_layout(LayoutKind::packed, shape_of(node.inputs[0]), 0));
    const Value residual = node.inputs.size() > 1 ? in_layout(input(node, 1), shape(), out) : Value{out, {}};
    const Ref ref = new_buffer(out.size());
    const auto packed = std::make_shared<const DotWeight>(pack_dot(weight));
    const bool sparse = !packed->start.empty();
    plan_.choices_[static_cast<size_t>(node_)] = Choice{Form::dot, sparse ? WeightKind::single : WeightKind::dense, 1};
    plan_.weight_bytes_ += packed->bytes();
    const auto ptr = pointers();
    const std::vector<int64_t> cuts = dot_cuts(*packed, weight.rows(), threads());
    DotJob job{};
    job.bias = node.bias ? node.bias->data() : nullptr;
    job.act = node.act.fits_epilogue() ? node.act : Activation{};
    job.value = weight.sparse ? packed->value.data() : weight.dense->data();
    job.start = packed->start.data();
    job.col16 = packed->col16.empty() ? nullptr : packed->col16.data();
    job.col32 = packed->col32.empty() ? nullptr : packed->col32.data();
    job.cols = weight.cols();
    add_step({x.ref, residual.ref, ref}, [=, act = node.act, k = &kernels()](const Run& run, int id) {
        DotJob own = job;
        own.row_begin = cuts[static_cast<size_t>(id)];
        own.row_end = cuts[static_cast<size_t>(id) + 1];
        const float* in = ptr.in(run, x.ref);
        const float* res = ptr.in(run, residual.ref);
        float* to = ptr.out(run, ref);
        for (int64_t n = 0; n < out.n; ++n, to += out.image) {
            own.x = in + n * x.layout.image;
            own.residual = res ? res + n * out.image : nullptr;
            own.out = to;
            (sparse ? k->dot_sparse : k->dot_dense)(own);
            if (!act.fits_epilogue()) k->act_row(to + own.row_begin, to + own.row_begin, own.row_end - own.row_begin, act);
        }
        (void)packed;  // lives as long as the step
    });
    return {out, ref};
}

Plan::Plan(std::shared_ptr<const Graph> graph, std::vector<Shape> inputs, const PlanOptions& options, const Choices& wanted)
    : graph_(std::move(graph)), inputs_(std::move(inputs)), options_(options) {
    shapes_ = infer_shapes(*graph_, inputs_);
    for (const int v : graph_->outputs) outputs_.push_back(shapes_[static_cast<size_t>(v)]);
    choices_.resize(graph_->nodes.size());
    candidates_.resize(graph_->nodes.size());
    PlanBuilder(*this, wanted).build();
}

// try_lock, not lock: a forked child may find the mutex held by a thread that it does not have, and must not wait for it.
Arena Plan::take_arena() const {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock() && !free_arenas_.empty()) {
        Arena arena = std::move(free_arenas_.back());
        free_arenas_.pop_back();
        return arena;
    }
    return Arena(arena_floats_, options_.guarded ? &buffers_ : nullptr);
}

void Plan::give_arena(Arena arena) const {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock.owns_lock() && free_arenas_.size() < 4) free_arenas_.push_back(std::move(arena));
}

// The time of a step, waiting for the other threads included: its node's, or shared out as thread 0 spent it.
static void account(double elapsed, double* begin, double* end) {
    const double spent = end - begin > 1 ? std::accumulate(begin, end, 0.0) : 0.0;
    if (spent == 0) end[-1] += elapsed;
    else std::for_each(begin, end, [&](double& seconds) { seconds *= elapsed / spent; });
}

void Plan::run(const float* const* inputs, float* const* outputs, std::vector<double>* node_seconds) const {
    Arena arena = take_arena();
    if (node_seconds) node_seconds->assign(graph_->nodes.size(), 0.0);
    const Run run{arena.data(), inputs, outputs, node_seconds ? node_seconds->data() : nullptr};
    const std::function<void(int, int)> step = [&](int i, int id) { steps_[static_cast<size_t>(i)].body(run, id); };
    const int count = static_cast<int>(steps_.size());
    if (!node_seconds) {
        run_steps(options_.threads, count, step);
    } else {
        using Clock = std::chrono::steady_clock;
        auto last = Clock::now();
        run_steps(options_.threads, count, step, [&](int i) {
            const auto now = Clock::now();
            const Step& done = steps_[static_cast<size_t>(i)];
            const double elapsed = std::chrono::duration<double>(now - last).count();
            if (!node_seconds->empty()) account(elapsed, node_seconds->data() + done.first, node_seconds->data() + done.node + 1);
            last = now;
        });
    }
    give_arena(std::move(arena));
}

}  // namespace sparseprune
