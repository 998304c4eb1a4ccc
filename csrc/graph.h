// The graph: operators with attributes, as read from docs/program.md's JSON, and shape inference on concrete sizes.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "block_csr.h"
#include "choice.h"
#include "cpu/kernels.h"

namespace sparseprune {

constexpr int kMaxRank = 8;
using Shape = std::vector<int64_t>;
std::string to_string(const Shape& shape);  // "(1, 3, 32, 32)"

enum class Op {
    conv, linear, max_pool, avg_pool, adaptive_avg_pool, adaptive_max_pool, add, sub, mul, div, maximum, minimum, act, prelu, flatten,
    constant, reshape, permute, expand, slice, index_select, roll, concat, pad, resize, pixel_shuffle, channel_shuffle, reduce, softmax,
    layer_norm, group_norm, matmul
};
const char* op_name(Op op);

enum class Binary { add, sub, mul, div, maximum, minimum };
enum class Reduction { mean, sum, max, min };
enum class PadMode { constant, reflect, replicate, circular };
enum class ResizeMode { nearest, bilinear };

// A size of a shape attribute: a positive number, -1 for what is left, -2 - i for size i of the first input, or a named one.
struct Size {
    int64_t value = 1;
    std::string symbol;
};

constexpr int64_t max_kernel_area = 1 << 14;  // taps of a convolution: planning costs time and memory for each

// Spatial attributes are {h, w}; for dims == 1 the h part is neutral (kernel 1, stride 1, padding 0).
struct Window {
    std::array<int64_t, 2> kernel{1, 1}, stride{1, 1}, dilation{1, 1};
    std::array<int64_t, 4> padding{0, 0, 0, 0};  // top, bottom, left, right
};

struct Weight {
    Shape shape;                        // as torch has it
    std::shared_ptr<const BlockCSR> sparse;  // exactly one of the two is set
    std::shared_ptr<const std::vector<float>> dense;
    bool half = false;  // the file held float16: rounded once, when it was written
    int64_t rows() const { return shape[0]; }
    int64_t cols() const;
};

struct Node {
    Op op;
    std::string name;  // the torch layer's
    std::vector<int> inputs;
    int weight = -1;  // index into Graph::weights
    std::shared_ptr<const std::vector<float>> bias;
    std::shared_ptr<const std::vector<float>> scale;
    Activation act;
    int dims = 2;
    Window window;
    int64_t groups = 1;
    bool ceil_mode = false, count_include_pad = true;
    int64_t divisor = 0;
    std::array<int64_t, 2> output_size{0, 0};
    // of the operators on values of any rank
    std::vector<Size> shape;
    std::vector<int64_t> axes, index;  // of permute, reduce; of index_select
    int64_t axis = 0, start = 0, end = 0, step = 1, shift = 0;
    std::vector<int64_t> pads;         // before and after each dimension
    PadMode pad_mode = PadMode::constant;
    float value = 0;
    ResizeMode resize_mode = ResizeMode::nearest;
    std::array<int64_t, 2> size{0, 0}, factor{1, 1}, crop{0, 0};
    std::array<double, 2> resize_scale{0, 0};
    bool align_corners = false, keepdim = false, transpose_b = false;
    Reduction reduction = Reduction::mean;
    double eps = 0;
};

struct Input {
    std::string name;
    std::vector<int64_t> size;       // -1 where symbolic
    std::vector<std::string> symbol;  // empty where fixed
};

// What was measured for these input shapes on this instruction set; kept with the program.
struct Tuned {
    std::string isa;
    std::vector<Shape> shapes;
    Choices choices;
    int threads = 0;  // of the measurement; 0 where it is not known
};

struct Graph {
    std::vector<Input> inputs;
    std::vector<Weight> weights;
    std::vector<Node> nodes;
    std::vector<int> outputs;
    std::string tree;  // the output tree's JSON, given back to Python as it is (validated: tensors in it == outputs)
    std::vector<Tuned> tuned;
    int value_count() const { return static_cast<int>(inputs.size() + nodes.size()); }
};

struct SliceRange {
    int64_t start, count;
};
SliceRange slice_range(const Node& node, int64_t size);  // what a slice takes of a dimension of this size

// The shape of every value for these input shapes. Throws ValueError naming input or layer, what was expected, what came.
// Every extent is in [1, 2^31), every product of a shape in [1, 2^40).
std::vector<Shape> infer_shapes(const Graph& graph, const std::vector<Shape>& inputs);

}  // namespace sparseprune
