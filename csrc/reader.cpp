// From the graph's JSON and the container's arrays to a Graph in which every number was checked.
#include "reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "attributes.h"
#include "errors.h"
#include "json.h"

namespace sparseprune {
namespace {

constexpr int64_t max_extent = std::numeric_limits<int32_t>::max();
constexpr size_t max_input_rank = 8;
constexpr int64_t format_version = 2;

// Runs `read`; whatever is wrong in there is the file's fault, and is said of `what`.
template <class Read>
auto in(const std::string& what, Read read) {
    try {
        return read();
    } catch (const FormatError& error) {
        throw FormatError(message(what, ": ", error.what()));
    } catch (const ValueError& error) {
        throw FormatError(message(what, ": ", error.what()));
    }
}

Shape read_shape(const Json& json, size_t min_rank, size_t max_rank) {
    if (json.array().size() < min_rank || json.array().size() > max_rank)
        json.fail(message("the shape has ", json.array().size(), " dimensions, expected ", min_rank, " to ", max_rank));
    Shape shape;
    for (const auto& item : json.array()) {
        const int64_t extent = item.integer();
        if (extent < 1 || extent > max_extent) item.fail(message("extent ", extent, " is not in [1, ", max_extent, "]"));
        shape.push_back(extent);
    }
    return shape;
}

Input read_input(const Json& json) {
    json.check_keys({"name", "shape"});
    Input input;
    input.name = json.at("name").string();
    const auto& shape = json.at("shape");
    if (shape.array().empty() || shape.array().size() > max_input_rank)
        shape.fail(message("the shape has ", shape.array().size(), " dimensions, expected 1 to ", max_input_rank));
    for (const auto& item : shape.array()) {
        if (item.is_string()) {
            if (item.string().empty()) item.fail("the name of a size is empty");
            input.size.push_back(-1);
            input.symbol.push_back(item.string());
            continue;
        }
        const int64_t size = item.integer();
        if (size < 1 || size > max_extent) item.fail(message("size ", size, " is not in [1, ", max_extent, "]"));
        input.size.push_back(size);
        input.symbol.emplace_back();
    }
    return input;
}

// IEEE 754 binary16 to binary32, exact; a NaN keeps its payload.
float float_of_half(uint16_t half) {
    const uint32_t sign = uint32_t{half & 0x8000u} << 16, fraction = half & 0x3FFu;
    uint32_t exponent = (half >> 10) & 0x1Fu, bits = 0;
    if (exponent == 0x1F) {
        bits = 0x7F800000u | fraction << 13;
    } else if (exponent == 0) {
        return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign ? -1.0f : 1.0f);
    } else {
        exponent += 127 - 15;
        bits = exponent << 23 | fraction << 13;
    }
    bits |= sign;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

// The number of tensors in the tree. JSON's own depth limit bounds the recursion.
size_t count_leaves(const Json& tree) {
    const std::string& kind = tree.at("kind").string();
    if (kind == "tensor" || kind == "none") {
        tree.check_keys({"kind"});
        return kind == "tensor" ? 1 : 0;
    }
    if (kind == "dict") {
        tree.check_keys({"kind", "keys", "items"});
        const auto& keys = tree.at("keys");
        if (keys.array().size() != tree.at("items").array().size()) keys.fail("not one key for each item");
        std::set<std::string> unique;
        for (const auto& key : keys.array())
            if (!unique.insert(key.string()).second) key.fail(message("duplicate key '", key.string(), "'"));
    } else if (kind == "list" || kind == "tuple") {
        tree.check_keys({"kind", "items"});
    } else {
        tree.fail(message("kind '", kind, "' is not one of tensor, list, tuple, dict, none"));
    }
    size_t leaves = 0;
    for (const auto& item : tree.at("items").array()) leaves += count_leaves(item);
    return leaves;
}

class Reader {
public:
    explicit Reader(const Container& container) : container_(container) {}

    Graph read() {
        const Json json = parse_json(container_.program);
        json.check_keys({"format", "version", "inputs", "weights", "nodes", "outputs", "tree"}, {"tuned"});
        if (json.at("format").string() != "sparseprune-program") json.fail("'format' is not 'sparseprune-program'");
        if (json.at("version").integer() != format_version)
            json.fail(message("version ", json.at("version").integer(), " of the format, this reader knows version ", format_version,
                              ": convert the model again"));
        read_inputs(json.at("inputs"));
        for (const auto& member : json.at("weights").object())
            in(message("weight '", member.key, "'"), [&] { read_weight(member.key, member.value); });
        for (const auto& node : json.at("nodes").array())
            in(message("node ", graph_.nodes.size()), [&] { read_node(node); });
        for (const auto& output : json.at("outputs").array())
            graph_.outputs.push_back(read_value(output, graph_.value_count()));
        read_tree(json.at("tree"));
        if (const Json* tuned = json.find("tuned"))
            for (const auto& item : tuned->array()) read_tuned(item);
        check_all_used();
        return std::move(graph_);
    }

private:
    void read_inputs(const Json& json) {
        if (json.array().empty()) json.fail("a program needs an input");
        std::set<std::string> names;
        for (const auto& item : json.array()) {
            graph_.inputs.push_back(read_input(item));
            const std::string& name = graph_.inputs.back().name;
            if (name.empty() || !names.insert(name).second)
                item.fail(message("input name '", name, "' is empty or not unique"));
            symbols_.insert(graph_.inputs.back().symbol.begin(), graph_.inputs.back().symbol.end());
        }
    }

