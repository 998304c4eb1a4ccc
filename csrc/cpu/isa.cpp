#include "isa.h"

#include <cstdlib>

#include "../errors.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sparseprune {
namespace {

#if defined(__x86_64__)
uint64_t enabled_state() {  // XGETBV: which registers the operating system saves
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

struct Features {
    bool avx2 = false, avx512 = false;
};

Features detect() {
    Features f;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
    const bool osxsave = c & (1u << 27), avx = c & (1u << 28), fma = c & (1u << 12);
    if (!osxsave || !avx || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
    const uint64_t state = enabled_state();
    f.avx2 = fma && (b & (1u << 5)) && (state & 0x6) == 0x6;
    const unsigned needed = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
    f.avx512 = f.avx2 && (b & needed) == needed && (state & 0xE6) == 0xE6;
    return f;
}

const Features features = detect();
#endif

std::string joined(const std::vector<std::string>& names) {
    std::string out;
    for (const auto& n : names) out += (out.empty() ? "" : ", ") + n;
    return out;
}

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names{"scalar"};
#if defined(__x86_64__)
    if (features.avx2) names.push_back("avx2");
    if (features.avx512) names.push_back("avx512");
#elif defined(__aarch64__)
    names.push_back("neon");  // every such processor has it
#endif
    return names;
}

const Kernels& kernels_for(const std::string& isa) {
    bool known = false;
    for (const auto& name : supported_isas()) known |= name == isa;
    if (!known) {
        throw ValueError(message("isa='", isa, "' is not available on this processor, which has: ", joined(supported_isas())));
    }
#if defined(__x86_64__)
    if (isa == "avx512") return *kernels_avx512();
    if (isa == "avx2") return *kernels_avx2();
#elif defined(__aarch64__)
    if (isa == "neon") return *kernels_neon();
#endif
    return *kernels_scalar();
}

const Kernels& default_kernels() {
    const char* forced = std::getenv("SPARSEPRUNE_ISA");
    if (!forced || !*forced) return kernels_for(supported_isas().back());
    try {
        return kernels_for(forced);
    } catch (const ValueError& e) {
        throw ValueError(message("SPARSEPRUNE_ISA: ", e.what()));
    }
}

}  // namespace sparseprune
