// What the kernels do to one element but for updates, which bases/ has. Included by every native backend, so a formula
// is written once.
//
// `T` is the type of the arithmetic: double for float64 weights, float for all others.
#pragma once

#include <cmath>

#include "config.h"

namespace samk {

// ASAM's diagonal operator T(w) = |w| + eta (Kwon et al. 2021, eq. 6). eta < 0 stands for T = 1.
template <class T>
SAMK_HOST_DEVICE T geometry(T weight, T eta) {
    return eta < T(0) ? T(1) : T(fabs(weight)) + eta;
}

// w + T(w)^2 d, with d the combined ascent direction, coefficients included.
template <class T>
SAMK_HOST_DEVICE T perturbed(T weight, T direction, T eta) {
    if (eta < T(0)) return weight + direction;
    const T scale = geometry(weight, eta);
    return weight + scale * scale * direction;
}

}  // namespace samk
