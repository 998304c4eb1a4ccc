// Random graphs of layers that can run depth first: bitwise the same in bands of any number and layer by layer, for every number of
// threads, an inaccessible page after each buffer. That layers are right is for fuzz_layers.cpp and the Python tests.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "cpu/isa.h"
#include "errors.h"
#include "guarded.h"
#include "plan.h"
#include "random.h"

using namespace sparseprune;

namespace {

constexpr int64_t kMostFloats = 40000;  // of a value: many small cases find more than few large ones

size_t count(const Shape& s) {
    size_t n = 1;
    for (int64_t d : s) n *= static_cast<size_t>(d);
    return n;
}

Activation random_act(Random& r) {
    const Activation acts[] = {{}, {}, {Act::relu, 0, 0}, {Act::relu6, 0, 0}, {Act::leaky_relu, 0.1f, 0}, {Act::leaky_relu, -1.5f, 0},
                               {Act::clamp, 0.25f, 0.5f}, {Act::hardswish, 0, 0}, {Act::silu, 0, 0}, {Act::sigmoid, 0, 0}};
    return one_of(r, acts);
}

// Grows a graph on planes wide enough for bands, each layer mostly reading the one before.
class Grower {
public:
    explicit Grower(unsigned seed) : r_(seed) {
        const int64_t images[] = {1, 1, 1, 2, 3, 9, 17};
        const int64_t n = one_of(r_, images);
        int64_t h = pick(r_, 5, 40), w = pick(r_, 17, 50);
        if (seed % 5 == 0) {  // rows of more vectors than a tile has
            h = pick(r_, 3, 7);
            w = pick(r_, 65, 300);
        }
        if (n > 3) {  // whole images to each thread
            h = std::min<int64_t>(h, 12);
            w = std::min<int64_t>(w, 20);
        }
        shapes_ = {{n, pick(r_, 1, 5), h, w}};
        graph_->inputs.push_back({"x", shapes_[0], Strings(4)});
        const size_t layers = static_cast<size_t>(pick(r_, 2, 12));
        while (graph_->nodes.size() < layers) add(random_node());
        choices_.resize(layers);
        for (auto& choice : choices_)
            if (one_in(r_, 2)) choice = random_choice();
        const int64_t last = static_cast<int64_t>(layers);
        for (int64_t i = pick(r_, 0, 2); i > 0; --i) graph_->outputs.push_back(static_cast<int>(pick(r_, 1, last)));
        graph_->outputs.push_back(static_cast<int>(last));
    }

    std::shared_ptr<const Graph> graph() const { return graph_; }
    const Shape& input() const { return shapes_[0]; }
    const Choices& choices() const { return choices_; }
    Random& random() { return r_; }

private:
    using Strings = std::vector<std::string>;

    // The node, unless it does not fit or makes a large value.
    void add(const Node& node) {
        graph_->nodes.push_back(node);
        try {
            std::vector<Shape> shapes = infer_shapes(*graph_, {shapes_[0]});
            if (static_cast<int64_t>(count(shapes.back())) <= kMostFloats) {
                shapes_ = std::move(shapes);
                return;
            }
        } catch (const ValueError&) {
        }
        graph_->nodes.pop_back();
        if (node.weight >= 0) graph_->weights.pop_back();
    }

    Node random_node() {
        Node node;
        node.name = "layer" + std::to_string(graph_->nodes.size());
        const int64_t last = static_cast<int64_t>(shapes_.size()) - 1;
        node.inputs = {static_cast<int>(one_in(r_, 3) ? pick(r_, 0, last) : last)};
        switch (pick(r_, 0, 7)) {
            case 0: make_pool(node); break;
            case 1: make_add(node); break;
            case 2: make_parts(node); break;
            case 3:
                node.op = Op::act;
                node.act = random_act(r_);
                break;
            default: make_conv(node);
        }
        return node;
    }

    const Shape& shape_of_input(const Node& node) const { return shapes_[static_cast<size_t>(node.inputs[0])]; }

