// The strict reader: the only way from bytes to a Graph. Nothing is allocated from a size before it was checked against the bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "graph.h"

namespace sparseprune {

Graph read_program(const uint8_t* bytes, size_t size);  // throws FormatError

}  // namespace sparseprune
