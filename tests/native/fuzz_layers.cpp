// Random layers against the double-precision oracle, every form and kind that fits, with an inaccessible page after each buffer.
#include <cstring>

#include "check.h"
#include "cpu/isa.h"
#include "guarded.h"
#include "plan.h"
#include "random.h"
#include "reference.h"

using namespace sparseprune;

namespace {

struct Case {
    std::shared_ptr<Graph> graph = std::make_shared<Graph>();
    std::vector<float> weight;
    Shape in, out;
};

size_t count(const Shape& s) {
    size_t n = 1;
    for (int64_t d : s) n *= static_cast<size_t>(d);
    return n;
}

void choose_window(Random& r, Case& c, Node& node) {
    Window& w = node.window;
    const bool one_d = pick(r, 0, 7) == 0, same = pick(r, 0, 1) == 0;
    for (int axis = 0; axis < 2; ++axis) {
        const size_t a = static_cast<size_t>(axis);
        if (one_d && axis == 0) continue;
        const int64_t kernels[] = {1, 3, 3, 5, 2, 7, 4};
        w.kernel[a] = kernels[pick(r, 0, 6)];
        w.dilation[a] = pick(r, 0, 4) == 0 ? 2 : 1;
        const int64_t extent = (w.kernel[a] - 1) * w.dilation[a];
        w.stride[a] = same ? 1 : pick(r, 1, 3);
        w.padding[a * 2] = same ? extent / 2 : pick(r, 0, extent);
        w.padding[a * 2 + 1] = same ? extent - extent / 2 : pick(r, 0, extent);
        const int64_t sizes[] = {1, 4, 7, 8, 9, 14, 16, 17, 28, 33};
        c.in[a + 2] = std::max<int64_t>(sizes[pick(r, 0, 9)], extent + 1 - w.padding[a * 2] - w.padding[a * 2 + 1]);
        if (pick(r, 0, 60) == 0 && axis == 1) c.in[a + 2] = pick(r, 50, 260);
    }
    if (one_d) c.in[2] = 1;
}

// Elements of the output times columns of the weight: what the oracle does.
int64_t work(const Case& c, const Node& node, int64_t channels) {
    int64_t work = c.in[0] * channels * c.in[1] / node.groups * node.window.kernel[0] * node.window.kernel[1];
    for (size_t a = 0; a < 2; ++a)
        work *= (c.in[a + 2] + node.window.padding[a * 2] + node.window.padding[a * 2 + 1] - node.window.dilation[a] * (node.window.kernel[a] - 1) - 1) /
                    node.window.stride[a] + 1;
    return work;
}

// Fewer images and rows, as few as are necessary: rows of pixels keep their length, and so their tiles.
void shrink(Case& c, const Node& node, int64_t channels) {
    constexpr int64_t most = 1 << 14;
    const Window& w = node.window;
    const int64_t least = std::max<int64_t>(1, w.dilation[0] * (w.kernel[0] - 1) + 1 - w.padding[0] - w.padding[1]);
    while (work(c, node, channels) > most && c.in[2] > least) c.in[2] = std::max(least, c.in[2] * 2 / 3);
    while (work(c, node, channels) > most && c.in[0] > 1) --c.in[0];
}

Case random_case(Random& r) {
    Case c;
    Node node;
    node.op = pick(r, 0, 9) == 0 ? Op::linear : Op::conv;
    node.name = "layer";
    const int64_t groups[] = {1, 1, 1, 2, 3};
    node.groups = node.op == Op::linear ? 1 : groups[pick(r, 0, 4)];
    int64_t cin = pick(r, 1, r.small() ? 4 : 9), per_group = pick(r, 1, 9);
    if (node.op == Op::conv && pick(r, 0, 7) == 0) {  // depthwise
        node.groups = pick(r, 2, 12);
        cin = per_group = 1;
    }
    if (node.op == Op::linear) cin = pick(r, 1, 90);
    const bool deep = node.op == Op::conv && !r.small() && pick(r, 0, 9) == 0;  // columns in blocks
    if (deep) {
        node.groups = 1;
        cin = pick(r, 60, 150);
        if (pick(r, 0, 3) == 0) per_group = pick(r, 300, 400);  // and rows in parts
    }
    const int64_t batches[] = {1, 1, 2, 3, 9};
    c.in = {batches[pick(r, 0, 4)], cin * node.groups, 1, 1};
    if (node.op == Op::conv) choose_window(r, c, node);
    if (deep) {
        node.window = Window{};
        node.window.kernel = {3, 3};
        node.window.padding = {1, 1, 1, 1};
        c.in = {1, cin, pick(r, 1, 6), pick(r, 7, 33)};
    }
    const Window& w = node.window;
    const int64_t oc = per_group * node.groups, taps = w.kernel[0] * w.kernel[1];
    if (r.small()) shrink(c, node, oc);
    c.out = {c.in[0], oc, 1, 1};
    for (size_t a = 0; a < 2; ++a)
        c.out[a + 2] = (c.in[a + 2] + w.padding[a * 2] + w.padding[a * 2 + 1] - w.dilation[a] * (w.kernel[a] - 1) - 1) / w.stride[a] + 1;
    const double densities[] = {0.0, 0.02, 0.05, 0.1, 0.3, 0.5, 1.0};
    const double density = densities[pick(r, 0, 6)];
    c.weight.resize(static_cast<size_t>(oc * cin * taps));
    for (float& v : c.weight) v = r.element() < density ? real(r) : 0.0f;
    if (pick(r, 0, 9) == 0) c.weight[static_cast<size_t>(pick(r, 0, static_cast<int64_t>(c.weight.size()) - 1))] = 0.5f;
    const int64_t blocks[] = {1, 1, 2, 4};
    int64_t R = blocks[pick(r, 0, 3)], C = blocks[pick(r, 0, 3)];
    if (oc % R != 0) R = 1;
    if (cin * taps % C != 0) C = 1;
    const Shape shape = node.op == Op::linear ? Shape{oc, cin} : Shape{oc, cin, w.kernel[0], w.kernel[1]};
    Weight packed{shape, nullptr, nullptr};
    if (pick(r, 0, 5) == 0) packed.dense = std::make_shared<const std::vector<float>>(c.weight);
    else packed.sparse = std::make_shared<const BlockCSR>(BlockCSR::from_dense(c.weight.data(), nullptr, shape, R, C));
    if (pick(r, 0, 1)) {
        std::vector<float> bias(static_cast<size_t>(oc));
        for (float& v : bias) v = real(r);
        node.bias = std::make_shared<const std::vector<float>>(bias);
    }
    const Activation acts[] = {{}, {Act::relu, 0, 0}, {Act::relu6, 0, 0}, {Act::leaky_relu, 0.1f, 0}, {Act::clamp, -0.2f, 0.3f}};
    node.act = acts[pick(r, 0, 4)];
    node.weight = 0;
    node.inputs = {0};
    const bool linear = node.op == Op::linear;
    c.graph->weights.push_back(packed);
    c.graph->inputs.push_back({"x", linear ? Shape{-1, c.in[1]} : Shape{-1, c.in[1], -1, -1}, {"n", "", "h", "w"}});
    if (pick(r, 0, 2) == 0) {
        node.inputs.push_back(1);
        c.graph->inputs.push_back({"r", linear ? Shape{-1, oc} : Shape{-1, oc, -1, -1}, {"n", "", "oh", "ow"}});
    }
    const int conv = static_cast<int>(c.graph->inputs.size());
    if (pick(r, 0, 1) && !linear) {  // from an internal layout rather than the caller's
        Node first;
        first.op = Op::act;
        first.name = "act";
        first.inputs = {0};
        c.graph->nodes.push_back(first);
        node.inputs[0] = conv;
    }
    c.graph->nodes.push_back(node);
    c.graph->outputs = {static_cast<int>(c.graph->inputs.size() + c.graph->nodes.size()) - 1};
    return c;
}

Shape graph_shape(const Case& c, Shape s) {
    if (c.graph->nodes.back().op == Op::linear) s.resize(2);
    return s;
}

std::string describe(const Case& c, const Choice& choice, const char* isa) {
    const Node& n = c.graph->nodes.back();
    const Window& w = n.window;
    std::string s = std::string(isa) + " " + form_name(choice.form) + "/" + kind_name(choice.kind) + "/" + std::to_string(choice.vectors);
    s += " in " + to_string(c.in) + " out " + to_string(c.out) + " groups " + std::to_string(n.groups);
    s += " kernel " + to_string({w.kernel[0], w.kernel[1]}) + " stride " + to_string({w.stride[0], w.stride[1]});
    s += " padding " + to_string({w.padding[0], w.padding[1], w.padding[2], w.padding[3]});
    return s + " dilation " + to_string({w.dilation[0], w.dilation[1]});
}

std::vector<float> run_plan(const Plan& plan, Guarded& x, Guarded& r, size_t size) {
    Guarded out(size);
    std::memset(out.data(), 0xFF, size * 4);  // NaN: what is not written is seen
    const float* in[] = {x.data(), r.data()};
    float* to[] = {out.data()};
    plan.run(in, to);
    return std::vector<float>(out.data(), out.data() + size);
}

// Where many small cases are wanted: one variant, on one thread.
std::vector<std::optional<Choice>> choices_to_try(Random& random, const Case& c, const std::vector<Shape>& shapes, const Kernels& kernels) {
    const WeightKind kinds[] = {WeightKind::single, WeightKind::masked, WeightKind::dense};
    const Form forms[] = {Form::direct, Form::taps, Form::phases, Form::halo, Form::panel};
    if (random.small()) {
        if (one_in(random, 8)) return {std::nullopt};
        const Form form = one_of(random, forms);
        const WeightKind kind = one_of(random, kinds);
        return {Choice{form, kind, static_cast<int>(pick(random, 1, 14))}};
    }
    std::vector<std::optional<Choice>> tries{std::nullopt};
    const Plan plan(c.graph, shapes, {&kernels, 1});
    const auto& all = plan.candidates().back();
    for (int i = 0; i < 3 && !all.empty(); ++i) tries.push_back(all[static_cast<size_t>(pick(random, 0, static_cast<int64_t>(all.size()) - 1))]);
    // kinds that the default list leaves out at this density
    for (const WeightKind kind : kinds)
        for (const Form form : forms) tries.push_back(Choice{form, kind, static_cast<int>(pick(random, 1, 8))});
    return tries;
}

void check_case(Random& random, const Case& c, const Kernels& kernels) {
    const Node& node = c.graph->nodes.back();
    Guarded x(count(c.in)), r(count(c.out));
    for (size_t i = 0; i < x.size(); ++i) x.data()[i] = real(random);
    for (size_t i = 0; i < r.size(); ++i) r.data()[i] = real(random);
    const bool residual = node.inputs.size() > 1;
    const Reference ref = conv_reference(node, c.weight, c.out[1], x.data(), c.in, c.out, residual ? r.data() : nullptr);
    std::vector<Shape> shapes{graph_shape(c, c.in)};
    if (residual) shapes.push_back(graph_shape(c, c.out));
    const size_t last = c.graph->nodes.size() - 1;
    for (const auto& choice : choices_to_try(random, c, shapes, kernels)) {
        Choices wanted(c.graph->nodes.size());
        wanted[last] = choice;
        const Plan plan(c.graph, shapes, {&kernels, 1, true, true, 0, guard_before()}, wanted);
        const bool taken = !choice || (plan.choices()[last]->form == choice->form && plan.choices()[last]->kind == choice->kind);
        if (!taken && !random.small()) continue;  // the default has been run
        const std::vector<float> y = run_plan(plan, x, r, count(c.out));
        size_t bad = 0, where = 0;
        for (size_t i = 0; i < y.size(); ++i)
            if (!(std::fabs(static_cast<double>(y[i]) - ref.value[i]) <= ref.bound[i])) {
                ++bad;
                where = i;
            }
        if (bad) {
            std::printf("%s: %zu of %zu wrong, at %zu: %g, expected %g\n", describe(c, *plan.choices()[last], kernels.name).c_str(),
                        bad, y.size(), where, static_cast<double>(y[where]), ref.value[where]);
        }
        CHECK(bad == 0);
        for (int threads : random.small() ? std::vector<int>{} : std::vector<int>{2, 4}) {
            const Plan more(c.graph, shapes, {&kernels, threads, true, true, 0, guard_before()}, wanted);
            CHECK(std::memcmp(run_plan(more, x, r, y.size()).data(), y.data(), y.size() * 4) == 0);
        }
    }
}

}  // namespace

void fuzz_layers(const std::string& isa, int cases) {
    const Kernels& kernels = kernels_for(isa);
    for (int i = 0; i < cases; ++i) {
        Random random(static_cast<unsigned>(i));
        guard_before() = i % 3 == 2;
        const Case c = random_case(random);
        check_case(random, c, kernels);
    }
}

void fuzz_layer(const std::string& isa, Random& random) {
    guard_before() = pick(random, 0, 1) != 0;
    const Case c = random_case(random);
    check_case(random, c, kernels_for(isa));
}
