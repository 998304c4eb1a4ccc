#include <cuda_runtime_api.h>

#include "launch.h"

int sparseprune_cuda_versions(int* driver, int* runtime) {
    const cudaError_t error = cudaDriverGetVersion(driver);
    return error != cudaSuccess ? error : cudaRuntimeGetVersion(runtime);
}

int sparseprune_cuda_properties(int device, int* multiprocessors, int* shared_bytes, int* capability) {
    int major = 0, minor = 0;
    cudaError_t error = cudaDeviceGetAttribute(multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    *capability = 10 * major + minor;
    return error;
}

const char* sparseprune_cuda_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* sparseprune_cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
