"""The base optimizers' updates of a chunk. :data:`BASES` says which functions belong to which.

Of each base there are two functions. One takes a group's record and a tensor's, and returns what an update takes of
them, in the type of the arithmetic: the ``Scalars`` of the struct in ``csrc/common/bases``. The other makes the update:
it takes weights, gradient, those state tensors that the variant has, and those scalars, and returns new weights and new
state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout as at
from .elements import number, quotient, root, scalar


@triton.jit
def setting(group, i: tl.constexpr):
    """The i-th of a group's settings behind lr, float64; flags are 0 or 1."""
    return number(tl.load(group + at.SETTINGS + i))


@triton.jit
def learning_rate(group):
    return scalar(tl.load(group + at.LR), (tl.load(group + at.GROUP_KINDS) >> (2 * at.MAX_LISTS)) & 3)


@triton.jit
def correction(row, i: tl.constexpr):
    """A number that the host has computed of a step count that it knows."""
    return number(tl.load(row + at.CORRECTIONS + i))


@triton.jit
def step_on_device(row, flags):
    """The step count, this step included, where it lies on the device."""
    address = tl.load(row + at.POINTERS + at.STEP)
    return scalar(address, tl.where((flags & at.STEP_IS_DOUBLE) != 0, at.FLOAT64, at.FLOAT32)).to(tl.int32) + 1


@triton.jit
def power(base, exponent):
    """Of a whole exponent."""
    result = tl.cast(1.0, tl.float64)
    while exponent > 0:
        if exponent % 2 == 1:
            result = result * base
        base = base * base
        exponent = exponent // 2
    return result


# ---------------------------------------------------------------- SGD


@triton.jit
def sgd_scalars(group, row, flags, ACC: tl.constexpr):
    """lr, momentum, weights of the old buffer and of the new gradient, weight decay, sign."""
    momentum = setting(group, 0)
    is_first = (flags & at.FIRST) != 0
    keep = tl.where(is_first, 0.0, momentum)
    take = tl.where(is_first, 1.0, 1.0 - setting(group, 1))
    decay = setting(group, 2)
    sign = tl.where(setting(group, 4) != 0.0, -1.0, 1.0)
    lr = learning_rate(group)
    return lr.to(ACC), momentum.to(ACC), keep.to(ACC), take.to(ACC), decay.to(ACC), sign.to(ACC)


@triton.jit
def sgd(weight, gradient, state, scalars, VARIANT: tl.constexpr):
    """As torch.optim.SGD. A learning rate of zero keeps the weight's very bits."""
    lr, momentum, keep, take, decay, sign = scalars
    direction = sign * gradient + decay * weight
    new_state = ()
    if VARIANT != 0:
        buffer = keep * state[0] + take * direction
        direction = direction + momentum * buffer if VARIANT == 2 else buffer
        new_state = (buffer,)
    return tl.where(lr == 0.0, weight, weight - lr * direction), new_state


# ---------------------------------------------------------------- Adam


@triton.jit
def adam_scalars(group, row, flags, ACC: tl.constexpr):
    """lr / (1 - beta1^t), sqrt(1 - beta2^t), 1 - beta1, beta2, 1 - beta2, eps, L2 penalty, decay factor, sign."""
    lr = learning_rate(group)
    beta1 = setting(group, 0)
    beta2 = setting(group, 1)
    correction1 = correction(row, 0)
    correction2_sqrt = correction(row, 1)
    if (flags & at.STEP_ON_DEVICE) != 0:
        step = step_on_device(row, flags)
        correction1 = 1.0 - power(beta1, step)
        correction2_sqrt = tl.sqrt(1.0 - power(beta2, step))
    decay = setting(group, 3)
    is_decoupled = setting(group, 4) != 0.0
    return (
        (lr / correction1).to(ACC),
        correction2_sqrt.to(ACC),
        (1.0 - beta1).to(ACC),
        beta2.to(ACC),
        (1.0 - beta2).to(ACC),
        setting(group, 2).to(ACC),
        tl.where(is_decoupled, 0.0, decay).to(ACC),
        tl.where(is_decoupled, 1.0 - lr * decay, 1.0).to(ACC),
        tl.where(setting(group, 6) != 0.0, -1.0, 1.0).to(ACC),
    )


