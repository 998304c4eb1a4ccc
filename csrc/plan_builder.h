// Turns a graph into steps, layer by layer. plan.cpp: convolutions, linear layers, pooling; plan_tensor.cpp: the other operators;
// plan_depth_first.cpp: groups of layers that run together.
#pragma once
#include <map>

#include "plan.h"
#include "steps.h"
#include "tensor_steps.h"

namespace sparseprune {

// Where a pointer comes from at run time.
struct Ref {
    enum Kind { none, input, output, buffer, constant } kind = none;
    int index = -1;      // of the input, output, buffer; of a constant's node
    int64_t offset = 0;  // floats: a value may lie inside another's buffer
};

class PlanBuilder {
public:
    PlanBuilder(Plan& plan, const Choices& wanted) : plan_(plan), graph_(*plan.graph_), wanted_(wanted) {}
    void build();

    // The pointer of a reference; captured by value in every step.
    struct Pointers {
        const Plan* plan;
        const float* in(const Run& run, Ref r) const;
        float* out(const Run& run, Ref r) const;
    };

private:
    struct Value {
        Layout layout;
        Ref ref;
    };
    using Body = std::function<void(const Run&, int)>;

    const Kernels& kernels() const { return *plan_.options_.kernels; }
    int threads() const { return plan_.options_.threads; }
    const Shape& shape_of(int value) const { return plan_.shapes_[static_cast<size_t>(value)]; }
    const Shape& shape() const { return shape_of(value_); }  // of this node's value
    const Value& input(const Node& node, size_t i) const { return values_[static_cast<size_t>(node.inputs[i])]; }
    const Shape& input_shape(const Node& node, size_t i) const { return shape_of(node.inputs[i]); }

    Pointers pointers() const { return {&plan_}; }

    // plan.cpp
    void choose_margins();
    Layout layout_of(const Shape& shape, bool may_pack) const;
    Ref new_buffer(int64_t floats);
    void add_step(const std::vector<Ref>& used, Body body);
    Value copy_to(const Value& from, const Shape& shape, const Layout& to, Ref ref);
    Value in_layout(const Value& v, const Shape& shape, const Layout& wanted);
    Value build_node(const Node& node);
    Value build_flatten(const Node& node);
    Value build_pool(const Node& node);
    Value build_adaptive(const Node& node);
    bool is_dot(const Node& node, const Layout& in) const;
    Value build_conv(const Node& node);
    Choice choose(const ConvShape& shape, const Weight& weight);
    bool may_take(const ConvShape& shape, const Choice& wanted) const;
    Choice fitting(const ConvShape& shape, Choice wanted);
    Value add_copy(const std::shared_ptr<const ConvPlan>& plan, const Value& x);
    void add_panels(const Node& node, const std::shared_ptr<const ConvPlan>& plan, const Value& x, const Value& residual, Ref ref);
    void add_panel(const std::shared_ptr<const ConvPlan>& plan, size_t chunk, const Value& x, Ref panel);
    void add_own_panels(const Node& node, const std::shared_ptr<const ConvPlan>& plan, size_t chunk, const std::vector<Share>& shares,
                        const std::vector<Ref>& panels, const Value& x, const Value& residual, Ref ref);
    void add_multiply(const Node& node, const std::shared_ptr<const ConvPlan>& plan, const std::vector<Share>& shares, const Value& packed,
                      const Value& residual, Ref ref, bool first);
    Value build_dot(const Node& node, const Weight& weight);

    // plan_tensor.cpp
    void place_in_concats();
    Ref concat_buffer(int node, const Layout& layout);
    Ref output_buffer(const Layout& layout);  // for this node's value: inside a concat's buffer where it can be
    Layout layout_like(const Shape& shape, const Value& like) const;
    Value plain(const Value& v, const Shape& shape);  // contiguous, copied where it is not
    // runs body, then zeroes what is no element of out; padded: body has written the lanes behind rows
    Value strided_step(std::vector<Ref> used, const Layout& out, Body body, bool padded = false);
    Value copy_step(const Value& x, const Strided& from, const Layout& out, const Strided& to);
    Value mapped_step(const Value& x, const Shape& in_shape, IndexMaps maps, float fill);
    Value build_add(const Node& node);
    Value build_binary(const Node& node);
    Value build_activation(const Node& node);
    Value build_prelu(const Node& node);
    Value build_reshape(const Node& node);
    Value build_permute(const Node& node);
    Value build_expand(const Node& node);
    Value build_slice(const Node& node);
    Value build_mapped(const Node& node);  // index_select, roll, channel_shuffle, pad, nearest resize
    Value build_concat(const Node& node);
    Value build_resize(const Node& node);
    Value build_pixel_shuffle(const Node& node);
    Value build_reduce(const Node& node);
    Value build_softmax(const Node& node);
    Value build_norm(const Node& node);
    Value build_matmul(const Node& node);

    // plan_depth_first.cpp
    struct BandNode;
    struct Group;
    size_t build_depth_first(size_t node);
    std::optional<BandNode> band_node(size_t node);
    Layout band_layout(int value) const;
    std::pair<int, int64_t> band_root(int value, size_t begin, size_t end) const;
    double traffic(int64_t bytes) const;
    double cost_alone(const BandNode& node) const;
    std::optional<Group> band_group(const std::vector<BandNode>& nodes, size_t begin, size_t end, int64_t wanted, bool& too_large) const;
    bool cost_of(const std::vector<BandNode>& nodes, Group& group) const;
    std::vector<Ref> own_buffers(int64_t floats);
    void build_group(const std::vector<BandNode>& nodes, const Group& group);

    Plan& plan_;
    const Graph& graph_;
    const Choices& wanted_;
    std::vector<Value> values_;
    std::map<std::pair<int64_t, int64_t>, int64_t> margins_;
    struct Place {
        int concat;       // its node
        int64_t channel;  // where the value begins
    };
    std::map<int, Place> places_;          // by value
    std::map<int, Ref> concat_buffers_;    // by node
    std::map<int, std::vector<int>> consumers_;  // nodes, by value; the graph itself comes last
    std::map<int, Layout> band_layouts_;         // by value: of those that are looked at
    mutable int64_t band_work_ = 0;
    int node_ = 0, value_ = 0;
};

// The strides of a value of this shape that lies so.
Strided strided(const Layout& layout, const Shape& shape);

}  // namespace sparseprune
