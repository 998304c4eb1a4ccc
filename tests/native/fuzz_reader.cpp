// Any bytes as a program: read, planned and run once if they are one. What may come is FormatError or ValueError, nothing else.
//
// The first byte says what follows the second. Even: a file, read with checksums that fit or (from 128 on) as it is. Odd: a graph's
// JSON; the arrays that it names come from the list below, so that mutations of the text alone reach every operator. Its other bits
// choose the instruction set and the side of the guard pages, the second byte chooses the sizes of the inputs.
#include "fuzz_reader.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>

#include "cpu/isa.h"
#include "plan.h"
#include "programs.h"

using namespace sparseprune;
using namespace programs;

namespace {

constexpr int64_t most_elements = 1 << 13, most_work = 1 << 17;  // of a program that is run; others are only read and shaped

std::vector<Array> all_arrays() {
    auto arrays = small_arrays();  // b0 (2), w0 (2, 2, 1, 1) in (2, 1) blocks, w1 (3, 2) dense
    arrays.push_back(array<float>("a", "F32", {4}, {1, -2, 3, 0.5f}));
    arrays.push_back(array<float>("s", "F32", {2}, {0.5f, 2}));
    arrays.push_back(array<int32_t>("g.crow_indices", "I32", {5}, {0, 2, 2, 5, 6}));  // g (4, 2, 3, 3) in (1, 1) blocks, float16
    arrays.push_back(array<uint8_t>("g.col_gaps", "U8", {6}, {0, 16, 2, 3, 4, 17}));
    arrays.push_back(array<uint16_t>("g.values", "F16", {6}, {0x3C00, 0xBC00, 0x4000, 0x3800, 0x3C00, 0xC200}));
    arrays.push_back(array<float>("k.values", "F32", {2, 1, 3}, {1, 2, 3, -1, 0, 1}));  // k (2, 1, 3)
    return arrays;
}

// An array is there where the text has its name, or its weight's, in quotation marks.
Container container_for(std::string graph) {
    static const std::map<std::string, DType> dtypes = {{"F32", DType::f32}, {"F16", DType::f16}, {"I32", DType::i32},
                                                        {"U16", DType::u16}, {"U8", DType::u8},   {"U64", DType::u64}};
    struct Known {
        Array array;
        std::string quoted;
    };
    static const std::vector<Known> all = [] {
        std::vector<Known> known;
        for (Array& a : all_arrays()) {
            const std::string quoted = "\"" + a.name.substr(0, a.name.find('.')) + "\"";
            known.push_back({std::move(a), quoted});
        }
        return known;
    }();
    Container container;
    for (const auto& [a, quoted] : all)
        if (graph.find(quoted) != std::string::npos)
            container.tensors.emplace(a.name, Tensor{dtypes.at(a.dtype), a.shape, a.data.data(), a.data.size()});
    container.program = std::move(graph);
    return container;
}

int64_t elements(const Shape& shape) {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
}

// Multiplications and window reads, roughly.
int64_t work(const Graph& graph, const std::vector<Shape>& shapes) {
    int64_t sum = 0;
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
        const Node& node = graph.nodes[i];
        const int64_t out = elements(shapes[graph.inputs.size() + i]);
        int64_t each = 1;
        if (node.weight >= 0) each = graph.weights[static_cast<size_t>(node.weight)].cols();
        if (node.op == Op::max_pool || node.op == Op::avg_pool) each = std::min<int64_t>(node.window.kernel[0] * node.window.kernel[1], most_work);
        if (node.op == Op::matmul) each = shapes[static_cast<size_t>(node.inputs[0])].back();
        if (node.op == Op::adaptive_avg_pool || node.op == Op::adaptive_max_pool) each = elements(shapes[static_cast<size_t>(node.inputs[0])]);
        if (each > most_work / out) return most_work;
        sum += out * each;
    }
    return sum;
}

void run(Graph read, uint8_t way, uint8_t sizes) {
    const auto shared = std::make_shared<const Graph>(std::move(read));
    const Graph& graph = *shared;
    std::vector<Shape> shapes;
    std::map<std::string, int64_t> symbols;
    for (const Input& input : graph.inputs) {
        Shape shape;
        for (size_t d = 0; d < input.size.size(); ++d) {
            const int64_t fresh = 1 + (sizes + 3 * static_cast<int64_t>(symbols.size())) % 11;
            shape.push_back(input.size[d] >= 0 ? input.size[d] : symbols.emplace(input.symbol[d], fresh).first->second);
        }
        shapes.push_back(shape);
    }
    const std::vector<Shape> all = infer_shapes(graph, shapes);
    int64_t total = 0;
    for (const Shape& shape : all) total += std::min(elements(shape), most_elements);
    if (total >= most_elements || work(graph, all) >= most_work) return;
    static const std::vector<std::string> isas = supported_isas();
    PlanOptions options{&kernels_for(isas[(way >> 1) % 8 % isas.size()])};
    options.guarded = true;
    options.guard_before = (way & 0x40) != 0;
    Choices choices;
    if (!graph.tuned.empty()) choices = graph.tuned[0].choices;
    const Plan plan(shared, shapes, options, choices);
    if (plan.arena_bytes() > (64 << 20)) return;
    std::vector<std::vector<float>> in, out;
    std::vector<const float*> from;
    std::vector<float*> to;
    for (const Shape& shape : shapes) {
        in.emplace_back(static_cast<size_t>(elements(shape)), 0.5f);
        from.push_back(in.back().data());
    }
    for (const Shape& shape : plan.output_shapes()) {
        out.emplace_back(static_cast<size_t>(elements(shape)));
        to.push_back(out.back().data());
    }
    plan.run(from.data(), to.data());
}

Graph read_any(const uint8_t* data, size_t size, uint8_t way) {
    if (way % 2 != 0) return read_graph(container_for(std::string(data, data + size)));
    Bytes bytes(data, data + size);
    return read(way < 128 ? sealed(std::move(bytes)) : bytes);
}

}  // namespace

void fuzz_program(const uint8_t* data, size_t size) {
    if (size < 2) return;
    try {
        run(read_any(data + 2, size - 2, data[0]), data[0], data[1]);
    } catch (const FormatError&) {
    } catch (const ValueError&) {
    }
}

int replay_corpus(const std::string& folder) {
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        std::ifstream file(entry.path(), std::ios::binary);
        const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        CHECK(!text.empty());
        for (const int way : {0x00, 0x02, 0x44, 0x80}) {  // each instruction set, both sides, as it is
            std::string input = text;
            input[0] = static_cast<char>((text[0] & 1) | way);
            fuzz_program(reinterpret_cast<const uint8_t*>(input.data()), input.size());
        }
        ++files;
    }
    CHECK(files > 0);
    return files;
}
