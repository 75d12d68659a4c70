// torch.optim.RMSprop.
#pragma once

#include "base.h"

namespace samk {

struct RMSprop : BaseOptimizer {
    static constexpr const char* kName = "rmsprop";

    struct Settings {
        double alpha, epsilon, weight_decay, momentum;
        bool centered, maximize;
    };
    template <class F>
    static void each(Settings& s, F f) {
        f(s.alpha), f(s.epsilon), f(s.weight_decay), f(s.momentum), f(s.centered), f(s.maximize);
    }

    enum Variant : int { kMomentum = 1, kCentered = 2, kVariants = 4 };
    static SAMK_HOST_DEVICE int variant(const Settings& s) {
        return (s.momentum > 0.0 ? kMomentum : 0) + (s.centered ? kCentered : 0);
    }
    // grad_avg, square_avg, momentum_buffer
    static constexpr unsigned states(int variant) {
        return (variant & kCentered ? 1u : 0u) | 2u | (variant & kMomentum ? 4u : 0u);
    }

    static constexpr bool kCountsSteps = true;

    template <class T>
    struct Scalars {
        T lr, alpha, one_minus_alpha, epsilon, weight_decay, momentum, sign;
    };
    template <class T>
    static SAMK_HOST_DEVICE Scalars<T> scalars(const Settings& s, double lr, const TensorFacts&) {
        const double sign = s.maximize ? -1.0 : 1.0;
        return {T(lr), T(s.alpha), T(1.0 - s.alpha), T(s.epsilon), T(s.weight_decay), T(s.momentum), T(sign)};
    }

    template <int variant, class T>
    static SAMK_HOST_DEVICE T update(T weight, T gradient, T (&state)[kMaxStates], const Scalars<T>& s) {
        T &grad_avg = state[0], &square_avg = state[1], &buffer = state[2];
        const T g = s.sign * gradient + s.weight_decay * weight;
        square_avg = square_avg * s.alpha + s.one_minus_alpha * g * g;
        T second_moment = square_avg;
        if (variant & kCentered) {
            grad_avg = grad_avg + s.one_minus_alpha * (g - grad_avg);
            second_moment = square_avg - grad_avg * grad_avg;
        }
        const T denominator = T(sqrt(second_moment)) + s.epsilon;
        T updated;
        if (variant & kMomentum) {
            buffer = buffer * s.momentum + g / denominator;
            updated = weight - s.lr * buffer;
        } else {
            updated = weight - s.lr * g / denominator;
        }
        return s.lr == T(0) ? weight : updated;
    }
};

}  // namespace samk