    const Tensor* find_tensor(const std::string& name) const {
        const auto found = container_.tensors.find(name);
        return found == container_.tensors.end() ? nullptr : &found->second;
    }

    const Tensor& tensor(const std::string& name) const {
        const Tensor* found = find_tensor(name);
        if (!found) throw FormatError(message("the array '", name, "' is missing"));
        return *found;
    }

    const Tensor& tensor(const std::string& name, size_t rank) const {
        const Tensor& found = tensor(name);
        if (found.shape.size() != rank)
            throw FormatError(message("the array '", name, "' has shape ", to_string(found.shape), ", expected ", rank,
                                      " dimensions"));
        return found;
    }

    const Tensor& tensor(const std::string& name, DType dtype, size_t rank) {
        const Tensor& found = tensor(name, rank);
        if (found.dtype != dtype)
            throw FormatError(message("the array '", name, "' is ", dtype_name(found.dtype), ", expected ",
                                      dtype_name(dtype)));
        used_tensors_.insert(name);
        return found;
    }

    template <class T>
    std::vector<T> array(const std::string& name, DType dtype, size_t rank = 1) {
        return copy_elements<T>(tensor(name, dtype, rank));
    }

    // A weight's values: F32, or F16, which were rounded when the file was written and are float32 from here on.
    std::vector<float> weight_values(const std::string& name, size_t rank) {
        if (tensor(name, rank).dtype != DType::f16) return array<float>(name, DType::f32, rank);
        const auto halves = array<uint16_t>(name, DType::f16, rank);
        std::vector<float> out(halves.size());
        std::transform(halves.begin(), halves.end(), out.begin(), float_of_half);
        return out;
    }

    void read_weight(const std::string& name, const Json& json) {
        json.check_keys({"shape"}, {"block_shape"});
        Weight weight;
        weight.shape = read_shape(json.at("shape"), 2, 4);
        if (const Json* block_shape = json.find("block_shape"))
            weight.sparse = read_sparse(name, weight.shape, read_shape(*block_shape, 2, 2));
        else
            weight.dense = read_dense(name, weight.shape);
        weight.half = tensor(name + ".values").dtype == DType::f16;
        weight_index_.emplace(name, static_cast<int>(graph_.weights.size()));
        graph_.weights.push_back(std::move(weight));
    }

    // A dense weight's shape is its array's, so the payload bounds it.
    std::shared_ptr<const std::vector<float>> read_dense(const std::string& name, const Shape& shape) {
        const std::string values = name + ".values";
        int64_t columns = 1;
        for (size_t i = 1; i < shape.size(); ++i) {
            if (shape[i] > max_extent / columns) throw FormatError(message("a row of ", to_string(shape), " exceeds ", max_extent, " columns"));
            columns *= shape[i];
        }
        if (tensor(values, shape.size()).shape != shape)
            throw FormatError(message("the array '", values, "' has not the shape ", to_string(shape)));
        return std::make_shared<const std::vector<float>>(weight_values(values, shape.size()));
    }

    std::shared_ptr<const BlockCSR> read_sparse(const std::string& name, const Shape& shape, const Shape& block_shape) {
        auto crow = array<int32_t>(name + ".crow_indices", DType::i32);
        auto col = find_tensor(name + ".col_gaps") ? read_gaps(name + ".col_gaps", crow) : read_columns(name + ".col_indices");
        std::vector<uint64_t> masks;
        if (find_tensor(name + ".masks")) {
            masks = array<uint64_t>(name + ".masks", DType::u64);
            // BlockCSR takes "no masks" for "all full"; a file that has the array means it.
            if (masks.size() != col.size())
                throw FormatError(message("masks has ", masks.size(), " elements, expected ", col.size()));
        }
        auto values = weight_values(name + ".values", 1);
        return std::make_shared<const BlockCSR>(shape, block_shape[0], block_shape[1], std::move(crow), std::move(col),
                                                std::move(masks), std::move(values));
    }

