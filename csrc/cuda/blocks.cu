#include "context.cuh"
#include "launch.h"
#include "start.cuh"

namespace sparseprune::cuda {
namespace {

template <Math M, int R, bool VECTORS>
__global__ void __launch_bounds__(32 * kBlockWarps, 1) blocks_kernel(const BlocksArgs args) {
    DeviceContext ctx;
    blocks_body<M, R, VECTORS>(ctx, args);
}

template <Math M, int R, bool VECTORS>
int run(int device, void* stream, int warps, const BlocksArgs& a) {
    if (warps != 1 && warps != 2 && warps != 4 && warps != kBlockWarps) return cudaErrorInvalidValue;
    constexpr int element = static_cast<int>(sizeof(typename Element<M>::type));
    const dim3 grid = grid_of(ceil_div(a.g.pixels, kStrip), a.row_groups * R / kWarpRows / warps);
    const auto shared = static_cast<size_t>(blocks_shared(a.g.span, a.chunk, element));
    return start<BlocksArgs>(device, stream, blocks_kernel<M, R, VECTORS>, grid, 32 * warps, shared, a);
}

template <Math M>
int run(int device, void* stream, int rows, int vectors, int warps, const BlocksArgs& a) {
    if (!vectors && rows == 16) return run<M, 16, false>(device, stream, warps, a);
    if (!vectors && rows == 32) return run<M, 32, false>(device, stream, warps, a);
    if (vectors && rows == 8) return run<M, 8, true>(device, stream, warps, a);
    if (vectors && rows == 16) return run<M, 16, true>(device, stream, warps, a);
    if (vectors && rows == 32) return run<M, 32, true>(device, stream, warps, a);
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sparseprune::cuda

int sparseprune_cuda_blocks(int device, void* stream, int math, int rows, int vectors, int warps, const sparseprune::cuda::BlocksArgs* args) {
    using namespace sparseprune::cuda;
    switch (static_cast<Math>(math)) {
        case Math::half: return run<Math::half>(device, stream, rows, vectors, warps, *args);
        case Math::bfloat: return run<Math::bfloat>(device, stream, rows, vectors, warps, *args);
        case Math::tf32: return run<Math::tf32>(device, stream, rows, vectors, warps, *args);
        case Math::tf32x3: return run<Math::tf32x3>(device, stream, rows, vectors, warps, *args);
    }
    return cudaErrorInvalidValue;
}
