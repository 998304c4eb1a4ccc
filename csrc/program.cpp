#include "program.h"

#include <mutex>

#include "errors.h"
#include "parallel.h"

namespace sparseprune {
namespace {

constexpr size_t kMostPlans = 16;

}  // namespace

Program::Program(Graph graph) : graph_(std::make_shared<const Graph>(std::move(graph))), tuned_(graph_->tuned) {}

// Planning a large network takes a while: it happens outside the lock, and where two callers planned the same, the first stays.
std::shared_ptr<const Plan> Program::plan(const std::vector<Shape>& shapes, int threads, const Kernels& kernels) {
    const Key key{kernels.name, shapes};
    Choices choices;
    {
        std::lock_guard<std::mutex> lock(bookkeeping());
        if (auto found = find_plan(key, threads)) return found;
        choices = choices_for(key);
    }
    PlanOptions options{&kernels, threads};
    auto plan = std::make_shared<const Plan>(graph_, shapes, options, choices);
    std::lock_guard<std::mutex> lock(bookkeeping());
    if (auto found = find_plan(key, threads)) return found;
    plans_.push_front({key, threads, plan});
    if (plans_.size() > kMostPlans) plans_.pop_back();
    return plan;
}

std::shared_ptr<const Plan> Program::plan_with(const std::vector<Shape>& shapes, const PlanOptions& options) {
    Choices choices;
    {
        std::lock_guard<std::mutex> lock(bookkeeping());
        choices = choices_for({options.kernels->name, shapes});
    }
    return std::make_shared<const Plan>(graph_, shapes, options, choices);
}

std::shared_ptr<const Plan> Program::find_plan(const Key& key, int threads) {
    for (auto it = plans_.begin(); it != plans_.end(); ++it) {
        if (it->threads != threads || it->key != key) continue;
        plans_.splice(plans_.begin(), plans_, it);
        return it->plan;
    }
    return nullptr;
}

Choices Program::choices_for(const Key& key) const {
    const Tuned* first = nullptr;
    for (const Tuned& t : tuned_) {
        if (t.isa != key.first) continue;
        if (t.shapes == key.second) return t.choices;
        if (!first) first = &t;
    }
    return first ? first->choices : Choices{};
}

void Program::set_choices(const std::string& isa, const std::vector<Shape>& shapes, Choices choices, int threads) {
    if (choices.size() != graph_->nodes.size())
        throw ValueError(message("choices: ", choices.size(), " came, expected one for each of ", graph_->nodes.size(), " nodes"));
    std::lock_guard<std::mutex> lock(bookkeeping());
    plans_.clear();
    for (Tuned& t : tuned_) {
        if (t.isa != isa || t.shapes != shapes) continue;
        t.choices = std::move(choices);
        t.threads = threads;
        return;
    }
    tuned_.push_back({isa, shapes, std::move(choices), threads});
}

std::vector<Tuned> Program::tuned() {
    std::lock_guard<std::mutex> lock(bookkeeping());
    return tuned_;
}

Graph single_layer(std::shared_ptr<const BlockCSR> weight, int dims, const Window& window, int64_t groups) {
    const Shape& shape = weight->shape();
    const size_t rank = dims == 0 ? 2 : static_cast<size_t>(dims) + 2;
    if (shape.size() != rank) throw ValueError(message("weight has shape ", to_string(shape), ", expected ", rank, " dimensions"));
    if (groups < 1 || shape[0] % groups != 0)
        throw ValueError(message("groups=", groups, " does not divide out_channels=", shape[0]));
    for (int64_t v : window.stride)
        if (v < 1 || v > (1 << 20)) throw ValueError(message("stride=", v, " must be in [1, 2^20]"));
    for (int64_t v : window.dilation)
        if (v < 1 || v > (1 << 20)) throw ValueError(message("dilation=", v, " must be in [1, 2^20]"));
    for (int64_t v : window.padding)
        if (v < 0 || v > (1 << 20)) throw ValueError(message("padding=", v, " must be in [0, 2^20]"));
    if (dims == 2 && shape[2] > max_kernel_area / shape[3])
        throw ValueError(message("weight: a kernel of ", shape[2], " x ", shape[3], " exceeds ", max_kernel_area, " taps"));
    if (dims == 1 && shape[2] > max_kernel_area) throw ValueError(message("weight: a kernel of ", shape[2], " exceeds ", max_kernel_area, " taps"));
    Graph graph;
    Input input{"input", {}, {}};
    for (size_t i = 0; i < rank; ++i) {
        const bool channels = i == 1;
        input.size.push_back(channels ? shape[1] * groups : -1);
        input.symbol.push_back(channels ? "" : "s" + std::to_string(i));
    }
    graph.inputs.push_back(input);
    graph.weights.push_back({shape, weight, nullptr});
    Node node;
    node.op = dims == 0 ? Op::linear : Op::conv;
    node.name = dims == 0 ? "linear" : dims == 1 ? "conv1d" : "conv2d";
    node.inputs = {0};
    node.weight = 0;
    node.dims = dims == 1 ? 1 : 2;
    node.window = window;
    if (dims == 2) node.window.kernel = {shape[2], shape[3]};
    if (dims == 1) node.window.kernel = {1, shape[2]};
    node.groups = groups;
    graph.nodes.push_back(node);
    graph.outputs = {1};
    graph.tree = "{\"kind\":\"tensor\"}";
    return graph;
}

}  // namespace sparseprune
