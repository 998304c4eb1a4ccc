// The only file here that knows Python. Packs weights (host memory) and starts kernels on pointers that Python hands over;
// it trusts those: sparseprune/cuda_layers.py, which checks tensors, is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "driver.h"
#include "errors.h"
#include "launch.h"
#include "pack.h"

namespace py = pybind11;
using namespace sparseprune;
using namespace sparseprune::cuda;

namespace {

struct CudaError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

void check(const char* what, int error) {
    if (error != 0) throw CudaError(message(what, ": ", sparseprune_cuda_error_name(error), ": ", sparseprune_cuda_error_text(error)));
}

void require_driver() {
    static const bool fits = [] {
        int driver = 0, runtime = 0;
        check("cudaDriverGetVersion", sparseprune_cuda_versions(&driver, &runtime));
        const std::string problem = driver_problem(driver, runtime);
        if (!problem.empty()) throw CudaError(problem);
        return true;
    }();
    (void)fits;
}

template <class T>
std::vector<T> to_vector(const py::array_t<T, 17>& a) {
    return std::vector<T>(a.data(), a.data() + a.size());
}

// Parts of one buffer, each 256-byte aligned as cudaMalloc's memory is.
class Parts {
public:
    template <class T>
    size_t add(const std::vector<T>& part) {
        const size_t at = bytes_.size();
        bytes_.resize((at + part.size() * sizeof(T) + 255) / 256 * 256);
        if (!part.empty()) memcpy(bytes_.data() + at, part.data(), part.size() * sizeof(T));
        return at;
    }
    std::vector<uint8_t> bytes_;
};

// What a call hands over besides the weights.
struct Call {
    int device;
    uintptr_t stream, weights, x;
    std::array<int64_t, 3> in;
    uintptr_t y;
    std::array<int64_t, 3> out;
    uintptr_t bias, residual;
    int act;
    float low, high;