    std::vector<int> values_like(const Shape& s, bool any_channels) const {
        std::vector<int> found;
        for (size_t i = 0; i < shapes_.size(); ++i) {
            const Shape& t = shapes_[i];
            if (t[0] == s[0] && t[2] == s[2] && t[3] == s[3] && (any_channels || t[1] == s[1])) found.push_back(static_cast<int>(i));
        }
        return found;
    }
    int any(const std::vector<int>& values) { return values[static_cast<size_t>(pick(r_, 0, static_cast<int64_t>(values.size()) - 1))]; }

    void make_conv(Node& node) {
        const Shape x = shape_of_input(node);
        node.op = Op::conv;
        node.groups = one_in(r_, 4) ? x[1] : x[1] % 2 == 0 && one_in(r_, 4) ? 2 : 1;
        const int64_t out = node.groups * pick(r_, 1, node.groups > 2 ? 2 : 5);
        const int64_t kernels[] = {1, 3, 3, 5, 2};
        for (size_t a = 0; a < 2; ++a) {
            const int64_t k = one_of(r_, kernels), dilation = one_in(r_, 6) ? 2 : 1, extent = (k - 1) * dilation;
            const bool same = !one_in(r_, 3);
            node.window.kernel[a] = k;
            node.window.dilation[a] = dilation;
            node.window.stride[a] = one_in(r_, 5) ? 2 : 1;
            node.window.padding[2 * a] = same ? extent / 2 : pick(r_, 0, extent + 1);
            node.window.padding[2 * a + 1] = same ? extent - extent / 2 : pick(r_, 0, extent + 1);
        }
        const Shape shape{out, x[1] / node.groups, node.window.kernel[0], node.window.kernel[1]};
        const double densities[] = {0.05, 0.1, 0.5, 1.0};
        const double density = one_of(r_, densities);
        std::vector<float> weight(count(shape)), bias(static_cast<size_t>(out));
        const float scale = 1.0f / std::sqrt(static_cast<float>(weight.size()) / static_cast<float>(out));
        for (float& v : weight) v = std::uniform_real_distribution<double>(0, 1)(r_) < density ? real(r_) * scale : 0.0f;
        for (float& v : bias) v = real(r_);
        Weight packed{shape, nullptr, nullptr};
        if (one_in(r_, 6)) packed.dense = std::make_shared<const std::vector<float>>(weight);
        else packed.sparse = std::make_shared<const BlockCSR>(BlockCSR::from_dense(weight.data(), nullptr, shape, 1, 1));
        node.weight = static_cast<int>(graph_->weights.size());
        graph_->weights.push_back(packed);
        if (one_in(r_, 2)) node.bias = std::make_shared<const std::vector<float>>(bias);
        node.act = random_act(r_);
        const std::vector<int> residuals = values_like({x[0], out, x[2], x[3]}, false);
        if (!residuals.empty() && one_in(r_, 2)) node.inputs.push_back(any(residuals));
    }

    void make_pool(Node& node) {
        node.op = one_in(r_, 2) ? Op::max_pool : Op::avg_pool;
        for (size_t a = 0; a < 2; ++a) {
            const int64_t k = node.window.kernel[a] = pick(r_, 2, 4);
            node.window.stride[a] = pick(r_, 1, 2);
            node.window.padding[2 * a] = pick(r_, 0, k / 2);
            node.window.padding[2 * a + 1] = pick(r_, 0, k / 2);
            if (node.op == Op::max_pool && one_in(r_, 6)) node.window.dilation[a] = 2;
        }
        node.ceil_mode = one_in(r_, 4);
        node.count_include_pad = one_in(r_, 2);
    }

    void make_add(Node& node) {
        node.op = Op::add;
        node.inputs.push_back(any(values_like(shape_of_input(node), false)));
        node.act = random_act(r_);
    }

    // Slices and concatenations of channels, as in CSP blocks.
    void make_parts(Node& node) {
        const Shape& x = shape_of_input(node);
        node.axis = 1;
        if (x[1] > 1 && one_in(r_, 2)) {
            node.op = Op::slice;
            node.start = pick(r_, 0, x[1] - 1);
            node.end = pick(r_, node.start + 1, x[1]);
            return;
        }
        std::vector<int> parts = values_like(x, true);
        std::shuffle(parts.begin(), parts.end(), r_);
        parts.resize(std::min(parts.size(), static_cast<size_t>(pick(r_, 1, 3))));
        node.op = Op::concat;
        node.inputs = parts;
    }

