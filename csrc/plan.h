// A plan: how one graph runs for one set of input shapes, one thread count and one instruction set.
#pragma once
#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "arena.h"
#include "conv.h"
#include "cpu/kernels.h"
#include "graph.h"

namespace sparseprune {

struct PlanOptions {
    const Kernels* kernels;
    int threads = 1;
    bool guarded = false;     // each buffer ends at an inaccessible page (tests)
    bool any_choice = false;  // take wanted choices that this density and shape would not offer (tests)
    int64_t bands = 0;        // > 0: groups run in so many bands an image, wherever they can; < 0: nothing runs in bands (tests)
    bool guard_before = false;  // guarded buffers begin at an inaccessible page instead (tests)
    Guard guard() const { return !guarded ? Guard::none : guard_before ? Guard::before : Guard::behind; }
};

// Pointers of one call.
struct Run {
    float* arena;
    const float* const* inputs;
    float* const* outputs;
    double* node_seconds = nullptr;  // where given: a step of several nodes adds what thread 0 spent in each
};

class Plan {
public:
    // Throws ValueError where the shapes do not fit the graph.
    Plan(std::shared_ptr<const Graph> graph, std::vector<Shape> inputs, const PlanOptions& options, const Choices& wanted = {});

    // Contiguous float32 arrays of the planned shapes. Safe from many threads at once: each call has its own arena.
    // node_seconds, where given, receives the time spent in each node.
    void run(const float* const* inputs, float* const* outputs, std::vector<double>* node_seconds = nullptr) const;

    const std::vector<Shape>& input_shapes() const { return inputs_; }
    const std::vector<Shape>& output_shapes() const { return outputs_; }
    const Choices& choices() const { return choices_; }                        // what each convolution and linear layer does
    const std::vector<std::vector<Choice>>& candidates() const { return candidates_; }  // what it could do, default first
    const std::vector<Shape>& value_shapes() const { return shapes_; }
    int threads() const { return options_.threads; }
    const char* isa() const { return options_.kernels->name; }
    int64_t arena_bytes() const { return arena_floats_ * 4; }
    int64_t weight_bytes() const { return weight_bytes_; }
    const std::vector<std::array<int64_t, 2>>& groups() const { return groups_; }  // nodes [begin, end) that run depth first, together

private:
    friend class PlanBuilder;
    struct Step {
        int first, node;  // the nodes that it computes; mostly one
        std::function<void(const Run&, int)> body;
    };
    Arena take_arena() const;
    void give_arena(Arena arena) const;

    std::shared_ptr<const Graph> graph_;
    std::vector<Shape> inputs_, outputs_, shapes_;
    PlanOptions options_;
    Choices choices_;
    std::vector<std::vector<Choice>> candidates_;
    std::vector<Step> steps_;
    std::vector<Buffer> buffers_;
    std::vector<std::array<int64_t, 2>> groups_;
    int64_t arena_floats_ = 0, weight_bytes_ = 0;
    mutable std::mutex mutex_;
    mutable std::vector<Arena> free_arenas_;
};

}  // namespace sparseprune
