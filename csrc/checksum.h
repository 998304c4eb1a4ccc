// CRC-64/XZ (ECMA-182 reflected): finds every single flipped bit and every burst of up to 64, anything else but once in 2^64.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparseprune {

// Of `before`'s bytes followed by these: crc64(b, n, crc64(a, m)) is that of a and b together.
uint64_t crc64(const uint8_t* bytes, size_t size, uint64_t before = 0);

}  // namespace sparseprune
