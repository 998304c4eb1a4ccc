// From the canonical weight to the order that one kernel wants, for one shape. Host code; the caller copies it to the device.
#pragma once
#include <optional>
#include <vector>

#include "block_csr.h"
#include "blocks.h"
#include "gemv.h"
#include "spmm.h"

namespace sparseprune::cuda {

// A convolution's shape and attributes as torch names them; all checked by `geometry`.
struct Layer {
    int64_t n, c, h, w, out_c, kh, kw, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
};

// Throws ValueError naming the value that does not fit (sizes beyond int32 among them).
Geometry geometry(const Layer& layer, int strip);

// The most channels a chunk may have in `bytes` of shared memory, cut so that chunks are even; 0: not even the least fits.
int spmm_chunk(const Geometry& g, int element, int64_t bytes);
int blocks_chunk(const Geometry& g, int element, int64_t bytes);

struct PackedSpmm {
    std::vector<uint32_t> records;
    std::vector<int> starts, counts, order;
    int chunk, chunks, tiles;
};
PackedSpmm pack_spmm(const Csr& weight, const Geometry& g, int rows_an_entry, int chunk);

struct PackedGemv {
    std::vector<uint16_t> columns;
    std::vector<uint8_t> values;
    std::vector<int> starts, order;
};
PackedGemv pack_gemv(const Csr& weight, int64_t columns, Math math);  // tf32 stands for plain float32 here

struct PackedBlocks {
    std::vector<uint32_t> weights, columns;
    std::vector<int> starts, order;
    int chunk, chunks, row_groups;
};
PackedBlocks pack_blocks(const Csr& weight, const Geometry& g, Math math, int rows, bool vectors, int chunk);

// Kept weights / places in the blocks that hold one; 1 where whole blocks are kept. Blocks are `rows` output channels times
// `columns` neighbouring input channels of one tap.
double fill(const Csr& weight, int64_t in_channels, int64_t taps, int rows, int columns);

}  // namespace sparseprune::cuda
