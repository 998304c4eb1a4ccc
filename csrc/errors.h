// The error model: every failure that a caller can cause is one of these; bindings.cpp maps each to its Python class.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace sparseprune {

// An argument that does not fit: names it, what was expected and what came.
struct ValueError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// Bytes that are not a valid program.
struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string message(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace sparseprune
