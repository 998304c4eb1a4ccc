// Choice by measurement: every convolution's candidates are timed inside the running network.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "program.h"

namespace sparseprune {

struct TunedLayer {
    int node;
    Choice choice;
    double seconds;                  // of the choice
    double dense_seconds;            // of our fastest dense variant, negative where none was timed
    int candidates;
};

// A sparse variant counts as min_gain times slower than it is where a dense one was timed.
// Sets the program's choices for these shapes. Stops early, with the best so far, when budget_seconds have passed.
// progress(done, total) is called between rounds; returning false stops too.
std::vector<TunedLayer> tune(Program& program, const std::vector<Shape>& shapes, int threads, const Kernels& kernels,
                             double budget_seconds, double min_gain, const std::function<bool(int, int)>& progress);

}  // namespace sparseprune
