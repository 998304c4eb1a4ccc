// The strict reader: the only way from bytes to a Graph. Nothing is allocated from a size before it was checked against the bytes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "graph.h"
#include "safetensors.h"

namespace sparseprune {

Graph read_program(const uint8_t* bytes, size_t size);  // throws FormatError

// The second half of it: from a container whose places were checked.
Graph read_graph(const Container& container);  // throws FormatError

}  // namespace sparseprune
