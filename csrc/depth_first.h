// Depth-first execution (Alwani et al. 2016, "Fused-layer CNN accelerators"): a group of layers is computed band of rows after band
// of rows, so that what they hand on stays in the second-level cache. A thread has its own bands and its own windows: the rows of
// an inner value that are needed just now. Rows at the border of two threads' bands are computed by both. Geometry only.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace sparseprune {

struct Range {
    int64_t begin = 0, end = 0;
    int64_t size() const { return end - begin; }
};

// Output rows [a, b) of a layer read its input's rows [a * stride + first, (b - 1) * stride + last].
struct BandInput {
    int value;
    int64_t stride, first, last;
    bool border;  // also the rows of zeros beyond the image
};

struct BandLayer {
    int output;
    std::vector<BandInput> inputs;
};

struct BandValue {
    int64_t height;
    int window;  // where its rows lie, perhaps with those of other values; -1: whole, in memory
};

// What a window holds during one band, and where that comes from.
struct WindowRows {
    Range rows;            // may go beyond the image, where it is zero
    int64_t kept = 0;      // of the rows before, that many stay:
    int64_t kept_at = 0;   // they lay so many rows after the first
    Range above, below;    // rows to be zeroed
};

struct Band {
    int64_t image;
    std::vector<Range> rows;          // that each layer computes
    std::vector<WindowRows> windows;
};

struct Schedule {
    std::vector<std::vector<Band>> threads;
    std::vector<int64_t> repeats;   // by thread: the bands are done for so many images, from the one that they name
    std::vector<int64_t> capacity;  // rows, by window
    std::vector<int64_t> most;      // rows of one band, by layer
    std::vector<int64_t> busiest;   // rows of all images, by layer, of the thread that computes most
};

// Whether each thread gets whole images.
bool many_images(int64_t images, int threads);

// The last layer's value is cut into `bands` bands an image; all images' bands go to the threads in order. Many images go whole.
Schedule make_schedule(const std::vector<BandLayer>& layers, const std::vector<BandValue>& values, int windows, int64_t images,
                       int64_t bands, int threads);

// Whether the layer computes each row of its output exactly once.
bool computes_once(const Schedule& schedule, size_t layer, int64_t height);

}  // namespace sparseprune
