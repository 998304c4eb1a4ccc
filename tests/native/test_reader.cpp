// Everything between bytes and a Graph: BlockCSR, JSON, the container, the graph reader and shape inference.
#include <cmath>
#include <cstring>
#include <random>
#include <utility>

#include "../../csrc/errors.h"
#include "../../csrc/json.h"
#include "../../csrc/reader.h"
#include "../../csrc/checksum.h"
#include "check.h"
#include "programs.h"

using namespace sparseprune;
using namespace programs;

namespace {

// ---- BlockCSR

std::vector<float> dense_of(const BlockCSR& weight) {
    std::vector<float> dense(static_cast<size_t>(weight.rows() * weight.cols()), -1.0f);
    weight.to_dense(dense.data());
    return dense;
}

std::vector<float> dense_of(const Csr& csr, int64_t cols) {
    std::vector<float> dense((csr.row_start.size() - 1) * static_cast<size_t>(cols), 0.0f);
    for (size_t row = 0; row + 1 < csr.row_start.size(); ++row) {
        for (auto i = static_cast<size_t>(csr.row_start[row]); i < static_cast<size_t>(csr.row_start[row + 1]); ++i) {
            if (i > static_cast<size_t>(csr.row_start[row])) CHECK(csr.col[i] > csr.col[i - 1]);
            dense[row * static_cast<size_t>(cols) + static_cast<size_t>(csr.col[i])] = csr.value[i];
        }
    }
    return dense;
}

void round_trip(int64_t R, int64_t C, std::mt19937& random) {
    const auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random); };
    const int64_t rows = R * pick(1, 4), taps = pick(1, 3), channels = C * pick(1, 5);
    const std::vector<int64_t> shape{rows, channels, taps};
    std::vector<float> dense(static_cast<size_t>(rows * channels * taps));
    std::vector<uint8_t> mask(dense.size());
    const int64_t percent = pick(0, 1) ? pick(0, 100) : 5;
    for (size_t i = 0; i < dense.size(); ++i) {
        mask[i] = pick(1, 100) <= percent;
        dense[i] = mask[i] ? static_cast<float>(pick(1, 1000)) : 0.0f;
    }
    const BlockCSR weight = BlockCSR::from_dense(dense.data(), nullptr, shape, R, C);
    CHECK(dense_of(weight) == dense);
    CHECK(dense_of(to_csr(weight), weight.cols()) == dense);
    const BlockCSR again(weight.shape(), R, C, weight.crow_indices(), weight.col_indices(), weight.masks(), weight.values());
    CHECK(dense_of(again) == dense);
    // With a mask, what it keeps is kept even where it is 0, and what it drops is dropped even where it is not.
    const std::vector<float> zeros(dense.size(), 0.0f), ones(dense.size(), 1.0f);
    const BlockCSR explicit_zeros = BlockCSR::from_dense(zeros.data(), mask.data(), shape, R, C);
    CHECK(explicit_zeros.masks() == weight.masks() && explicit_zeros.kept() == weight.kept());
    CHECK(to_csr(explicit_zeros).value.size() == weight.values().size());
    CHECK(BlockCSR::from_dense(ones.data(), mask.data(), shape, R, C).kept() == weight.kept());
}

void test_block_csr_round_trips() {
    std::mt19937 random(7);
    for (int64_t R = 1; R <= 64; ++R)
        for (int64_t C = 1; R * C <= 64; ++C) round_trip(R, C, random);
    const float nan[2] = {std::nanf(""), -0.0f};
    CHECK(BlockCSR::from_dense(nan, nullptr, {1, 2}, 1, 1).kept() == 1);
    const BlockCSR full({4, 4}, 2, 2, {0, 1, 2}, {0, 1}, {}, {1, 2, 3, 4, 5, 6, 7, 8});
    CHECK(full.masks() == std::vector<uint64_t>({15, 15}));
    CHECK(dense_of(full) == std::vector<float>({1, 2, 0, 0, 3, 4, 0, 0, 0, 0, 5, 6, 0, 0, 7, 8}));
    CHECK(BlockCSR({4, 4}, 1, 1, {0, 0, 0, 0, 0}, {}, {}, {}).nnz_blocks() == 0);
}

