// Lion (Chen et al. 2023, arXiv 2302.06675), as pytorch-optimizer's and lion-pytorch's.
#pragma once

#include "base.h"

namespace samk {

struct Lion : BaseOptimizer {
    static constexpr const char* kName = "lion";

    struct Settings {
        double beta1, beta2, weight_decay;
        bool decoupled, maximize;
    };
    template <class F>
    static void each(Settings& s, F f) {
        f(s.beta1), f(s.beta2), f(s.weight_decay), f(s.decoupled), f(s.maximize);
    }

    static constexpr int kVariants = 1;
    static SAMK_HOST_DEVICE int variant(const Settings&) { return 0; }
    static constexpr unsigned states(int) { return 1; }  // exp_avg

    template <class T>
    struct Scalars {
        T lr, one_minus_beta1, one_minus_beta2, l2, decay, sign;
    };
    template <class T>
    static SAMK_HOST_DEVICE Scalars<T> scalars(const Settings& s, double lr, const TensorFacts&) {
        return {T(lr),
                T(1.0 - s.beta1),
                T(1.0 - s.beta2),
                T(s.decoupled ? 0.0 : s.weight_decay),
                T(s.decoupled ? 1.0 - lr * s.weight_decay : 1.0),
                T(s.maximize ? -1.0 : 1.0)};
    }

    template <int variant, class T>
    static SAMK_HOST_DEVICE T update(T weight, T gradient, T (&state)[kMaxStates], const Scalars<T>& s) {
        const T g = s.sign * gradient + s.l2 * weight;
        const T direction = state[0] + s.one_minus_beta1 * (g - state[0]);
        state[0] = state[0] + s.one_minus_beta2 * (g - state[0]);
        // Zero for NaN, as torch.sign has it.
        const T step = T(direction > T(0)) - T(direction < T(0));
        const T updated = weight * s.decay - s.lr * step;
        return s.lr == T(0) ? weight : updated;
    }
};

}  // namespace samk
