// How the operators on values of any rank become steps. What works on planes stays on planes; the rest is contiguous.
#include <algorithm>
#include <cmath>

#include "plan_builder.h"

namespace sparseprune {
namespace {

Binary binary_of(Op op) {
    switch (op) {
        case Op::sub: return Binary::sub;
        case Op::mul: return Binary::mul;
        case Op::div: return Binary::div;
        case Op::maximum: return Binary::maximum;
        case Op::minimum: return Binary::minimum;
        default: return Binary::add;
    }
}

// The value broadcast to a larger shape: strides of 0.
Strided broadcast(const Strided& from, const Shape& shape) {
    Strided out;
    out.rank = static_cast<int>(shape.size());
    out.offset = from.offset;
    for (int d = 0; d < out.rank; ++d) {
        const auto to = static_cast<size_t>(d);
        const int own = d - (out.rank - from.rank);
        out.size[to] = shape[to];
        out.stride[to] = own < 0 || from.size[static_cast<size_t>(own)] == 1 ? 0 : from.stride[static_cast<size_t>(own)];
    }
    return out;
}

// Dimensions in another order.
Strided permuted(const Strided& from, const std::vector<int64_t>& axes) {
    Strided out;
    out.rank = static_cast<int>(axes.size());
    out.offset = from.offset;
    for (size_t d = 0; d < axes.size(); ++d) {
        out.size[d] = from.size[static_cast<size_t>(axes[d])];
        out.stride[d] = from.stride[static_cast<size_t>(axes[d])];
    }
    return out;
}

// The part [start, start + count) of a dimension.
Strided part_of(Strided from, int64_t axis, int64_t start, int64_t count, int64_t step = 1) {
    const auto d = static_cast<size_t>(axis);
    from.offset += start * from.stride[d];
    from.size[d] = count;
    from.stride[d] *= step;
    return from;
}

// Rows with their padding lanes: longer runs, for what leaves zeros zero.
Strided padded_rows(const Layout& l) {
    Strided s;
    s.rank = 3;
    s.size = {l.c, l.n, l.h * l.pitch};
    s.stride = {l.plane, l.image, 1};
    s.offset = l.offset;
    return s;
}

bool planes(const Layout& l) { return l.kind == LayoutKind::rows || l.kind == LayoutKind::flat; }

std::vector<int32_t> every(int64_t size) {
    std::vector<int32_t> map(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) map[static_cast<size_t>(i)] = static_cast<int32_t>(i);
    return map;
}

std::vector<int32_t> pad_map(PadMode mode, int64_t size, int64_t before, int64_t after) {
    std::vector<int32_t> map;
    for (int64_t i = -before; i < size + after; ++i) {
        int64_t at = i;
        if (mode == PadMode::constant && (i < 0 || i >= size)) at = -1;
        if (mode == PadMode::replicate) at = std::clamp<int64_t>(i, 0, size - 1);
        if (mode == PadMode::reflect) at = i < 0 ? -i : i >= size ? 2 * (size - 1) - i : i;
        if (mode == PadMode::circular) at = (i + size) % size;
        map.push_back(static_cast<int32_t>(at));
    }
    return map;
}

// torch's arithmetic: float32, rounded down
std::vector<int32_t> nearest_map(int64_t in, int64_t out, double factor) {
    const float step = factor > 0 ? static_cast<float>(1.0 / factor) : static_cast<float>(in) / static_cast<float>(out);
    std::vector<int32_t> map;
    for (int64_t i = 0; i < out; ++i)
        map.push_back(static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(std::floor(static_cast<float>(i) * step)), in - 1)));
    return map;
}

}  // namespace

Strided strided(const Layout& l, const Shape& shape) {
    Strided s;
    s.rank = static_cast<int>(shape.size());
    s.offset = l.offset;
    for (size_t d = 0; d < shape.size(); ++d) s.size[d] = shape[d];
    if (l.kind == LayoutKind::external) {
        int64_t stride = 1;
        for (size_t d = shape.size(); d-- > 0; stride *= shape[d]) s.stride[d] = stride;
        return s;
    }
    s.stride = {l.image, l.plane, l.pitch, 1};
    if (shape.size() == 3) s.stride[2] = 1;
    return s;
}

// ---- concatenation without copies: who computes a part of it writes into its planes ----

