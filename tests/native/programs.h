// Program files made by hand, for the tests that damage them.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "errors.h"
#include "reader.h"
#include "safetensors.h"

namespace programs {

using namespace sparseprune;

using Bytes = std::vector<uint8_t>;

struct Array {
    std::string name, dtype;
    std::vector<int64_t> shape;
    Bytes data;
};

template <class T>
Array array(const char* name, const char* dtype, std::vector<int64_t> shape, const std::vector<T>& elements) {
    Bytes data(elements.size() * sizeof(T));
    if (!data.empty()) std::memcpy(data.data(), elements.data(), data.size());
    return {name, dtype, std::move(shape), std::move(data)};
}

inline Bytes file_of(const std::string& header, const Bytes& payload) {
    Bytes out(8);
    for (size_t i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(header.size() >> (8 * i));
    out.insert(out.end(), header.begin(), header.end());
    out.insert(out.end(), payload.begin(), payload.end());
    return out;
}

inline std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') out += '\\';
        if (c == '\n')
            out += "\\n";
        else
            out += c;
    }
    return out + "\"";
}

// With the checksums of what is there now, where the container is whole; what is behind them is then reached.
inline Bytes sealed(Bytes bytes) {
    try {
        seal(bytes.data(), bytes.size());
    } catch (const FormatError&) {
    }
    return bytes;
}

inline Bytes file_of(const std::string& graph, const std::vector<Array>& arrays) {
    std::string header = "{\"__metadata__\":{\"sparseprune\":" + quoted(graph) + "}";
    header += ",\"checksum\":{\"dtype\":\"U64\",\"shape\":[2],\"data_offsets\":[0,16]}";
    Bytes payload(16);
    for (const Array& a : arrays) {
        header += ",\"" + a.name + "\":{\"dtype\":\"" + a.dtype + "\",\"shape\":[";
        for (size_t i = 0; i < a.shape.size(); ++i) header += (i ? "," : "") + std::to_string(a.shape[i]);
        const size_t end = payload.size() + a.data.size();
        header += message("],\"data_offsets\":[", payload.size(), ",", end, "]}");
        payload.insert(payload.end(), a.data.begin(), a.data.end());
    }
    return sealed(file_of(header + "}", payload));
}

inline Graph read(const Bytes& bytes) { return read_program(bytes.data(), bytes.size()); }

// Each use of a part of the format once: sparse and dense weight, U16 columns, masks, bias, residual, tree.
const char* const small_graph = R"({"format":"sparseprune-program","version":2,
"inputs":[{"name":"x","shape":["s0",2,"s1",6]}],
"weights":{"w0":{"shape":[2,2,1,1],"block_shape":[2,1]},"w1":{"shape":[3,2]}},
"nodes":[
{"op":"conv","name":"conv","inputs":[0,0],"weight":"w0","bias":"b0","attrs":{"dims":2,"stride":[1,1],"padding":[0,0,0,0],"dilation":[1,1],"groups":1,"act":"relu"}},
{"op":"max_pool","name":"mp","inputs":[1],"attrs":{"dims":2,"kernel":[2,2],"stride":[2,2],"padding":[1,1,0,0],"dilation":[1,1],"ceil_mode":true}},
{"op":"avg_pool","name":"ap","inputs":[2],"attrs":{"dims":2,"kernel":[1,1],"stride":[1,1],"padding":[0,0,0,0],"ceil_mode":false,"count_include_pad":true,"divisor":0}},
{"op":"add","name":"add","inputs":[2,3],"attrs":{"act":"relu6"}},
{"op":"adaptive_avg_pool","name":"gap","inputs":[4],"attrs":{"dims":2,"output_size":[1,1]}},
{"op":"flatten","name":"flat","inputs":[5],"attrs":{}},
{"op":"linear","name":"fc","inputs":[6],"weight":"w1","attrs":{}},
{"op":"act","name":"relu","inputs":[7],"attrs":{"act":"relu"}}],
"outputs":[8,2],
"tree":{"kind":"dict","keys":["a","b"],"items":[{"kind":"tensor"},{"kind":"tuple","items":[{"kind":"none"},{"kind":"tensor"}]}]}})";

inline std::vector<Array> small_arrays() {
    return {array<float>("b0", "F32", {2}, {1, 2}),
            array<int32_t>("w0.crow_indices", "I32", {2}, {0, 2}),
            array<uint16_t>("w0.col_indices", "U16", {2}, {0, 1}),
            array<uint64_t>("w0.masks", "U64", {2}, {3, 1}),
            array<float>("w0.values", "F32", {3}, {1, 2, 3}),
            array<float>("w1.values", "F32", {3, 2}, {1, 2, 3, 4, 5, 6})};
}

inline std::string replaced(std::string text, const std::string& from, const std::string& to) {
    const size_t at = text.find(from);
    CHECK(at != std::string::npos);
    return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

}  // namespace programs
