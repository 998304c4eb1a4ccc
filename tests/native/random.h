// What the fuzz tests draw.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>

// A Mersenne twister. Or, for a fuzzer, its bytes: each is the highest one of a number until they are used up; what is behind them,
// and the elements of arrays, which would use them up, come from a congruential generator, for a twister's start takes longer than
// the small cases that are drawn then.
class Random {
public:
    using result_type = uint32_t;
    explicit Random(unsigned seed) : twister_(std::make_unique<std::mt19937>(seed)) {}
    Random(const uint8_t* bytes, size_t size) : bytes_(bytes), left_(size) {}
    static constexpr result_type min() { return 0; }
    static constexpr result_type max() { return UINT32_MAX; }
    bool small() const { return !twister_; }  // many small cases are wanted
    result_type operator()() {
        const result_type drawn = next();
        if (left_ == 0) return drawn;
        --left_;
        return (drawn >> 8) | (static_cast<result_type>(*bytes_++) << 24);
    }
    // In [0, 1), for an element of an array.
    double element() {
        if (twister_) return std::uniform_real_distribution<double>(0, 1)(*twister_);
        return next() * 0x1p-32;
    }
    float real(float low, float high) {
        if (twister_) return std::uniform_real_distribution<float>(low, high)(*twister_);
        return low + (high - low) * static_cast<float>(next() >> 8) * 0x1p-24f;
    }

private:
    result_type next() {
        if (twister_) return static_cast<result_type>((*twister_)());
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<result_type>(state_ >> 32);
    }
    std::unique_ptr<std::mt19937> twister_;
    uint64_t state_ = 1;
    const uint8_t* bytes_ = nullptr;
    size_t left_ = 0;
};

inline int64_t pick(Random& r, int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(r); }
inline bool one_in(Random& r, int64_t n) { return pick(r, 1, n) == 1; }
inline float real(Random& r) { return r.real(-1.0f, 1.0f); }

template <class T, size_t N>
T one_of(Random& r, const T (&all)[N]) { return all[static_cast<size_t>(pick(r, 0, N - 1))]; }