void test_block_csr_gate() {
    struct Parts {
        std::vector<int64_t> shape{4, 8};
        int64_t R = 2, C = 2;
        std::vector<int32_t> crow{0, 2, 3}, col{0, 3, 1};
        std::vector<uint64_t> masks{15, 1, 6};
        std::vector<float> values = std::vector<float>(7, 1.0f);
    };
    const auto with = [](auto change) {
        Parts p;
        change(p);
        return BlockCSR(p.shape, p.R, p.C, p.crow, p.col, p.masks, p.values);
    };
#define BAD(change, part) CHECK_THROWS(with([](Parts& p) { change; }), ValueError, part)
    CHECK(with([](Parts&) {}).kept() == 7);
    BAD(p.shape = {4}, "shape has 1 dimensions");
    BAD(p.shape[1] = 0, "shape[1]=0");
    BAD(p.shape[0] = int64_t{1} << 31, "shape[0]=2147483648");
    BAD((p.shape = {4, 1 << 30, 1 << 30}), "product");
    BAD((p.shape = {1 << 30, 1 << 30}), "elements");
    BAD(p.R = 3, "block_shape[0]=3 does not divide out_channels=4");
    BAD(p.C = 3, "block_shape[1]=3 does not divide columns=8");
    BAD(p.R = 0, "block_shape[0]=0");
    BAD(p.C = 65, "block_shape[1]=65");
    BAD(p.C = -2, "block_shape[1]=-2");
    BAD((p.shape = {16, 16}, p.R = 16, p.C = 8), "block_shape=(16, 8)");
    BAD(p.crow = {}, "crow_indices has 0 elements, expected 3");
    BAD(p.crow[0] = 1, "crow_indices[0]=1");
    BAD(p.crow[1] = -1, "crow_indices[1]=-1 is below crow_indices[0]=0");
    BAD(p.crow[1] = 9, "crow_indices[2]=3 is below crow_indices[1]=9");
    BAD(p.crow[2] = 4, "crow_indices[2]=4 is not the 3");
    BAD(p.col[0] = -1, "col_indices[0]=-1");
    BAD(p.col[1] = 4, "col_indices[1]=4 is not in [0, 4)");
    BAD(p.col[1] = 0, "col_indices[1]=0 is not above col_indices[0]=0 in block row 0");
    BAD(p.masks[1] = 0, "masks[1]=0");
    BAD(p.masks[1] = 16, "masks[1]=16 has bits outside");
    BAD(p.masks.pop_back(), "masks has 2 elements, expected 3");
    BAD(p.masks[1] = 3, "values has 7 elements, expected 8");
    BAD(p.masks = {}, "values has 7 elements, expected 12");
    BAD(p.values.clear(), "values has 0 elements, expected 7");
#undef BAD
    const float one = 1;
    CHECK_THROWS(BlockCSR::from_dense(&one, nullptr, {1, 1}, 1, 2), ValueError, "does not divide columns=1");
}

// ---- JSON

void test_json() {
    CHECK(parse_json(" [1, -9223372036854775808, 9223372036854775807, -0] ").array().size() == 4);
    CHECK(parse_json("-9223372036854775808").integer() == INT64_MIN);
    CHECK(parse_json("9223372036854775807").integer() == INT64_MAX);
    CHECK(parse_json("\"\\ud83d\\ude00\\u00e9\\u20ac\\n\\/\"").string() == "\xF0\x9F\x98\x80\xC3\xA9\xE2\x82\xAC\n/");
    CHECK(parse_json("\"\xF0\x9F\x98\x80\xC3\xA9\"").string() == "\xF0\x9F\x98\x80\xC3\xA9");
    CHECK(parse_json("{\"a\": {}, \"b\": [], \"\": null}").object().size() == 3);
    const Json sliced = parse_json("{\"k\": [1, 2] }");
    CHECK(sliced.at("k").begin == 6 && sliced.at("k").end == 12);
    CHECK_THROWS(parse_json("1.5").integer(), FormatError, "expected an integer, got a real number");
    CHECK_THROWS(parse_json("1e3").integer(), FormatError, "got a real number");
    CHECK_THROWS(parse_json("true").string(), FormatError, "expected a string, got a boolean");
    CHECK_THROWS(parse_json("{\"a\": 1, \"b\": 2, \"a\": 3}"), FormatError, "duplicate key 'a'");
    CHECK_THROWS(parse_json("{\"a\": 1, \"\\u0061\": 3}"), FormatError, "duplicate key 'a'");
    CHECK_THROWS(parse_json("9223372036854775808"), FormatError, "64 bits");
    CHECK_THROWS(parse_json("-9223372036854775809"), FormatError, "64 bits");
    CHECK_THROWS(parse_json(std::string(100000, '9')), FormatError, "64 bits");
    CHECK_THROWS(parse_json(std::string(100000, '[')), FormatError, "nested deeper");
    CHECK(parse_json(std::string(60, '[') + std::string(60, ']')).array().size() == 1);
    const char* const bad[] = {
        "", " ", "nul", "tru", "True", "NaN", "Infinity", "-", "+1", "01", "-01", "1.", ".5", "1e", "1e+", "0x1", "1 2",
        "[", "[1", "[1,", "[1,]", "[,]", "[1 2]", "]", "{", "{}}", "{\"a\"", "{\"a\":", "{\"a\":1", "{\"a\":1,", "{\"a\":1,}",
        "{a:1}", "{1:1}", "{'a':1}", "\"", "\"a", "\"\\", "\"\\x\"", "\"\\u12\"", "\"\\u12g4\"", "\"\\ud800\"",
        "\"\\ud800x\"", "\"\\ud800\\n\"", "\"\\ud800\\u0041\"", "\"\\udc00\"", "\"\\ud800\\ud800\"", "\"\t\"", "\"\n\"",
        "\"\x80\"", "\"\xC0\xAF\"", "\"\xC1\xBF\"", "\"\xC3\"", "\"\xE0\x80\x80\"", "\"\xED\xA0\x80\"", "\"\xF4\x90\x80\x80\"",
        "\"\xF5\x80\x80\x80\"", "\"\xFF\"", "\"\xF0\x9F\x98", "\xEF\xBB\xBF{}", "// c\n1", "[1]\x01"};
    for (const char* text : bad) CHECK_THROWS(parse_json(text), FormatError, "JSON byte");
    CHECK_THROWS(parse_json(std::string_view("1\0", 2)), FormatError, "after the value");
    CHECK_THROWS(parse_json(std::string_view("\"\0\"", 3)), FormatError, "control");
}

// ---- Programs