    Choice random_choice() {
        const Form forms[] = {Form::direct, Form::phases, Form::halo};
        const WeightKind kinds[] = {WeightKind::single, WeightKind::single, WeightKind::masked, WeightKind::dense};
        return {one_of(r_, forms), one_of(r_, kinds), static_cast<int>(pick(r_, 1, 8))};
    }

    Random r_;
    std::shared_ptr<Graph> graph_ = std::make_shared<Graph>();
    std::vector<Shape> shapes_;
    Choices choices_;
};

// All outputs of a second run: it finds the numbers of the first in the arena.
std::vector<std::vector<float>> run_twice(const Plan& plan, Guarded& x) {
    std::vector<std::unique_ptr<Guarded>> outputs;
    std::vector<float*> to;
    const float* in[] = {x.data()};
    for (const Shape& s : plan.output_shapes()) {
        outputs.push_back(std::make_unique<Guarded>(count(s)));
        to.push_back(outputs.back()->data());
    }
    for (int i = 0; i < 2; ++i) {
        for (const auto& out : outputs) std::memset(out->data(), 0xFF, out->size() * 4);  // NaN: what is not written is seen
        plan.run(in, to.data());
    }
    std::vector<std::vector<float>> values;
    for (const auto& out : outputs) values.emplace_back(out->data(), out->data() + out->size());
    return values;
}

bool all_finite(const std::vector<std::vector<float>>& values) {
    for (const auto& v : values)
        for (float f : v)
            if (!std::isfinite(f)) return false;
    return true;
}

std::string describe(const Graph& graph) {
    std::string s;
    for (const Node& node : graph.nodes) {
        s += s.empty() ? "" : ", ";
        s += op_name(node.op);
        for (int i : node.inputs) s += " " + std::to_string(i);
    }
    return s;
}

// Returns how many groups of two layers or more ran.
int check_graph(unsigned seed, const Kernels& kernels) {
    struct Way {
        int threads;
        int64_t bands;
        bool guarded;  // where not, buffers share memory
    };
    const Way ways[] = {{1, 1, true}, {1, 3, true}, {2, 2, false}, {2, 7, true}, {3, 40, true}, {3, 5, false}, {2, 0, false}};
    Grower c(seed);
    Guarded x(count(c.input()));
    for (size_t i = 0; i < x.size(); ++i) x.data()[i] = real(c.random());
    const Plan alone(c.graph(), {c.input()}, {&kernels, 1, true, true, -1}, c.choices());
    CHECK(alone.groups().empty());
    const auto expected = run_twice(alone, x);
    CHECK(all_finite(expected));
    int groups = 0;
    for (const Way& way : ways) {
        const Plan plan(c.graph(), {c.input()}, {&kernels, way.threads, way.guarded, true, way.bands, guard_before()}, c.choices());
        for (const auto& group : plan.groups()) groups += group[1] - group[0] > 1;
        const auto got = run_twice(plan, x);
        for (size_t i = 0; i < got.size(); ++i) {
            const bool same = std::memcmp(got[i].data(), expected[i].data(), got[i].size() * 4) == 0;
            if (!same)
                std::printf("%s seed %u, %d threads, %d bands: output %zu (value %d) differs; x %s; %s\n", kernels.name, seed, way.threads,
                            static_cast<int>(way.bands), i, c.graph()->outputs[i], to_string(c.input()).c_str(), describe(*c.graph()).c_str());
            CHECK(same);
        }
    }
    return groups;
}

}  // namespace

void fuzz_depth_first(const std::string& isa, int cases) {
    const Kernels& kernels = kernels_for(isa);
    int groups = 0;
    for (int i = 0; i < cases; ++i) {
        guard_before() = i % 3 == 2;
        groups += check_graph(static_cast<unsigned>(i), kernels);
    }
    CHECK(cases < 20 || groups > 2 * cases);  // or nothing was tested
    std::printf("%s: %d random graphs, %d groups depth first\n", isa.c_str(), cases, groups);
}
