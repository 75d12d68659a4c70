// One parameter group's settings of the base optimizer, named as in torch.
#pragma once

namespace samk {

enum class BaseKind : int { Sgd = 0, Adam = 1 };

struct SgdSettings {
    double lr, momentum, dampening, weight_decay;
    bool nesterov, maximize;
};

struct AdamSettings {
    double lr, beta1, beta2, epsilon, weight_decay;
    bool decoupled, amsgrad, maximize;
};

}  // namespace samk