void test_small_program() {
    const Bytes bytes = file_of(small_graph, small_arrays());
    const Graph graph = read(bytes);
    CHECK(graph.nodes.size() == 8 && graph.value_count() == 9 && graph.outputs == std::vector<int>({8, 2}));
    CHECK(graph.inputs[0].size == std::vector<int64_t>({-1, 2, -1, 6}) && graph.inputs[0].symbol[2] == "s1");
    CHECK(graph.nodes[0].act.kind == Act::relu && graph.nodes[0].weight == 0 && graph.nodes[6].weight == 1);
    CHECK(*graph.nodes[0].bias == std::vector<float>({1, 2}) && !graph.nodes[6].bias);
    CHECK(graph.weights[0].sparse && !graph.weights[0].dense && dense_of(*graph.weights[0].sparse) == std::vector<float>({1, 3, 2, 0}));
    CHECK(!graph.weights[1].sparse && graph.weights[1].dense->size() == 6 && graph.weights[1].cols() == 2);
    CHECK(graph.tree.front() == '{' && graph.tree.back() == '}' && parse_json(graph.tree).at("items").array().size() == 2);
    const auto shapes = infer_shapes(graph, {{5, 2, 7, 6}});
    CHECK(shapes[2] == Shape({5, 2, 4, 3}) && shapes[8] == Shape({5, 3}));
    Bytes shifted(1, 0);  // unaligned bytes read the same
    shifted.insert(shifted.end(), bytes.begin(), bytes.end());
    CHECK(*read_program(shifted.data() + 1, bytes.size()).nodes[0].bias == *graph.nodes[0].bias);
}

void test_hostile_graphs() {
    const auto bad = [](const std::string& from, const std::string& to, const std::string& part) {
        CHECK_THROWS(read(file_of(replaced(small_graph, from, to), small_arrays())), FormatError, part);
    };
    bad("\"version\":2", "\"version\":1", "version 1 of the format, this reader knows version 2: convert the model again");
    bad("\"version\":2", "\"version\":2.0", "expected an integer");
    bad("\"version\":2", "\"version\":2,\"extra\":0", "unknown key 'extra'");
    bad("sparseprune-program", "other", "'format'");
    bad("\"outputs\":[8,2],", "", "'outputs' is missing");
    bad("\"s0\",2", "\"s0\",0", "size 0");
    bad("\"s0\",2", "\"\",2", "empty");
    bad("\"name\":\"x\"", "\"name\":\"\"", "input name");
    bad("\"inputs\":[0,0]", "\"inputs\":[0,1]", "value 1 is not in [0, 1)");
    bad("\"inputs\":[0,0]", "\"inputs\":[-1]", "value -1");
    bad("\"inputs\":[0,0]", "\"inputs\":[0,0,0]", "3 inputs");
    bad("\"inputs\":[2,3]", "\"inputs\":[2]", "1 inputs");
    bad("\"op\":\"conv\"", "\"op\":\"fft\"", "unknown op 'fft'");
    bad("\"weight\":\"w0\",", "", "node 0: conv 'conv': JSON byte");
    bad("\"weight\":\"w0\",", "\"weight\":\"w9\",", "no weight 'w9'");
    bad("\"weight\":\"w0\",", "\"weight\":\"w1\",", "expected 4 dimensions");
    bad("\"name\":\"flat\",", "\"name\":\"flat\",\"weight\":\"w1\",", "takes no weight");
    bad("\"name\":\"flat\",", "\"name\":\"flat\",\"bias\":\"b0\",", "takes no bias");
    bad("\"bias\":\"b0\"", "\"bias\":\"w0.values\"", "part of a weight");
    bad("\"bias\":\"b0\",", "", "nothing uses the array 'b0'");
    bad("\"name\":\"fc\",", "\"name\":\"fc\",\"bias\":\"b0\",", "has 2 elements, expected 3");
    bad("\"groups\":1", "\"groups\":0", "attrs.groups=0");
    bad("\"groups\":1", "\"groups\":3", "attrs.groups=3 does not divide out_channels=2");
    bad("\"groups\":1,", "", "'groups' is missing");
    bad("\"groups\":1", "\"groups\":true", "expected an integer, got a boolean");
    bad("\"groups\":1", "\"groups\":1,\"kernel\":[1,1]", "unknown key 'kernel'");
    bad("\"stride\":[1,1]", "\"stride\":[1,0]", "attrs.stride[1]=0");
    bad("\"stride\":[1,1]", "\"stride\":[1]", "attrs.stride has 1 elements");
    bad("\"dilation\":[1,1]", "\"dilation\":[0,1]", "attrs.dilation[0]=0");
    bad("\"padding\":[0,0,0,0]", "\"padding\":[0,0,-1,0]", "attrs.padding[2]=-1");
    bad("\"padding\":[0,0,0,0]", "\"padding\":[0,0,0,1048577]", "attrs.padding[3]=1048577");
    bad("\"padding\":[1,1,0,0]", "\"padding\":[2,1,0,0]", "attrs.padding[0]=2 is above half of kernel 2");
    bad("\"ceil_mode\":true", "\"ceil_mode\":1", "expected a boolean");
    bad("\"kernel\":[1,1]", "\"kernel\":[0,1]", "attrs.kernel[0]=0");
    bad("\"act\":\"relu6\"", "\"act\":\"swish\"", "attrs.act='swish' is not one of none, relu, relu6,");
    bad("\"act\":\"relu6\"", "\"act\":\"clamp\",\"alpha\":2,\"beta\":1.5", "clamp to [2, 1.5], expected alpha <= beta");
    bad("\"act\":\"relu6\"", "\"act\":\"elu\",\"alpha\":1e39", "is not a finite float32");
    bad("\"act\":\"relu6\"", "\"act\":\"elu\",\"alpha\":\"1\"", "expected a number, got a string");
    bad("\"name\":\"fc\",", "\"name\":\"fc\",\"scale\":\"b0\",", "takes no scale");
    bad("\"attrs\":{\"dims\":2,\"output_size\":[1,1]}", "\"attrs\":{\"dims\":1,\"output_size\":[2,1]}", "not neutral");
    bad("\"dims\":2", "\"dims\":3", "attrs.dims=3");
    bad("\"outputs\":[8,2]", "\"outputs\":[8,9]", "value 9");
    bad("\"outputs\":[8,2]", "\"outputs\":[8]", "the tree has 2 tensors");
    bad("\"keys\":[\"a\",\"b\"]", "\"keys\":[\"a\",\"a\"]", "duplicate key 'a'");
    bad("\"keys\":[\"a\",\"b\"]", "\"keys\":[\"a\"]", "one key for each item");
    bad("\"kind\":\"tuple\"", "\"kind\":\"set\"", "kind 'set'");
    bad("\"w1\":{", "\"w2\":{", "the array 'w2.values' is missing");
    bad("\"shape\":[3,2]", "\"shape\":[2,3]", "has not the shape (2, 3)");
    bad("\"shape\":[3,2]", "\"shape\":[3,2],\"extra\":1", "unknown key 'extra'");
    bad("\"block_shape\":[2,1]", "\"block_shape\":[3,1]", "weight 'w0': block_shape[0]=3 does not divide out_channels=2");
    bad("\"block_shape\":[2,1]", "\"block_shape\":[1,1]", "crow_indices has 2 elements, expected 3");
    bad("\"shape\":[2,2,1,1]", "\"shape\":[2,2147483647,2147483647,1]", "product");
}