    std::vector<int32_t> read_columns(const std::string& name) {
        if (tensor(name, 1).dtype != DType::u16) return array<int32_t>(name, DType::i32);
        const auto narrow = array<uint16_t>(name, DType::u16);
        return {narrow.begin(), narrow.end()};
    }

    // In each block row, how many block columns without a block come before the next with one; 255 means 255 of them and no block.
    // `crow` is as the file has it: what BlockCSR will check of it is not relied on, so memory is bounded by the bytes that are there.
    std::vector<int32_t> read_gaps(const std::string& name, const std::vector<int32_t>& crow) {
        constexpr uint8_t skip = 255;
        const Tensor& gaps = tensor(name, DType::u8, 1);
        std::vector<int32_t> columns;
        if (!crow.empty() && crow.back() >= 0 && static_cast<size_t>(crow.back()) <= gaps.byte_count)
            columns.reserve(static_cast<size_t>(crow.back()));
        size_t at = 0;
        for (size_t row = 0; row + 1 < crow.size(); ++row) {
            int64_t column = 0;
            while (static_cast<int64_t>(columns.size()) < crow[row + 1]) {
                if (at == gaps.byte_count) throw FormatError(message("the array '", name, "' ends in block row ", row));
                const uint8_t gap = gaps.data[at++];
                column += gap;
                if (gap == skip) continue;
                if (column > max_extent) throw FormatError(message("the array '", name, "': block row ", row, " exceeds ", max_extent, " columns"));
                columns.push_back(static_cast<int32_t>(column++));
            }
        }
        if (at != gaps.byte_count)
            throw FormatError(message("the array '", name, "' has ", gaps.byte_count, " elements, expected ", at));
        return columns;
    }

    static int read_value(const Json& json, int count) {
        const int64_t value = json.integer();
        if (value < 0 || value >= count) json.fail(message("value ", value, " is not in [0, ", count, ")"));
        return static_cast<int>(value);
    }

    void read_node(const Json& json) {
        json.check_keys({"op", "name", "inputs", "attrs"}, {"weight", "bias", "scale"});
        const OpSchema* schema = find_op(json.at("op").string());
        if (!schema) json.fail(message("unknown op '", json.at("op").string(), "'"));
        Node node;
        node.op = schema->op;
        node.name = json.at("name").string();
        in(message(op_name(node.op), " '", node.name, "'"), [&] {
            read_operands(*schema, json.at("inputs"), node);
            read_attributes(*schema, json.at("attrs"), node);
            read_arrays(schema->arrays, json, node);
            check_symbols(json.at("attrs"), node);
        });
        graph_.nodes.push_back(std::move(node));
    }

    void read_arrays(Arrays arrays, const Json& json, Node& node) {
        const Json *weight = json.find("weight"), *bias = json.find("bias"), *scale = json.find("scale");
        if (arrays == Arrays::weight && !weight) json.fail("'weight' is missing");
        if (arrays == Arrays::bias && !bias) json.fail("'bias' is missing");
        if (arrays == Arrays::scale && !scale) json.fail("'scale' is missing");
        if (arrays != Arrays::weight && weight) weight->fail("takes no weight");
        if ((arrays == Arrays::none || arrays == Arrays::scale) && bias) bias->fail("takes no bias");
        if (arrays != Arrays::scale && arrays != Arrays::scale_bias && scale) scale->fail("takes no scale");
        if (weight) attach_weight(*weight, node);
        if (bias) node.bias = read_array(*bias);
        if (scale) node.scale = read_array(*scale);
        if (bias && weight) check_length(*bias, *node.bias, graph_.weights[static_cast<size_t>(node.weight)].rows());
        if (node.op == Op::constant) check_length(*bias, *node.bias, constant_elements(node));
        if (bias && scale) check_length(*bias, *node.bias, static_cast<int64_t>(node.scale->size()));
    }

    // Saturates: an array that long cannot be.
    static int64_t constant_elements(const Node& node) {
        int64_t n = 1;
        for (const Size& size : node.shape) n = n > max_extent ? n : n * size.value;
        return n;
    }

    static void check_length(const Json& json, const std::vector<float>& array, int64_t expected) {
        if (static_cast<int64_t>(array.size()) != expected)
            json.fail(message("the array '", json.string(), "' has ", array.size(), " elements, expected ", expected));
    }

    void check_symbols(const Json& json, const Node& node) const {
        for (const Size& size : node.shape)
            if (!size.symbol.empty() && !symbols_.count(size.symbol)) json.fail(message("attrs.shape: no input has a size '", size.symbol, "'"));
    }

    void read_operands(const OpSchema& schema, const Json& json, Node& node) const {
        const size_t count = json.array().size();
        if (count < schema.min_inputs || count > schema.max_inputs)
            json.fail(message(count, " inputs, expected ", schema.min_inputs, " to ", schema.max_inputs));
        for (const auto& item : json.array()) node.inputs.push_back(read_value(item, graph_.value_count()));
    }

