// The only file that knows Python. Arrays are checked here, once; the native code behind trusts them.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "block_csr.h"
#include "cpu/isa.h"
#include "errors.h"
#include "parallel.h"
#include "program.h"
#include "reader.h"
#include "safetensors.h"
#include "tuner.h"

namespace py = pybind11;
using namespace sparseprune;

namespace {

Shape shape_of(const py::array& a) { return Shape(a.shape(), a.shape() + a.ndim()); }

template <class T>
std::vector<T> to_vector(const py::array_t<T, py::array::c_style | py::array::forcecast>& a, const char* name) {
    if (a.ndim() != 1) throw ValueError(message(name, " has ", a.ndim(), " dimensions, expected 1"));
    return std::vector<T>(a.data(), a.data() + a.size());
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& v) {
    return py::array_t<T>(static_cast<py::ssize_t>(v.size()), v.data());
}

// A float32, C-contiguous, aligned array of exactly this shape; nothing is converted.
const py::array& checked(const py::array& a, const Shape& shape, const char* what, size_t index, bool writes) {
    const std::string name = message(what, "[", index, "]");
    if (!py::isinstance<py::array_t<float>>(a)) {
        throw ValueError(message(name, " has dtype ", py::str(a.dtype()).cast<std::string>(), ", expected float32"));
    }
    if (shape_of(a) != shape) throw ValueError(message(name, " has shape ", to_string(shape_of(a)), ", expected ", to_string(shape)));
    if (!(a.flags() & py::array::c_style) || reinterpret_cast<uintptr_t>(a.data()) % alignof(float) != 0)
        throw ValueError(message(name, " is not C-contiguous and aligned"));
    if (writes && !a.writeable()) throw ValueError(message(name, " is read-only"));
    return a;
}

struct Arrays {
    std::vector<const float*> in;
    std::vector<float*> out;
};

Arrays check_arrays(const Plan& plan, const std::vector<py::array>& inputs, const std::vector<py::array>& outputs) {
    if (inputs.size() != plan.input_shapes().size())
        throw ValueError(message("inputs: ", inputs.size(), " came, expected ", plan.input_shapes().size()));
    if (outputs.size() != plan.output_shapes().size())
        throw ValueError(message("outputs: ", outputs.size(), " came, expected ", plan.output_shapes().size()));
    Arrays arrays;
    for (size_t i = 0; i < inputs.size(); ++i)
        arrays.in.push_back(static_cast<const float*>(checked(inputs[i], plan.input_shapes()[i], "inputs", i, false).data()));
    for (size_t i = 0; i < outputs.size(); ++i)
        arrays.out.push_back(
            static_cast<float*>(const_cast<void*>(checked(outputs[i], plan.output_shapes()[i], "outputs", i, true).data())));
    return arrays;
}

const Kernels& kernels_named(const std::optional<std::string>& isa) { return isa ? kernels_for(*isa) : default_kernels(); }

int threads_or_default(std::optional<int> threads) {
    if (!threads) return num_threads();
    if (*threads < 1 || *threads > 256) throw ValueError(message("threads=", *threads, " must be between 1 and 256"));
    return *threads;
}

py::list input_list(const Graph& graph) {
    py::list out;
    for (const Input& input : graph.inputs) {
        py::list dims;
        for (size_t d = 0; d < input.size.size(); ++d) {
            if (input.size[d] < 0) dims.append(input.symbol[d]);
            else dims.append(input.size[d]);
        }
        out.append(py::make_tuple(input.name, py::tuple(dims)));
    }
    return out;
}

py::list layer_list(const Graph& graph) {
    py::list out;
    for (const Node& node : graph.nodes) {
        py::dict d;
        d["name"] = node.name;
        d["op"] = op_name(node.op);
        if (node.weight >= 0) {
            const Weight& w = graph.weights[static_cast<size_t>(node.weight)];
            const int64_t total = w.rows() * w.cols();
            d["shape"] = py::tuple(py::cast(w.shape));
            d["total"] = total;
            d["kept"] = w.sparse ? w.sparse->kept() : total;
            d["stored"] = w.half ? "float16" : "float32";
            d["block_shape"] = w.sparse ? py::make_tuple(w.sparse->block_rows(), w.sparse->block_cols()) : py::make_tuple(int64_t{1}, int64_t{1});
            d["block_density"] = w.sparse ? static_cast<double>(w.sparse->nnz_blocks() * w.sparse->block_rows() * w.sparse->block_cols()) /
                                                static_cast<double>(total)
                                          : 1.0;
        }
        out.append(d);
    }
    return out;
}

py::object choice_dict(const std::optional<Choice>& c) {
    if (!c) return py::none();
    py::dict d;
    d["form"] = form_name(c->form);
    d["kind"] = kind_name(c->kind);
    d["vectors"] = c->vectors;
    return d;
}

Choices choices_from(const py::list& list) {
    Choices out;
    for (const py::handle item : list) {
        if (item.is_none()) {
            out.push_back(std::nullopt);
            continue;
        }
        const py::dict d = py::cast<py::dict>(item);
        out.push_back(choice_named(py::cast<std::string>(d["form"]), py::cast<std::string>(d["kind"]), py::cast<int64_t>(d["vectors"])));
        if (!out.back()) throw ValueError(message("choices: ", py::str(item).cast<std::string>(), " is none of the known choices"));
    }
    return out;
}

py::list choice_list(const Choices& choices) {
    py::list out;
    for (const auto& c : choices) out.append(choice_dict(c));
    return out;
}

void bind_block_csr(py::module_& m) {
    py::class_<BlockCSR, std::shared_ptr<BlockCSR>>(m, "BlockCSR")
        .def(py::init([](std::vector<int64_t> shape, std::pair<int64_t, int64_t> block_shape, py::array_t<int32_t, 17> crow,
                         py::array_t<int32_t, 17> col, std::optional<py::array_t<uint64_t, 17>> masks, py::array_t<float, 17> values) {
                 return std::make_shared<BlockCSR>(std::move(shape), block_shape.first, block_shape.second,
                                                   to_vector<int32_t>(crow, "crow_indices"), to_vector<int32_t>(col, "col_indices"),
                                                   masks ? to_vector<uint64_t>(*masks, "masks") : std::vector<uint64_t>{},
                                                   to_vector<float>(values, "values"));
             }),
             py::arg("shape"), py::arg("block_shape"), py::arg("crow_indices"), py::arg("col_indices"), py::arg("masks"),
             py::arg("values"))
        .def_static(
            "from_dense",
            [](py::array_t<float, 17> dense, std::optional<py::array_t<bool, 17>> mask, std::pair<int64_t, int64_t> block_shape) {
                if (mask && shape_of(*mask) != shape_of(dense))
                    throw ValueError(message("mask has shape ", to_string(shape_of(*mask)), ", expected ", to_string(shape_of(dense))));
                return std::make_shared<BlockCSR>(BlockCSR::from_dense(
                    dense.data(), mask ? reinterpret_cast<const uint8_t*>(mask->data()) : nullptr, shape_of(dense), block_shape.first,
                    block_shape.second));
            },
            py::arg("dense"), py::arg("mask") = py::none(), py::arg("block_shape") = std::pair<int64_t, int64_t>{1, 1})
        .def("to_dense", [](const BlockCSR& w) {
            py::array_t<float> out(std::vector<py::ssize_t>(w.shape().begin(), w.shape().end()));
            w.to_dense(out.mutable_data());
            return out;
        })
        .def_property_readonly("shape", [](const BlockCSR& w) { return py::tuple(py::cast(w.shape())); })
        .def_property_readonly("block_shape", [](const BlockCSR& w) { return py::make_tuple(w.block_rows(), w.block_cols()); })
        .def_property_readonly("crow_indices", [](const BlockCSR& w) { return to_array(w.crow_indices()); })
        .def_property_readonly("col_indices", [](const BlockCSR& w) { return to_array(w.col_indices()); })
        .def_property_readonly("masks", [](const BlockCSR& w) { return to_array(w.masks()); })
        .def_property_readonly("values", [](const BlockCSR& w) { return to_array(w.values()); })
        .def_property_readonly("nnz_blocks", &BlockCSR::nnz_blocks)
        .def_property_readonly("kept", &BlockCSR::kept);
}

void bind_program(py::module_& m) {
    py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
        .def("run",
             [](const Plan& plan, const std::vector<py::array>& inputs, const std::vector<py::array>& outputs) {
                 const Arrays arrays = check_arrays(plan, inputs, outputs);
                 py::gil_scoped_release released;
                 plan.run(arrays.in.data(), arrays.out.data());
             })
        .def("profile",
             [](const Plan& plan, const std::vector<py::array>& inputs, const std::vector<py::array>& outputs) {
                 const Arrays arrays = check_arrays(plan, inputs, outputs);
                 std::vector<double> seconds;
                 {
                     py::gil_scoped_release released;
                     plan.run(arrays.in.data(), arrays.out.data(), &seconds);
                 }
                 return seconds;
             })
        .def_property_readonly("output_shapes",
                               [](const Plan& p) {
                                   py::list out;
                                   for (const Shape& s : p.output_shapes()) out.append(py::tuple(py::cast(s)));
                                   return out;
                               })
        .def_property_readonly("value_shapes",
                               [](const Plan& p) {
                                   py::list out;
                                   for (const Shape& s : p.value_shapes()) out.append(py::tuple(py::cast(s)));
                                   return out;
                               })
        .def_property_readonly("choices",
[](const Plan& p) { return choice_list(p.choices()); })
        .def_property_readonly("threads", &Plan::threads)
        .def_property_readonly("isa", [](const Plan& p) { return std::string(p.isa()); })
        .def_property_readonly("groups", &Plan::groups)
        .def_property_readonly("arena_bytes", &Plan::arena_bytes)
        .def_property_readonly("weight_bytes", &Plan::weight_bytes);

    py::class_<Program, std::shared_ptr<Program>>(m, "Program")
        .def(py::init([](const py::bytes& data) {
                 const std::string_view view = data;
                 py::gil_scoped_release released;
                 return std::make_shared<Program>(read_program(reinterpret_cast<const uint8_t*>(view.data()), view.size()));
             }),
             py::arg("data"))
        .def_static(
            "layer",
            [](std::shared_ptr<BlockCSR> weight, int dims, std::array<int64_t, 2> stride, std::array<int64_t, 4> padding,
               std::array<int64_t, 2> dilation, int64_t groups) {
                Window window;
                window.stride = stride;
                window.padding = padding;
                window.dilation = dilation;
                return std::make_shared<Program>(single_layer(std::move(weight), dims, window, groups));
            },
            py::arg("weight"), py::arg("dims"), py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"))
        .def_property_readonly("inputs", [](const Program& p) { return input_list(p.graph()); })
        .def_property_readonly("tree", [](const Program& p) { return p.graph().tree; })
        .def_property_readonly("tuned",
                               [](Program& p) {
                                   std::vector<Tuned> tuned;
                                   {
                                       py::gil_scoped_release released;
                                       tuned = p.tuned();
                                   }
                                   py::list out;
                                   for (const Tuned& t : tuned) out.append(py::make_tuple(t.isa, t.shapes, choice_list(t.choices), t.threads));
                                   return out;
                               })
        .def_property_readonly("layers", [](const Program& p) { return layer_list(p.graph()); })
        .def(
            "plan",
            [](Program& p, const std::vector<Shape>& shapes, std::optional<int> threads, std::optional<std::string> isa,
               std::optional<int64_t> bands) {
                const Kernels& kernels = kernels_named(isa);
                PlanOptions options{&kernels, threads_or_default(threads)};
                py::gil_scoped_release released;
                if (!bands) return std::const_pointer_cast<Plan>(p.plan(shapes, options.threads, kernels));
                options.guarded = *bands > 0;
                options.bands = *bands;
                return std::const_pointer_cast<Plan>(p.plan_with(shapes, options));
            },
            py::arg("shapes"), py::arg("threads") = py::none(), py::arg("isa") = py::none(), py::arg("bands") = py::none())
        .def(
            "set_choices",
            [](Program& p, const std::vector<Shape>& shapes, const py::list& choices, std::optional<std::string> isa) {
                const Choices wanted = choices_from(choices);
                const Kernels& kernels = kernels_named(isa);
                py::gil_scoped_release released;
                p.set_choices(kernels.name, shapes, wanted);
            },
            py::arg("shapes"), py::arg("choices"), py::arg("isa") = py::none())
        .def(
            "tune",
            [](Program& p, const std::vector<Shape>& shapes, double budget_seconds, double min_gain, std::function<bool(int, int)> progress,
               std::optional<int> threads, std::optional<std::string> isa) {
                const Kernels& kernels = kernels_named(isa);
                const int count = threads_or_default(threads);
                std::vector<TunedLayer> layers;
                const auto call = [&](int done, int all) {  // the callback is Python's
                    py::gil_scoped_acquire held;
                    return PyErr_CheckSignals() == 0 && (!progress || progress(done, all));
                };
                {
                    py::gil_scoped_release released;
                    layers = tune(p, shapes, count, kernels, budget_seconds, min_gain, call);
                }
                if (PyErr_Occurred()) throw py::error_already_set();
                py::list out;
                for (const TunedLayer& l : layers) {
                    py::dict d;
                    d["node"] = l.node;
                    d["choice"] = choice_dict(l.choice);
                    d["seconds"] = l.seconds;
                    d["dense_seconds"] = l.dense_seconds < 0 ? py::object(py::none()) : py::cast(l.dense_seconds);
                    d["candidates"] = l.candidates;
                    out.append(d);
                }
                return out;
            },
            py::arg("shapes"), py::arg("budget_seconds"), py::arg("min_gain") = 1.0, py::arg("progress") = py::none(), py::arg("threads") = py::none(),
            py::arg("isa") = py::none());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The torch-free core of sparseprune. Private: use the functions of the package.";
    static py::object format_error = py::module_::import("sparseprune.errors").attr("FormatError");
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const FormatError& e) {
            PyErr_SetString(format_error.ptr(), e.what());
        } catch (const ValueError& e) {
            PyErr_SetString(PyExc_ValueError, e.what());
        }
    });
    bind_block_csr(m);
    bind_program(m);
    m.def(
        "seal",
        [](const py::bytes& data) {
            std::string copy = data;
            seal(reinterpret_cast<uint8_t*>(copy.data()), copy.size());
            return py::bytes(copy);
        },
        py::arg("data"));
    m.def("available_cores", &available_cores);
    m.def("num_threads", &num_threads);
    m.def("set_num_threads", &set_num_threads, py::arg("n"));
    m.def("isa", [] { return std::string(default_kernels().name); });
    m.def("supported_isas", &supported_isas);
}