void test_hostile_containers() {
    const auto bad = [](size_t index, const Array& other, const std::string& part) {
        auto arrays = small_arrays();
        arrays[index] = other;
        CHECK_THROWS(read(file_of(small_graph, arrays)), FormatError, part);
    };
    bad(0, array<float>("b1", "F32", {2}, {1, 2}), "'b0' is missing");
    bad(0, array<float>("b0", "F32", {3}, {1, 2, 3}), "the array 'b0' has 3 elements, expected 2");
    bad(0, array<float>("b0", "F32", {1, 2}, {1, 2}), "expected 1 dimensions");
    bad(0, array<int32_t>("b0", "I32", {2}, {1, 2}), "is I32, expected F32");
    bad(0, array<float>("b0", "F64", {1}, {1, 2}), "dtype 'F64'");
    bad(0, array<float>("b0", "F32", {3}, {1, 2}), "the shape needs 12");
    bad(0, array<float>("b0", "F32", {-2}, {1, 2}), "negative");
    bad(0, array<float>("b0", "F32", {INT64_MAX, 4}, {1, 2}), "more bytes than the payload");
    bad(0, array<float>("b0", "F32", {1, 1, 1, 1, 1, 1, 1, 1, 2}, {1, 2}), "more than 8 dimensions");
    bad(1, array<int32_t>("w0.crow_indices", "I32", {2}, {0, 3}), "weight 'w0': crow_indices[1]=3");
    bad(2, array<uint16_t>("w0.col_indices", "U16", {2}, {0, 2}), "weight 'w0': col_indices[1]=2");
    bad(3, array<uint64_t>("w0.masks", "U64", {2}, {3, 0}), "masks[1]=0");
    bad(3, array<uint64_t>("w0.masks", "U64", {0}, {}), "masks has 0 elements, expected 2");
    auto wide = small_arrays();
    wide[2] = array<int32_t>("w0.col_indices", "I32", {2}, {0, 1});
    CHECK(read(file_of(small_graph, wide)).weights[0].sparse->nnz_blocks() == 2);

    const std::string graph = R"({"__metadata__":{"sparseprune":"{}"},)";
    const auto one = [&](const std::string& tensors, size_t payload, const std::string& part) {
        CHECK_THROWS(read(file_of(graph + tensors + "}", Bytes(payload))), FormatError, part);
    };
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})", 8, "payload: 8 bytes");
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]})", 8, "there is a gap");
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})", 4, "overlap");
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]})", 4, "data_offsets [4, 0]");
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]})", 4, "data_offsets [-4, 0]");
    one(R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 4, "data_offsets [0, 8]");
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0]})", 4, "two elements");
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1})", 4, "unknown key 'x'");
    const std::string checksum = R"("checksum":{"dtype":"U64","shape":[2],"data_offsets":[0,16]})";
    one(R"("a":{"dtype":"F32","shape":[],"data_offsets":[16,20]},)" + checksum, 20, "the checksum of its header does not match");
    CHECK_THROWS(read(sealed(file_of(graph + R"("a":{"dtype":"F32","shape":[],"data_offsets":[16,20]},)" + checksum + "}", Bytes(20)))),
                 FormatError, "graph: JSON byte 0");  // the container is fine
    one(R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})", 4, "'checksum' is missing: a program of format version 1");
    one(R"("checksum":{"dtype":"U64","shape":[1],"data_offsets":[0,8]})", 8, "'checksum' is not two U64");
    one(R"("checksum":{"dtype":"F32","shape":[4],"data_offsets":[0,16]})", 16, "'checksum' is not two U64");
    CHECK_THROWS(read(file_of(" {}", Bytes())), FormatError, "'{'");
    CHECK_THROWS(read(file_of("{}", Bytes())), FormatError, "'__metadata__' is missing");
    CHECK_THROWS(read(file_of(R"({"__metadata__":{"format":"pt"}})", Bytes())), FormatError, "unknown key 'format'");
    CHECK_THROWS(read(file_of(R"({"__metadata__":{"sparseprune":1}})", Bytes())), FormatError, "expected a string");
    CHECK_THROWS(read(Bytes(8, 0xFF)), FormatError, "the header has");
    CHECK_THROWS(read(Bytes(8, 0)), FormatError, "first byte");
    CHECK_THROWS(read(Bytes()), FormatError, "0 bytes");
}

