// Which shape has each value? torch's rules, on concrete sizes.
#include "graph.h"

#include <algorithm>

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

Shape broadcast_shape(const Node& node, const Shape& a, const Shape& b) {
    Shape out(std::max(a.size(), b.size()), 1);
    for (size_t i = 0; i < out.size(); ++i) {
        const int64_t sa = i < a.size() ? a[a.size() - 1 - i] : 1, sb = i < b.size() ? b[b.size() - 1 - i] : 1;
        if (sa != sb && sa != 1 && sb != 1) fail(node, "inputs of shapes ", to_string(a), " and ", to_string(b), " do not broadcast");
        out[out.size() - 1 - i] = sa == 1 ? sb : sa;
    }
    return out;
}

void expect_axis(const Node& node, const Shape& x, int64_t axis) {
    if (axis >= static_cast<int64_t>(x.size())) fail(node, "axis ", axis, " is not one of ", to_string(x));
}

int64_t elements(const Shape& shape) {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
}

using Symbols = std::map<std::string, int64_t>;

// The numbers behind a shape attribute; -1 stays.
Shape resolve(const Node& node, const Shape* x, const Symbols& symbols) {
    Shape out;
    for (const Size& size : node.shape) {
        if (!size.symbol.empty()) {
            out.push_back(symbols.at(size.symbol));
        } else if (size.value <= -2) {
            const auto i = static_cast<size_t>(-2 - size.value);
            if (!x || i >= x->size()) fail(node, "shape refers to a dimension that its input has not");
            out.push_back((*x)[i]);
        } else {
            out.push_back(size.value);
        }
    }
    return out;
}

Shape reshape_shape(const Node& node, const Shape& x, const Symbols& symbols) {
    Shape out = resolve(node, &x, symbols);
    const int64_t total = elements(x);
    // Not elements(out), which could overflow: more than total is as bad as anything above.
    const auto times = [total](int64_t product, int64_t d) { return product > total / d ? total + 1 : product * d; };
    int64_t known = 1;
    for (int64_t d : out)
        if (d != -1) known = times(known, d);
    for (int64_t& d : out)
        if (d == -1) d = total / known;
    int64_t product = 1;
    for (int64_t d : out) product = d < 1 ? total + 1 : times(product, d);
    if (product != total) fail(node, "a value of shape ", to_string(x), " does not fit the shape ", to_string(out));
    return out;
}

Shape permute_shape(const Node& node, const Shape& x) {
    if (node.axes.size() != x.size()) fail(node, "expected an input of ", node.axes.size(), " dimensions, got ", to_string(x));
    Shape out;
    for (int64_t axis : node.axes) {
        expect_axis(node, x, axis);
        out.push_back(x[static_cast<size_t>(axis)]);
    }
    return out;
}

Shape expand_shape(const Node& node, const Shape& x, const Symbols& symbols) {
    const Shape out = resolve(node, &x, symbols);
    bool fits = out.size() == x.size();
    for (size_t i = 0; fits && i < x.size(); ++i) fits = out[i] == x[i] || x[i] == 1;
    if (!fits) fail(node, "a value of shape ", to_string(x), " does not expand to ", to_string(out));
    return out;
}

Shape slice_shape(const Node& node, Shape x) {
    expect_axis(node, x, node.axis);
    int64_t& size = x[static_cast<size_t>(node.axis)];
    const SliceRange range = slice_range(node, size);
    if (range.count < 1) fail(node, "the slice ", node.start, ":", node.end, " of ", size, " is empty");
    size = range.count;
    return x;
}

Shape index_select_shape(const Node& node, Shape x) {
    expect_axis(node, x, node.axis);
    int64_t& size = x[static_cast<size_t>(node.axis)];
    for (int64_t i : node.index)
        if (i >= size) fail(node, "index ", i, " is outside dimension ", node.axis, " of ", to_string(x));
    size = static_cast<int64_t>(node.index.size());
    return x;
}

Shape pad_shape(const Node& node, Shape x) {
    if (node.pads.size() != 2 * x.size()) fail(node, "padding for ", node.pads.size() / 2, " dimensions, the input is ", to_string(x));
    for (size_t i = 0; i < x.size(); ++i) {
        const int64_t most = std::max(node.pads[2 * i], node.pads[2 * i + 1]);
        const bool fits = node.pad_mode == PadMode::reflect ? most < x[i] : node.pad_mode == PadMode::circular ? most <= x[i] : true;
        if (!fits) fail(node, "padding of ", most, " is too much for dimension ", i, " of ", to_string(x));
        x[i] += node.pads[2 * i] + node.pads[2 * i + 1];
    }
    return x;
}

