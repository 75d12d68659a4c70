// What the kernels do to one element. Included by every native backend, so a formula is written once.
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

// Hyper-parameters of torch.optim.SGD for one tensor. `keep` and `take` weigh the old momentum buffer and the new
// gradient: (0, 1) at a tensor's first step, (momentum, 1 - dampening) afterwards.
template <class T>
struct SgdScalars {
    T learning_rate;
    T momentum;
    T keep;
    T take;
    T weight_decay;
    T sign;  // -1 to maximise
};

SAMK_HOST_DEVICE SgdScalars<float> rounded(const SgdScalars<double>& s) {
    return {float(s.learning_rate), float(s.momentum),     float(s.keep),
            float(s.take),          float(s.weight_decay), float(s.sign)};
}

enum class SgdKind { Plain, Momentum, Nesterov };

// The same as torch.optim.SGD, operation by operation. A learning rate of zero keeps the weight's very bits (-0 too).
template <class T, SgdKind kind>
SAMK_HOST_DEVICE T sgd(T weight, T gradient, T& buffer, const SgdScalars<T>& s) {
    T direction = s.sign * gradient + s.weight_decay * weight;
    if (kind != SgdKind::Plain) {
        buffer = s.keep * buffer + s.take * direction;
        direction = kind == SgdKind::Nesterov ? direction + s.momentum * buffer : buffer;
    }
    const T updated = weight - s.learning_rate * direction;
    return s.learning_rate == T(0) ? weight : updated;
}

// Hyper-parameters of torch.optim.Adam and AdamW for one tensor, bias corrections of its own step count included.
template <class T>
struct AdamScalars {
    T step_size;              // lr / (1 - beta1^step)
    T bias_correction2_sqrt;  // sqrt(1 - beta2^step)
    T one_minus_beta1;
    T beta2;
    T one_minus_beta2;
    T epsilon;
    T l2;     // Adam's weight decay, added to the gradient
    T decay;  // AdamW's factor 1 - lr * weight_decay
    T sign;   // -1 to maximise
};

SAMK_HOST_DEVICE AdamScalars<float> rounded(const AdamScalars<double>& s) {
    return {float(s.step_size),
            float(s.bias_correction2_sqrt),
            float(s.one_minus_beta1),
            float(s.beta2),
            float(s.one_minus_beta2),
            float(s.epsilon),
            float(s.l2),
            float(s.decay),
            float(s.sign)};
}

template <class T, bool amsgrad>
SAMK_HOST_DEVICE T adam(T weight, T gradient, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq, const AdamScalars<T>& s) {
    const T g = s.sign * gradient + s.l2 * weight;
    exp_avg = exp_avg + s.one_minus_beta1 * (g - exp_avg);
    exp_avg_sq = exp_avg_sq * s.beta2 + s.one_minus_beta2 * g * g;
    T second_moment = exp_avg_sq;
    if (amsgrad) {
        // A NaN in either wins, as in torch.maximum.
        const bool replace = max_exp_avg_sq < exp_avg_sq || exp_avg_sq != exp_avg_sq;
        max_exp_avg_sq = replace ? exp_avg_sq : max_exp_avg_sq;
        second_moment = max_exp_avg_sq;
    }
    const T denominator = T(sqrt(second_moment)) / s.bias_correction2_sqrt + s.epsilon;
    const T updated = weight * s.decay - s.step_size * exp_avg / denominator;
    return s.step_size == T(0) ? weight : updated;
}

}  // namespace samk
