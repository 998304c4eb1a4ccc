// The gate of the canonical weight: a BlockCSR that exists has every invariant that block_csr.h lists.
#include "block_csr.h"

#include <algorithm>
#include <bitset>
#include <limits>
#include <utility>

#include "errors.h"

namespace sparseprune {
namespace {

constexpr int64_t max_extent = std::numeric_limits<int32_t>::max();
constexpr int64_t max_elements = int64_t{1} << 40;

int64_t popcount(uint64_t mask) { return static_cast<int64_t>(std::bitset<64>(mask).count()); }

struct Extents {
    int64_t rows, cols;
};

// (out, ...) as a matrix rows x cols. Each product is checked before it is formed, so nothing overflows.
Extents matrix_of(const std::vector<int64_t>& shape) {
    if (shape.size() < 2) throw ValueError(message("shape has ", shape.size(), " dimensions, expected 2 or more"));
    for (size_t i = 0; i < shape.size(); ++i)
        if (shape[i] < 1 || shape[i] > max_extent)
            throw ValueError(message("shape[", i, "]=", shape[i], " is not in [1, ", max_extent, "]"));
    int64_t cols = 1;
    for (size_t i = 1; i < shape.size(); ++i) {
        if (cols > max_extent / shape[i])
            throw ValueError(message("shape: the product of all but its first dimension exceeds ", max_extent));
        cols *= shape[i];
    }
    if (shape[0] > max_elements / cols) throw ValueError(message("shape holds more than ", max_elements, " elements"));
    return {shape[0], cols};
}

void check_block_shape(Extents matrix, int64_t block_rows, int64_t block_cols) {
    if (block_rows < 1 || block_rows > 64)
        throw ValueError(message("block_shape[0]=", block_rows, " is not in [1, 64]"));
    if (block_cols < 1 || block_cols > 64)
        throw ValueError(message("block_shape[1]=", block_cols, " is not in [1, 64]"));
    if (block_rows * block_cols > 64)
        throw ValueError(message("block_shape=(", block_rows, ", ", block_cols, ") has more than 64 entries"));
    if (matrix.rows % block_rows != 0)
        throw ValueError(message("block_shape[0]=", block_rows, " does not divide out_channels=", matrix.rows));
    if (matrix.cols % block_cols != 0)
        throw ValueError(message("block_shape[1]=", block_cols, " does not divide columns=", matrix.cols));
}

void check_crow(const std::vector<int32_t>& crow, int64_t block_row_count, int64_t nnz_blocks) {
    if (static_cast<int64_t>(crow.size()) != block_row_count + 1)
        throw ValueError(message("crow_indices has ", crow.size(), " elements, expected ", block_row_count + 1));
    if (crow[0] != 0) throw ValueError(message("crow_indices[0]=", crow[0], ", expected 0"));
    for (size_t i = 1; i < crow.size(); ++i)
        if (crow[i] < crow[i - 1])
            throw ValueError(message("crow_indices[", i, "]=", crow[i], " is below crow_indices[", i - 1,
                                     "]=", crow[i - 1]));
    if (crow.back() != nnz_blocks)
        throw ValueError(message("crow_indices[", crow.size() - 1, "]=", crow.back(), " is not the ", nnz_blocks,
                                 " elements of col_indices"));
}

// `crow` has passed check_crow.
void check_columns(const std::vector<int32_t>& crow, const std::vector<int32_t>& col, int64_t block_col_count) {
    for (size_t row = 0; row + 1 < crow.size(); ++row) {
        const auto first = static_cast<size_t>(crow[row]), last = static_cast<size_t>(crow[row + 1]);
        for (size_t i = first; i < last; ++i) {
            if (col[i] < 0 || col[i] >= block_col_count)
                throw ValueError(message("col_indices[", i, "]=", col[i], " is not in [0, ", block_col_count, ")"));
            if (i > first && col[i] <= col[i - 1])
                throw ValueError(message("col_indices[", i, "]=", col[i], " is not above col_indices[", i - 1,
                                         "]=", col[i - 1], " in block row ", row));
        }
    }
}

void check_value_count(int64_t values, int64_t kept) {
    if (values != kept) throw ValueError(message("values has ", values, " elements, expected ", kept, ", the entries kept"));
}

void check_masks(const std::vector<uint64_t>& masks, int64_t nnz_blocks, uint64_t full, int64_t value_count) {
    if (static_cast<int64_t>(masks.size()) != nnz_blocks)
        throw ValueError(message("masks has ", masks.size(), " elements, expected ", nnz_blocks));
    int64_t kept = 0;
    for (size_t i = 0; i < masks.size(); ++i) {
        if (masks[i] == 0) throw ValueError(message("masks[", i, "]=0: a stored block keeps an entry"));
        if ((masks[i] & ~full) != 0)
            throw ValueError(message("masks[", i, "]=", masks[i], " has bits outside the block: expected at most ", full));
        kept += popcount(masks[i]);
    }
    check_value_count(value_count, kept);
}

// visit(row, col, value) for each kept entry, block by block in bit order; in each row the columns ascend.
template <class Visit>
void for_each_kept(const BlockCSR& weight, Visit visit) {
    const int64_t C = weight.block_cols(), bits = weight.block_rows() * C;
    size_t next = 0;
    for (size_t block_row = 0; block_row + 1 < weight.crow_indices().size(); ++block_row) {
        const int64_t row = static_cast<int64_t>(block_row) * weight.block_rows();
        const auto last = static_cast<size_t>(weight.crow_indices()[block_row + 1]);
        for (auto i = static_cast<size_t>(weight.crow_indices()[block_row]); i < last; ++i) {
            const int64_t col = weight.col_indices()[i] * C;
            const uint64_t mask = weight.mask(i);
            for (int64_t bit = 0; bit < bits; ++bit)
                if ((mask >> bit) & 1) visit(row + bit / C, col + bit % C, weight.values()[next++]);
        }
    }
}

}  // namespace

BlockCSR::BlockCSR(std::vector<int64_t> shape, int64_t block_rows, int64_t block_cols,
                   std::vector<int32_t> crow_indices, std::vector<int32_t> col_indices, std::vector<uint64_t> masks,
                   std::vector<float> values)
    : shape_(std::move(shape)),
      rows_(0),
      cols_(0),
      block_rows_(block_rows),
      block_cols_(block_cols),
      crow_indices_(std::move(crow_indices)),
      col_indices_(std::move(col_indices)),
      masks_(std::move(masks)),
      values_(std::move(values)) {
    const Extents matrix = matrix_of(shape_);
    check_block_shape(matrix, block_rows_, block_cols_);
    rows_ = matrix.rows;
    cols_ = matrix.cols;
    check_crow(crow_indices_, rows_ / block_rows_, nnz_blocks());
    check_columns(crow_indices_, col_indices_, cols_ / block_cols_);
    if (masks_.empty()) {
        check_value_count(kept(), nnz_blocks() * block_rows_ * block_cols_);
        return;
    }
    const uint64_t full = full_mask();
    check_masks(masks_, nnz_blocks(), full, kept());
    if (std::all_of(masks_.begin(), masks_.end(), [full](uint64_t mask) { return mask == full; })) std::vector<uint64_t>().swap(masks_);
}

std::vector<uint64_t> BlockCSR::masks() const {
    return masks_.empty() ? std::vector<uint64_t>(col_indices_.size(), full_mask()) : masks_;
}

BlockCSR BlockCSR::from_dense(const float* dense, const uint8_t* mask, std::vector<int64_t> shape, int64_t block_rows,
                              int64_t block_cols) {
    const Extents matrix = matrix_of(shape);
    check_block_shape(matrix, block_rows, block_cols);
    std::vector<int32_t> crow_indices{0}, col_indices;
    std::vector<uint64_t> masks;
    std::vector<float> values;
    for (int64_t row = 0; row < matrix.rows; row += block_rows) {
        for (int64_t col = 0; col < matrix.cols; col += block_cols) {
            uint64_t block = 0;
            for (int64_t r = 0; r < block_rows; ++r) {
                for (int64_t c = 0; c < block_cols; ++c) {
                    const int64_t at = (row + r) * matrix.cols + col + c;
                    if (mask ? mask[at] == 0 : dense[at] == 0) continue;
                    block |= uint64_t{1} << (r * block_cols + c);
                    values.push_back(dense[at]);
                }
            }
            if (block == 0) continue;
            masks.push_back(block);
            col_indices.push_back(static_cast<int32_t>(col / block_cols));  // below cols, an int32
        }
        if (static_cast<int64_t>(col_indices.size()) > max_extent)
            throw ValueError(message("the weight keeps more than ", max_extent, " blocks"));
        crow_indices.push_back(static_cast<int32_t>(col_indices.size()));
    }
    return BlockCSR(std::move(shape), block_rows, block_cols, std::move(crow_indices), std::move(col_indices),
                    std::move(masks), std::move(values));
}

void BlockCSR::to_dense(float* dense) const {
    for (int64_t i = 0; i < rows_ * cols_; ++i) dense[i] = 0;
    for_each_kept(*this, [&](int64_t row, int64_t col, float value) { dense[row * cols_ + col] = value; });
}

Csr to_csr(const BlockCSR& weight) {
    Csr csr;
    csr.row_start.assign(static_cast<size_t>(weight.rows()) + 1, 0);
    for_each_kept(weight, [&](int64_t row, int64_t, float) { ++csr.row_start[static_cast<size_t>(row) + 1]; });
    for (size_t i = 1; i < csr.row_start.size(); ++i) csr.row_start[i] += csr.row_start[i - 1];

    // Kept entries arrive with ascending columns in each row, so a cursor a row is all the sorting there is.
    std::vector<int64_t> cursor(csr.row_start.begin(), csr.row_start.end() - 1);
    csr.col.resize(weight.values().size());
    csr.value.resize(weight.values().size());
    for_each_kept(weight, [&](int64_t row, int64_t col, float value) {
        const auto at = static_cast<size_t>(cursor[static_cast<size_t>(row)]++);
        csr.col[at] = static_cast<int32_t>(col);
        csr.value[at] = value;
    });
    return csr;
}

}  // namespace sparseprune