void PlanBuilder::place_in_concats() {
    const int first = static_cast<int>(graph_.inputs.size());
    const auto writes_planes = [&](int value) {
        if (value < first) return false;
        switch (graph_.nodes[static_cast<size_t>(value - first)].op) {
            case Op::conv:
            case Op::max_pool:
            case Op::avg_pool:
            case Op::adaptive_avg_pool:
            case Op::adaptive_max_pool:
            case Op::add:
            case Op::sub:
            case Op::mul:
            case Op::div:
            case Op::maximum:
            case Op::minimum:
            case Op::act:
            case Op::prelu:
            case Op::index_select:
            case Op::roll:
            case Op::channel_shuffle:
            case Op::pad:
            case Op::resize:
            case Op::pixel_shuffle:
            case Op::group_norm:
            case Op::concat: return true;
            default: return false;
        }
    };
    // The last concatenation first: where one takes up another's inputs (DenseNet), the earlier one is a part of the later one.
    for (size_t i = graph_.nodes.size(); i-- > 0;) {
        const Node& node = graph_.nodes[i];
        const Shape& out = shape_of(first + static_cast<int>(i));
        if (node.op != Op::concat || node.axis != 1 || out.size() < 3 || out.size() > 4 || !planes(layout_of(out, true))) continue;
        int64_t channel = 0;
        for (int value : node.inputs) {
            if (writes_planes(value)) places_.emplace(value, Place{static_cast<int>(i), channel});
            channel += shape_of(value)[1];
        }
    }
}

// The buffer of a concatenation's value, made when the first of its parts is written.
Ref PlanBuilder::concat_buffer(int node, const Layout& layout) {
    const auto found = concat_buffers_.find(node);
    if (found != concat_buffers_.end()) return found->second;
    const int value = static_cast<int>(graph_.inputs.size()) + node;
    const Shape& shape = shape_of(value);
    Ref ref;
    if (const auto outer = places_.find(value); outer != places_.end()) {
        ref = concat_buffer(outer->second.concat, layout);
        ref.offset += outer->second.channel * layout.plane;
    } else {
        ref = new_buffer(shape[1] * layout.plane);
    }
    return concat_buffers_[node] = ref;
}

Ref PlanBuilder::output_buffer(const Layout& layout) {
    const auto place = places_.find(value_);
    if (place == places_.end() || !planes(layout)) return new_buffer(layout.size());
    Ref ref = concat_buffer(place->second.concat, layout);
    ref.offset += place->second.channel * layout.plane;
    return ref;
}

// On planes where that value is, contiguous where it is not.
Layout PlanBuilder::layout_like(const Shape& shape, const Value& like) const {
    const bool image = shape.size() >= 2 && shape.size() <= 4 && like.layout.kind != LayoutKind::external;
    return image || places_.count(value_) ? layout_of(shape, true) : external_layout(shape);
}

PlanBuilder::Value PlanBuilder::plain(const Value& v, const Shape& shape) { return in_layout(v, shape, external_layout(shape)); }

PlanBuilder::Value PlanBuilder::strided_step(std::vector<Ref> used, const Layout& out, Body body, bool padded) {
    const Ref ref = used.back();
    const auto ptr = pointers();
    const auto zero = padded ? zero_margins : zero_rest;  // never what another thread's body writes
    add_step(used, [ptr, out, ref, zero, body = std::move(body), count = threads()](const Run& run, int id) {
        body(run, id);
        const Part part{id, count};
        zero(out, ptr.out(run, ref), part.begin(out.c), part.end(out.c));
    });
    return {out, ref};
}

PlanBuilder::Value PlanBuilder::copy_step(const Value& x, const Strided& from, const Layout& out, const Strided& to) {
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [ptr, x, from, to, ref, count = threads()](const Run& run, int id) {
        copy_strided(from, ptr.in(run, x.ref), to, ptr.out(run, ref), {id, count});
    });
}

PlanBuilder::Value PlanBuilder::mapped_step(const Value& x, const Shape& in_shape, IndexMaps maps, float fill) {
    const Layout out = layout_like(shape(), x);
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [ptr, x, maps = std::move(maps), fill, from = strided(x.layout, in_shape),
                                            to = strided(out, shape()), ref, count = threads()](const Run& run, int id) {
        copy_mapped(from, ptr.in(run, x.ref), maps, fill, to, ptr.out(run, ref), {id, count});
    });
}

// ---- element by element ----

PlanBuilder::Value PlanBuilder::build_add(const Node& node) {
    const Value a = input(node, 0), b = input(node, 1);
    const bool alike = input_shape(node, 0) == shape() && input_shape(node, 1) == shape();
    const bool images = shape().size() >= 2 && shape().size() <= 4 &&
                        (a.layout.kind != LayoutKind::external || b.layout.kind != LayoutKind::external);
    if (!alike || !images || !node.act.fits_epilogue() || !node.act.keeps_zero()) return build_binary(node);
    const Layout out = layout_of(shape(), true);
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    add_step({a.ref, b.ref, ref}, [ptr, a, b, out, ref, act = node.act, k = &kernels(), count = threads()](const Run& run, int id) {
        add_values(*k, a.layout, ptr.in(run, a.ref), b.layout, ptr.in(run, b.ref), out, ptr.out(run, ref), act, {id, count});
    });
    return {out, ref};
}

