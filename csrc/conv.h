// How one convolution (or batched linear layer) is run: where its packed input comes from, its tiles, its packed weight.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "choice.h"
#include "layout.h"
#include "packed.h"

namespace sparseprune {

// Convolution as tap arithmetic: the input row of output row oy and tap ky is stride * (oy + q) + phase.
struct Tap {
    int64_t py, qy, px, qx;
};

struct ConvShape {
    Layout in, out;
    Window window;
    int64_t groups, channels_per_group;  // input channels of a group
    std::vector<Tap> taps;               // kernel order
    int64_t min_qx, max_qx, min_qy, max_qy;
    int64_t columns() const { return channels_per_group * static_cast<int64_t>(taps.size()); }
};
ConvShape conv_shape(const Node& node, const Layout& in, const Layout& out);

// Rows of zeros that a direct k x k convolution wants around its input; 0 where it cannot be direct.
int64_t direct_margin(const Node& node, const Shape& in, const Shape& out);

// The choices worth timing, the default one first. density: kept / total.
std::vector<Choice> conv_choices(const ConvShape& shape, double density, const Kernels& kernels);
bool choice_fits(const ConvShape& shape, const Choice& choice, const Kernels& kernels);

// The tile sizes, in vectors, that this form and kind allow; ascending, empty where none does.
std::vector<int> vector_counts(const ConvShape& shape, Form form, WeightKind kind, const Kernels& kernels);

struct PhaseCopy {  // geometry of the forms phases and halo
    int64_t rows, pitch, plane, phase, first_column;  // rows of a phase image; floats of a channel, of a phase
    std::vector<std::array<int64_t, 2>> phases;       // {py, px} of those that a tap reads
};

struct ConvPlan {
    Choice choice;
    ConvShape shape;
    PackedWeight weight;
    PhaseCopy copy{};
    int64_t packed_floats = 0;       // scratch: the copy, or one chunk of the panel
    std::vector<Tile> tiles;         // by chunk for the panel
    std::vector<uint16_t> masks;
    std::vector<uint16_t> edges;     // by vector of a tile: 0 where a row of pixels starts, else all ones
    std::vector<size_t> chunk_tiles; // first tile of each chunk of the panel, and the end; {0, all} otherwise
    std::vector<Piece> pieces;           // im2col, by (chunk, tap)
    std::vector<int32_t> first_piece;
    std::vector<uint16_t> tap_masks;  // form taps: by (group, vector)
    int64_t panel_plane = 0;
    int64_t residual_plane = 0;  // floats between two planes of the value that is added
    int unroll = 1;
};

// Forms direct, phases and halo of one image: the tiles of output rows [begin, end).
std::vector<Tile> row_tiles(const ConvPlan& plan, int64_t begin, int64_t end);

// copy_rows: the most rows of a phase that a copy will hold at once; 0: all.
ConvPlan plan_conv(const ConvShape& shape, const Weight& weight, const Choice& choice, const Kernels& kernels, int64_t copy_rows = 0);

}  // namespace sparseprune
