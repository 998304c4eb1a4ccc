#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "errors.h"

namespace sparseprune {
namespace {

constexpr int kMaxThreads = 256;
// How long an idle worker looks for the next job before it sleeps: longer than a caller takes between two calls in a row.
constexpr auto kSpin = std::chrono::microseconds(300);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits until done() holds: spinning first, then giving the processor away, since its peer may need this very core.
template <class Done>
void spin_until(const Done& done) {
    for (int i = 0; !done(); ++i) {
        if (i < 300) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

// One call's work; it lives on the caller's stack until every worker has counted itself out.
struct Job {
    const std::function<void(int, int)>& step;
    const std::function<void(int)>& after;
    int threads, steps;
    std::fenv_t mode{};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<int> finished{0};

    void barrier(int round) {
        const int target = round * threads;
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 >= target) return;
        spin_until([&] { return arrived.load(std::memory_order_acquire) >= target; });
    }

    void work(int id) {
        for (int i = 0; i < steps; ++i) {
            step(i, id);
            if (i + 1 < steps) {
                barrier(i + 1);
            } else if (id == 0) {
                spin_until([&] { return finished.load(std::memory_order_acquire) == threads - 1; });
            }
            if (id == 0 && after) after(i);
        }
    }
};

// A worker's letter box: the caller puts a job in, the worker takes it out when it has finished.
class Worker {
public:
    void start(int id) {
        std::thread([this, id] { loop(id); }).detach();  // lives as long as the process; the pool is never destroyed
    }

    void give(Job* job) {
        job_.store(job, std::memory_order_seq_cst);
        if (asleep_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_one();
        }
    }

private:
    void loop(int id) {
        for (;;) {
            Job* job = wait();
            std::fesetenv(&job->mode);
            job->work(id);
            job_.store(nullptr, std::memory_order_relaxed);
            job->finished.fetch_add(1, std::memory_order_release);
        }
    }

    Job* wait() {
        const auto until = std::chrono::steady_clock::now() + kSpin;
        for (int i = 0;; ++i) {
            if (Job* job = job_.load(std::memory_order_acquire)) return job;
            pause();
            if (i % 64 != 63 || std::chrono::steady_clock::now() < until) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            asleep_.store(true, std::memory_order_seq_cst);
            wake_.wait(lock, [&] { return job_.load(std::memory_order_seq_cst) != nullptr; });
            asleep_.store(false, std::memory_order_seq_cst);
        }
    }

    alignas(64) std::atomic<Job*> job_{nullptr};
    std::atomic<bool> asleep_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

class Pool {
public:
    // False where another caller has the pool, or no more threads can be had.
    bool run(Job& job) {
        std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        if (!mine.owns_lock() || !grow(job.threads - 1)) return false;
        std::fegetenv(&job.mode);
        for (int i = 0; i + 1 < job.threads; ++i) workers_[i]->give(&job);
        job.work(0);
        return true;
    }

private:
    bool grow(int workers) {
        try {
            if (workers > 0) workers_.reserve(static_cast<size_t>(workers));  // a started worker must not be lost to bad_alloc
            while (static_cast<int>(workers_.size()) < workers) {
                auto worker = std::make_unique<Worker>();
                worker->start(static_cast<int>(workers_.size()) + 1);
                workers_.push_back(std::move(worker));
            }
        } catch (const std::exception&) {
            return false;
        }
        return true;
    }

    std::mutex busy_;
    std::vector<std::unique_ptr<Worker>> workers_;
};

std::atomic<Pool*> the_pool{nullptr};
std::atomic<int> chosen_threads{0}, default_threads{0};  // 0: not known

// Never destroyed: threads may still run when the process ends.
std::mutex& the_bookkeeping = *new std::mutex;

// A forked child has none of its parent's threads: it leaves the old pool alone and makes its own at first use.
const int registered = pthread_atfork([] { the_bookkeeping.lock(); }, [] { the_bookkeeping.unlock(); },
                                      [] {
                                          the_bookkeeping.unlock();
                                          the_pool.store(nullptr);
                                      });

Pool* pool() {
    Pool* p = the_pool.load(std::memory_order_acquire);
    if (p) return p;
    (void)registered;
    Pool* fresh = new Pool;
    if (the_pool.compare_exchange_strong(p, fresh)) return fresh;
    delete fresh;
    return p;
}

double quota_from(const char* quota_file, const char* period_file) {
    double quota = 0, period = 0;
    if (std::FILE* f = std::fopen(quota_file, "r")) {
        const int read = std::fscanf(f, "%lf %lf", &quota, &period);  // cgroup v2: both in one file, or "max"
        std::fclose(f);
        if (read < 1) return 0;
    }
    if (period_file) {
        if (std::FILE* f = std::fopen(period_file, "r")) {
            if (std::fscanf(f, "%lf", &period) != 1) period = 0;
            std::fclose(f);
        }
    }
    return quota > 0 && period > 0 ? quota / period : 0;
}

}  // namespace

std::mutex& bookkeeping() { return the_bookkeeping; }

int available_cores() {
    cpu_set_t set;
    CPU_ZERO(&set);
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set)
                                                            : static_cast<int>(std::thread::hardware_concurrency());
    double quota = quota_from("/sys/fs/cgroup/cpu.max", nullptr);
    if (quota <= 0) quota = quota_from("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (quota > 0) cores = std::min(cores, std::max(1, static_cast<int>(quota + 0.5)));
    return std::clamp(cores, 1, kMaxThreads);
}

int num_threads() {
    const int chosen = chosen_threads.load();
    if (chosen > 0) return chosen;
    int cores = default_threads.load();
    if (cores == 0) {  // asks the operating system: tens of microseconds
        cores = available_cores();
        default_threads.store(cores);
    }
    return cores;
}

void set_num_threads(int n) {
    if (n < 1 || n > kMaxThreads) throw ValueError(message("num_threads=", n, " must be between 1 and ", kMaxThreads));
    chosen_threads.store(n);
}

void run_steps(int threads, int steps, const std::function<void(int, int)>& step, const std::function<void(int)>& after) {
    if (steps == 0) return;
    Job job{step, after, threads, steps};
    if (threads > 1 && pool()->run(job)) return;
    for (int i = 0; i < steps; ++i) {
        for (int id = 0; id < threads; ++id) step(i, id);
        if (after) after(i);
    }
}

}  // namespace sparseprune
