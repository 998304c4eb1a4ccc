// What the fuzz tests draw.
#pragma once
#include <cstddef>
#include <cstdint>
#include <random>

// A Mersenne twister; where a fuzzer gives bytes, each of them is the highest one of a number until they are used up.
class Random {
public:
    using result_type = std::mt19937::result_type;
    explicit Random(unsigned seed) : twister_(seed) {}
    Random(const uint8_t* bytes, size_t size) : twister_(1), bytes_(bytes), left_(size) {}
    static constexpr result_type min() { return std::mt19937::min(); }
    static constexpr result_type max() { return std::mt19937::max(); }
    result_type operator()() {
        const result_type drawn = twister_();
        if (left_ == 0) return drawn;
        --left_;
        return (drawn >> 8) | (static_cast<result_type>(*bytes_++) << 24);
    }

private:
    std::mt19937 twister_;
    const uint8_t* bytes_ = nullptr;
    size_t left_ = 0;
};

inline int64_t pick(Random& r, int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(r); }
inline bool one_in(Random& r, int64_t n) { return pick(r, 1, n) == 1; }
inline float real(Random& r) { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(r); }

template <class T, size_t N>
T one_of(Random& r, const T (&all)[N]) { return all[static_cast<size_t>(pick(r, 0, N - 1))]; }
