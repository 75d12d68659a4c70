// torch.optim.Adam and AdamW.
#pragma once

#include "base.h"

namespace samk {

struct Adam : BaseOptimizer {
    static constexpr const char* kName = "adam";

    struct Settings {
        double beta1, beta2, epsilon, weight_decay;
        bool decoupled, amsgrad, maximize;
    };
    template <class F>
    static void each(Settings& s, F f) {
        f(s.beta1), f(s.beta2), f(s.epsilon), f(s.weight_decay), f(s.decoupled), f(s.amsgrad), f(s.maximize);
    }

    enum Variant : int { kPlain, kAmsgrad, kVariants };
    static SAMK_HOST_DEVICE int variant(const Settings& s) { return s.amsgrad ? kAmsgrad : kPlain; }
    // exp_avg, exp_avg_sq, max_exp_avg_sq
    static constexpr unsigned states(int variant) { return variant == kAmsgrad ? 7 : 3; }

    static constexpr bool kCountsSteps = true;
    static constexpr bool kHasCorrections = true;
    // 1 - beta1^step, sqrt(1 - beta2^step)
    template <class Power>
    static SAMK_HOST_DEVICE void corrections(const Settings& s, double step, Power power,
                                             double (&out)[kMaxCorrections]) {
        out[0] = 1.0 - power(s.beta1, step);
        out[1] = sqrt(1.0 - power(s.beta2, step));
    }

    template <class T>
    struct Scalars {
        T step_size;  // lr / (1 - beta1^step)
        T bias_correction2_sqrt;
        T one_minus_beta1, beta2, one_minus_beta2, epsilon;
        T l2;     // Adam's weight decay, added to the gradient
        T decay;  // AdamW's factor 1 - lr * weight_decay
        T sign;   // -1 to maximise
    };
    template <class T>
    static SAMK_HOST_DEVICE Scalars<T> scalars(const Settings& s, double lr, const TensorFacts& tensor) {
        return {T(lr / tensor.corrections[0]),
                T(tensor.corrections[1]),
                T(1.0 - s.beta1),
                T(s.beta2),
                T(1.0 - s.beta2),
                T(s.epsilon),
                T(s.decoupled ? 0.0 : s.weight_decay),
                T(s.decoupled ? 1.0 - lr * s.weight_decay : 1.0),
                T(s.maximize ? -1.0 : 1.0)};
    }

    template <int variant, class T>
    static SAMK_HOST_DEVICE T update(T weight, T gradient, T (&state)[kMaxStates], const Scalars<T>& s) {
        T &exp_avg = state[0], &exp_avg_sq = state[1], &max_exp_avg_sq = state[2];
        const T g = s.sign * gradient + s.l2 * weight;
        exp_avg = exp_avg + s.one_minus_beta1 * (g - exp_avg);
        exp_avg_sq = exp_avg_sq * s.beta2 + s.one_minus_beta2 * g * g;
        T second_moment = exp_avg_sq;
        if (variant == kAmsgrad) {
            // A NaN in either wins, as in torch.maximum.
            const bool replace = max_exp_avg_sq < exp_avg_sq || exp_avg_sq != exp_avg_sq;
            max_exp_avg_sq = replace ? exp_avg_sq : max_exp_avg_sq;
            second_moment = max_exp_avg_sq;
        }
        const T denominator = T(sqrt(second_moment)) / s.bias_correction2_sqrt + s.epsilon;
        const T updated = weight * s.decay - s.step_size * exp_avg / denominator;
        return s.step_size == T(0) ? weight : updated;
    }
};

}  // namespace samk
