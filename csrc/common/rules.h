// Scalar rules: from the Gram matrix of the gradient lists to their coefficients.
//
// The Python side states the same rules in sam_kernels/rules.py, where each names its paper.
#pragma once

#include <cmath>

#include "config.h"

namespace samk {

enum class Rule : int {
    Fixed = 0,          // c_i = 1: the scales say it all
    Normalized = 1,     // c_i = 1 / (|x_i| + eps)
    Deflected = 2,      // lists (g+, g): g+ minus alpha times the part of g orthogonal to g+
    NormMatched = 3,    // lists (g+, g): c = (|g| / (|g+| + eps), 0)
    NormalizedSum = 4,  // c_i = 1 / (|x_1 + x_2 + ...| + eps)
};

struct RuleArguments {
    Rule rule = Rule::Fixed;
    double epsilon = 0.0;
    double alpha = 0.0;
};

// `gram` is row-major with kMaxLists columns. Writes `lists` coefficients; a Gram matrix with an entry that is not
// finite gives zeros and returns false.
SAMK_HOST_DEVICE bool apply_rule(const RuleArguments& arguments, const double* gram, int lists, double* coefficients) {
    bool finite = true;
    for (int i = 0; i < lists; ++i)
        for (int j = 0; j < lists; ++j) {
            const double entry = gram[i * kMaxLists + j];
            finite = finite && (entry - entry == 0.0);
        }
    for (int i = 0; i < kMaxLists; ++i) coefficients[i] = 0.0;
    if (!finite) return false;

    const double g00 = gram[0];
    switch (arguments.rule) {
        case Rule::Fixed:
            for (int i = 0; i < lists; ++i) coefficients[i] = 1.0;
            break;
        case Rule::Normalized:
            for (int i = 0; i < lists; ++i) coefficients[i] = 1.0 / (sqrt(gram[i * kMaxLists + i]) + arguments.epsilon);
            break;
        case Rule::Deflected:
            coefficients[0] = 1.0 + (g00 > 0.0 ? arguments.alpha * gram[1] / g00 : 0.0);
            coefficients[1] = -arguments.alpha;
            break;
        case Rule::NormalizedSum: {
            double squared = 0.0;
            for (int i = 0; i < lists; ++i)
                for (int j = 0; j < lists; ++j) squared += gram[i * kMaxLists + j];
            // Lists that cancel may leave a rounding error below zero.
            const double norm = squared > 0.0 ? sqrt(squared) : 0.0;
            for (int i = 0; i < lists; ++i) coefficients[i] = 1.0 / (norm + arguments.epsilon);
            break;
        }
        case Rule::NormMatched: coefficients[0] = sqrt(gram[kMaxLists + 1]) / (sqrt(g00) + arguments.epsilon); break;
    }
    return true;
}

}  // namespace samk
