// The table of this instruction set's functions; the last include of each kernels_<isa>.cpp.
#pragma once

constexpr Kernels kTable = {
    kName, kDenseRows, kMaxSingle, kMaxShift, kMaxMasked, kMaxDense, kMaxPart, run_single, run_masked, run_dense, dot_sparse, dot_dense, im2col,
    copy_rows, split_rows, add_row, max_pool_row, sum_pool_row, sum_row, act_row,
    {binary_row<Add>, binary_row<Subtract>, binary_row<Multiply>, binary_row<Divide>, binary_row<Larger>, binary_row<Smaller>,
     binary_row<Prelu>},
    max_row, min_row, square_row, exp_row, norm_row, sum_columns, square_columns, exp_columns, norm_columns, lerp_row, lerp_gather, gemm};
