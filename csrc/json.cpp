// A recursive-descent parser: one function a grammar rule, each leaving `at_` just behind what it took.
#include "json.h"

#include <algorithm>
#include <limits>
#include <locale>
#include <sstream>

#include "errors.h"

namespace sparseprune {
namespace {

constexpr int max_depth = 64;

[[noreturn]] void fail_at(size_t offset, const std::string& problem) {
    throw FormatError(message("JSON byte ", offset, ": ", problem));
}

class Parser {
public:
    explicit Parser(std::string_view text) : text_(text) {}

    Json document() {
        Json json = element(0);
        if (at_ != text_.size()) fail_at(at_, "bytes after the value");
        return json;
    }

private:
    // 0 where the text ends: a NUL is no JSON byte outside a string, and in one it is refused as a control character.
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool take(char expected) {
        if (at_ == text_.size() || text_[at_] != expected) return false;
        ++at_;
        return true;
    }

    void expect(char expected) {
        if (!take(expected)) fail_at(at_, message("expected '", expected, "'"));
    }

    void skip_space() {
        while (peek() == ' ' || peek() == '\n' || peek() == '\r' || peek() == '\t') ++at_;
    }

    // A value with the white space on both sides of it.
    Json element(int depth) {
        if (depth > max_depth) fail_at(at_, message("nested deeper than ", max_depth));
        skip_space();
        Json json;
        json.begin = static_cast<uint32_t>(at_);
        switch (peek()) {
            case '{': json.value = object(depth); break;
            case '[': json.value = array(depth); break;
            case '"': json.value = string(); break;
            case 't': word("true"), json.value = true; break;
            case 'f': word("false"), json.value = false; break;
            case 'n': word("null"); break;
            default: number(json);
        }
        json.end = static_cast<uint32_t>(at_);
        skip_space();
        return json;
    }

    void word(std::string_view expected) {
        if (text_.substr(at_, expected.size()) != expected) fail_at(at_, message("expected ", expected));
        at_ += expected.size();
    }

    Json::Array array(int depth) {
        Json::Array items;
        expect('[');
        skip_space();
        if (take(']')) return items;
        do items.push_back(element(depth + 1));
        while (take(','));
        expect(']');
        return items;
    }

    Json::Object object(int depth) {
        const size_t begin = at_;
        Json::Object members;
        expect('{');
        skip_space();
        if (take('}')) return members;
        do {
            skip_space();
            std::string key = string();
            skip_space();
            expect(':');
            members.push_back({std::move(key), element(depth + 1)});
        } while (take(','));
        expect('}');
        check_unique(members, begin);
        return members;
    }

    static void check_unique(const Json::Object& members, size_t begin) {
        std::vector<std::string_view> keys;
        for (const auto& member : members) keys.push_back(member.key);
        std::sort(keys.begin(), keys.end());
        const auto twice = std::adjacent_find(keys.begin(), keys.end());
        if (twice != keys.end()) fail_at(begin, message("duplicate key '", *twice, "'"));
    }

    static bool is_digit(char c) { return c >= '0' && c <= '9'; }

    void digits() {
        if (!is_digit(peek())) fail_at(at_, "expected a digit");
        while (is_digit(peek())) ++at_;
    }

    // -?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?
    void number(Json& json) {
        const size_t begin = at_;
        const bool negative = take('-');
        const size_t first = at_;
        if (!is_digit(peek())) fail_at(at_, negative ? "expected a digit" : "expected a value");
        if (!take('0')) digits();
        if (is_digit(peek())) fail_at(first, "a number does not begin with 0");
        const size_t last = at_;
        if (take('.')) digits();
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            digits();
        }
        if (at_ != last)
            json.value = Json::Real{real(text_.substr(begin, at_ - begin))};
        else
            json.value = integer(text_.substr(first, last - first), negative, begin);
    }

    // A stream of the classic locale: strtod reads the program's locale, and std::from_chars is missing from older compilers.
    // Beyond a double's range it gives the largest one, which no attribute takes.
    static double real(std::string_view text) {
        std::istringstream stream{std::string(text)};
        stream.imbue(std::locale::classic());
        double value = 0;
        stream >> value;
        return value;
    }

    // Counted downwards, since the lowest int64 has no positive.
    static int64_t integer(std::string_view digits, bool negative, size_t begin) {
        constexpr int64_t lowest = std::numeric_limits<int64_t>::min();
        int64_t value = 0;
        for (const char c : digits) {
            const int64_t digit = c - '0';
            if (value < (lowest + digit) / 10) fail_at(begin, "the integer does not fit 64 bits");
            value = value * 10 - digit;
        }
        if (!negative && value == lowest) fail_at(begin, "the integer does not fit 64 bits");
        return negative ? value : -value;
    }