// ---- Columns as gaps, float16

// One row of `columns` columns, its gaps and its values.
Graph gaps_of(int64_t columns, const std::vector<int32_t>& crow, const std::vector<uint8_t>& gaps, size_t values) {
    const std::string graph = replaced(R"({"format":"sparseprune-program","version":2,"inputs":[{"name":"x","shape":["n",COLUMNS]}],
"weights":{"w":{"shape":[2,COLUMNS],"block_shape":[1,1]}},"nodes":[{"op":"linear","name":"fc","inputs":[0],"weight":"w","attrs":{}}],
"outputs":[1],"tree":{"kind":"tensor"}})", "COLUMNS", std::to_string(columns));
    return read(file_of(replaced(graph, "COLUMNS", std::to_string(columns)),
                        {array<int32_t>("w.crow_indices", "I32", {static_cast<int64_t>(crow.size())}, crow),
                         array<uint8_t>("w.col_gaps", "U8", {static_cast<int64_t>(gaps.size())}, gaps),
                         array<float>("w.values", "F32", {static_cast<int64_t>(values)}, std::vector<float>(values, 1.0f))}));
}

void test_gaps() {
    CHECK(gaps_of(1000, {0, 3, 4}, {0, 254, 255, 0, 3}, 4).weights[0].sparse->col_indices() == std::vector<int32_t>({0, 255, 511, 3}));
    CHECK(gaps_of(5, {0, 0, 0}, {}, 0).weights[0].sparse->kept() == 0);
    CHECK_THROWS(gaps_of(1000, {0, 3, 5}, {0, 254, 255, 0, 3}, 5), FormatError, "'w.col_gaps' ends in block row 1");
    CHECK_THROWS(gaps_of(1000, {0, 3, 4}, {0, 254, 255, 0, 3, 7}, 4), FormatError, "'w.col_gaps' has 6 elements, expected 5");
    CHECK_THROWS(gaps_of(1000, {0, 1, 1}, {255}, 1), FormatError, "'w.col_gaps' ends in block row 0");
    CHECK_THROWS(gaps_of(511, {0, 3, 4}, {0, 254, 255, 0, 3}, 4), FormatError, "col_indices[2]=511 is not in [0, 511)");
    CHECK_THROWS(gaps_of(1000, {0, 4, 3}, {0, 0, 0, 0}, 4), FormatError, "crow_indices[2]=3 is below crow_indices[1]=4");
    CHECK_THROWS(gaps_of(1000, {0, INT32_MAX, INT32_MAX}, {0, 0, 0, 0}, 4), FormatError, "ends in block row 0");
    CHECK_THROWS(gaps_of(1000, {0, -1, 4}, {0, 0, 0, 0}, 4), FormatError, "crow_indices[1]=-1 is below");
    CHECK_THROWS(gaps_of(1000, {}, {}, 0), FormatError, "crow_indices has 0 elements");
    auto both = small_arrays();
    both.push_back(array<uint8_t>("w0.col_gaps", "U8", {2}, {0, 0}));
    CHECK_THROWS(read(file_of(small_graph, both)), FormatError, "nothing uses the array 'w0.col_indices'");
}

void test_float16() {
    auto arrays = small_arrays();
    arrays[4] = array<uint16_t>("w0.values", "F16", {3}, {0x3C01, 0x8001, 0x7BFF});  // 1 + 2^-10, -2^-24, 65504
    const Graph graph = read(file_of(small_graph, arrays));
    CHECK(graph.weights[0].half && !graph.weights[1].half);
    CHECK(graph.weights[0].sparse->values() == std::vector<float>({1.0009765625f, -0x1p-24f, 65504.0f}));
    arrays[5] = array<uint16_t>("w1.values", "F16", {3, 2}, {0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E01, 0x03FF});
    const std::vector<float> dense = *read(file_of(small_graph, arrays)).weights[1].dense;
    CHECK(dense[0] == 0 && !std::signbit(dense[0]) && dense[1] == 0 && std::signbit(dense[1]));
    CHECK(std::isinf(dense[2]) && dense[2] > 0 && std::isinf(dense[3]) && dense[3] < 0 && std::isnan(dense[4]) && dense[5] == 0x3FFp-24f);
    arrays[0] = array<uint16_t>("b0", "F16", {2}, {0, 0});
    CHECK_THROWS(read(file_of(small_graph, arrays)), FormatError, "'b0' is F16, expected F32");
}

void test_checksum() {
    const std::string digits = "123456789";
    const auto* bytes = reinterpret_cast<const uint8_t*>(digits.data());
    CHECK(crc64(bytes, 9) == 0x995DC9BBDF1939FA);  // the check value of CRC-64/XZ
    for (size_t cut = 0; cut <= 9; ++cut) CHECK(crc64(bytes + cut, 9 - cut, crc64(bytes, cut)) == crc64(bytes, 9));
}

// ---- Shape inference