Shape concat_shape(const Node& node, const std::vector<const Shape*>& inputs) {
    Shape out = *inputs[0];
    expect_axis(node, out, node.axis);
    const auto axis = static_cast<size_t>(node.axis);
    for (size_t i = 1; i < inputs.size(); ++i) {
        Shape other = *inputs[i];
        const bool ranks = other.size() == out.size();
        const int64_t size = ranks ? other[axis] : 0;
        if (ranks) other[axis] = out[axis];
        if (!ranks || other != out) fail(node, "inputs of shapes ", to_string(out), " and ", to_string(*inputs[i]), " do not concatenate");
        out[axis] += size;
        if (out[axis] >= max_extent) fail(node, "the output is too large");
    }
    return out;
}

Shape resize_shape(const Node& node, const Shape& x, const Shape* like) {
    expect_rank(node, x, 4);
    Shape out = x;
    for (size_t i = 0; i < 2; ++i) {
        if (like) {
            expect_rank(node, *like, 4);
            out[2 + i] = (*like)[2 + i];
        } else if (node.size[i] > 0) {
            out[2 + i] = node.size[i];
        } else {
            const double size = static_cast<double>(x[2 + i]) * node.resize_scale[i];
            if (!(size >= 1 && size < static_cast<double>(max_extent))) fail(node, "neither size nor scale give an output");
            out[2 + i] = static_cast<int64_t>(size);
        }
    }
    return out;
}

Shape pixel_shuffle_shape(const Node& node, const Shape& x) {
    expect_rank(node, x, 4);
    const int64_t area = node.factor[0] * node.factor[1];
    if (x[1] % area != 0) fail(node, "expected a multiple of ", area, " channels, got ", to_string(x));
    return {x[0], x[1] / area, x[2] * node.factor[0] - node.crop[0], x[3] * node.factor[1] - node.crop[1]};
}

Shape reduce_shape(const Node& node, const Shape& x) {
    Shape out;
    for (size_t i = 0; i < x.size(); ++i) {
        const bool gone = std::find(node.axes.begin(), node.axes.end(), static_cast<int64_t>(i)) != node.axes.end();
        if (!gone) out.push_back(x[i]);
        else if (node.keepdim) out.push_back(1);
    }
    for (int64_t axis : node.axes) expect_axis(node, x, axis);
    if (out.empty()) out.push_back(1);  // values have a dimension at least
    return out;
}

Shape norm_shape(const Node& node, const Shape& x) {
    int64_t expected = 0;
    if (node.op == Op::layer_norm) {
        if (node.axis > static_cast<int64_t>(x.size())) fail(node, "over ", node.axis, " dimensions, the input is ", to_string(x));
        expected = elements(Shape(x.end() - node.axis, x.end()));
    } else {
        if (x.size() < 2 || x[1] % node.groups != 0) fail(node, "expected channels for ", node.groups, " groups, got ", to_string(x));
        expected = x[1];
    }
    for (const auto& array : {node.scale, node.bias})
        if (array && static_cast<int64_t>(array->size()) != expected)
            fail(node, "an array of ", array->size(), " elements, expected ", expected, " for an input of ", to_string(x));
    return x;
}

Shape prelu_shape(const Node& node, const Shape& x) {
    const auto slopes = static_cast<int64_t>(node.scale->size());
    if (slopes != 1 && (x.size() < 2 || slopes != x[1])) fail(node, slopes, " slopes for an input of ", to_string(x));
    return x;
}

Shape matmul_shape(const Node& node, const Shape& a, const Shape& b) {
    if (a.size() < 2 || b.size() < 2) fail(node, "expected inputs of 2 dimensions or more, got ", to_string(a), " and ", to_string(b));
    const int64_t k = node.transpose_b ? b.back() : b[b.size() - 2], n = node.transpose_b ? b[b.size() - 2] : b.back();
    if (a.back() != k) fail(node, "inputs of shapes ", to_string(a), " and ", to_string(b), " do not multiply");
    Shape out = broadcast_shape(node, Shape(a.begin(), a.end() - 2), Shape(b.begin(), b.end() - 2));
    out.push_back(a[a.size() - 2]);
    out.push_back(n);
    return out;
}