PlanBuilder::Value PlanBuilder::build_binary(const Node& node) {
    const Value a = input(node, 0), b = input(node, 1);
    const bool a_leads = input_shape(node, 0) == shape() && (a.layout.kind != LayoutKind::external || input_shape(node, 1) != shape());
    const Layout out = layout_like(shape(), a_leads ? a : b);
    const Ref ref = output_buffer(out);
    const Binary op = binary_of(node.op);
    Strided sa, sb, to;
    const bool padded = out.kind == LayoutKind::rows && a.layout.same_as(out) && b.layout.same_as(out) && op != Binary::div && node.act.keeps_zero();
    if (padded) {
        sa = sb = to = padded_rows(out);
    } else {
        sa = broadcast(strided(a.layout, input_shape(node, 0)), shape());
        sb = broadcast(strided(b.layout, input_shape(node, 1)), shape());
        to = strided(out, shape());
    }
    const auto ptr = pointers();
    return strided_step({a.ref, b.ref, ref}, out, [=, act = node.act, k = &kernels(), count = threads()](const Run& run, int id) {
        binary(*k, op, sa, ptr.in(run, a.ref), sb, ptr.in(run, b.ref), to, ptr.out(run, ref), act, {id, count});
    }, padded);
}

PlanBuilder::Value PlanBuilder::build_activation(const Node& node) {
    const Value x = input(node, 0);
    const Layout out = layout_like(shape(), x);
    const Ref ref = output_buffer(out);
    const bool whole = out.kind == LayoutKind::rows && x.layout.same_as(out) && node.act.keeps_zero();
    const Strided from = whole ? padded_rows(out) : strided(x.layout, shape()), to = whole ? from : strided(out, shape());
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [=, act = node.act, k = &kernels(), count = threads()](const Run& run, int id) {
        activate(*k, from, ptr.in(run, x.ref), to, ptr.out(run, ref), act, {id, count});
    }, whole);
}

PlanBuilder::Value PlanBuilder::build_prelu(const Node& node) {
    const Value x = input(node, 0);
    const Layout out = layout_like(shape(), x);
    const Ref ref = output_buffer(out);
    const Strided from = strided(x.layout, shape()), to = strided(out, shape());
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [=, scale = node.scale, k = &kernels(), count = threads()](const Run& run, int id) {
        prelu(*k, from, ptr.in(run, x.ref), *scale, to, ptr.out(run, ref), {id, count});
    });
}

// ---- moving elements ----

PlanBuilder::Value PlanBuilder::build_reshape(const Node& node) {
    const Value x = plain(input(node, 0), input_shape(node, 0));
    return {external_layout(shape()), x.ref};
}

PlanBuilder::Value PlanBuilder::build_permute(const Node& node) {
    const Value x = input(node, 0);
    const Layout out = external_layout(shape());
    return copy_step(x, permuted(strided(x.layout, input_shape(node, 0)), node.axes), out, strided(out, shape()));
}

PlanBuilder::Value PlanBuilder::build_expand(const Node& node) {
    const Value x = input(node, 0);
    const Layout out = layout_like(shape(), x);
    return copy_step(x, broadcast(strided(x.layout, input_shape(node, 0)), shape()), out, strided(out, shape()));
}

PlanBuilder::Value PlanBuilder::build_slice(const Node& node) {
    const Value x = input(node, 0);
    const Shape& in = input_shape(node, 0);
    const SliceRange range = slice_range(node, in[static_cast<size_t>(node.axis)]);
    if (node.step == 1 || range.count == 1) {
        if (planes(x.layout) && node.axis == 1) {  // some of the planes
            Value part = x;
            part.layout.c = range.count;
            part.ref.offset += range.start * x.layout.plane;
            return part;
        }
        bool outermost = x.layout.kind == LayoutKind::external;
        int64_t inner = 1;
        for (size_t d = 0; d < in.size(); ++d) {
            if (static_cast<int64_t>(d) < node.axis) outermost = outermost && in[d] == 1;
            if (static_cast<int64_t>(d) > node.axis) inner *= in[d];
        }
        if (outermost) {
            Value part{external_layout(shape()), x.ref};
            part.ref.offset += range.start * inner;
            return part;
        }
    }
    const Layout out = layout_like(shape(), x);
    return copy_step(x, part_of(strided(x.layout, in), node.axis, range.start, range.count, node.step), out, strided(out, shape()));
}

