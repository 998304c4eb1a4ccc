// Memory of one call: every intermediate value and scratch buffer at a fixed offset, reused as values die.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sparseprune {

struct Buffer {
    int64_t floats;
    int first_step, last_step;  // the steps between which it must keep its content
    int64_t offset = 0;         // floats, set by place_buffers
};

// Sets every offset so that buffers alive at the same step do not overlap; returns the arena's size in floats.
// Guarded, for the tests: each buffer alone, its end on a page boundary and followed by a page that Arena makes inaccessible; or,
// `before`, its beginning on one, preceded by such a page.
enum class Guard { none, behind, before };
int64_t place_buffers(std::vector<Buffer>& buffers, Guard guard);

class Arena {
public:
    Arena(int64_t floats, const std::vector<Buffer>* guarded);  // throws std::bad_alloc
    ~Arena();
    Arena(Arena&& other) noexcept;
    Arena& operator=(Arena&&) = delete;
    float* data() const { return data_; }

private:
    void* base_ = nullptr;
    size_t bytes_ = 0;
    float* data_ = nullptr;
};

}  // namespace sparseprune
