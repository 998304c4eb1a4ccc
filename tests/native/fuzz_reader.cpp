// Any bytes as a program: read, planned and run once if they are one. What may come is FormatError or ValueError, nothing else.
//
// The first byte says what the others are. Even: a file, read as it is and again with checksums that fit. Odd: a graph's JSON; the
// arrays that it names come from the list below, so that mutations of the text alone reach every operator.
#include "fuzz_reader.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>

#include "cpu/isa.h"
#include "program.h"
#include "programs.h"

using namespace sparseprune;
using namespace programs;

namespace {

constexpr int64_t most_elements = 1 << 16, most_work = 1 << 21;  // of a program that is run; others are only read and shaped

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
Bytes file_for(const std::string& graph) {
    std::vector<Array> arrays;
    for (Array& a : all_arrays())
        if (graph.find("\"" + a.name.substr(0, a.name.find('.')) + "\"") != std::string::npos) arrays.push_back(std::move(a));
    return file_of(graph, arrays);
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

void run(Graph graph, uint8_t sizes) {
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
    Program program(std::move(graph));
    for (const Kernels* kernels : {&kernels_for("scalar"), &default_kernels()}) {
        const auto plan = program.plan(shapes, 1, *kernels);
        if (plan->arena_bytes() > (64 << 20)) continue;
        std::vector<std::vector<float>> in, out;
        std::vector<const float*> from;
        std::vector<float*> to;
        for (const Shape& shape : shapes) {
            in.emplace_back(static_cast<size_t>(elements(shape)), 0.5f);
            from.push_back(in.back().data());
        }
        for (const Shape& shape : plan->output_shapes()) {
            out.emplace_back(static_cast<size_t>(elements(shape)));
            to.push_back(out.back().data());
        }
        plan->run(from.data(), to.data());
    }
}

void read_and_run(const Bytes& bytes, uint8_t sizes) {
    try {
        run(read(bytes), sizes);
    } catch (const FormatError&) {
    } catch (const ValueError&) {
    }
}

}  // namespace

void fuzz_program(const uint8_t* data, size_t size) {
    if (size < 2) return;
    const uint8_t sizes = data[1];
    if (data[0] % 2 == 0) {
        const Bytes bytes(data + 2, data + size);
        read_and_run(bytes, sizes);
        read_and_run(sealed(bytes), sizes);
    } else {
        read_and_run(file_for(std::string(data + 2, data + size)), sizes);
    }
}

int replay_corpus(const std::string& folder) {
    int files = 0;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        std::ifstream file(entry.path(), std::ios::binary);
        const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
        fuzz_program(reinterpret_cast<const uint8_t*>(text.data()), text.size());
        ++files;
    }
    CHECK(files > 0);
    return files;
}
