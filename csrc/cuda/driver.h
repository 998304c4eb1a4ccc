// Whether the installed driver can run what was built: said once, at the first use, in words.
#pragma once
#include <string>

namespace sparseprune::cuda {

// Versions as CUDA writes them: 13020 is 13.2. Empty: they fit. Within a major version a driver may be the older one.
inline std::string driver_problem(int driver, int runtime) {
    const auto text = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    if (driver == 0) return "no CUDA driver was found; this extension was built with CUDA " + text(runtime);
    if (driver / 1000 >= runtime / 1000) return "";
    return "the CUDA driver is too old: it supports CUDA " + text(driver) + ", this extension was built with CUDA " + text(runtime) +
           "; update the driver, or build with a toolkit of CUDA " + std::to_string(driver / 1000);
}

}  // namespace sparseprune::cuda
