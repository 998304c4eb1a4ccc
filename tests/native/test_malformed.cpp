// Damaged and hostile files: found, and nothing is allocated from a size that was not checked. And memory that runs out anywhere:
// std::bad_alloc, after which everything still works.
#include <cstring>
#include <memory>
#include <random>

#include "allocations.h"
#include "cpu/isa.h"
#include "parallel.h"
#include "program.h"
#include "programs.h"

using namespace sparseprune;
using namespace programs;

namespace {

// A parsed header takes some hundred times its bytes; a size that was believed would take millions.
size_t allowed(size_t file) { return 400 * file + (64 << 10); }

// A valid graph or FormatError, and then shapes or ValueError: anything else ends the test program.
bool readable(const Bytes& bytes) {
    allocations::watch();
    bool valid = true;
    try {
        const Graph graph = read(bytes);
        try {
            infer_shapes(graph, {{1, 2, 4, 6}});
        } catch (const ValueError&) {
        }
    } catch (const FormatError&) {
        valid = false;
    }
    CHECK(allocations::largest() <= allowed(bytes.size()));
    return valid;
}

Bytes cut(const Bytes& bytes, size_t size) {  // its own end: ASan sees overreads
    return Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
}

void test_truncation() {
    const Bytes bytes = file_of(small_graph, small_arrays());
    CHECK(readable(bytes));
    for (size_t size = 0; size < bytes.size(); ++size) {
        CHECK(!readable(cut(bytes, size)));
        CHECK(!readable(sealed(cut(bytes, size))));
    }
    Bytes longer = bytes;
    longer.push_back(0);
    CHECK(!readable(longer) && !readable(sealed(longer)));
}

void test_every_flipped_bit_is_found() {
    Bytes bytes = file_of(small_graph, small_arrays());
    for (size_t i = 0; i < bytes.size(); ++i)
        for (int bit = 0; bit < 8; ++bit) {
            bytes[i] = static_cast<uint8_t>(bytes[i] ^ (1 << bit));
            CHECK(!readable(bytes));
            bytes[i] = static_cast<uint8_t>(bytes[i] ^ (1 << bit));
        }
    CHECK(readable(bytes));
}

// As they come, mutated files are found by their checksum; sealed again, what is behind the checksum has to stand.
void test_mutation() {
    const Bytes bytes = file_of(small_graph, small_arrays());
    const uint8_t replacements[] = {0, ' ', '"', '\\', '0', '9', '-', '{', ']', ',', 'e', 0x7F, 0xC3, 0xFF};
    for (size_t i = 0; i < bytes.size(); ++i) {
        Bytes changed = bytes;
        for (const uint8_t byte : replacements) {
            changed[i] = byte;
            CHECK(readable(changed) == (byte == bytes[i]));
            readable(sealed(changed));
        }
        changed[i] = static_cast<uint8_t>(bytes[i] ^ 1);
        readable(sealed(changed));
    }
    std::mt19937 random(11);
    for (int round = 0; round < 3000; ++round) {  // several at once: a change here may hide one there
        Bytes changed = bytes;
        for (int i = 0; i < 3; ++i) changed[random() % bytes.size()] = static_cast<uint8_t>(replacements[random() % 14]);
        readable(sealed(changed));
    }
}

// Sizes that are declared, and bytes that are not there.
void test_declared_sizes() {
    const auto bad = [](const std::string& from, const std::string& to, const std::string& part) {
        const Bytes bytes = file_of(replaced(small_graph, from, to), small_arrays());
        allocations::watch();
        CHECK_THROWS(read(bytes), FormatError, part);
        CHECK(allocations::largest() <= allowed(bytes.size()));
    };
    bad("\"shape\":[2,2,1,1]", "\"shape\":[2147483646,2,1,1]", "crow_indices has 2 elements");
    bad("\"shape\":[3,2]", "\"shape\":[2147483647,2147483647]", "has not the shape");
    bad("\"shape\":[3,2]", "\"shape\":[2,2147483647,2147483647]", "exceeds 2147483647 columns");
    auto arrays = small_arrays();
    const auto all = [&](const std::string& part) {
        const Bytes bytes = file_of(small_graph, arrays);
        allocations::watch();
        CHECK_THROWS(read(bytes), FormatError, part);
        CHECK(allocations::largest() <= allowed(bytes.size()));
    };
    for (const Shape& shape : {Shape{INT64_MAX}, Shape{1LL << 32, 1LL << 32}, Shape{1LL << 61, 8}, Shape{1LL << 40}, Shape{0, INT64_MAX, 3}}) {
        arrays[0].shape = shape;
        all("header: JSON byte");
    }
    arrays = small_arrays();
    arrays[1] = array<int32_t>("w0.crow_indices", "I32", {2}, {0, INT32_MAX});
    arrays[2] = array<uint8_t>("w0.col_gaps", "U8", {2}, {0, 0});
    all("'w0.col_gaps' ends in block row 0");
    Bytes header(8, 0xFF);
    header[7] = 0;
    allocations::watch();
    CHECK_THROWS(read(header), FormatError, "expected at most");
    CHECK(allocations::largest() < 4096);
}

struct Model {
    std::vector<float> x = std::vector<float>(2 * 2 * 8 * 6), logits = std::vector<float>(6), planes = std::vector<float>(2 * 2 * 5 * 3);
    std::vector<Shape> shapes{{2, 2, 8, 6}};

    Model() {
        for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3;
    }
    void run(const Plan& plan) {
        const float* in[] = {x.data()};
        float* out[] = {logits.data(), planes.data()};
        plan.run(in, out);
    }
};

// work() with the n-th allocation failing, for every n until it needs no more. Returns how many n there were.
template <class Work>
int64_t fail_everywhere(const Work& work) {
    for (int64_t n = 1;; ++n) {
        allocations::fail_at(n);
        bool out_of_memory = false;
        try {
            work();
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
        const bool failed = allocations::failed();
        allocations::fail_at(0);
        CHECK(failed || !out_of_memory);  // it must be ours
        if (!failed) return n - 1;
    }
}

void test_memory_that_runs_out() {
    const Bytes bytes = file_of(small_graph, small_arrays());
    Model expected;
    {
        Program program(read(bytes));
        expected.run(*program.plan(expected.shapes, 1, default_kernels()));
    }
    const auto same = [&](Program& program, int threads) {
        Model again;
        again.run(*program.plan(again.shapes, threads, default_kernels()));
        return again.logits == expected.logits && again.planes == expected.planes;
    };
    int64_t points = fail_everywhere([&] { read(bytes); });
    CHECK(points >= 20);
    for (int threads : {1, 3}) {
        Program program(read(bytes));
        const int64_t planning = fail_everywhere([&] { program.plan(expected.shapes, threads, default_kernels()); });
        CHECK(planning >= 20 && same(program, threads));
        const auto plan = Program(read(bytes)).plan(expected.shapes, threads, default_kernels());
        points += planning + fail_everywhere([&] {
            Model model;
            model.run(*plan);
        });
        CHECK(same(program, threads));
    }
    std::printf("memory ran out at %lld points, and everything worked after each\n", static_cast<long long>(points));
}

}  // namespace

void test_malformed() {
    test_truncation();
    test_every_flipped_bit_is_found();
    test_mutation();
    test_declared_sizes();
    test_memory_that_runs_out();
}
