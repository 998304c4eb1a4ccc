// The smallest test harness: a failed CHECK prints where and is counted; main returns the count.
#pragma once
#include <cstdio>
#include <string>

inline int& check_failures() {
    static int count = 0;
    return count;
}

inline void check_failed(const char* file, int line, const std::string& what) {
    ++check_failures();
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what.c_str());
}

#define CHECK(condition) \
    do { \
        if (!(condition)) check_failed(__FILE__, __LINE__, #condition); \
    } while (false)

// The expression throws Error, and its message contains `part`.
#define CHECK_THROWS(expression, Error, part) \
    do { \
        std::string got_ = "nothing"; \
        bool threw_ = false; \
        try { \
            (void)(expression); \
        } catch (const Error& error_) { \
            got_ = error_.what(); \
            threw_ = got_.find(part) != std::string::npos; \
        } catch (const std::exception& error_) { \
            got_ = std::string("another exception: ") + error_.what(); \
        } \
        if (!threw_) \
            check_failed(__FILE__, __LINE__, \
                         std::string(#expression) + " should throw " #Error " with \"" + (part) + "\", got " + got_); \
    } while (false)
