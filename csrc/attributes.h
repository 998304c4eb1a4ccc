// What each operator takes: number of inputs, weight or none, which attributes in which range (docs/program.md, Operators).
#pragma once
#include <string>
#include <vector>

#include "graph.h"
#include "json.h"

namespace sparseprune {

struct OpSchema {
    Op op;
    size_t min_inputs, max_inputs;
    bool weight;
    std::vector<const char*> attrs;  // all required, but for `act`
};

const OpSchema* find_op(const std::string& name);                            // null where there is none
void read_attributes(const OpSchema& schema, const Json& attrs, Node& node);  // throws FormatError

}  // namespace sparseprune
