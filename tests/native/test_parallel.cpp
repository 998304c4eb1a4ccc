// The pool: every part of every step runs once, in order; concurrent callers and forked children are served.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "check.h"
#include "parallel.h"

using namespace sparseprune;

namespace {

bool steps_in_order(int threads) {
    constexpr int kSteps = 20;
    std::atomic<int> done[kSteps] = {};
    std::atomic<bool> ok{true};
    run_steps(threads, kSteps, [&](int i, int) {
        if (i > 0 && done[i - 1].load() != threads) ok = false;
        done[i].fetch_add(1);
    });
    for (const auto& d : done)
        if (d.load() != threads) ok = false;
    return ok;
}

}  // namespace

// ThreadSanitizer would end a child of several threads that starts another, as ours does.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "die_after_fork=0"; }

void test_parallel() {
    for (int threads : {1, 2, 3, 8}) CHECK(steps_in_order(threads));
    std::vector<std::thread> callers;
    std::atomic<int> good{0};
    for (int c = 0; c < 6; ++c)
        callers.emplace_back([&] {
            for (int i = 0; i < 50; ++i) good += steps_in_order(2);
        });
    for (auto& t : callers) t.join();
    CHECK(good == 300);
    if (!std::getenv("SPARSEPRUNE_EMULATED")) {  // qemu-user 7.2 itself aborts where a child of several threads starts another
        const pid_t child = fork();
        if (child == 0) _exit(steps_in_order(4) ? 0 : 1);
        int status = 1;
        waitpid(child, &status, 0);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    bool threw = false;
    try {
        set_num_threads(0);
    } catch (const std::exception&) {
        threw = true;
    }
    CHECK(threw);
}