    std::string string() {
        std::string out;
        expect('"');
        while (!take('"')) {
            if (at_ == text_.size()) fail_at(at_, "the string does not end");
            const auto byte = static_cast<unsigned char>(text_[at_]);
            if (byte < 0x20) fail_at(at_, "a control character in a string");
            if (byte == '\\')
                escape(out);
            else
                copy_utf8(out);
        }
        return out;
    }

    void escape(std::string& out) {
        const size_t begin = at_++;
        const char kind = peek();
        if (at_ < text_.size()) ++at_;
        switch (kind) {
            case '"': case '\\': case '/': out += kind; break;
            case 'b': out += '\b'; break;
            case 'f': out += '\f'; break;
            case 'n': out += '\n'; break;
            case 'r': out += '\r'; break;
            case 't': out += '\t'; break;
            case 'u': append_utf8(out, code_point(begin)); break;
            default: fail_at(begin, "an unknown escape");
        }
    }

    uint32_t hex4() {
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const char c = peek();
            if (is_digit(c)) value = value * 16 + static_cast<uint32_t>(c - '0');
            else if (c >= 'a' && c <= 'f') value = value * 16 + static_cast<uint32_t>(c - 'a') + 10;
            else if (c >= 'A' && c <= 'F') value = value * 16 + static_cast<uint32_t>(c - 'A') + 10;
            else fail_at(at_, "expected four hexadecimal digits");
        }
        return value;
    }

    // \uXXXX, or the two of a surrogate pair.
    uint32_t code_point(size_t begin) {
        const uint32_t high = hex4();
        if (high < 0xD800 || high > 0xDFFF) return high;
        if (high > 0xDBFF || !take('\\') || !take('u')) fail_at(begin, "a lone surrogate");
        const uint32_t low = hex4();
        if (low < 0xDC00 || low > 0xDFFF) fail_at(begin, "a lone surrogate");
        return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
    }

    static void append_utf8(std::string& out, uint32_t code) {
        const auto put = [&](uint32_t byte) { out += static_cast<char>(static_cast<unsigned char>(byte)); };
        if (code < 0x80) return put(code);
        if (code < 0x800) {
            put(0xC0 | (code >> 6));
        } else {
            if (code < 0x10000) {
                put(0xE0 | (code >> 12));
            } else {
                put(0xF0 | (code >> 18));
                put(0x80 | ((code >> 12) & 0x3F));
            }
            put(0x80 | ((code >> 6) & 0x3F));
        }
        put(0x80 | (code & 0x3F));
    }

    // One character as it is; overlong forms, surrogates and what is above U+10FFFF are refused.
    void copy_utf8(std::string& out) {
        const auto lead = static_cast<unsigned char>(text_[at_]);
        const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        if ((lead >= 0x80 && lead < 0xC2) || lead > 0xF4 || text_.size() - at_ < length) fail_at(at_, "invalid UTF-8");
        for (size_t i = 1; i < length; ++i) {
            const auto byte = static_cast<unsigned char>(text_[at_ + i]);
            const unsigned low = i > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
            const unsigned high = i > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
            if (byte < low || byte > high) fail_at(at_, "invalid UTF-8");
        }
        out.append(text_, at_, length);
        at_ += length;
    }

    std::string_view text_;
    size_t at_ = 0;
};

bool contains(std::initializer_list<std::string_view> keys, std::string_view key) {
    return std::find(keys.begin(), keys.end(), key) != keys.end();
}

}  // namespace

const Json* Json::find(std::string_view key) const {
    for (const auto& member : object())
        if (member.key == key) return &member.value;
    return nullptr;
}

const Json& Json::at(std::string_view key) const {
    const Json* found = find(key);
    if (!found) fail(message("'", key, "' is missing"));
    return *found;
}

void Json::check_keys(std::initializer_list<std::string_view> required,
                      std::initializer_list<std::string_view> optional) const {
    for (const auto& member : object())
        if (!contains(required, member.key) && !contains(optional, member.key))
            fail(message("unknown key '", member.key, "'"));
    for (const auto key : required) at(key);
}

double Json::number() const {
    if (const auto* whole = std::get_if<int64_t>(&value)) return static_cast<double>(*whole);
    return get<Real>("a number").value;
}

void Json::fail(const std::string& problem) const { fail_at(begin, problem); }

void Json::fail_kind(const char* expected) const {
    static const char* const kinds[] = {"null",     "a boolean", "an integer", "a real number",
                                        "a string", "an array",  "an object"};  // as in the variant
    fail(message("expected ", expected, ", got ", kinds[value.index()]));
}

Json parse_json(std::string_view text) {
    if (text.size() > std::numeric_limits<uint32_t>::max()) throw FormatError("a JSON text of 4 GiB or more");
    return Parser(text).document();
}

}  // namespace sparseprune
