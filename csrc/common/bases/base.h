// What a base optimizer says of itself to the launches. Each has a file in this folder with one struct, and a place in
// the list of ../bases.h; nothing else in csrc/ names one.
//
// Such a struct has
//   kName               by which Python asks for it
//   Settings            of a parameter group, named as in torch; lr is given apart, it may lie on a device
//   each(settings, f)   f(member) for each of them, in the order of the tuple that Python gives, which lr begins
//   kVariants           forms of the update whose loops are compiled apart
//   variant(settings)   the one that these settings need
//   states(variant)     bit s is set if it reads and writes state tensor s
//   Scalars<T>          what an update takes of a group and a tensor, in the type of the arithmetic
//   scalars<T>(...)     those numbers
//   update<variant>()   the new weight; changes the state
// and, where it does not do with those below, what BaseOptimizer has.
#pragma once

#include <cmath>

#include "../config.h"

namespace samk {

// State tensors of a parameter, and numbers that follow from its step count, that a base optimizer may have.
constexpr int kMaxStates = 3;
constexpr int kMaxCorrections = 2;

// What an update depends on beside the settings.
struct TensorFacts {
    bool first;  // the state is new
    double corrections[kMaxCorrections];
};

struct BaseOptimizer {
    // Whether each parameter has a step count, which a descent counts up.
    static constexpr bool kCountsSteps = false;
    static constexpr bool kHasCorrections = false;

    // Numbers that follow from a step count, with power(base, exponent) as the place of the call computes it.
    template <class Settings, class Power>
    static SAMK_HOST_DEVICE void corrections(const Settings&, double, Power, double (&)[kMaxCorrections]) {}
};

}  // namespace samk
