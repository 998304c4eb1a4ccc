// libFuzzer over reader, validation, planning and one run (tests/native/fuzz.sh reader).
#include "../fuzz_reader.h"

extern "C" __attribute__((visibility("default"))) int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    fuzz_program(data, size);
    return 0;
}
