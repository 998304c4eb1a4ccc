// What a kernel body sees on the GPU; tests/native/cuda_emulator.h has its counterpart on the host.
#pragma once
#include "portable.h"

namespace sparseprune::cuda {

extern __shared__ __align__(16) char dynamic_shared[];

struct DeviceContext {
    __device__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ int threads() const { return static_cast<int>(blockDim.x); }
    __device__ int block_x() const { return static_cast<int>(blockIdx.x); }
    __device__ int block_y() const { return static_cast<int>(blockIdx.y); }
    __device__ int blocks_x() const { return static_cast<int>(gridDim.x); }
    __device__ void* shared() const { return dynamic_shared; }
    __device__ void sync() const { __syncthreads(); }

    // Copies to shared memory, zeros where not `inside`. 16 bits are too few for an asynchronous one.
    __device__ void copy(float* to, const float* from, bool inside) const {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address(to)), "l"(from), "r"(inside ? 4 : 0) : "memory");
    }
    template <class T>
    __device__ void copy(T* to, const T* from, bool inside) const {
        uint16_t bits = 0;
        if (inside) bits = __ldg(reinterpret_cast<const unsigned short*>(from));
        to->bits = bits;
    }
    __device__ void copy16(char* to, const void* from, bool inside) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
    }
    __device__ void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
    __device__ void wait_all() const { asm volatile("cp.async.wait_all;" ::: "memory"); }

    // Weights, which nothing writes while a kernel runs.
    __device__ uint32_t read(const uint32_t* p) const { return __ldg(p); }
    __device__ Words2 read2(const uint32_t* p) const {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(p));
        return {{v.x, v.y}};
    }
    __device__ Words4 read4(const uint32_t* p) const {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
        return {{v.x, v.y, v.z, v.w}};
    }
    // ... of which each is read once: not worth a place in the first-level cache
    template <class T>
    __device__ T stream(const T* p) const {
        static_assert(sizeof(T) == 8 || sizeof(T) == 16);
        if constexpr (sizeof(T) == 8) {
            Words2 v;
            asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.w[0]), "=r"(v.w[1]) : "l"(p));
            return bits_as<T>(v);
        } else {
            Words4 v;
            asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                : "l"(p));
            return bits_as<T>(v);
        }
    }
    __device__ uint16_t load16(const char* p) const { return *reinterpret_cast<const uint16_t*>(p); }
    __device__ uint32_t load32(const char* p) const { return *reinterpret_cast<const uint32_t*>(p); }
    __device__ void store32(char* p, uint32_t value) const { *reinterpret_cast<uint32_t*>(p) = value; }
    __device__ float fma(float a, float b, float c) const { return fmaf(a, b, c); }

    __device__ int shuffle(int value, int lane) const { return __shfl_sync(0xffffffffu, value, lane); }
    __device__ float shuffle_xor(float value, int mask) const { return __shfl_xor_sync(0xffffffffu, value, mask); }

    __device__ void ldmatrix(uint32_t (&w)[4], const char* row) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                     : "r"(address(row))
                     : "memory");
    }
    template <bool BF>
    __device__ void mma16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
        if constexpr (BF)
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        else
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
    __device__ void mma8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }

private:
    static __device__ uint32_t address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }
};

}  // namespace sparseprune::cuda