Graph one_node(Node node, Input input, const Shape& weight = {}) {
    Graph graph;
    graph.inputs = {std::move(input)};
    node.name = "layer";
    for (int i = static_cast<int>(node.inputs.size()); i < 1; ++i) node.inputs.push_back(0);
    if (!weight.empty()) {
        graph.weights.push_back({weight, nullptr, std::make_shared<const std::vector<float>>()});
        node.weight = 0;
        if (node.op == Op::conv) node.window.kernel = {weight.size() == 4 ? weight[2] : 1, weight.back()};
    }
    graph.nodes.push_back(std::move(node));
    return graph;
}

Input any_input(size_t rank) {
    Input input{"x", std::vector<int64_t>(rank, -1), {}};
    for (size_t i = 0; i < rank; ++i) input.symbol.push_back("s" + std::to_string(i));
    return input;
}

Node node_of(Op op, int dims = 2) {
    Node node;
    node.op = op;
    node.dims = dims;
    return node;
}

Shape output(const Graph& graph, const Shape& x) { return infer_shapes(graph, {x}).back(); }

void test_conv_shapes() {
    Node conv = node_of(Op::conv);
    conv.window.stride = {2, 1};
    conv.window.padding = {3, 3, 0, 2};
    conv.window.dilation = {1, 2};
    conv.groups = 2;
    const Graph graph = one_node(conv, any_input(4), {8, 3, 7, 3});
    CHECK(output(graph, {2, 6, 224, 10}) == Shape({2, 8, 112, 8}));
    CHECK_THROWS(output(graph, {2, 3, 224, 10}), ValueError, "layer 'layer' (conv): expected an input of 6 channels, got (2, 3, 224, 10)");
    CHECK_THROWS(output(graph, {2, 6, 224, 2}), ValueError, "a window of 5 does not fit 2 padded by 0 and 2 along w");
    CHECK_THROWS(output(graph, {2, 6, 0, 10}), ValueError, "extent 2 of (2, 6, 0, 10)");
    CHECK_THROWS(output(graph, {2, 6, 10}), ValueError, "input 'x': expected 4 dimensions, got (2, 6, 10)");
    CHECK_THROWS(output(graph, {int64_t{1} << 31, 6, 10, 10}), ValueError, "extent 0");
    CHECK_THROWS(output(graph, {1 << 20, 6, 1 << 10, 1 << 10}), ValueError, "elements or more");
    CHECK_THROWS(infer_shapes(graph, {}), ValueError, "expected 1 inputs, got 0");

    CHECK(output(one_node(node_of(Op::conv, 1), any_input(3), {8, 3, 5}), {2, 3, 20}) == Shape({2, 8, 16}));
    CHECK_THROWS(output(one_node(node_of(Op::conv, 1), any_input(4), {8, 3, 5}), {2, 3, 20, 20}), ValueError, "of 3 dimensions");
    Node residual = node_of(Op::conv);
    residual.inputs = {0, 0};
    const Graph with_residual = one_node(residual, any_input(4), {3, 3, 3, 3});
    CHECK_THROWS(output(with_residual, {1, 3, 8, 8}), ValueError, "second input of shape (1, 3, 6, 6), got (1, 3, 8, 8)");
    Node huge = node_of(Op::conv);
    huge.window.padding = {1 << 20, 1 << 20, 1 << 20, 1 << 20};
    CHECK_THROWS(output(one_node(huge, any_input(4), {8, 3, 1, 1}), {1, 3, 8, 8}), ValueError, "output (1, 8, 2097160, 2097160) has");
}

void test_pool_shapes() {
    struct Case {
        int64_t in, kernel, stride, padding, dilation;
        bool ceil;
        int64_t out;  // as torch.nn.functional.max_pool1d has it; 0: it refuses
    };
    const Case cases[] = {{112, 3, 2, 1, 1, false, 56}, {112, 3, 2, 1, 1, true, 57}, {7, 2, 2, 0, 1, false, 3},
                          {7, 2, 2, 0, 1, true, 4},     {2, 3, 2, 0, 1, true, 1},    {1, 3, 2, 0, 1, true, 0},
                          {2, 3, 2, 0, 1, false, 0},    {3, 2, 3, 1, 1, true, 2},    {4, 1, 3, 0, 1, true, 2},
                          {5, 2, 5, 1, 1, true, 2},     {6, 3, 2, 1, 2, true, 3},    {1, 2, 4, 1, 1, true, 1},
                          {3, 2, 4, 1, 1, true, 1},     {4, 3, 7, 0, 1, true, 1},    {8, 3, 4, 0, 1, true, 2}};
    for (const Case& c : cases) {
        Node pool = node_of(Op::max_pool, 1);
        pool.window.kernel[1] = c.kernel;
        pool.window.stride[1] = c.stride;
        pool.window.dilation[1] = c.dilation;
        pool.window.padding = {0, 0, c.padding, c.padding};
        pool.ceil_mode = c.ceil;
        const Graph graph = one_node(pool, any_input(3));
        if (c.out == 0)
            CHECK_THROWS(output(graph, {1, 2, c.in}), ValueError, "does not fit");
        else
            CHECK(output(graph, {1, 2, c.in}) == Shape({1, 2, c.out}));
    }
    Node adaptive = node_of(Op::adaptive_max_pool);
    adaptive.output_size = {0, 5};
    CHECK(output(one_node(adaptive, any_input(4)), {1, 2, 9, 3}) == Shape({1, 2, 9, 5}));
}

