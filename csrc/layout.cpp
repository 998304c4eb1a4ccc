#include "layout.h"

#include <algorithm>

namespace sparseprune {
namespace {

void set_sizes(Layout& l, const Shape& shape) {
    if (shape.size() < 2 || shape.size() > 4) {
        l.n = shape.size() == 1 ? 1 : shape[0];
        l.c = l.h = l.w = 1;
        for (size_t d = shape.size() == 1 ? 0 : 1; d < shape.size(); ++d) l.c *= shape[d];
        return;
    }
    l.n = shape[0];
    l.c = shape[1];
    l.h = shape.size() == 4 ? shape[2] : 1;
    l.w = shape.size() > 2 ? shape.back() : 1;
}

}  // namespace

Layout make_layout(LayoutKind kind, const Shape& shape, int64_t margin) {
    Layout l{};
    l.kind = kind;
    set_sizes(l, shape);
    l.pitch = l.w;
    l.image = l.h * l.w;
    switch (kind) {
        case LayoutKind::external:
            l.plane = l.image;
            l.image *= l.c;
            break;
        case LayoutKind::packed:
            l.plane = 1;
            l.image = round_up(l.c, 16);
            break;
        case LayoutKind::flat:
            l.plane = odd_lines(l.n * l.image);
            break;
        case LayoutKind::rows:
            l.margin = margin;
            l.pitch = round_up(l.w, 16);
            l.image = (l.h + margin) * l.pitch;
            l.offset = margin * l.pitch;
            l.plane = odd_lines(l.offset + l.n * l.image);
            break;
    }
    return l;
}

Layout external_layout(const Shape& shape) { return make_layout(LayoutKind::external, shape, 0); }

Layout internal_layout(const Shape& shape, int64_t margin, bool may_pack) {
    const int64_t w = shape.size() > 2 ? shape.back() : 1, h = shape.size() == 4 ? shape[2] : 1;
    if (may_pack && h * w == 1 && shape[0] < kFewImages) return make_layout(LayoutKind::packed, shape, 0);
    return make_layout(w > 8 ? LayoutKind::rows : LayoutKind::flat, shape, margin);
}

void zero_margins(const Layout& l, float* data, int64_t begin, int64_t end) {
    if (l.kind != LayoutKind::rows || l.margin == 0) return;
    const int64_t gap = l.margin * l.pitch;
    for (int64_t c = begin; c < end; ++c)
        for (int64_t n = 0; n <= l.n; ++n) std::fill_n(data + c * l.plane + n * l.image, gap, 0.0f);
}

void zero_rest(const Layout& l, float* data, int64_t begin, int64_t end) {
    if (l.kind != LayoutKind::rows) return;
    if (l.pitch != l.w)
        for (int64_t c = begin; c < end; ++c)
            for (int64_t n = 0; n < l.n; ++n)
                for (int64_t y = 0; y < l.h; ++y) std::fill_n(data + l.at(n, c, y) + l.w, l.pitch - l.w, 0.0f);
    zero_margins(l, data, begin, end);
}

}  // namespace sparseprune
