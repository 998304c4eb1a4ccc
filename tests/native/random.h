// What the fuzz tests draw.
#pragma once
#include <cstdint>
#include <random>

using Random = std::mt19937;
inline int64_t pick(Random& r, int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(r); }
inline bool one_in(Random& r, int64_t n) { return pick(r, 1, n) == 1; }
inline float real(Random& r) { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(r); }

template <class T, size_t N>
T one_of(Random& r, const T (&all)[N]) { return all[static_cast<size_t>(pick(r, 0, N - 1))]; }
