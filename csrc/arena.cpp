#include "arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

namespace sparseprune {
namespace {

constexpr size_t kHugePage = 2u << 20;

int64_t page_floats() { return sysconf(_SC_PAGESIZE) / 4; }

int64_t place_guarded(std::vector<Buffer>& buffers, bool before) {
    const int64_t page = page_floats();
    int64_t at = page;
    for (Buffer& b : buffers) {
        const int64_t pages = (b.floats + page - 1) / page * page;
        b.offset = before ? at : at + pages - b.floats;
        at += pages + page;
    }
    return at;
}

}  // namespace

int64_t place_buffers(std::vector<Buffer>& buffers, Guard guard) {
    for (Buffer& b : buffers) b.floats = (b.floats + 15) / 16 * 16;
    if (guard != Guard::none) return place_guarded(buffers, guard == Guard::before);
    std::vector<size_t> order(buffers.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return buffers[a].floats > buffers[b].floats; });
    std::vector<size_t> placed;  // by offset
    int64_t size = 0;
    for (const size_t i : order) {
        Buffer& b = buffers[i];
        int64_t at = 0;
        for (const size_t j : placed) {
            const Buffer& other = buffers[j];
            if (other.last_step < b.first_step || b.last_step < other.first_step) continue;
            if (at + b.floats <= other.offset) break;
            at = std::max(at, other.offset + other.floats);
        }
        b.offset = at;
        size = std::max(size, at + b.floats);
        placed.insert(std::upper_bound(placed.begin(), placed.end(), i, [&](size_t x, size_t y) {
            return buffers[x].offset < buffers[y].offset;
        }), i);
    }
    return size;
}

Arena::Arena(int64_t floats, const std::vector<Buffer>* guarded) {
    bytes_ = static_cast<size_t>(floats) * 4 + kHugePage;
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) {
        base_ = nullptr;
        throw std::bad_alloc();
    }
    const size_t start = (reinterpret_cast<size_t>(base_) + kHugePage - 1) / kHugePage * kHugePage;
    data_ = reinterpret_cast<float*>(start);
    if (guarded) {
        const size_t page = static_cast<size_t>(page_floats());
        mprotect(data_, page * 4, PROT_NONE);
        for (const Buffer& b : *guarded) {
            std::memset(data_ + b.offset, 0xFF, static_cast<size_t>(b.floats) * 4);  // NaN: what is read before it is written is seen
            const int64_t end = (b.offset + b.floats + page_floats() - 1) / page_floats() * page_floats();
            mprotect(data_ + end, page * 4, PROT_NONE);
        }
    } else {
        madvise(data_, static_cast<size_t>(floats) * 4, MADV_HUGEPAGE);  // a hint: planes of many layers share few page-table entries
    }
}

Arena::~Arena() {
    if (base_) munmap(base_, bytes_);
}

Arena::Arena(Arena&& other) noexcept : base_(other.base_), bytes_(other.bytes_), data_(other.data_) { other.base_ = nullptr; }

}  // namespace sparseprune
