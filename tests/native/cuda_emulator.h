// Runs a kernel body of csrc/cuda on the host: every thread of a block is a fiber, in random order between its barriers.
// Shared memory starts as NaN and asynchronous copies land only when waited for, so that what is read too early shows. The
// warp's collective operations follow their definitions in the PTX manual, not the kernels.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>

#include "cuda/portable.h"
#include "random.h"

namespace emulator {

namespace cuda = sparseprune::cuda;

// Threads that wait for each other.
struct Group {
    int size = 0, arrived = 0;
    int64_t generation = 0;
};

struct LaneWords {
    uint32_t a[4], b[2];
    const void* address;
};

struct Warp {
    Group group;
    LaneWords lanes[2][32];  // by the generation's parity: nobody is two ahead
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    bool inside;
};

class Block;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    const Group* waits = nullptr;
    int64_t since = 0;
    bool done = false;
    std::vector<Copy> copies;
};

// A block of threads, and where in the grid it is.
class Block {
public:
    Block(int threads, size_t shared_bytes, int x, int y, int blocks_x, Random& random)
        : threads_(threads), x_(x), y_(y), blocks_x_(blocks_x), random_(random), fibers_(static_cast<size_t>(threads)),
          warps_(static_cast<size_t>(threads / 32)) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
        shared_.reset(static_cast<char*>(memory));
        memset(shared_.get(), 0xff, shared_bytes);
        all_.size = threads;
        for (Warp& warp : warps_) warp.group.size = 32;
    }

    void run(const std::function<void(int)>& body) {
        body_ = &body;
        for (Fiber& fiber : fibers_) {
            fiber.stack.reset(new char[kStack]);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = &scheduler_;
            const auto bits = reinterpret_cast<uintptr_t>(this);
            const auto index = static_cast<unsigned>(&fiber - fibers_.data());
            makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 3, static_cast<unsigned>(bits >> 32),
                        static_cast<unsigned>(bits), index);
        }
        std::vector<int> order(fibers_.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
        for (bool ran = true; ran;) {
            ran = false;
            std::shuffle(order.begin(), order.end(), random_);
            for (const int i : order) {
                Fiber& fiber = fibers_[static_cast<size_t>(i)];
                if (fiber.done || (fiber.waits != nullptr && fiber.waits->generation == fiber.since)) continue;
                fiber.waits = nullptr;
                current_ = i;
                swapcontext(&scheduler_, &fiber.context);
                ran = true;
            }
        }
        for (const Fiber& fiber : fibers_)
            if (!fiber.done) throw std::runtime_error("a barrier that not all threads reach");
    }

    void wait(Group& group, int thread) {
        Fiber& fiber = fibers_[static_cast<size_t>(thread)];
        if (++group.arrived == group.size) {
            group.arrived = 0;
            ++group.generation;
            return;
        }
        fiber.waits = &group;
        fiber.since = group.generation;
        swapcontext(&fiber.context, &scheduler_);
    }

    // Gives `mine` to the warp; returns all 32 lanes' words.
    const LaneWords* exchange(int thread, const LaneWords& mine) {
        Warp& warp = warps_[static_cast<size_t>(thread / 32)];
        LaneWords* lanes = warp.lanes[warp.group.generation % 2];
        lanes[thread % 32] = mine;
        wait(warp.group, thread);
        return lanes;
    }

    Group& all() { return all_; }
    std::vector<Copy>& copies(int thread) { return fibers_[static_cast<size_t>(thread)].copies; }
    void* shared() { return shared_.get(); }
    int threads() const { return threads_; }
    int x() const { return x_; }
    int y() const { return y_; }
    int blocks_x() const { return blocks_x_; }

private:
    static constexpr size_t kStack = 64 << 10;
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };

    static void enter(unsigned high, unsigned low, unsigned index) {
        auto* block = reinterpret_cast<Block*>(uintptr_t{high} << 32 | low);
        (*block->body_)(static_cast<int>(index));
        block->fibers_[index].done = true;
    }

    int threads_, x_, y_, blocks_x_, current_ = 0;
    Random& random_;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    Group all_;
    ucontext_t scheduler_;
    std::unique_ptr<char, Free> shared_;
    const std::function<void(int)>* body_ = nullptr;
};

// What a kernel body sees: the counterpart of csrc/cuda/context.cuh.
class Context {
public:
    Context(Block& block, int thread) : block_(block), thread_(thread) {}

    int thread() const { return thread_; }
    int threads() const { return block_.threads(); }
    int block_x() const { return block_.x(); }
    int block_y() const { return block_.y(); }
    int blocks_x() const { return block_.blocks_x(); }
    void* shared() { return block_.shared(); }
    void sync() { block_.wait(block_.all(), thread_); }

