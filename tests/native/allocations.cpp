#include "allocations.h"

#include <atomic>
#include <cstdlib>
#include <new>

namespace {

std::atomic<int64_t> counted{0}, left{0};
std::atomic<size_t> biggest{0};
std::atomic<bool> threw{false};

void account(size_t size) {
    counted.fetch_add(1, std::memory_order_relaxed);
    size_t before = biggest.load(std::memory_order_relaxed);
    while (size > before && !biggest.compare_exchange_weak(before, size, std::memory_order_relaxed)) {
    }
    if (left.load(std::memory_order_relaxed) > 0 && left.fetch_sub(1, std::memory_order_relaxed) == 1) {
        threw = true;
        throw std::bad_alloc();
    }
}

}  // namespace

namespace allocations {

void watch() { counted = 0, biggest = 0; }
int64_t count() { return counted; }
size_t largest() { return biggest; }
void fail_at(int64_t n) { threw = false, left = n; }
bool failed() { return threw; }

}  // namespace allocations

void* operator new(size_t size) {
    account(size);
    if (void* p = std::malloc(size ? size : 1)) return p;
    throw std::bad_alloc();
}

void* operator new(size_t size, std::align_val_t align) {
    account(size);
    const auto a = static_cast<size_t>(align);
    if (void* p = std::aligned_alloc(a, (size + a - 1) / a * a)) return p;
    throw std::bad_alloc();
}

// std::stable_sort's; a sanitizer's own would not fit our delete.
void* operator new(size_t size, const std::nothrow_t&) noexcept {
    try {
        return operator new(size);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
