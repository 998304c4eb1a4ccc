// The test program's operator new: counted, and made to fail where a test wants it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace allocations {

void watch();       // count from here on
int64_t count();    // since then
size_t largest();   // bytes of the largest single one since then

void fail_at(int64_t n);  // the n-th from here on throws std::bad_alloc, 1 is the next; 0: none
bool failed();            // whether it came to that

}  // namespace allocations