PlanBuilder::Value PlanBuilder::build_mapped(const Node& node) {
    const Shape& in = input_shape(node, 0);
    IndexMaps maps;
    if (node.op == Op::pad) {
        for (size_t d = 0; d < in.size(); ++d)
            if (node.pads[2 * d] + node.pads[2 * d + 1] > 0) maps[d] = pad_map(node.pad_mode, in[d], node.pads[2 * d], node.pads[2 * d + 1]);
    } else if (node.op == Op::channel_shuffle) {
        const int64_t per_group = in[1] / node.groups;
        for (int64_t c = 0; c < in[1]; ++c) maps[1].push_back(static_cast<int32_t>(c % node.groups * per_group + c / node.groups));
    } else if (node.op == Op::roll) {
        auto& map = maps[static_cast<size_t>(node.axis)];
        map = every(in[static_cast<size_t>(node.axis)]);
        const int64_t size = static_cast<int64_t>(map.size()), left = ((-node.shift) % size + size) % size;
        std::rotate(map.begin(), map.begin() + left, map.end());
    } else {
        maps[static_cast<size_t>(node.axis)].assign(node.index.begin(), node.index.end());
    }
    return mapped_step(input(node, 0), in, std::move(maps), node.value);
}

PlanBuilder::Value PlanBuilder::build_concat(const Node& node) {
    Value like = input(node, 0);
    for (size_t i = 0; i < node.inputs.size(); ++i)
        if (planes(input(node, i).layout)) like = input(node, i);
    const Layout out = layout_like(shape(), like);
    const bool on_planes = node.axis == 1 && shape().size() >= 3 && planes(out);
    // All parts side by side in some other concatenation: nothing to do.
    if (on_planes && !concat_buffers_.count(node_)) {
        const Value& first = input(node, 0);
        int64_t channel = 0;
        bool adjacent = true;
        for (size_t i = 0; i < node.inputs.size(); ++i) {
            const Value& v = input(node, i);
            Layout piece = out;
            piece.c = v.layout.c;
            adjacent = adjacent && v.layout.same_as(piece) && v.ref.kind == Ref::buffer && v.ref.index == first.ref.index &&
                       v.ref.offset == first.ref.offset + channel * out.plane;
            channel += v.layout.c;
        }
        if (adjacent && !places_.count(value_)) return {out, first.ref};
    }
    const Ref ref = on_planes ? concat_buffer(node_, out) : output_buffer(out);
    Strided all = strided(out, shape());
    int64_t at = 0;
    struct Piece {
        Value value;
        Strided from, to;
    };
    std::vector<Piece> pieces;
    std::vector<Ref> used;
    for (size_t i = 0; i < node.inputs.size(); ++i) {
        const Value& v = input(node, i);
        const Shape& in = input_shape(node, i);
        const int64_t size = in[static_cast<size_t>(node.axis)];
        const bool there = on_planes && planes(v.layout) && v.ref.kind == Ref::buffer && v.ref.index == ref.index &&
                           v.ref.offset == ref.offset + at * out.plane;
        if (!there) pieces.push_back({v, strided(v.layout, in), part_of(all, node.axis, at, size)});
        used.push_back(v.ref);
        at += size;
    }
    used.push_back(ref);
    if (pieces.empty()) return {out, ref};
    const auto ptr = pointers();
    return strided_step(used, out, [ptr, pieces, ref, count = threads()](const Run& run, int id) {
        for (const Piece& p : pieces) copy_strided(p.from, ptr.in(run, p.value.ref), p.to, ptr.out(run, ref), {id, count});
    });
}

PlanBuilder::Value PlanBuilder::build_resize(const Node& node) {
    const Value x = input(node, 0);
    const Shape& in = input_shape(node, 0);
    if (node.resize_mode == ResizeMode::nearest) {
        IndexMaps maps;
        for (size_t d = 2; d < 4; ++d) maps[d] = nearest_map(in[d], shape()[d], node.resize_scale[d - 2]);
        return mapped_step(x, in, std::move(maps), 0);
    }
    const Layout out = layout_like(shape(), x);
    const Ref ref = output_buffer(out);
    const auto axes = std::make_shared<const Bilinear>(bilinear_axes(in[2], in[3], shape()[2], shape()[3], node.resize_scale[0],
                                                                     node.resize_scale[1], node.align_corners));
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [=, from = strided(x.layout, in), to = strided(out, shape()), k = &kernels(),
                                            count = threads()](const Run& run, int id) {
        resize_bilinear(*k, *axes, from, ptr.in(run, x.ref), to, ptr.out(run, ref), {id, count});
    });
}

