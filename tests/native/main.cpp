// The native tests: one plain executable that sanitizers and emulators can run too.
// usage: native_tests [cases per instruction set] [isa ...]
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/isa.h"

void test_reader();
void test_malformed();
void test_parallel();
int replay_corpus(const std::string& folder);
void test_cuda(int cases);
void fuzz_layers(const std::string& isa, int cases);
void test_activations(const std::string& isa);
void fuzz_tensor(const std::string& isa, int cases);
void fuzz_depth_first(const std::string& isa, int cases);

int main(int argc, char** argv) {
    const int cases = argc > 1 ? std::atoi(argv[1]) : 2000;
    std::vector<std::string> isas(argv + (argc > 2 ? 2 : argc), argv + argc);
    if (isas.empty()) isas = sparseprune::supported_isas();
    test_reader();
    test_malformed();
    test_parallel();
    std::printf("%d files of the fuzzer's corpus\n", replay_corpus(SPARSEPRUNE_CORPUS));
    test_cuda(cases / 50);
    for (const std::string& isa : isas) {
        test_activations(isa);
        fuzz_tensor(isa, cases);
        std::printf("%s: %d random cases of each tensor step\n", isa.c_str(), cases);
        fuzz_layers(isa, cases);
        std::printf("%s: %d random layers\n", isa.c_str(), cases);
        fuzz_depth_first(isa, cases / 4);
    }
    std::printf("%d failures\n", check_failures());
    return check_failures() != 0;
}
