// Which kernels this process runs: the best that the processor and the operating system support, or SPARSEPRUNE_ISA.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sparseprune {

std::vector<std::string> supported_isas();        // from slowest to fastest
const Kernels& kernels_for(const std::string& isa);  // ValueError where the processor lacks it
const Kernels& default_kernels();                 // honours SPARSEPRUNE_ISA; ValueError where that cannot be had

}  // namespace sparseprune
