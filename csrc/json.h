// Strict JSON (RFC 8259): UTF-8, no duplicate keys, bounded depth, nothing after the value. Memory is proportional to the text.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace sparseprune {

class Json {
public:
    struct Member;
    struct Real {  // a number with a fraction or an exponent
        double value = 0;
    };
    using Array = std::vector<Json>;
    using Object = std::vector<Member>;

    // Each throws FormatError with the offset where the value is of another kind.
    bool boolean() const { return get<bool>("a boolean"); }
    int64_t integer() const { return get<int64_t>("an integer"); }
    double number() const;  // an integer or a real
    const std::string& string() const { return get<std::string>("a string"); }
    const Array& array() const { return get<Array>("an array"); }
    const Object& object() const { return get<Object>("an object"); }
    bool is_null() const { return std::holds_alternative<std::nullptr_t>(value); }
    bool is_string() const { return std::holds_alternative<std::string>(value); }

    const Json* find(std::string_view key) const;  // null where the object has no such key; linear
    const Json& at(std::string_view key) const;
    // Every key of `required` and none outside the two lists.
    void check_keys(std::initializer_list<std::string_view> required,
                    std::initializer_list<std::string_view> optional = {}) const;

    [[noreturn]] void fail(const std::string& problem) const;  // FormatError: "byte 17: problem"

    uint32_t begin = 0, end = 0;  // the value's own bytes in the text
    std::variant<std::nullptr_t, bool, int64_t, Real, std::string, Array, Object> value;

private:
    template <class T>
    const T& get(const char* expected) const {
        const T* found = std::get_if<T>(&value);
        if (!found) fail_kind(expected);
        return *found;
    }
    [[noreturn]] void fail_kind(const char* expected) const;
};

struct Json::Member {
    std::string key;
    Json value;
};

Json parse_json(std::string_view text);  // throws FormatError

}  // namespace sparseprune
