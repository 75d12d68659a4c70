// torch.optim.SGD.
#pragma once

#include "base.h"

namespace samk {

struct Sgd : BaseOptimizer {
    static constexpr const char* kName = "sgd";

    struct Settings {
        double momentum, dampening, weight_decay;
        bool nesterov, maximize;
    };
    template <class F>
    static void each(Settings& s, F f) {
        f(s.momentum), f(s.dampening), f(s.weight_decay), f(s.nesterov), f(s.maximize);
    }

    enum Variant : int { kPlain, kMomentum, kNesterov, kVariants };
    static SAMK_HOST_DEVICE int variant(const Settings& s) {
        return s.momentum == 0.0 ? kPlain : s.nesterov ? kNesterov : kMomentum;
    }
    // momentum_buffer
    static constexpr unsigned states(int variant) { return variant == kPlain ? 0 : 1; }

    template <class T>
    struct Scalars {
        T lr, momentum;
        T keep, take;  // of the old buffer and of the new gradient
        T weight_decay;
        T sign;  // -1 to maximise
    };
    template <class T>
    static SAMK_HOST_DEVICE Scalars<T> scalars(const Settings& s, double lr, const TensorFacts& tensor) {
        return {T(lr),
                T(s.momentum),
                T(tensor.first ? 0.0 : s.momentum),
                T(tensor.first ? 1.0 : 1.0 - s.dampening),
                T(s.weight_decay),
                T(s.maximize ? -1.0 : 1.0)};
    }

    // The same as torch's, operation by operation. A learning rate of zero keeps the weight's very bits (-0 too).
    template <int variant, class T>
    static SAMK_HOST_DEVICE T update(T weight, T gradient, T (&state)[kMaxStates], const Scalars<T>& s) {
        T direction = s.sign * gradient + s.weight_decay * weight;
        if (variant != kPlain) {
            state[0] = s.keep * state[0] + s.take * direction;
            direction = variant == kNesterov ? direction + s.momentum * state[0] : state[0];
        }
        const T updated = weight - s.lr * direction;
        return s.lr == T(0) ? weight : updated;
    }
};

}  // namespace samk
