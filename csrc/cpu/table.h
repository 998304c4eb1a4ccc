// The table of this instruction set's functions; the last include of each kernels_<isa>.cpp.
#pragma once

constexpr Kernels kTable = {kName,     kDenseRows, kMaxSingle, kMaxShift, kMaxMasked, kMaxDense, run_single,   run_masked,  run_dense,
                            dot_sparse, dot_dense, im2col,     copy_rows,  add_row,    max_pool_row, sum_pool_row, sum_row};