PlanBuilder::Value PlanBuilder::build_pixel_shuffle(const Node& node) {
    const Value x = input(node, 0);
    const Layout out = layout_like(shape(), x);
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [ptr, x, out, ref, factor = node.factor, count = threads()](const Run& run, int id) {
        pixel_shuffle_value(x.layout, ptr.in(run, x.ref), factor, out, ptr.out(run, ref), {id, count});
    });
}

// ---- over dimensions ----

PlanBuilder::Value PlanBuilder::build_reduce(const Node& node) {
    const Value x = input(node, 0);
    const Shape& in = input_shape(node, 0);
    const Layout out = external_layout(shape());
    std::vector<int64_t> order, reduced;
    Shape kept;
    for (int64_t d = 0; d < static_cast<int64_t>(in.size()); ++d) {
        const bool gone = std::find(node.axes.begin(), node.axes.end(), d) != node.axes.end();
        (gone ? reduced : order).push_back(d);
        if (!gone) kept.push_back(in[static_cast<size_t>(d)]);
    }
    order.insert(order.end(), reduced.begin(), reduced.end());
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [ptr, x, ref, from = permuted(strided(x.layout, in), order), to = strided(out, kept),
                                            kind = node.reduction, k = &kernels(), count = threads()](const Run& run, int id) {
        reduce(*k, kind, from, ptr.in(run, x.ref), to, ptr.out(run, ref), {id, count});
    });
}

PlanBuilder::Value PlanBuilder::build_softmax(const Node& node) {
    const Value x = input(node, 0);
    const Layout out = external_layout(shape());
    std::vector<int64_t> order;
    for (int64_t d = 0; d < static_cast<int64_t>(shape().size()); ++d)
        if (d != node.axis) order.push_back(d);
    order.push_back(node.axis);
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [ptr, x, ref, from = permuted(strided(x.layout, shape()), order),
                                            to = permuted(strided(out, shape()), order), k = &kernels(), count = threads()](
                                               const Run& run, int id) {
        softmax(*k, from, ptr.in(run, x.ref), to, ptr.out(run, ref), {id, count});
    });
}

PlanBuilder::Value PlanBuilder::build_norm(const Node& node) {
    const Value x = input(node, 0);
    const bool layer = node.op == Op::layer_norm;
    const Layout out = layer ? external_layout(shape()) : layout_like(shape(), x);
    const Ref ref = output_buffer(out);
    const auto ptr = pointers();
    return strided_step({x.ref, ref}, out, [=, n = &node, from = strided(x.layout, shape()), to = strided(out, shape()), k = &kernels(),
                                            count = threads()](const Run& run, int id) {
        const float* scale = n->scale ? n->scale->data() : nullptr;
        const float* bias = n->bias ? n->bias->data() : nullptr;
        if (layer)
            layer_norm(*k, static_cast<int>(n->axis), n->eps, scale, bias, from, ptr.in(run, x.ref), to, ptr.out(run, ref), {id, count});
        else
            group_norm(*k, n->groups, n->eps, scale, bias, from, ptr.in(run, x.ref), to, ptr.out(run, ref), {id, count});
    });
}

PlanBuilder::Value PlanBuilder::build_matmul(const Node& node) {
    const Value a = input(node, 0), b = input(node, 1);
    const Layout out = external_layout(shape());
    const auto operand = [&](const Value& v, const Shape& in, bool transpose) {
        Strided s = strided(v.layout, in);
        const size_t last = in.size() - 1;
        if (transpose) {
            std::swap(s.size[last], s.size[last - 1]);
            std::swap(s.stride[last], s.stride[last - 1]);
        }
        Shape wide = shape();
        wide[wide.size() - 2] = s.size[last - 1];
        wide.back() = s.size[last];
        return broadcast(s, wide);
    };
    const Strided sa = operand(a, input_shape(node, 0), false), sb = operand(b, input_shape(node, 1), node.transpose_b);
    const Ref ref = output_buffer(out);
    const int64_t line = matmul_scratch(sa, sb);
    const Ref scratch = new_buffer(std::max<int64_t>(line * threads(), 1));
    const auto ptr = pointers();
    return strided_step({a.ref, b.ref, scratch, ref}, out, [=, to = strided(out, shape()), k = &kernels(), count = threads()](
                                                               const Run& run, int id) {
        matmul(*k, sa, ptr.in(run, a.ref), sb, ptr.in(run, b.ref), to, ptr.out(run, ref), ptr.out(run, scratch) + id * line, {id, count});
    });
}

}  // namespace sparseprune
