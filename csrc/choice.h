// What the tuner decides for a layer, and how it is written in a program.
#pragma once
#include <optional>
#include <string>
#include <vector>

namespace sparseprune {

// Where a convolution's packed input comes from.
enum class Form {
    direct,  // the value itself: 1x1, or k x k at stride 1 with lane shifts and the layout's zero rows
    phases,  // a copy split by stride, with lane shifts
    halo,    // the same with a zero border in each row: loads may be misaligned, no lane shifts
    panel,   // im2col
    taps,    // narrow planes at stride 1: the value itself, one lane shift for each tap
    dot      // one dot product for each output: few images of one pixel
};

enum class WeightKind { single, masked, dense };  // one row, groups of four rows by mask, all ones

// Form and kind settle the order of additions; `vectors` (T, of a tile) does not.
struct Choice {
    Form form = Form::halo;
    WeightKind kind = WeightKind::single;
    int vectors = 4;
};

using Choices = std::vector<std::optional<Choice>>;  // one a node; empty entries take the default

inline const char* form_name(Form form) {
    static const char* const names[] = {"direct", "phases", "halo", "panel", "taps", "dot"};
    return names[static_cast<int>(form)];
}

inline const char* kind_name(WeightKind kind) {
    static const char* const names[] = {"single", "masked", "dense"};
    return names[static_cast<int>(kind)];
}

// The choice of these names, or nothing where one is unknown or vectors is outside [1, 64].
inline std::optional<Choice> choice_named(const std::string& form, const std::string& kind, int64_t vectors) {
    for (int f = 0; f <= static_cast<int>(Form::dot); ++f)
        for (int k = 0; k <= static_cast<int>(WeightKind::dense); ++k)
            if (form == form_name(static_cast<Form>(f)) && kind == kind_name(static_cast<WeightKind>(k)) && vectors >= 1 && vectors <= 64)
                return Choice{static_cast<Form>(f), static_cast<WeightKind>(k), static_cast<int>(vectors)};
    return std::nullopt;
}

}  // namespace sparseprune
