// Is this a safetensors file of ours? Header length, header, then each tensor's place in the payload.
#include "safetensors.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "checksum.h"
#include "errors.h"
#include "json.h"

namespace sparseprune {
namespace {

// A parsed header takes some 30 times its bytes; real ones are far below 1 MiB.
constexpr uint64_t max_header = uint64_t{16} << 20;
constexpr size_t max_rank = 8;

struct DTypeInfo {
    DType dtype;
    const char* name;
    size_t size;
};
constexpr DTypeInfo dtypes[] = {
    {DType::f32, "F32", 4}, {DType::f16, "F16", 2}, {DType::i32, "I32", 4},
    {DType::u16, "U16", 2}, {DType::u8, "U8", 1},   {DType::u64, "U64", 8}};

const DTypeInfo& read_dtype(const Json& json) {
    for (const auto& info : dtypes)
        if (json.string() == info.name) return info;
    json.fail(message("dtype '", json.string(), "' is not one of F32, F16, I32, U16, U8, U64"));
}

uint64_t read_header_length(const uint8_t* bytes, size_t size) {
    if (size < 8) throw FormatError(message("the file has ", size, " bytes, expected 8 or more"));
    uint64_t length = 0;
    for (int i = 0; i < 8; ++i) length |= uint64_t{bytes[i]} << (8 * i);
    if (length > max_header)
        throw FormatError(message("the header has ", length, " bytes, expected at most ", max_header));
    if (length > size - 8)
        throw FormatError(message("the header has ", length, " bytes, but only ", size - 8, " follow"));
    return length;
}

// The payload's bytes are `payload_size`, so a product beyond it is an error before it can overflow.
Tensor read_tensor(const Json& json, const uint8_t* payload, size_t payload_size) {
    json.check_keys({"dtype", "shape", "data_offsets"});
    const DTypeInfo& info = read_dtype(json.at("dtype"));
    const auto& offsets = json.at("data_offsets");
    if (offsets.array().size() != 2) offsets.fail("data_offsets has not two elements");
    const int64_t begin = offsets.array()[0].integer(), end = offsets.array()[1].integer();
    if (begin < 0 || end < begin || static_cast<uint64_t>(end) > payload_size)
        offsets.fail(message("data_offsets [", begin, ", ", end, "] are not a part of the payload's ", payload_size,
                             " bytes"));

    const auto& dimensions = json.at("shape");
    if (dimensions.array().size() > max_rank) dimensions.fail(message("shape has more than ", max_rank, " dimensions"));
    Tensor tensor{info.dtype, {}, payload + begin, static_cast<size_t>(end - begin)};
    uint64_t expected = info.size;
    for (const auto& dimension : dimensions.array()) {
        const int64_t extent = dimension.integer();
        if (extent < 0) dimension.fail(message("the extent ", extent, " is negative"));
        if (extent > 0 && expected > payload_size / static_cast<uint64_t>(extent))
            dimension.fail("the shape needs more bytes than the payload has");
        expected *= static_cast<uint64_t>(extent);
        tensor.shape.push_back(extent);
    }
    if (expected != tensor.byte_count)
        json.fail(message("data_offsets span ", tensor.byte_count, " bytes, the shape needs ", expected));
    return tensor;
}

// Sorted by place, each tensor must begin where the last one ended, and the last must end with the file.
void check_contiguous(const std::map<std::string, Tensor>& tensors, const uint8_t* payload, size_t payload_size) {
    std::vector<std::pair<size_t, size_t>> spans;
    for (const auto& entry : tensors) {
        const auto begin = static_cast<size_t>(entry.second.data - payload);
        spans.emplace_back(begin, begin + entry.second.byte_count);
    }
    std::sort(spans.begin(), spans.end());
    size_t end = 0;
    for (const auto& span : spans) {
        if (span.first != end)
            throw FormatError(message("payload: a tensor begins at byte ", span.first, ", expected ", end,
                                      span.first < end ? ": two overlap" : ": there is a gap"));
        end = span.second;
    }
    if (end != payload_size) throw FormatError(message("payload: ", payload_size, " bytes, but the tensors hold ", end));
}

constexpr const char* checksum_name = "checksum";
constexpr size_t checksum_bytes = 16;

struct Parsed {
    Container container;
    const uint8_t* payload;
    size_t payload_size;
    size_t checksum_at;  // in the payload
};

Parsed parse(const uint8_t* bytes, size_t size) {
    const auto header_length = static_cast<size_t>(read_header_length(bytes, size));
    const std::string_view text(reinterpret_cast<const char*>(bytes) + 8, header_length);
    if (text.empty() || text[0] != '{') throw FormatError("header: the first byte is not '{'");
    Parsed out{{}, bytes + 8 + header_length, size - 8 - header_length, 0};
    auto& tensors = out.container.tensors;
    bool has_program = false;
    try {
        const Json header = parse_json(text);
        for (const auto& member : header.object()) {
            if (member.key == "__metadata__") {
                member.value.check_keys({"sparseprune"});
                out.container.program = member.value.at("sparseprune").string();
                has_program = true;
                continue;
            }
            tensors.emplace(member.key, read_tensor(member.value, out.payload, out.payload_size));
        }
    } catch (const FormatError& error) {
        throw FormatError(message("header: ", error.what()));
    }
    if (!has_program) throw FormatError("header: '__metadata__' is missing: not a sparseprune program");
    check_contiguous(tensors, out.payload, out.payload_size);
    const auto found = tensors.find(checksum_name);
    if (found == tensors.end())
        throw FormatError("the array 'checksum' is missing: a program of format version 1, which had none, or none at all; convert "
                          "the model again");
    if (found->second.dtype != DType::u64 || found->second.shape != std::vector<int64_t>{2})
        throw FormatError("the array 'checksum' is not two U64");
    out.checksum_at = static_cast<size_t>(found->second.data - out.payload);
    tensors.erase(found);
    return out;
}

// Of the header with its length, and of the payload but for the checksums themselves; little-endian.
std::array<uint8_t, checksum_bytes> checksums(const uint8_t* bytes, size_t size, const Parsed& parsed) {
    const size_t behind = parsed.checksum_at + checksum_bytes;
    uint64_t payload = crc64(parsed.payload, parsed.checksum_at);
    payload = crc64(parsed.payload + behind, parsed.payload_size - behind, payload);
    const uint64_t values[2] = {crc64(bytes, size - parsed.payload_size), payload};
    std::array<uint8_t, checksum_bytes> out{};
    for (size_t i = 0; i < checksum_bytes; ++i) out[i] = static_cast<uint8_t>(values[i / 8] >> (8 * (i % 8)));
    return out;
}

}  // namespace

const char* dtype_name(DType dtype) {
    for (const auto& info : dtypes)
        if (info.dtype == dtype) return info.name;
    return "?";
}

Container read_container(const uint8_t* bytes, size_t size) {
    Parsed parsed = parse(bytes, size);
    const auto expected = checksums(bytes, size, parsed);
    for (size_t i = 0; i < checksum_bytes; ++i)
        if (parsed.payload[parsed.checksum_at + i] != expected[i])
            throw FormatError(message("the file is damaged: the checksum of its ", i < 8 ? "header" : "payload", " does not match"));
    return std::move(parsed.container);
}

void seal(uint8_t* bytes, size_t size) {
    const Parsed parsed = parse(bytes, size);
    const auto values = checksums(bytes, size, parsed);
    std::copy(values.begin(), values.end(), bytes + (size - parsed.payload_size) + parsed.checksum_at);
}

}  // namespace sparseprune
