#include "context.cuh"
#include "launch.h"
#include "start.cuh"

namespace sparseprune::cuda {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(1024, 1) gemv_kernel(const GemvArgs args) {
    DeviceContext ctx;
    gemv_body<T, N>(ctx, args);
}

template <class T>
int run(int device, void* stream, int inputs, int blocks, int warps, const GemvArgs& a) {
    if (a.n < 1 || a.n > inputs || blocks < 1 || warps < 1 || warps > 32) return cudaErrorInvalidValue;
    const size_t shared = (static_cast<size_t>(a.k) + 1) * static_cast<size_t>(inputs) * sizeof(float);
    const dim3 grid = grid_of(blocks, 1);
    if (inputs == 1) return start<GemvArgs>(device, stream, gemv_kernel<T, 1>, grid, 32 * warps, shared, a);
    if (inputs == 2) return start<GemvArgs>(device, stream, gemv_kernel<T, 2>, grid, 32 * warps, shared, a);
    if (inputs == 4) return start<GemvArgs>(device, stream, gemv_kernel<T, 4>, grid, 32 * warps, shared, a);
    return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sparseprune::cuda

int sparseprune_cuda_gemv(int device, void* stream, int type, int inputs, int blocks, int warps, const sparseprune::cuda::GemvArgs* args) {
    using namespace sparseprune::cuda;
    if (type == sparseprune_float) return run<float>(device, stream, inputs, blocks, warps, *args);
    if (type == sparseprune_half) return run<Half>(device, stream, inputs, blocks, warps, *args);
    if (type == sparseprune_bfloat) return run<BFloat>(device, stream, inputs, blocks, warps, *args);
    return cudaErrorInvalidValue;
}
