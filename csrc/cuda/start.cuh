// Starting a kernel on a device, and putting the thread's device back.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

namespace sparseprune::cuda {

constexpr size_t kSharedWithoutAsking = 48 << 10;

template <class Args>
int start(int device, void* stream, void (*kernel)(Args), dim3 grid, int threads, size_t shared, const Args& args) {
    int before = 0;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
    if (error != cudaSuccess) return error;
    if (shared > kSharedWithoutAsking)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error == cudaSuccess) {
        Args copy = args;
        void* pointers[] = {&copy};
        error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(threads)), pointers, shared,
                                 static_cast<cudaStream_t>(stream));
    }
    if (error != cudaSuccess) (void)cudaGetLastError();  // it is returned; nobody shall find it later
    const cudaError_t back = before == device ? cudaSuccess : cudaSetDevice(before);
    return error != cudaSuccess ? error : back;
}

inline dim3 grid_of(int x, int y) { return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)); }

}  // namespace sparseprune::cuda
