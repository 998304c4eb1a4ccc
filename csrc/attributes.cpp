// One table of operators, one reader for each attribute.
#include "attributes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "errors.h"

namespace sparseprune {
namespace {

constexpr int64_t max_window = int64_t{1} << 20;  // keeps every sum and product of shape inference far from overflow
constexpr int64_t max_extent = (int64_t{1} << 31) - 1;

constexpr size_t many = 1 << 16;
constexpr size_t max_rank = 8;

// Made when the library is loaded, as the names below: what is made at first use hangs a child that was forked in the middle of it.
const std::vector<OpSchema> schemas = [] {
    using A = Arrays;
    return std::vector<OpSchema>{
        {Op::conv, 1, 2, A::weight, {"dims", "stride", "padding", "dilation", "groups", "act"}},
        {Op::linear, 1, 2, A::weight, {"act"}},
        {Op::max_pool, 1, 1, A::none, {"dims", "kernel", "stride", "padding", "dilation", "ceil_mode"}},
        {Op::avg_pool, 1, 1, A::none, {"dims", "kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor"}},
        {Op::adaptive_avg_pool, 1, 1, A::none, {"dims", "output_size"}},
        {Op::adaptive_max_pool, 1, 1, A::none, {"dims", "output_size"}},
        {Op::add, 2, 2, A::none, {"act"}},
        {Op::sub, 2, 2, A::none, {"act"}},
        {Op::mul, 2, 2, A::none, {"act"}},
        {Op::div, 2, 2, A::none, {"act"}},
        {Op::maximum, 2, 2, A::none, {"act"}},
        {Op::minimum, 2, 2, A::none, {"act"}},
        {Op::act, 1, 1, A::none, {"act"}},
        {Op::prelu, 1, 1, A::scale, {}},
        {Op::flatten, 1, 1, A::none, {}},
        {Op::constant, 0, 0, A::bias, {"shape"}},
        {Op::reshape, 1, 1, A::none, {"shape"}},
        {Op::permute, 1, 1, A::none, {"axes"}},
        {Op::expand, 1, 1, A::none, {"shape"}},
        {Op::slice, 1, 1, A::none, {"axis", "start", "end", "step"}},
        {Op::index_select, 1, 1, A::none, {"axis", "index"}},
        {Op::roll, 1, 1, A::none, {"axis", "shift"}},
        {Op::concat, 1, many, A::none, {"axis"}},
        {Op::pad, 1, 1, A::none, {"padding", "mode", "value"}},
        {Op::resize, 1, 2, A::none, {"mode", "size", "scale", "align_corners"}},
        {Op::pixel_shuffle, 1, 1, A::none, {"factor", "crop"}},
        {Op::channel_shuffle, 1, 1, A::none, {"groups"}},
        {Op::reduce, 1, 1, A::none, {"kind", "axes", "keepdim"}},
        {Op::softmax, 1, 1, A::none, {"axis"}},
        {Op::layer_norm, 1, 1, A::scale_bias, {"axes", "eps"}},
        {Op::group_norm, 1, 1, A::scale_bias, {"groups", "eps"}},
        {Op::matmul, 2, 2, A::none, {"transpose_b"}},
    };
}();

int64_t ranged(const Json& json, const std::string& name, int64_t low, int64_t high) {
    const int64_t value = json.integer();
    if (value < low || value > high) json.fail(message("attrs.", name, "=", value, " is not in [", low, ", ", high, "]"));
    return value;
}

template <size_t N>
void read_numbers(const Json& json, const std::string& name, int64_t low, int64_t high, std::array<int64_t, N>& out) {
    if (json.array().size() != N)
        json.fail(message("attrs.", name, " has ", json.array().size(), " elements, expected ", N));
    for (size_t i = 0; i < N; ++i) out[i] = ranged(json.array()[i], message(name, "[", i, "]"), low, high);
}

// The value of this name, or an error that lists all of them.
template <class T>
T named(const Json& json, const std::string& attribute, const std::vector<std::pair<const char*, T>>& known) {
    std::string all;
    for (const auto& [name, value] : known) {
        if (json.string() == name) return value;
        all += (all.empty() ? "" : ", ") + std::string(name);
    }
    json.fail(message("attrs.", attribute, "='", json.string(), "' is not one of ", all));
}

const std::vector<std::pair<const char*, Act>> acts = {
    {"none", Act::none}, {"relu", Act::relu}, {"relu6", Act::relu6}, {"leaky_relu", Act::leaky_relu}, {"clamp", Act::clamp},
    {"hardsigmoid", Act::hardsigmoid}, {"hardswish", Act::hardswish}, {"sigmoid", Act::sigmoid}, {"silu", Act::silu},
    {"tanh", Act::tanh}, {"elu", Act::elu}, {"gelu", Act::gelu}, {"gelu_tanh", Act::gelu_tanh}, {"mish", Act::mish},
    {"softplus", Act::softplus}, {"exp", Act::exp}, {"sqrt", Act::sqrt}, {"rsqrt", Act::rsqrt}, {"reciprocal", Act::reciprocal},
    {"abs", Act::abs}, {"neg", Act::neg}, {"square", Act::square}};

Act read_act(const Json& json) { return named(json, "act", acts); }

float read_float(const Json& json, const std::string& name) {
    const double value = json.number();
    if (!(std::fabs(value) <= std::numeric_limits<float>::max())) json.fail(message("attrs.", name, "=", value, " is not a finite float32"));
    return static_cast<float>(value);
}

std::vector<int64_t> read_list(const Json& json, const std::string& name, size_t most, int64_t low, int64_t high) {
    if (json.array().empty() || json.array().size() > most)
        json.fail(message("attrs.", name, " has ", json.array().size(), " elements, expected 1 to ", most));
    std::vector<int64_t> out;
    for (size_t i = 0; i < json.array().size(); ++i) out.push_back(ranged(json.array()[i], message(name, "[", i, "]"), low, high));
    return out;
}

// A list of dimensions, each once.
std::vector<int64_t> read_axes(const Json& json) {
    auto axes = read_list(json, "axes", max_rank, 0, max_rank - 1);
    auto sorted = axes;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) json.fail("attrs.axes names a dimension twice");
    return axes;
}

std::vector<Size> read_sizes(const Json& json, Op op) {
    if (json.array().empty() || json.array().size() > max_rank)
        json.fail(message("attrs.shape has ", json.array().size(), " elements, expected 1 to ", max_rank));
    std::vector<Size> sizes;
    int left = 0;
    for (size_t i = 0; i < json.array().size(); ++i) {
        const Json& item = json.array()[i];
        Size size;
        if (item.is_string() && op != Op::constant) {
            size.symbol = item.string();
            if (size.symbol.empty()) item.fail("the name of a size is empty");
        } else {
            const int64_t low = op == Op::constant ? 1 : -1 - static_cast<int64_t>(max_rank);
            size.value = ranged(item, message("shape[", i, "]"), low, max_extent);
            if (size.value == 0) item.fail(message("attrs.shape[", i, "]=0 is no size"));
            left += size.value == -1;
        }
        sizes.push_back(size);
    }
    if (left > (op == Op::reshape ? 1 : 0)) json.fail("attrs.shape has too many sizes of -1");
    return sizes;
}

void read_double_pair(const Json& json, const std::string& name, std::array<double, 2>& out) {
    if (json.array().size() != 2) json.fail(message("attrs.", name, " has ", json.array().size(), " elements, expected 2"));
    for (size_t i = 0; i < 2; ++i) {
        out[i] = json.array()[i].number();
        if (out[i] != 0 && !(out[i] >= 1e-6 && out[i] <= 1e6)) json.fail(message("attrs.", name, "[", i, "]=", out[i], " is not 0 or in [1e-6, 1e6]"));
    }
}

// Attributes of the operators on values of any rank.
bool read_tensor_attribute(const std::string& name, const Json& json, Node& node) {
    constexpr int64_t last = max_rank - 1;
    if (name == "shape") node.shape = read_sizes(json, node.op);
    else if (name == "axes" && node.op == Op::layer_norm) node.axis = ranged(json, name, 1, max_rank);
    else if (name == "axes") node.axes = read_axes(json);
    else if (name == "axis") node.axis = ranged(json, name, 0, last);
    else if (name == "start") node.start = ranged(json, name, -max_extent - 1, max_extent);
    else if (name == "end") node.end = ranged(json, name, -max_extent - 1, max_extent);
    else if (name == "step") node.step = ranged(json, name, 1, max_extent);
    else if (name == "shift") node.shift = ranged(json, name, -max_extent, max_extent);
    else if (name == "index") node.index = read_list(json, name, many, 0, max_extent - 1);
    else if (name == "padding" && node.op == Op::pad) node.pads = read_list(json, name, 2 * max_rank, 0, max_window);
    else if (name == "value") node.value = read_float(json, name);
    else if (name == "mode" && node.op == Op::pad)
        node.pad_mode = named<PadMode>(json, name, {{"constant", PadMode::constant}, {"reflect", PadMode::reflect},
                                                    {"replicate", PadMode::replicate}, {"circular", PadMode::circular}});
    else if (name == "mode")
        node.resize_mode = named<ResizeMode>(json, name, {{"nearest", ResizeMode::nearest}, {"bilinear", ResizeMode::bilinear}});
    else if (name == "kind")
        node.reduction = named<Reduction>(json, name, {{"mean", Reduction::mean}, {"sum", Reduction::sum}, {"max", Reduction::max},
                                                       {"min", Reduction::min}});
    else if (name == "size") read_numbers(json, name, 0, max_extent, node.size);
    else if (name == "scale") read_double_pair(json, name, node.resize_scale);
    else if (name == "factor") read_numbers(json, name, 1, 1 << 10, node.factor);
    else if (name == "crop") read_numbers(json, name, 0, 1 << 10, node.crop);
    else if (name == "align_corners") node.align_corners = json.boolean();
    else if (name == "keepdim") node.keepdim = json.boolean();
    else if (name == "transpose_b") node.transpose_b = json.boolean();
    else if (name == "eps") node.eps = static_cast<double>(read_float(json, name));
    else return false;
    return true;
}

void read_attribute(const std::string& name, const Json& json, Node& node) {
    Window& window = node.window;
    if (name == "act") node.act.kind = read_act(json);
    else if (name == "alpha") node.act.alpha = read_float(json, name);
    else if (name == "beta") node.act.beta = read_float(json, name);
    else if (read_tensor_attribute(name, json, node)) return;
    else if (name == "dims") node.dims = static_cast<int>(ranged(json, name, 1, 2));
    else if (name == "kernel") read_numbers(json, name, 1, max_window, window.kernel);
    else if (name == "stride") read_numbers(json, name, 1, max_window, window.stride);
    else if (name == "dilation") read_numbers(json, name, 1, max_window, window.dilation);
    else if (name == "padding") read_numbers(json, name, 0, max_window, window.padding);
    else if (name == "output_size") read_numbers(json, name, 0, max_extent, node.output_size);
    else if (name == "groups") node.groups = ranged(json, name, 1, max_extent);
    else if (name == "divisor") node.divisor = ranged(json, name, 0, max_extent);
    else if (name == "ceil_mode") node.ceil_mode = json.boolean();
    else if (name == "count_include_pad") node.count_include_pad = json.boolean();
    else json.fail(message("attribute '", name, "' has no reader"));
}

// One-dimensional operators have no h: its attributes must say so.
void check_neutral(const Json& attrs, const Node& node) {
    const Window& w = node.window;
    if (w.kernel[0] != 1 || w.stride[0] != 1 || w.dilation[0] != 1 || w.padding[0] != 0 || w.padding[1] != 0 ||
        node.output_size[0] > 1)
        attrs.fail("attrs: dims=1, but the h part of kernel, stride, dilation, padding or output_size is not neutral");
}

void check_pool_padding(const Json& attrs, const Window& window) {
    for (size_t i = 0; i < window.padding.size(); ++i) {
        const int64_t kernel = window.kernel[i / 2];
        if (window.padding[i] > kernel / 2)
            attrs.fail(message("attrs.padding[", i, "]=", window.padding[i], " is above half of kernel ", kernel));
    }
}

}  // namespace

