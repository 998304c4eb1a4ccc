// Eight bytes at a time through eight tables ("slicing by 8", Kounavis and Berry 2005): no instruction set is needed for it.
#include "checksum.h"

#include <array>

namespace sparseprune {
namespace {

constexpr uint64_t polynomial = 0xC96C5795D7870F42;

using Tables = std::array<std::array<uint64_t, 256>, 8>;

// tables[k][b]: what byte b does to the remainder when k more bytes follow it.
constexpr Tables make_tables() {
    Tables tables{};
    for (uint64_t byte = 0; byte < 256; ++byte) {
        uint64_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? polynomial : 0);
        tables[0][byte] = crc;
    }
    for (size_t k = 1; k < 8; ++k)
        for (size_t byte = 0; byte < 256; ++byte) {
            const uint64_t crc = tables[k - 1][byte];
            tables[k][byte] = (crc >> 8) ^ tables[0][crc & 0xFF];
        }
    return tables;
}

constexpr Tables tables = make_tables();

}  // namespace

uint64_t crc64(const uint8_t* bytes, size_t size, uint64_t before) {
    uint64_t crc = ~before;
    for (; size >= 8; size -= 8, bytes += 8) {
        uint64_t word = 0;
        for (size_t i = 0; i < 8; ++i) word |= uint64_t{bytes[i]} << (8 * i);
        word ^= crc;
        crc = 0;
        for (size_t i = 0; i < 8; ++i) crc ^= tables[7 - i][(word >> (8 * i)) & 0xFF];
    }
    for (; size > 0; --size, ++bytes) crc = (crc >> 8) ^ tables[0][(crc ^ *bytes) & 0xFF];
    return ~crc;
}

}  // namespace sparseprune
