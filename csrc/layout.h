// How a value lies in memory. Inside a program a value is channel-major, (C, N, H, W): the pixels of all images of one channel
// follow each other, so that a kernel's vectors run over images too.
#pragma once
#include <cstdint>

#include "graph.h"

namespace sparseprune {

enum class LayoutKind {
    external,  // the caller's contiguous (N, C, H, W)
    rows,      // each row of pixels padded to whole vectors, rows of zeros around each image: wide planes
    flat,      // pixels without gaps, only the plane padded: narrow planes
    packed     // (N, C), for values of one pixel and few images
};

struct Layout {
    LayoutKind kind;
    int64_t n, c, h, w;
    int64_t pitch, image, plane, offset;  // floats between rows, images, channels; of the first pixel
    int64_t margin;                       // rows of zeros above, between and below images (kind rows)

    int64_t at(int64_t in, int64_t ic, int64_t y) const { return offset + ic * plane + in * image + y * pitch; }
    int64_t size() const { return kind == LayoutKind::packed || kind == LayoutKind::external ? n * image : c * plane; }
    int64_t row_vectors() const { return (w + 15) / 16; }
    bool same_as(const Layout& o) const {
        return kind == o.kind && n == o.n && c == o.c && h == o.h && w == o.w && margin == o.margin;
    }
};

constexpr int64_t kFewImages = 8;  // below this a value of one pixel is packed, and linear layers are dot products

// shape: (N, C), (N, C, L) or (N, C, H, W); an external one may have any rank: then (first, the rest) stands for it
Layout external_layout(const Shape& shape);
Layout internal_layout(const Shape& shape, int64_t margin, bool may_pack);
Layout make_layout(LayoutKind kind, const Shape& shape, int64_t margin);

// Zeroes what is neither pixel nor lane of a pixel's vector, for channels [begin, end): kernels write only vectors.
void zero_margins(const Layout& layout, float* data, int64_t begin, int64_t end);

// The same, and the lanes behind each row: for steps that write elements only.
void zero_rest(const Layout& layout, float* data, int64_t begin, int64_t end);

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
// An odd number of cache lines: planes of a power of two would all fall into one cache set.
inline int64_t odd_lines(int64_t floats) { return (((floats + 15) / 16) | 1) * 16; }

}  // namespace sparseprune
