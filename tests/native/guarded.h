#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <map>
#include <vector>

// Whether guarded memory begins at an inaccessible page, rather than ending at one; the tests change it from case to case.
inline bool& guard_before() {
    static bool before = false;
    return before;
}

// Floats that end exactly at an inaccessible page, or begin there. Not initialised: memory of a few pages is used again, for making it
// takes longer than most tests that use it. Of one thread.
class Guarded {
public:
    explicit Guarded(size_t floats) : floats_(floats) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        const size_t body = (floats * 4 + page - 1) / page * page;
        bytes_ = body + 2 * page;
        std::vector<char*>& unused = unused_of(bytes_);
        if (unused.empty()) {
            base_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            mprotect(base_, page, PROT_NONE);
            mprotect(base_ + page + body, page, PROT_NONE);
        } else {
            base_ = unused.back();
            unused.pop_back();
        }
        data_ = reinterpret_cast<float*>(base_ + page + (guard_before() ? 0 : body - floats * 4));
    }
    ~Guarded() {
        if (bytes_ <= kKept) unused_of(bytes_).push_back(base_);
        else munmap(base_, bytes_);
    }
    Guarded(const Guarded&) = delete;
    float* data() { return data_; }
    size_t size() const { return floats_; }

private:
    static constexpr size_t kKept = 64 << 10;
    static std::vector<char*>& unused_of(size_t bytes) {
        static auto& all = *new std::map<size_t, std::vector<char*>>;
        return all[bytes];
    }
    size_t floats_, bytes_;
    char* base_;
    float* data_;
};
