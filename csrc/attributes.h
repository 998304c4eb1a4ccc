// What each operator takes: number of inputs, weight or none, which attributes in which range (docs/program.md, Operators).
#pragma once
#include <string>
#include <vector>

#include "graph.h"
#include "json.h"

namespace sparseprune {

enum class Arrays { none, weight, bias, scale, scale_bias };  // weight: required, with an optional bias; bias: required (constant);
                                                             // scale: required (prelu); scale_bias: both optional (norms)

struct OpSchema {
    Op op;
    size_t min_inputs, max_inputs;
    Arrays arrays;
    std::vector<const char*> attrs;  // all required, but for `act`; where that is, `alpha` and `beta` may be too
};

const OpSchema* find_op(const std::string& name);                            // null where there is none
void read_attributes(const OpSchema& schema, const Json& attrs, Node& node);  // throws FormatError

}  // namespace sparseprune