const OpSchema* find_op(const std::string& name) {
    for (const auto& schema : schemas)
        if (name == op_name(schema.op)) return &schema;
    return nullptr;
}

void read_attributes(const OpSchema& schema, const Json& attrs, Node& node) {
    const auto has = [&](std::string_view name) {
        return std::find(schema.attrs.begin(), schema.attrs.end(), name) != schema.attrs.end();
    };
    for (const auto& member : attrs.object()) {
        const std::string_view name = member.key;
        if (!has(name) && !(has("act") && (name == "alpha" || name == "beta")))
            attrs.fail(message("attrs: unknown key '", member.key, "'"));
        read_attribute(member.key, member.value, node);
    }
    for (const std::string_view name : schema.attrs)
        if (name != "act" && !attrs.find(name)) attrs.fail(message("attrs: '", name, "' is missing"));
    if (node.dims == 1) check_neutral(attrs, node);
    if (node.op == Op::max_pool || node.op == Op::avg_pool) check_pool_padding(attrs, node.window);
    if (node.act.kind == Act::clamp && !(node.act.alpha <= node.act.beta))
        attrs.fail(message("attrs: clamp to [", node.act.alpha, ", ", node.act.beta, "], expected alpha <= beta"));
    if (node.op == Op::pixel_shuffle && (node.crop[0] >= node.factor[0] || node.crop[1] >= node.factor[1]))
        attrs.fail("attrs.crop is not below factor");
}

}  // namespace sparseprune
