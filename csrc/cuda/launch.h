// The C interface of the kernels. Each call sets the device, starts one kernel on the caller's stream and puts the device
// back; it allocates nothing, waits for nothing and touches no other stream, so it can be captured in a CUDA graph. No
// kernel needs a workspace. The result is 0, or a cudaError_t, which the two functions at the end name.
#pragma once
#include "blocks.h"
#include "gemv.h"
#include "spmm.h"

extern "C" {

enum SparsepruneType { sparseprune_float, sparseprune_half, sparseprune_bfloat };

// All pointers in `args` are the device's, packed weights 16-byte aligned.
// rows_an_entry: 1 or 4; tile: 1 or 4, args->g.strip is 32 times that.
int sparseprune_cuda_spmm(int device, void* stream, int type, int rows_an_entry, int tile, const sparseprune::cuda::SpmmArgs* args);
// inputs: 1, 2 or 4, at least args->n.
int sparseprune_cuda_gemv(int device, void* stream, int type, int inputs, int blocks, int warps, const sparseprune::cuda::GemvArgs* args);
// rows: 16 or 32, with vectors 8 too; math: of sparseprune::cuda::Math; warps: 1, 2, 4 or 8 a block. x is 16-byte aligned.
int sparseprune_cuda_blocks(int device, void* stream, int math, int rows, int vectors, int warps, const sparseprune::cuda::BlocksArgs* args);

// Versions as CUDA writes them (12040 is 12.4); driver 0: there is none.
int sparseprune_cuda_versions(int* driver, int* runtime);
// Multiprocessors, shared memory a block may have (bytes), compute capability (90 is 9.0).
int sparseprune_cuda_properties(int device, int* multiprocessors, int* shared_bytes, int* capability);

const char* sparseprune_cuda_error_name(int error);
const char* sparseprune_cuda_error_text(int error);
}