@triton.jit
def adam(weight, gradient, state, scalars, VARIANT: tl.constexpr):
    """As torch.optim.Adam and AdamW."""
    step_size, correction2_sqrt, take1, keep2, take2, eps, penalty, decay, sign = scalars
    g = sign * gradient + penalty * weight
    exp_avg = state[0] + take1 * (g - state[0])
    exp_avg_sq = state[1] * keep2 + take2 * g * g
    new_state = (exp_avg, exp_avg_sq)
    second_moment = exp_avg_sq
    if VARIANT == 1:
        # A NaN in either wins, as in torch.maximum.
        second_moment = tl.where((state[2] < exp_avg_sq) | (exp_avg_sq != exp_avg_sq), exp_avg_sq, state[2])
        new_state = (exp_avg, exp_avg_sq, second_moment)
    denominator = quotient(root(second_moment), correction2_sqrt) + eps
    updated = weight * decay - quotient(step_size * exp_avg, denominator)
    return tl.where(step_size == 0.0, weight, updated), new_state


# ---------------------------------------------------------------- Lion


@triton.jit
def lion_scalars(group, row, flags, ACC: tl.constexpr):
    """lr, 1 - beta1, 1 - beta2, L2 penalty, decay factor, sign."""
    lr, decay, is_decoupled = learning_rate(group), setting(group, 2), setting(group, 3) != 0.0
    return (
        lr.to(ACC),
        (1.0 - setting(group, 0)).to(ACC),
        (1.0 - setting(group, 1)).to(ACC),
        tl.where(is_decoupled, 0.0, decay).to(ACC),
        tl.where(is_decoupled, 1.0 - lr * decay, 1.0).to(ACC),
        tl.where(setting(group, 4) != 0.0, -1.0, 1.0).to(ACC),
    )


@triton.jit
def lion(weight, gradient, state, scalars, VARIANT: tl.constexpr):
    """As pytorch-optimizer's Lion."""
    lr, take1, take2, penalty, decay, sign = scalars
    g = sign * gradient + penalty * weight
    direction = state[0] + take1 * (g - state[0])
    step = tl.where(direction > 0.0, lr, tl.where(direction < 0.0, -lr, 0.0))
    return tl.where(lr == 0.0, weight, weight * decay - step), (state[0] + take2 * (g - state[0]),)


# ---------------------------------------------------------------- RMSprop


@triton.jit
def rmsprop_scalars(group, row, flags, ACC: tl.constexpr):
    """lr, alpha, 1 - alpha, eps, L2 penalty, momentum, sign."""
    alpha = setting(group, 0)
    return (
        learning_rate(group).to(ACC),
        alpha.to(ACC),
        (1.0 - alpha).to(ACC),
        setting(group, 1).to(ACC),
        setting(group, 2).to(ACC),
        setting(group, 3).to(ACC),
        tl.where(setting(group, 5) != 0.0, -1.0, 1.0).to(ACC),
    )


@triton.jit
def rmsprop(weight, gradient, state, scalars, VARIANT: tl.constexpr):
    """As torch.optim.RMSprop; bits of the variant: momentum, centered."""
    lr, keep, take, eps, penalty, momentum, sign = scalars
    g = sign * gradient + penalty * weight
    square_avg = state[VARIANT // 2] * keep + take * g * g
    new_state = (square_avg,)
    second_moment = square_avg
    if VARIANT // 2 == 1:
        grad_avg = state[0] + take * (g - state[0])
        new_state = (grad_avg, square_avg)
        second_moment = square_avg - grad_avg * grad_avg
    denominator = root(second_moment) + eps
    if VARIANT % 2 == 1:
        buffer = state[VARIANT // 2 + 1] * momentum + quotient(g, denominator)
        new_state = new_state + (buffer,)
        step = lr * buffer
    else:
        step = quotient(lr * g, denominator)
    return tl.where(lr == 0.0, weight, weight - step), new_state


# ---------------------------------------------------------------- the list


class Functions(NamedTuple):
    """What a descent is compiled with."""

    scalars: Any
    update: Any


BASES = {
    "sgd": Functions(sgd_scalars, sgd),
    "adam": Functions(adam_scalars, adam),
    "lion": Functions(lion_scalars, lion),
    "rmsprop": Functions(rmsprop_scalars, rmsprop),
}
