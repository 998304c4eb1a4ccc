// libFuzzer over the kernels (tests/native/fuzz.sh kernels): the bytes choose an instruction set, then a layer and how it runs, or a
// tensor step; the result is compared with the oracle in double precision, between inaccessible pages.
#include <cstdlib>
#include <string>

#include "../check.h"
#include "../random.h"
#include "cpu/isa.h"

void fuzz_layer(const std::string& isa, Random& random);
void fuzz_tensor_step(const std::string& isa, Random& random);

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const std::vector<std::string> isas = sparseprune::supported_isas();
    if (size < 2) return 0;
    Random random(data + 1, size - 1);
    const std::string& isa = isas[data[0] / 2 % isas.size()];
    if (data[0] % 2 != 0) fuzz_layer(isa, random);
    else fuzz_tensor_step(isa, random);
    if (check_failures() != 0) std::abort();
    return 0;
}
