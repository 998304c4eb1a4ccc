// Which shape has each value? torch's rules, on concrete sizes.
#include "graph.h"

#include "errors.h"

namespace sparseprune {
namespace {

constexpr int64_t max_extent = int64_t{1} << 31;
constexpr int64_t max_elements = int64_t{1} << 40;

template <class... Parts>
[[noreturn]] void fail(const Node& node, const Parts&... parts) {
    throw ValueError(message("layer '", node.name, "' (", op_name(node.op), "): ", parts...));
}

// Empty where every extent and the product are in range, else what is wrong.
std::string range_problem(const Shape& shape) {
    int64_t elements = 1;
    for (size_t i = 0; i < shape.size(); ++i) {
        if (shape[i] < 1 || shape[i] >= max_extent)
            return message("extent ", i, " of ", to_string(shape), " is not in [1, ", max_extent, ")");
        if (elements > (max_elements - 1) / shape[i])
            return message(to_string(shape), " has ", max_elements, " elements or more");
        elements *= shape[i];
    }
    return {};
}

void check_inputs(const Graph& graph, const std::vector<Shape>& shapes) {
    if (shapes.size() != graph.inputs.size())
        throw ValueError(message("expected ", graph.inputs.size(), " inputs, got ", shapes.size()));
    struct Seen {
        int64_t size;
        std::string where;
    };
    std::map<std::string, Seen> seen;
    for (size_t i = 0; i < shapes.size(); ++i) {
        const Input& input = graph.inputs[i];
        const Shape& shape = shapes[i];
        if (shape.size() != input.size.size())
            throw ValueError(message("input '", input.name, "': expected ", input.size.size(), " dimensions, got ",
                                     to_string(shape)));
        const std::string problem = range_problem(shape);
        if (!problem.empty()) throw ValueError(message("input '", input.name, "': ", problem));
        for (size_t d = 0; d < shape.size(); ++d) {
            if (input.size[d] >= 0) {
                if (shape[d] != input.size[d])
                    throw ValueError(message("input '", input.name, "': expected size ", input.size[d],
                                             " in dimension ", d, ", got ", to_string(shape)));
                continue;
            }
            const auto found =
                seen.emplace(input.symbol[d], Seen{shape[d], message("'", input.name, "' dimension ", d)}).first;
            if (found->second.size != shape[d])
                throw ValueError(message("input '", input.name, "' dimension ", d, ": ", input.symbol[d], " is ", shape[d],
                                         ", expected ", found->second.size, " as in ", found->second.where));
        }
    }
}

void expect_rank(const Node& node, const Shape& x, size_t rank) {
    if (x.size() != rank) fail(node, "expected an input of ", rank, " dimensions, got ", to_string(x));
}

// The places of a window of `extent` (dilation included) in `padded` elements; 0 where not one fits.
int64_t window_places(int64_t padded, int64_t extent, int64_t stride) {
    return padded < extent ? 0 : (padded - extent) / stride + 1;
}

// axis 0 is h, 1 is w.
int64_t window_output(const Node& node, int64_t in, size_t axis, bool ceil_mode) {
    const Window& window = node.window;
    const int64_t before = window.padding[2 * axis], after = window.padding[2 * axis + 1], stride = window.stride[axis];
    const int64_t extent = window.dilation[axis] * (window.kernel[axis] - 1) + 1;
    const int64_t padded = in + before + after;
    int64_t out = window_places(padded + (ceil_mode ? stride - 1 : 0), extent, stride);
    // torch: the last window must start inside the input or the padding before it.
    if (ceil_mode && (out - 1) * stride >= in + before) --out;
    if (out < 1)
        fail(node, "a window of ", extent, " does not fit ", in, " padded by ", before, " and ", after, " along ",
             axis == 0 ? "h" : "w");
    return out;
}

// (N, C, L) or (N, C, H, W), each spatial extent through `map(extent, axis)`.
template <class Map>
Shape map_spatial(const Node& node, const Shape& x, int64_t channels, Map map) {
    Shape out{x[0], channels};
    if (node.dims == 2) out.push_back(map(x[2], 0));
    out.push_back(map(x.back(), 1));
    return out;
}

Shape conv_shape(const Graph& graph, const Node& node, const Shape& x) {
    expect_rank(node, x, static_cast<size_t>(node.dims) + 2);
    const Weight& weight = graph.weights[static_cast<size_t>(node.weight)];
    const int64_t channels = weight.shape[1] * node.groups;
    if (x[1] != channels) fail(node, "expected an input of ", channels, " channels, got ", to_string(x));
    return map_spatial(node, x, weight.rows(),
                       [&](int64_t in, size_t axis) { return window_output(node, in, axis, false); });
}

Shape linear_shape(const Graph& graph, const Node& node, const Shape& x) {
    expect_rank(node, x, 2);
    const Weight& weight = graph.weights[static_cast<size_t>(node.weight)];
    if (x[1] != weight.cols()) fail(node, "expected an input of ", weight.cols(), " features, got ", to_string(x));
    return {x[0], weight.rows()};
}

Shape pool_shape(const Node& node, const Shape& x) {
    expect_rank(node, x, static_cast<size_t>(node.dims) + 2);
    return map_spatial(node, x, x[1],
                       [&](int64_t in, size_t axis) { return window_output(node, in, axis, node.ceil_mode); });
}

Shape adaptive_shape(const Node& node, const Shape& x) {
    expect_rank(node, x, static_cast<size_t>(node.dims) + 2);
    return map_spatial(node, x, x[1], [&](int64_t in, size_t axis) {
        return node.output_size[axis] == 0 ? in : node.output_size[axis];
    });
}

Shape flatten_shape(const Node& node, const Shape& x) {
    if (x.size() < 2) fail(node, "expected an input of 2 or more dimensions, got ", to_string(x));
    int64_t rest = 1;
    for (size_t i = 1; i < x.size(); ++i) rest *= x[i];
    return {x[0], rest};
}

Shape node_shape(const Graph& graph, const Node& node, const Shape& x) {
    switch (node.op) {
        case Op::conv: return conv_shape(graph, node, x);
        case Op::linear: return linear_shape(graph, node, x);
        case Op::max_pool:
        case Op::avg_pool: return pool_shape(node, x);
        case Op::adaptive_avg_pool:
        case Op::adaptive_max_pool: return adaptive_shape(node, x);
        case Op::flatten: return flatten_shape(node, x);
        case Op::add:
        case Op::act: return x;
    }
    fail(node, "unknown operator");
}

}  // namespace

std::string to_string(const Shape& shape) {
    std::string out = "(";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + (shape.size() == 1 ? ",)" : ")");
}

const char* op_name(Op op) {
    switch (op) {
        case Op::conv: return "conv";
        case Op::linear: return "linear";
        case Op::max_pool: return "max_pool";
        case Op::avg_pool: return "avg_pool";
        case Op::adaptive_avg_pool: return "adaptive_avg_pool";
        case Op::adaptive_max_pool: return "adaptive_max_pool";
        case Op::add: return "add";
        case Op::act: return "act";
        case Op::flatten: return "flatten";
    }
    return "?";
}

int64_t Weight::cols() const {
    int64_t cols = 1;
    for (size_t i = 1; i < shape.size(); ++i) cols *= shape[i];
    return cols;
}

std::vector<Shape> infer_shapes(const Graph& graph, const std::vector<Shape>& inputs) {
    check_inputs(graph, inputs);
    std::vector<Shape> shapes = inputs;
    shapes.reserve(static_cast<size_t>(graph.value_count()));
    for (const Node& node : graph.nodes) {
        const auto operand = [&](size_t i) -> const Shape& { return shapes[static_cast<size_t>(node.inputs[i])]; };
        Shape out = node_shape(graph, node, operand(0));
        const std::string problem = range_problem(out);
        if (!problem.empty()) fail(node, "output ", problem);
        // The second operand of an add, or the residual of a conv or linear: torch would broadcast, a program never does.
        if (node.inputs.size() == 2 && operand(1) != out)
            fail(node, "expected a second input of shape ", to_string(out), ", got ", to_string(operand(1)));
        shapes.push_back(std::move(out));
    }
    return shapes;
}

}  // namespace sparseprune
