// Our own thread pool: a job is one function that every thread runs once, with barriers between its steps.
#pragma once
#include <functional>
#include <mutex>

namespace sparseprune {

int available_cores();        // affinity mask, bounded by the cgroup's CPU quota
int num_threads();            // what set_num_threads said, or available_cores()
void set_num_threads(int n);  // >= 1; ValueError otherwise

// Runs step(i, thread) for i in [0, steps), thread in [0, threads): all threads finish step i before any starts i + 1.
// The caller is thread 0; workers take its floating-point mode. Where the pool is busy with another caller's job, the caller
// runs every part alone: same results, no waiting. after(i), where given, is called by thread 0 between two steps.
// The functions must not throw.
void run_steps(int threads, int steps, const std::function<void(int, int)>& step, const std::function<void(int)>& after = {});

// Guards the short lists that callers share (plans made, choices): never held while anything is planned or computed. One for all, since
// fork takes it: the child of a process whose other threads were anywhere finds it free, and the lists whole.
std::mutex& bookkeeping();

}  // namespace sparseprune