void test_other_shapes() {
    const Graph linear = one_node(node_of(Op::linear), any_input(2), {10, 512});
    CHECK(output(linear, {3, 512}) == Shape({3, 10}));
    CHECK_THROWS(output(linear, {3, 500}), ValueError, "layer 'layer' (linear): expected an input of 512 features, got (3, 500)");
    CHECK_THROWS(output(one_node(node_of(Op::linear), any_input(3), {10, 512}), {1, 3, 512}), ValueError, "of 2 dimensions");
    CHECK(output(one_node(node_of(Op::flatten), any_input(4)), {2, 3, 4, 5}) == Shape({2, 60}));
    CHECK_THROWS(output(one_node(node_of(Op::flatten), any_input(1)), {2}), ValueError, "2 or more dimensions, got (2,)");

    Graph add;
    add.inputs = {{"a", {-1, 3}, {"n", ""}}, {"b", {-1, 3}, {"n", ""}}};
    add.nodes.push_back(node_of(Op::add));
    add.nodes[0].inputs = {0, 1};
    CHECK(infer_shapes(add, {{4, 3}, {4, 3}}).back() == Shape({4, 3}));
    CHECK_THROWS(infer_shapes(add, {{4, 3}, {5, 3}}), ValueError, "input 'b' dimension 0: n is 5, expected 4 as in 'a' dimension 0");
    CHECK_THROWS(infer_shapes(add, {{4, 3}, {4, 1}}), ValueError, "input 'b': expected size 3 in dimension 1, got (4, 1)");
    add.inputs[1] = {"b", {-1, -1}, {"n", "m"}};
    CHECK(infer_shapes(add, {{4, 3}, {4, 1}}).back() == Shape({4, 3}));
    CHECK_THROWS(infer_shapes(add, {{4, 3}, {4, 2}}), ValueError, "(4, 3) and (4, 2) do not broadcast");
}

// A program of one operator, as JSON: what the reader makes of its attributes, and the shape of its value.
Graph read_node(const std::string& op, const std::string& attrs, const std::string& more = "", const std::string& shape = R"(["n","c",6,"w"])") {
    const bool array_used = !more.empty();
    const std::string graph = R"({"format":"sparseprune-program","version":2,"inputs":[{"name":"x","shape":)" + shape +
                              R"(}],"weights":{},"nodes":[{"op":")" + op + R"(","name":"layer","inputs":)" +
                              (op == "constant" ? "[]" : op == "matmul" || op == "mul" ? "[0,0]" : "[0]") + ",\"attrs\":{" + attrs +
                              "}" + more + R"(}],"outputs":[1],"tree":{"kind":"tensor"}})";
    std::vector<Array> arrays;
    if (array_used) arrays.push_back(array<float>("a", "F32", {4}, {1, 2, 3, 4}));
    return read(file_of(graph, arrays));
}