Shape node_shape(const Graph& graph, const Node& node, const std::vector<const Shape*>& inputs, const Symbols& symbols) {
    if (inputs.empty()) return resolve(node, nullptr, symbols);  // constant
    const Shape& x = *inputs[0];
    switch (node.op) {
        case Op::conv: return conv_shape(graph, node, x);
        case Op::linear: return linear_shape(graph, node, x);
        case Op::max_pool:
        case Op::avg_pool: return pool_shape(node, x);
        case Op::adaptive_avg_pool:
        case Op::adaptive_max_pool: return adaptive_shape(node, x);
        case Op::flatten: return flatten_shape(node, x);
        case Op::add:
        case Op::sub:
        case Op::mul:
        case Op::div:
        case Op::maximum:
        case Op::minimum: return broadcast_shape(node, x, *inputs[1]);
        case Op::prelu: return prelu_shape(node, x);
        case Op::constant: break;
        case Op::reshape: return reshape_shape(node, x, symbols);
        case Op::permute: return permute_shape(node, x);
        case Op::expand: return expand_shape(node, x, symbols);
        case Op::slice: return slice_shape(node, x);
        case Op::index_select: return index_select_shape(node, x);
        case Op::concat: return concat_shape(node, inputs);
        case Op::pad: return pad_shape(node, x);
        case Op::resize: return resize_shape(node, x, inputs.size() > 1 ? inputs[1] : nullptr);
        case Op::pixel_shuffle: return pixel_shuffle_shape(node, x);
        case Op::channel_shuffle:
            if (x.size() < 2 || x[1] % node.groups != 0) fail(node, "expected channels for ", node.groups, " groups, got ", to_string(x));
            return x;
        case Op::reduce: return reduce_shape(node, x);
        case Op::roll:
        case Op::softmax: expect_axis(node, x, node.axis); return x;
        case Op::layer_norm:
        case Op::group_norm: return norm_shape(node, x);
        case Op::matmul: return matmul_shape(node, x, *inputs[1]);
        case Op::act: return x;
    }
    fail(node, "unknown operator");
}

bool has_residual(const Node& node) { return (node.op == Op::conv || node.op == Op::linear) && node.inputs.size() == 2; }

}  // namespace

std::string to_string(const Shape& shape) {
    std::string out = "(";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + (shape.size() == 1 ? ",)" : ")");
}

const char* op_name(Op op) {
    static const char* const names[] = {
        "conv", "linear", "max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "add", "sub", "mul", "div", "maximum",
        "minimum", "act", "prelu", "flatten", "constant", "reshape", "permute", "expand", "slice", "index_select", "roll", "concat", "pad",
        "resize", "pixel_shuffle", "channel_shuffle", "reduce", "softmax", "layer_norm", "group_norm", "matmul"};
    return names[static_cast<int>(op)];
}

SliceRange slice_range(const Node& node, int64_t size) {
    const auto clamp = [size](int64_t i) { return std::clamp<int64_t>(i < 0 ? i + size : i, 0, size); };
    const int64_t start = clamp(node.start), end = clamp(node.end);
    return {start, end <= start ? 0 : (end - start + node.step - 1) / node.step};
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
    Symbols symbols;
    for (size_t i = 0; i < inputs.size(); ++i)
        for (size_t d = 0; d < inputs[i].size(); ++d)
            if (graph.inputs[i].size[d] < 0) symbols.emplace(graph.inputs[i].symbol[d], inputs[i][d]);
    for (const Node& node : graph.nodes) {
        std::vector<const Shape*> operands;
        for (int i : node.inputs) operands.push_back(&shapes[static_cast<size_t>(i)]);
        Shape out = node_shape(graph, node, operands, symbols);
        if (out.size() > kMaxRank) fail(node, "output ", to_string(out), " has more than ", kMaxRank, " dimensions");
        const std::string problem = range_problem(out);
        if (!problem.empty()) fail(node, "output ", problem);
        // torch would broadcast a residual, a program never does.
        if (has_residual(node) && *operands[1] != out)
            fail(node, "expected a second input of shape ", to_string(out), ", got ", to_string(*operands[1]));
        shapes.push_back(std::move(out));
    }
    return shapes;
}

}  // namespace sparseprune
