#include "context.cuh"
#include "launch.h"
#include "start.cuh"

namespace sparseprune::cuda {
namespace {

template <class T, int V, int TILE>
__global__ void __launch_bounds__(32 * kSpmmWarps, 2) spmm_kernel(const SpmmArgs args) {
    DeviceContext ctx;
    spmm_body<T, V, TILE>(ctx, args);
}

template <class T, int V, int TILE>
int run(int device, void* stream, const SpmmArgs& a) {
    const dim3 grid = grid_of(ceil_div(a.g.pixels, 32 * TILE), a.tiles / kSpmmWarps);
    const size_t shared = 2 * static_cast<size_t>(spmm_buffer(a.g.span, a.chunk)) * sizeof(T);
    return start<SpmmArgs>(device, stream, spmm_kernel<T, V, TILE>, grid, 32 * kSpmmWarps, shared, a);
}

template <class T>
int run(int device, void* stream, int v, int tile, const SpmmArgs& a) {
    if (v == 1 && tile == 1) return run<T, 1, 1>(device, stream, a);
    if (v == 1 && tile == 4) return run<T, 1, 4>(device, stream, a);
    if (v == 4 && tile == 1) return run<T, 4, 1>(device, stream, a);
    if (v == 4 && tile == 4) return run<T, 4, 4>(device, stream, a);
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sparseprune::cuda

int sparseprune_cuda_spmm(int device, void* stream, int type, int rows_an_entry, int tile, const sparseprune::cuda::SpmmArgs* args) {
    using namespace sparseprune::cuda;
    if (type == sparseprune_float) return run<float>(device, stream, rows_an_entry, tile, *args);
    if (type == sparseprune_half) return run<Half>(device, stream, rows_an_entry, tile, *args);
    if (type == sparseprune_bfloat) return run<BFloat>(device, stream, rows_an_entry, tile, *args);
    return cudaErrorInvalidValue;
}