    void attach_weight(const Json& json, Node& node) {
        const auto found = weight_index_.find(json.string());
        if (found == weight_index_.end()) json.fail(message("there is no weight '", json.string(), "'"));
        node.weight = found->second;
        used_weights_.insert(found->second);
        const Shape& shape = graph_.weights[static_cast<size_t>(node.weight)].shape;
        const size_t rank = node.op == Op::conv ? static_cast<size_t>(node.dims) + 2 : 2;
        if (shape.size() != rank)
            json.fail(message("weight '", json.string(), "' has shape ", to_string(shape), ", expected ", rank,
                              " dimensions"));
        if (node.op != Op::conv) return;
        if (shape[0] % node.groups != 0)
            json.fail(message("attrs.groups=", node.groups, " does not divide out_channels=", shape[0]));
        if (shape[1] > max_extent / node.groups)
            json.fail(message("attrs.groups=", node.groups, " times ", shape[1], " exceeds ", max_extent, " channels"));
        node.window.kernel = {node.dims == 2 ? shape[2] : 1, shape.back()};
        if (node.window.kernel[0] > max_kernel_area / node.window.kernel[1])
            json.fail(message("a kernel of ", node.window.kernel[0], " x ", node.window.kernel[1], " exceeds ", max_kernel_area, " taps"));
    }

    // Nodes that share an array share its memory: a file cannot make us copy one array many times.
    std::shared_ptr<const std::vector<float>> read_array(const Json& json) {
        const std::string& name = json.string();
        auto& found = arrays_[name];
        if (!found) {
            if (used_tensors_.count(name)) json.fail(message("the array '", name, "' is part of a weight"));
            found = std::make_shared<const std::vector<float>>(array<float>(name, DType::f32));
        }
        return found;
    }

    void read_tree(const Json& json) {
        const size_t leaves = count_leaves(json);
        if (leaves != graph_.outputs.size())
            json.fail(message("the tree has ", leaves, " tensors, the program ", graph_.outputs.size(), " outputs"));
        graph_.tree = container_.program.substr(json.begin, json.end - json.begin);
    }

    // Measured choices: hints, so only their form is checked; the plan takes those that fit.
    void read_tuned(const Json& json) {
        json.check_keys({"isa", "shapes", "choices"}, {"threads"});
        Tuned tuned{json.at("isa").string(), {}, {}, 0};
        if (const Json* threads = json.find("threads")) {
            if (threads->integer() < 1 || threads->integer() > 256) threads->fail(message("threads=", threads->integer(), " is not in [1, 256]"));
            tuned.threads = static_cast<int>(threads->integer());
        }
        for (const auto& shape : json.at("shapes").array()) {
            tuned.shapes.emplace_back();
            for (const auto& size : shape.array()) tuned.shapes.back().push_back(size.integer());
        }
        for (const auto& item : json.at("choices").array()) {
            if (item.is_null()) {
                tuned.choices.push_back(std::nullopt);
                continue;
            }
            const auto& parts = item.array();
            if (parts.size() != 3) item.fail("a choice is [form, kind, vectors]");
            tuned.choices.push_back(choice_named(parts[0].string(), parts[1].string(), parts[2].integer()));
            if (!tuned.choices.back()) item.fail("a choice is [form, kind, vectors], of known names");
        }
        if (tuned.choices.size() != graph_.nodes.size()) json.fail("'choices' is not one for each node");
        if (!tuned_.emplace(tuned.isa, tuned.shapes).second) json.fail("'tuned' has the same isa and shapes twice");
        graph_.tuned.push_back(std::move(tuned));
    }

    void check_all_used() const {
        for (const auto& entry : weight_index_)
            if (!used_weights_.count(entry.second))
                throw FormatError(message("no node uses the weight '", entry.first, "'"));
        for (const auto& entry : container_.tensors)
            if (!used_tensors_.count(entry.first))
                throw FormatError(message("nothing uses the array '", entry.first, "'"));
    }

    const Container& container_;
    Graph graph_;
    std::map<std::string, int> weight_index_;
    std::map<std::string, std::shared_ptr<const std::vector<float>>> arrays_;
    std::set<std::string> symbols_, used_tensors_;
    std::set<std::pair<std::string, std::vector<Shape>>> tuned_;
    std::set<int> used_weights_;
};

}  // namespace

Graph read_graph(const Container& container) {
    return in("graph", [&] { return Reader(container).read(); });
}

Graph read_program(const uint8_t* bytes, size_t size) { return read_graph(read_container(bytes, size)); }

}  // namespace sparseprune
