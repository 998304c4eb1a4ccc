// PackedWeight: a weight in the order that one kernel and one geometry want. Built at plan time, never stored.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "choice.h"
#include "cpu/kernels.h"
#include "graph.h"

namespace sparseprune {

struct PackedWeight {
    WeightKind kind = WeightKind::single;
    std::vector<int64_t> start;      // single: rows * groups + 1; masked: one a block of columns and group of 4 rows
    std::vector<Entry> entries;      // single: one of the two is filled
    std::vector<NarrowEntry> narrow;
    int64_t narrow_base = 0;
    std::vector<int32_t> shifts;     // single: lane shift of each group, the first is 0
    std::vector<int32_t> stream;     // masked
    int64_t blocks = 1;              // masked: of columns
    std::vector<float> dense;        // dense: [block][col][R]
    std::vector<int32_t> dense_offsets;
    int64_t dense_rows_per_group = 0, dense_group_offset = 0;
    std::vector<int64_t> cuts;       // rows where work may be split, from 0 to rows
    std::vector<int64_t> cost;       // kept weights before each cut
    int64_t bytes() const;
};

// A linear layer's weight for single inputs: six bytes a kept weight where columns fit 16 bits.
struct DotWeight {
    std::vector<int64_t> start;   // rows + 1; empty where the weight is dense
    std::vector<uint16_t> col16;  // one of the two, with sixteen columns more
    std::vector<int32_t> col32;
    std::vector<float> value;     // dense: rows x cols; empty where the weight has no zeros and lies as it should
    int64_t bytes() const;
};
DotWeight pack_dot(const Weight& weight);

// Where column k of a weight row finds its input: an offset, and a lane shift.
struct Column {
    int32_t offset;
    int32_t shift;
};

// columns: one for each (convolution group, column), group-major; all shifts 0 unless kind is single.
// unroll: kind single has a multiple of so many entries for each row and shift. block: kind masked has blocks of about so many columns.
PackedWeight pack_weight(WeightKind kind, const Weight& weight, int64_t groups, const std::vector<Column>& columns,
                         int32_t dense_block_rows, int unroll, int64_t block);

// Row r, column c, value of every kept weight, in order.
Csr weight_csr(const Weight& weight);

}  // namespace sparseprune
