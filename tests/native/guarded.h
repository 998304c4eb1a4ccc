#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>

// Whether guarded memory begins at an inaccessible page, rather than ending at one; the tests change it from case to case.
inline bool& guard_before() {
    static bool before = false;
    return before;
}

// Floats that end exactly at an inaccessible page, or begin there.
class Guarded {
public:
    explicit Guarded(size_t floats) : floats_(floats) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t body = (floats * 4 + page - 1) / page * page;
        bytes_ = body + 2 * page;
        base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(base_, page, PROT_NONE);
        mprotect(base_ + page + body, page, PROT_NONE);
        data_ = reinterpret_cast<float*>(base_ + page + (guard_before() ? 0 : body - floats * 4));
    }
    ~Guarded() { munmap(base_, bytes_); }
    Guarded(const Guarded&) = delete;
    float* data() { return data_; }
    size_t size() const { return floats_; }

private:
    size_t floats_, bytes_;
    char* base_;
    float* data_;
};