    Epilogue epilogue() const { return {reinterpret_cast<const void*>(bias), reinterpret_cast<const void*>(residual), act, low, high}; }
    template <class T>
    const T* packed(size_t offset) const { return reinterpret_cast<const T*>(weights + offset); }
};

// A packed weight and how to run it, for one shape.
class Kernel {
public:
    virtual ~Kernel() = default;
    virtual int start(const Call& call) const = 0;
    py::array_t<uint8_t> packed() const { return py::array_t<uint8_t>(static_cast<py::ssize_t>(parts.bytes_.size()), parts.bytes_.data()); }
    Parts parts;
    int64_t shared_bytes = 0;
    const char* name = "";
};

class Spmm : public Kernel {
public:
    Spmm(const Csr& weight, const Geometry& g, int type, int v, int tile, int chunk) : type_(type), v_(v), tile_(tile) {
        const PackedSpmm packed = pack_spmm(weight, g, v, chunk);
        name = "spmm";
        records_ = parts.add(packed.records), starts_ = parts.add(packed.starts), counts_ = parts.add(packed.counts), order_ = parts.add(packed.order);
        args_.g = g, args_.chunk = packed.chunk, args_.chunks = packed.chunks, args_.tiles = packed.tiles;
        shared_bytes = 2 * int64_t{spmm_buffer(g.span, chunk)} * (type == sparseprune_float ? 4 : 2);
    }
    int start(const Call& call) const override {
        SpmmArgs a = args_;
        a.epilogue = call.epilogue(), a.in = {call.in[0], call.in[1], call.in[2]}, a.out = {call.out[0], call.out[1], call.out[2]};
        a.x = reinterpret_cast<const void*>(call.x), a.y = reinterpret_cast<void*>(call.y);
        a.records = call.packed<uint32_t>(records_), a.starts = call.packed<int>(starts_);
        a.counts = call.packed<int>(counts_), a.order = call.packed<int>(order_);
        return sparseprune_cuda_spmm(call.device, reinterpret_cast<void*>(call.stream), type_, v_, tile_, &a);
    }

private:
    SpmmArgs args_{};
    int type_, v_, tile_;
    size_t records_, starts_, counts_, order_;
};

class Gemv : public Kernel {
public:
    Gemv(const Csr& weight, const Geometry& g, int type, int multiprocessors) : type_(type) {
        const Math math = type == sparseprune_float ? Math::tf32 : type == sparseprune_half ? Math::half : Math::bfloat;
        const PackedGemv packed = pack_gemv(weight, g.c, math);
        name = "gemv";
        columns_ = parts.add(packed.columns), values_ = parts.add(packed.values), starts_ = parts.add(packed.starts), order_ = parts.add(packed.order);
        args_.n = g.w, args_.k = g.c, args_.rows = g.out_c;
        inputs_ = g.w == 1 ? 1 : g.w == 2 ? 2 : 4;
        // as few blocks as keep every multiprocessor busy: each reads all inputs
        warps_ = std::clamp(ceil_div(g.out_c, std::max(multiprocessors, 1)), 4, 32);
        blocks_ = std::min(ceil_div(g.out_c, warps_), std::max(multiprocessors, 1));
        shared_bytes = (int64_t{g.c} + 1) * inputs_ * 4;
    }
    int start(const Call& call) const override {
        GemvArgs a = args_;
        a.epilogue = call.epilogue();
        a.x = reinterpret_cast<const void*>(call.x), a.y = reinterpret_cast<void*>(call.y);
        a.columns = call.packed<uint16_t>(columns_), a.values = call.packed<void>(values_);
        a.starts = call.packed<int>(starts_), a.order = call.packed<int>(order_);
        return sparseprune_cuda_gemv(call.device, reinterpret_cast<void*>(call.stream), type_, inputs_, blocks_, warps_, &a);
    }

private:
    GemvArgs args_{};
    int type_, inputs_, warps_, blocks_;
    size_t columns_, values_, starts_, order_;
};

class Blocks : public Kernel {
public:
    Blocks(const Csr& weight, const Geometry& g, Math math, int rows, bool vectors, int chunk, int multiprocessors)
        : math_(math), rows_(rows), vectors_(vectors) {
        const PackedBlocks packed = pack_blocks(weight, g, math, rows, vectors, chunk);
        name = vectors ? "vectors" : "blocks";
        weights_ = parts.add(packed.weights), columns_ = parts.add(packed.columns), starts_ = parts.add(packed.starts), order_ = parts.add(packed.order);
        args_.g = g, args_.chunk = packed.chunk, args_.chunks = packed.chunks;
        // Most warps a block read the inputs least often; fewer where multiprocessors would be idle.
        const int needed = ceil_div(g.out_c, kWarpRows), strips = ceil_div(g.pixels, kStrip);
        warps_ = kBlockWarps;
        while (warps_ > 1 && (warps_ / 2 >= needed || strips * ceil_div(needed, warps_) < multiprocessors)) warps_ /= 2;
        args_.row_groups = ceil_div(needed, warps_) * warps_ * (kWarpRows / rows);  // the packed ones behind are empty
        shared_bytes = blocks_shared(g.span, chunk, math == Math::half || math == Math::bfloat ? 2 : 4);
    }
    int start(const Call& call) const override {
        BlocksArgs a = args_;
        a.epilogue = call.epilogue(), a.in = {call.in[0], call.in[1], call.in[2]}, a.out = {call.out[0], call.out[1], call.out[2]};
        a.x = reinterpret_cast<const void*>(call.x), a.y = reinterpret_cast<void*>(call.y);
        a.weights = call.packed<uint32_t>(weights_), a.columns = call.packed<uint32_t>(columns_);
        a.starts = call.packed<int>(starts_), a.order = call.packed<int>(order_);
        return sparseprune_cuda_blocks(call.device, reinterpret_cast<void*>(call.stream), static_cast<int>(math_), rows_, vectors_, warps_, &a);
    }

private:
    BlocksArgs args_{};
    Math math_;
    int rows_, warps_;
    bool vectors_;
    size_t weights_, columns_, starts_, order_;
};

// The canonical weight, for the packers.
class Weight {
public:
    Weight(std::vector<int64_t> shape, std::pair<int64_t, int64_t> block, const py::array_t<int32_t, 17>& crow, const py::array_t<int32_t, 17>& col,
           const py::array_t<uint64_t, 17>& masks, const py::array_t<float, 17>& values)
        : csr_(to_csr(BlockCSR(shape, block.first, block.second, to_vector(crow), to_vector(col), to_vector(masks), to_vector(values)))), shape_(std::move(shape)) {
        if (shape_.size() != 2 && shape_.size() != 4) throw ValueError(message("shape has ", shape_.size(), " dimensions, expected 2 or 4"));
    }
    const Csr& csr() const { return csr_; }
    double fill_of(int rows, int columns) const {
        if (rows < 1 || columns < 1) throw ValueError("rows and columns must be positive");
        return fill(csr_, shape_[1], shape_.size() == 4 ? shape_[2] * shape_[3] : 1, rows, columns);
    }
    // `x`: (N, K) or (N, C, H, W)
    Geometry geometry_of(const std::vector<int64_t>& x, const std::array<int64_t, 6>& window, int64_t groups, int strip) const {
        if (x.size() != shape_.size()) throw ValueError(message("x has ", x.size(), " dimensions, expected ", shape_.size()));
        if (x[1] != shape_[1] * groups) throw ValueError(message("x has ", x[1], " channels, expected ", shape_[1] * groups));
        const bool conv = shape_.size() == 4;
        return geometry({conv ? x[0] : 1, x[1], conv ? x[2] : 1, conv ? x[3] : x[0], shape_[0], conv ? shape_[2] : 1, conv ? shape_[3] : 1, window[0],
                         window[1], window[2], window[3], window[4], window[5], groups},
                        strip);
    }

private:
    Csr csr_;
    std::vector<int64_t> shape_;
};

constexpr int kTiles[] = {1, 4};

void bind_weight(py::module_& m) {
    using Window = std::array<int64_t, 6>;
    py::class_<Weight>(m, "Weight")
        .def(py::init<std::vector<int64_t>, std::pair<int64_t, int64_t>, const py::array_t<int32_t, 17>&, const py::array_t<int32_t, 17>&,
                      const py::array_t<uint64_t, 17>&, const py::array_t<float, 17>&>(),
             py::arg("shape"), py::arg("block_shape"), py::arg("crow_indices"), py::arg("col_indices"), py::arg("masks"), py::arg("values"))
        .def("fill", &Weight::fill_of, py::arg("rows"), py::arg("columns"))
        .def(
            "spmm",
            [](const Weight& w, const std::vector<int64_t>& x, const Window& window, int64_t groups, int type, int rows, int tile, int64_t shared) {
                if (type < 0 || type > 2) throw ValueError(message("type=", type, " must be 0, 1 or 2"));
                if (rows != 1 && rows != 4) throw ValueError(message("rows=", rows, " must be 1 or 4"));
                if (std::find(std::begin(kTiles), std::end(kTiles), tile) == std::end(kTiles)) throw ValueError(message("tile=", tile, " must be 1 or 4"));
                py::gil_scoped_release released;
                const Geometry g = w.geometry_of(x, window, groups, 32 * tile);
                const int chunk = spmm_chunk(g, type == sparseprune_float ? 4 : 2, shared);
                return chunk < 1 ? std::shared_ptr<Kernel>() : std::make_shared<Spmm>(w.csr(), g, type, rows, tile, chunk);
            },
            py::arg("x_shape"), py::arg("window"), py::arg("groups"), py::arg("type"), py::arg("rows"), py::arg("tile"), py::arg("shared_bytes"))
        .def(
            "gemv",
            [](const Weight& w, const std::vector<int64_t>& x, int type, int multiprocessors, int64_t shared) {
                if (type < 0 || type > 2) throw ValueError(message("type=", type, " must be 0, 1 or 2"));
                py::gil_scoped_release released;
                const Geometry g = w.geometry_of(x, {1, 1, 0, 0, 1, 1}, 1, 32);
                std::shared_ptr<Kernel> kernel;
                if (x.size() == 2 && g.w <= 4 && g.c <= kGemvMost) kernel = std::make_shared<Gemv>(w.csr(), g, type, multiprocessors);
                return kernel && kernel->shared_bytes <= shared ? kernel : nullptr;
            },
            py::arg("x_shape"), py::arg("type"), py::arg("multiprocessors"), py::arg("shared_bytes"))
        .def(
            "blocks",
            [](const Weight& w, const std::vector<int64_t>& x, const Window& window, int64_t groups, const std::string& math, int rows, bool vectors,
               int multiprocessors, int64_t shared) {
                const std::array<const char*, 4> names = {"half", "bfloat", "tf32", "tf32x3"};
                const auto found = std::find(names.begin(), names.end(), math);
                if (found == names.end()) throw ValueError(message("math=", math, " is none of half, bfloat, tf32, tf32x3"));
                if (rows != 16 && rows != 32 && !(vectors && rows == 8)) throw ValueError(message("rows=", rows, " must be 16, 32, or 8 with vectors"));
                py::gil_scoped_release released;
                const Math kind = static_cast<Math>(found - names.begin());
                const Geometry g = w.geometry_of(x, window, groups, kStrip);
                const int chunk = blocks_chunk(g, kind == Math::half || kind == Math::bfloat ? 2 : 4, shared);
                return chunk < 1 ? std::shared_ptr<Kernel>() : std::make_shared<Blocks>(w.csr(), g, kind, rows, vectors, chunk, multiprocessors);
            },
            py::arg("x_shape"), py::arg("window"), py::arg("groups"), py::arg("math"), py::arg("rows"), py::arg("vectors"), py::arg("multiprocessors"),
            py::arg("shared_bytes"));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The CUDA kernels of sparseprune. Private: use the functions of the package.";
    static py::object cuda_error = py::module_::import("sparseprune.errors").attr("CudaError");
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const CudaError& e) {
            PyErr_SetString(cuda_error.ptr(), e.what());
        } catch (const ValueError& e) {
            PyErr_SetString(PyExc_ValueError, e.what());
        }
    });
    py::class_<Kernel, std::shared_ptr<Kernel>>(m, "Kernel")
        .def_property_readonly("name", [](const Kernel& k) { return std::string(k.name); })
        .def_property_readonly("shared_bytes", [](const Kernel& k) { return k.shared_bytes; })
        .def_property_readonly("packed", &Kernel::packed)
        .def(
            "start",
            [](const Kernel& k, int device, uintptr_t stream, uintptr_t weights, uintptr_t x, const std::array<int64_t, 3>& x_strides, uintptr_t y,
               const std::array<int64_t, 3>& y_strides, uintptr_t bias, uintptr_t residual, int act, float low, float high) {
                require_driver();
                check(k.name, k.start({device, stream, weights, x, x_strides, y, y_strides, bias, residual, act, low, high}));
            },
            py::arg("device"), py::arg("stream"), py::arg("weights"), py::arg("x"), py::arg("x_strides"), py::arg("y"), py::arg("y_strides"),
            py::arg("bias"), py::arg("residual"), py::arg("act"), py::arg("low"), py::arg("high"));
    bind_weight(m);
    m.def("require_driver", &require_driver);
    m.def("driver_problem", &driver_problem, py::arg("driver"), py::arg("runtime"));
    m.def(
        "properties",
        [](int device) {
            require_driver();
            int multiprocessors = 0, shared_bytes = 0, capability = 0;
            check("cudaDeviceGetAttribute", sparseprune_cuda_properties(device, &multiprocessors, &shared_bytes, &capability));
            return std::array<int, 3>{multiprocessors, shared_bytes, capability};
        },
        py::arg("device"));
}
