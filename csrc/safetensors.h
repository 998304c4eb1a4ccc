// The safetensors container: named arrays and one metadata string, every size and offset checked against the bytes, and the
// checksums that one of the arrays holds.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace sparseprune {

enum class DType { f32, f16, i32, u16, u8, u64 };

struct Tensor {
    DType dtype;
    std::vector<int64_t> shape;
    const uint8_t* data;  // into the caller's bytes, of any alignment
    size_t byte_count;
};

struct Container {
    std::string program;  // __metadata__["sparseprune"]
    std::map<std::string, Tensor> tensors;  // without the one of the checksums
};

const char* dtype_name(DType dtype);
Container read_container(const uint8_t* bytes, size_t size);  // throws FormatError; the bytes must outlive the result

// Writes the checksums of what is there into the array that holds them; throws FormatError where the container is damaged.
void seal(uint8_t* bytes, size_t size);

// T is the dtype's own type; the file and every machine that we build for are little-endian.
template <class T>
std::vector<T> copy_elements(const Tensor& tensor) {
    std::vector<T> out(tensor.byte_count / sizeof(T));
    if (!out.empty()) std::memcpy(out.data(), tensor.data, tensor.byte_count);
    return out;
}

}  // namespace sparseprune