    void copy(float* to, const float* from, bool inside) { later(to, from, 4, inside); }
    template <class T>
    void copy(T* to, const T* from, bool inside) {
        *to = inside ? *from : T{0};
    }
    void copy16(char* to, const void* from, bool inside) {
        aligned(to, 16), aligned(from, 16);
        later(to, from, 16, inside);
    }
    void commit() {}
    void wait_all() {
        for (const Copy& c : block_.copies(thread_)) {
            if (c.inside) memcpy(c.to, c.from, c.bytes);
            else memset(c.to, 0, c.bytes);
        }
        block_.copies(thread_).clear();
    }

    uint32_t read(const uint32_t* p) { return *p; }
    cuda::Words2 read2(const uint32_t* p) { return *as<cuda::Words2>(p); }
    cuda::Words4 read4(const uint32_t* p) { return *as<cuda::Words4>(p); }
    template <class T>
    T stream(const T* p) { return *as<T>(p); }
    uint16_t load16(const char* p) { return *as<uint16_t>(p); }
    uint32_t load32(const char* p) { return *as<uint32_t>(p); }
    void store32(char* p, uint32_t value) {
        aligned(p, 4);
        memcpy(p, &value, 4);
    }
    float fma(float a, float b, float c) { return std::fma(a, b, c); }

    int shuffle(int value, int lane) {
        LaneWords mine{};
        mine.a[0] = static_cast<uint32_t>(value);
        return static_cast<int>(block_.exchange(thread_, mine)[lane].a[0]);
    }
    float shuffle_xor(float value, int mask) {
        LaneWords mine{};
        mine.a[0] = cuda::bits_as<uint32_t>(value);
        return cuda::bits_as<float>(block_.exchange(thread_, mine)[thread_ % 32 ^ mask].a[0]);
    }

    // ldmatrix.x4.b16: matrix i's row r begins where lane 8 i + r says; lane l gets word l % 4 of row l / 4.
    void ldmatrix(uint32_t (&words)[4], const char* row) {
        aligned(row, 16);
        LaneWords mine{};
        mine.address = row;
        const LaneWords* lanes = block_.exchange(thread_, mine);
        for (int i = 0; i < 4; ++i)
            memcpy(&words[i], static_cast<const char*>(lanes[8 * i + lane() / 4].address) + lane() % 4 * 4, 4);
    }

    // mma.m16n8k16, 16-bit: A(row, k) is in lane row % 8 * 4 + k % 8 / 2, word row / 8 + k / 8 * 2, half k % 2;
    // B(k, col) in lane col * 4 + k % 8 / 2, word k / 8, half k % 2. C: word i of lane l is (l / 4 + i / 2 * 8, l % 4 * 2 + i % 2).
    template <bool BF>
    void mma16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        const LaneWords* lanes = give(a, b);
        const auto half = [](uint32_t word, int k) {
            const auto bits = static_cast<uint16_t>(word >> (k % 2 * 16));
            return BF ? cuda::to_float(cuda::BFloat{bits}) : cuda::to_float(cuda::Half{bits});
        };
        for (int i = 0; i < 4; ++i) {
            const int row = lane() / 4 + i / 2 * 8, col = lane() % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k)
                c[i] += half(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k) * half(lanes[col * 4 + k % 8 / 2].b[k / 8], k);
        }
    }
    // mma.m16n8k8, tf32: A(row, k) is in lane row % 8 * 4 + k % 4, word row / 8 + k / 4 * 2; B(k, col) in lane col * 4 + k % 4,
    // word k / 4. The 13 low bits of an operand are not looked at.
    void mma8(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        const LaneWords* lanes = give(a, b);
        const auto real = [](uint32_t word) { return cuda::bits_as<float>(word & 0xffffe000u); };
        for (int i = 0; i < 4; ++i) {
            const int row = lane() / 4 + i / 2 * 8, col = lane() % 4 * 2 + i % 2;
            for (int k = 0; k < 8; ++k) c[i] += real(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) * real(lanes[col * 4 + k % 4].b[k / 4]);
        }
    }

private:
    int lane() const { return thread_ % 32; }
    const LaneWords* give(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
        LaneWords mine{};
        std::copy(a, a + 4, mine.a), std::copy(b, b + 2, mine.b);
        return block_.exchange(thread_, mine);
    }
    static void aligned(const void* p, size_t bytes) {
        if (reinterpret_cast<uintptr_t>(p) % bytes != 0) throw std::runtime_error("a misaligned address");
    }
    template <class T>
    static const T* as(const void* p) {
        aligned(p, alignof(T));
        return static_cast<const T*>(p);
    }
    void later(void* to, const void* from, size_t bytes, bool inside) { block_.copies(thread_).push_back({to, from, bytes, inside}); }

    Block& block_;
    int thread_;
};

// Every block of a grid, one after the other.
template <class Body>
void launch(int blocks_x, int blocks_y, int threads, size_t shared_bytes, Random& random, const Body& body) {
    for (int y = 0; y < blocks_y; ++y)
        for (int x = 0; x < blocks_x; ++x) {
            Block block(threads, shared_bytes, x, y, blocks_x, random);
            block.run([&](int thread) {
                Context context(block, thread);
                body(context);
            });
        }
}

}  // namespace emulator