void test_tensor_operators() {
    const auto shape = [](const std::string& op, const std::string& attrs, const Shape& x, const std::string& more = "") {
        return output(read_node(op, attrs, more), x);
    };
    const auto bad = [](const std::string& op, const std::string& attrs, const std::string& part, const std::string& more = "") {
        CHECK_THROWS(read_node(op, attrs, more), FormatError, part);
    };
    const auto misfit = [&](const std::string& op, const std::string& attrs, const std::string& part, const std::string& more = "") {
        CHECK_THROWS(shape(op, attrs, {2, 4, 6, 8}, more), ValueError, part);
    };
    const Shape x{2, 4, 6, 8};
    CHECK(shape("reshape", R"("shape":["n",-2,-1])", x) == Shape({2, 2, 96}));
    CHECK(shape("reshape", R"("shape":[-3,-1,2,2])", x) == Shape({4, 24, 2, 2}));
    misfit("reshape", R"("shape":[5,-1])", "(2, 4, 6, 8) does not fit the shape (5, 76)");
    misfit("reshape", R"("shape":[-1,1000])", "does not fit");
    misfit("reshape", R"("shape":[2147483646,2147483646,2147483646])", "does not fit");
    // products of sizes that pass 2^63, and from there 0: what is left was once divided by it
    const Shape large{1 << 10, 1 << 19, 6, 1 << 7};
    for (const char* sizes : {"[1073741824,8,1073741824,2,-1]", "[1073741824,8,1073741824,2]", "[2147483647,4,2147483647,-1]"})
        CHECK_THROWS(shape("reshape", message("\"shape\":", sizes), large), ValueError, "does not fit");
    misfit("reshape", R"("shape":[-7])", "a dimension that its input has not");
    bad("reshape", R"("shape":[-1,-1])", "too many sizes of -1");
    bad("reshape", R"("shape":[0])", "shape[0]=0");
    bad("reshape", R"("shape":["q"])", "no input has a size 'q'");
    bad("reshape", R"("shape":[1,1,1,1,1,1,1,1,1])", "9 elements, expected 1 to 8");
    bad("reshape", R"("shape":[])", "0 elements");
    CHECK(shape("permute", R"("axes":[0,2,3,1])", x) == Shape({2, 6, 8, 4}));
    misfit("permute", R"("axes":[0,1])", "expected an input of 2 dimensions");
    bad("permute", R"("axes":[0,0,1,2])", "twice");
    CHECK(output(read_node("expand", R"("shape":["n",7,6,-5])"), {2, 1, 6, 8}) == Shape({2, 7, 6, 8}));
    misfit("expand", R"("shape":[2,7,6,8])", "does not expand");
    CHECK(shape("slice", R"("axis":3,"start":-5,"end":2147483647,"step":2)", x) == Shape({2, 4, 6, 3}));
    misfit("slice", R"("axis":3,"start":4,"end":2,"step":1)", "is empty");
    misfit("slice", R"("axis":4,"start":0,"end":2,"step":1)", "axis 4");
    bad("slice", R"("axis":3,"start":4,"end":2,"step":0)", "attrs.step=0");
    CHECK(shape("index_select", R"("axis":1,"index":[3,3,0])", x) == Shape({2, 3, 6, 8}));
    misfit("index_select", R"("axis":1,"index":[4])", "index 4 is outside");
    bad("index_select", R"("axis":1,"index":[-1])", "attrs.index[0]=-1");
    CHECK(shape("roll", R"("axis":3,"shift":-100)", x) == x);
    CHECK(shape("concat", R"("axis":1)", x) == x);
    misfit("concat", R"("axis":7)", "axis 7");
    CHECK(shape("pad", R"("padding":[0,0,0,0,1,2,3,4],"mode":"reflect","value":0)", x) == Shape({2, 4, 9, 15}));
    misfit("pad", R"("padding":[0,0,0,0,6,0,0,0],"mode":"reflect","value":0)", "padding of 6 is too much");
    misfit("pad", R"("padding":[0,0,0,0,7,0,0,0],"mode":"circular","value":0)", "padding of 7 is too much");
    misfit("pad", R"("padding":[0,0],"mode":"constant","value":0.5)", "padding for 1 dimensions");
    bad("pad", R"("padding":[0,0],"mode":"mirror","value":0)", "is not one of constant, reflect, replicate, circular");
    bad("pad", R"("padding":[-1,0],"mode":"constant","value":0)", "attrs.padding[0]=-1");
    const std::string resize = R"("mode":"nearest","align_corners":false,)";
    CHECK(shape("resize", resize + R"("size":[0,5],"scale":[2.5,0])", x) == Shape({2, 4, 15, 5}));
    misfit("resize", resize + R"("size":[0,5],"scale":[0,0])", "neither size nor scale");
    misfit("resize", resize + R"("size":[0,5],"scale":[0.001,0])", "neither size nor scale");
    bad("resize", resize + R"("size":[0,5],"scale":[-1,0])", "is not 0 or in");
    bad("resize", resize + R"("size":[0,5],"scale":[1e7,0])", "is not 0 or in");
    CHECK(shape("pixel_shuffle", R"("factor":[2,1],"crop":[1,0])", x) == Shape({2, 2, 11, 8}));
    misfit("pixel_shuffle", R"("factor":[3,1],"crop":[0,0])", "a multiple of 3 channels");
    bad("pixel_shuffle", R"("factor":[3,1],"crop":[3,0])", "crop is not below factor");
    CHECK(shape("channel_shuffle", R"("groups":2)", x) == x);
    misfit("channel_shuffle", R"("groups":3)", "channels for 3 groups");
    CHECK(shape("reduce", R"("kind":"max","axes":[2,0],"keepdim":false)", x) == Shape({4, 8}));
    CHECK(shape("reduce", R"("kind":"sum","axes":[0,1,2,3],"keepdim":false)", x) == Shape({1}));
    CHECK(shape("reduce", R"("kind":"mean","axes":[1],"keepdim":true)", x) == Shape({2, 1, 6, 8}));
    misfit("reduce", R"("kind":"mean","axes":[5],"keepdim":true)", "axis 5");
    bad("reduce", R"("kind":"median","axes":[1],"keepdim":true)", "is not one of mean, sum, max, min");
    misfit("softmax", R"("axis":4)", "axis 4");
    CHECK(shape("layer_norm", R"("axes":2,"eps":1e-5)", x) == x);
    misfit("layer_norm", R"("axes":1,"eps":1e-5)", "an array of 4 elements, expected 8", R"(,"scale":"a")");
    misfit("layer_norm", R"("axes":5,"eps":1e-5)", "over 5 dimensions");
    CHECK(shape("group_norm", R"("groups":2,"eps":1e-5)", x, R"(,"scale":"a","bias":"a")") == x);
    misfit("group_norm", R"("groups":3,"eps":1e-5)", "channels for 3 groups");
    CHECK(shape("prelu", "", x, R"(,"scale":"a")") == x);
    CHECK_THROWS(output(read_node("prelu", "", R"(,"scale":"a")"), {2, 5, 6, 8}), ValueError, "4 slopes for an input of (2, 5, 6, 8)");
    bad("prelu", "", "'scale' is missing");
    CHECK(shape("constant", R"("shape":[2,1,2])", x, R"(,"bias":"a")") == Shape({2, 1, 2}));
    bad("constant", R"("shape":[2,1,3])", "the array 'a' has 4 elements, expected 6", R"(,"bias":"a")");
    bad("constant", R"("shape":[2147483647,2147483647,2147483647,4])", "the array 'a' has 4 elements", R"(,"bias":"a")");
    bad("constant", R"("shape":["n"])", "expected an integer", R"(,"bias":"a")");
    bad("constant", R"("shape":[4])", "'bias' is missing");
    CHECK(output(read_node("matmul", R"("transpose_b":true)"), x) == Shape({2, 4, 6, 6}));
    CHECK_THROWS(output(read_node("matmul", R"("transpose_b":false)"), x), ValueError, "do not multiply");
    CHECK(shape("mul", R"("act":"leaky_relu","alpha":0.1)", x) == x);
    bad("mul", R"("act":"relu","gamma":1)", "unknown key 'gamma'");
}

}  // namespace

void test_reader() {
    test_block_csr_round_trips();
    test_block_csr_gate();
    test_json();
    test_small_program();
    test_hostile_graphs();
    test_hostile_containers();
    test_gaps();
    test_float16();
    test_checksum();
    test_conv_shapes();
    test_pool_shapes();
    test_other_shapes();
    test_tensor_operators();
}
