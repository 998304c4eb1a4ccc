// One table of operators, one reader for each attribute.
#include "attributes.h"

#include <algorithm>
#include <string_view>

#include "errors.h"

namespace sparseprune {
namespace {

constexpr int64_t max_window = int64_t{1} << 20;  // keeps every sum and product of shape inference far from overflow
constexpr int64_t max_extent = (int64_t{1} << 31) - 1;

const std::vector<OpSchema>& schemas() {
    static const std::vector<OpSchema> table = {
        {Op::conv, 1, 2, true, {"dims", "stride", "padding", "dilation", "groups", "act"}},
        {Op::linear, 1, 2, true, {"act"}},
        {Op::max_pool, 1, 1, false, {"dims", "kernel", "stride", "padding", "dilation", "ceil_mode"}},
        {Op::avg_pool, 1, 1, false, {"dims", "kernel", "stride", "padding", "ceil_mode", "count_include_pad", "divisor"}},
        {Op::adaptive_avg_pool, 1, 1, false, {"dims", "output_size"}},
        {Op::adaptive_max_pool, 1, 1, false, {"dims", "output_size"}},
        {Op::add, 2, 2, false, {"act"}},
        {Op::act, 1, 1, false, {"act"}},
        {Op::flatten, 1, 1, false, {}},
    };
    return table;
}

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

Act read_act(const Json& json) {
    const std::string& name = json.string();
    if (name == "none") return Act::none;
    if (name == "relu") return Act::relu;
    if (name == "relu6") return Act::relu6;
    json.fail(message("attrs.act='", name, "' is not one of none, relu, relu6"));
}

void read_attribute(const std::string& name, const Json& json, Node& node) {
    Window& window = node.window;
    if (name == "act") node.act = read_act(json);
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
    for (const auto& schema : schemas())
        if (name == op_name(schema.op)) return &schema;
    return nullptr;
}

void read_attributes(const OpSchema& schema, const Json& attrs, Node& node) {
    for (const auto& member : attrs.object()) {
        const auto same = [&](std::string_view name) { return name == member.key; };
        if (std::none_of(schema.attrs.begin(), schema.attrs.end(), same))
            attrs.fail(message("attrs: unknown key '", member.key, "'"));
        read_attribute(member.key, member.value, node);
    }
    for (const std::string_view name : schema.attrs)
        if (name != "act" && !attrs.find(name)) attrs.fail(message("attrs: '", name, "' is missing"));
    if (node.dims == 1) check_neutral(attrs, node);
    if (node.op == Op::max_pool || node.op == Op::avg_pool) check_pool_padding(attrs, node.window);
}

}  // namespace sparseprune
