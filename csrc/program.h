// A program: one immutable graph, its plans (cached, bounded) and what tuning has chosen.
#pragma once
#include <list>
#include <memory>
#include <string>

#include "graph.h"
#include "plan.h"

namespace sparseprune {

class Program {
public:
    explicit Program(Graph graph);

    const Graph& graph() const { return *graph_; }
    std::shared_ptr<const Graph> shared_graph() const { return graph_; }

    // The plan for these input shapes: from the cache, or made now (never tuned).
    std::shared_ptr<const Plan> plan(const std::vector<Shape>& shapes, int threads, const Kernels& kernels);

    // A plan of its own, with these options (tests, benchmarks).
    std::shared_ptr<const Plan> plan_with(const std::vector<Shape>& shapes, const PlanOptions& options);

    // Everything chosen so far, to be kept with the program.
    std::vector<Tuned> tuned();

    // Choices for these shapes on this instruction set, whatever the thread count: they settle the rounding.
    // `threads`: with how many they were measured, 0 where they were not.
    void set_choices(const std::string& isa, const std::vector<Shape>& shapes, Choices choices, int threads = 0);

private:
    using Key = std::pair<std::string, std::vector<Shape>>;  // instruction set, input shapes
    struct Cached {
        Key key;
        int threads;
        std::shared_ptr<const Plan> plan;
    };
    std::shared_ptr<const Plan> find_plan(const Key& key, int threads);  // with bookkeeping() held, as choices_for
    Choices choices_for(const Key& key) const;

    std::shared_ptr<const Graph> graph_;
    std::list<Cached> plans_;  // latest used first
    std::vector<Tuned> tuned_;  // the first of an instruction set is what other shapes start from
};

// The graph of one layer, for sparseprune.ops. Attributes as in docs/program.md; throws ValueError.
Graph single_layer(std::shared_ptr<const BlockCSR> weight, int dims, const Window& window, int64_t groups);  // dims 0: linear

}  // namespace sparseprune
