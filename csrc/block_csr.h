// BlockCSR: the canonical packed weight. A weight (out, in/groups, kh, kw) is a matrix rows x cols with cols = in/groups*kh*kw;
// it is cut into blocks of R rows and C columns, and a block is stored, in ascending column order, only if it keeps an entry.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace sparseprune {

class BlockCSR {
public:
    // shape: (out, ...); block_shape (R, C) divides the matrix; R*C <= 64.
    // crow_indices: rows/R + 1; col_indices: block columns, strictly ascending in each block row;
    // masks: R*C bits a block, bit r*C + c set where the entry is kept, never 0; values: kept ones, block by block, bit order.
    // Checks every invariant once; throws ValueError naming the field and the value. `masks` empty: all blocks full.
    BlockCSR(std::vector<int64_t> shape, int64_t block_rows, int64_t block_cols, std::vector<int32_t> crow_indices,
             std::vector<int32_t> col_indices, std::vector<uint64_t> masks, std::vector<float> values);

    // kept(i) is dense[i] != 0 (NaN is kept), or mask[i] != 0 where a mask is given; row-major rows x cols.
    static BlockCSR from_dense(const float* dense, const uint8_t* mask, std::vector<int64_t> shape, int64_t block_rows,
                               int64_t block_cols);
    void to_dense(float* dense) const;  // rows x cols, zeros where nothing is kept

    const std::vector<int64_t>& shape() const { return shape_; }
    int64_t rows() const { return rows_; }
    int64_t cols() const { return cols_; }
    int64_t block_rows() const { return block_rows_; }
    int64_t block_cols() const { return block_cols_; }
    const std::vector<int32_t>& crow_indices() const { return crow_indices_; }
    const std::vector<int32_t>& col_indices() const { return col_indices_; }
    std::vector<uint64_t> masks() const;  // always one a block
    uint64_t mask(size_t block) const { return masks_.empty() ? full_mask() : masks_[block]; }
    const std::vector<float>& values() const { return values_; }
    int64_t nnz_blocks() const { return static_cast<int64_t>(col_indices_.size()); }
    int64_t kept() const { return static_cast<int64_t>(values_.size()); }

private:
    uint64_t full_mask() const { return ~uint64_t{0} >> (64 - block_rows_ * block_cols_); }

    std::vector<int64_t> shape_;
    int64_t rows_, cols_, block_rows_, block_cols_;
    std::vector<int32_t> crow_indices_, col_indices_;
    std::vector<uint64_t> masks_;  // empty where every block is full: 1x1 blocks would take 8 bytes more a kept weight
    std::vector<float> values_;
};

// The same weight as plain CSR, column-sorted: what the packers start from.
struct Csr {
    std::vector<int64_t> row_start;  // rows + 1
    std::vector<int32_t> col;
    std::vector<float> value;
};
Csr to_csr(const BlockCSR& weight);

}  // namespace sparseprune
