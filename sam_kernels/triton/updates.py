"""The base optimizers, and descents: restoring, combining and updating in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .elements import (
    address_of,
    addresses_of,
    are_aligned,
    combination,
    doubles_at,
    first_of,
    given_coefficients,
    group_of,
    number,
    quotient,
    read,
    root,
    row_of,
    scalar,
    with_scales,
    write,
)
from .gram import gram_by_all, is_last_program
from .perturb import restore_chunk

# ---------------------------------------------------------------- base optimizers

# KIND of a descent.
PLAIN: tl.constexpr = tl.constexpr(0)
MOMENTUM: tl.constexpr = tl.constexpr(1)
NESTEROV: tl.constexpr = tl.constexpr(2)
ADAM: tl.constexpr = tl.constexpr(3)
AMSGRAD: tl.constexpr = tl.constexpr(4)


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


@triton.jit
def sgd_scalars(table, row, flags, ACC: tl.constexpr):
    """lr, momentum, weights of the old buffer and of the new gradient, weight decay, sign."""
    group = group_of(table, row)
    lr = scalar(tl.load(group + at.LR), (tl.load(group + at.GROUP_KINDS) >> (2 * at.MAX_LISTS)) & 3)
    momentum = number(tl.load(group + at.MOMENTUM))
    is_first = (flags & at.FIRST) != 0
    keep = tl.where(is_first, 0.0, momentum)
    take = tl.where(is_first, 1.0, 1.0 - number(tl.load(group + at.DAMPENING)))
    decay = number(tl.load(group + at.WEIGHT_DECAY))
    sign = tl.where((tl.load(group + at.GROUP_FLAGS) & at.MAXIMIZE) != 0, -1.0, 1.0)
    return lr.to(ACC), momentum.to(ACC), keep.to(ACC), take.to(ACC), decay.to(ACC), sign.to(ACC)


@triton.jit
def sgd(weight, gradient, state, scalars, KIND: tl.constexpr):
    """As torch.optim.SGD. A learning rate of zero keeps the weight's very bits."""
    lr, momentum, keep, take, decay, sign = scalars
    direction = sign * gradient + decay * weight
    new_state = ()
    if KIND != PLAIN:
        buffer = keep * state[0] + take * direction
        direction = direction + momentum * buffer if KIND == NESTEROV else buffer
        new_state = (buffer,)
    return tl.where(lr == 0.0, weight, weight - lr * direction), new_state


@triton.jit
def adam_scalars(table, row, flags, ACC: tl.constexpr):
    """lr / (1 - beta1^t), sqrt(1 - beta2^t), 1 - beta1, beta2, 1 - beta2, eps, L2 penalty, decay factor, sign."""
    group = group_of(table, row)
    lr = scalar(tl.load(group + at.LR), (tl.load(group + at.GROUP_KINDS) >> (2 * at.MAX_LISTS)) & 3)
    beta1 = number(tl.load(group + at.BETA1))
    beta2 = number(tl.load(group + at.BETA2))
    correction1 = number(tl.load(row + at.BIAS_CORRECTION1))
    correction2_sqrt = number(tl.load(row + at.BIAS_CORRECTION2_SQRT))
    if (flags & at.STEP_ON_DEVICE) != 0:
        address = tl.load(row + at.POINTERS + at.STEP)
        step = scalar(address, tl.where((flags & at.STEP_IS_DOUBLE) != 0, at.FLOAT64, at.FLOAT32)).to(tl.int32) + 1
        correction1 = 1.0 - power(beta1, step)
        correction2_sqrt = tl.sqrt(1.0 - power(beta2, step))
    decay = number(tl.load(group + at.WEIGHT_DECAY))
    eps = number(tl.load(group + at.EPS))
    group_flags = tl.load(group + at.GROUP_FLAGS)
    is_decoupled = (group_flags & at.DECOUPLED) != 0
    sign = tl.where((group_flags & at.MAXIMIZE) != 0, -1.0, 1.0)
    return (
        (lr / correction1).to(ACC),
        correction2_sqrt.to(ACC),
        (1.0 - beta1).to(ACC),
        beta2.to(ACC),
        (1.0 - beta2).to(ACC),
        eps.to(ACC),
        tl.where(is_decoupled, 0.0, decay).to(ACC),
        tl.where(is_decoupled, 1.0 - lr * decay, 1.0).to(ACC),
        sign.to(ACC),
    )


@triton.jit
def adam(weight, gradient, state, scalars, KIND: tl.constexpr):
    """As torch.optim.Adam and AdamW."""
    step_size, correction2_sqrt, take1, keep2, take2, eps, penalty, decay, sign = scalars
    g = sign * gradient + penalty * weight
    exp_avg = state[0] + take1 * (g - state[0])
    exp_avg_sq = state[1] * keep2 + take2 * g * g
    new_state = (exp_avg, exp_avg_sq)
    second_moment = exp_avg_sq
    if KIND == AMSGRAD:
        # A NaN in either wins, as in torch.maximum.
        second_moment = tl.where((state[2] < exp_avg_sq) | (exp_avg_sq != exp_avg_sq), exp_avg_sq, state[2])
        new_state = (exp_avg, exp_avg_sq, second_moment)
    denominator = quotient(root(second_moment), correction2_sqrt) + eps
    updated = weight * decay - quotient(step_size * exp_avg, denominator)
    return tl.where(step_size == 0.0, weight, updated), new_state


@triton.jit
def base_scalars(table, row, flags, KIND: tl.constexpr, ACC: tl.constexpr):
    if KIND == ADAM or KIND == AMSGRAD:
        scalars = adam_scalars(table, row, flags, ACC)
    else:
        scalars = sgd_scalars(table, row, flags, ACC)
    return scalars


@triton.jit
def updated_by_base(
    weight,
    gradient,
    state_at,
    scalars,
    count,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    M: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New weights and new state, neither written."""
    state = ()
    for i in tl.static_range(len(M)):
        state = state + (read(state_at[i], 0, count, M[i], FULL, BLOCK).to(ACC),)
    if KIND == ADAM or KIND == AMSGRAD:
        updated, new_state = adam(weight, gradient, state, scalars, KIND)
    else:
        updated, new_state = sgd(weight, gradient, state, scalars, KIND)
    return updated, new_state


@triton.jit
def update_elements(
    weight,
    source,
    xs,
    coefficients,
    state_at,
    scalars,
    count,
    PREVIEW: tl.constexpr,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gradient = combination(coefficients, xs, count, ACC, X, FULL, BLOCK)
    own = read(source, 0, count, S, FULL, BLOCK).to(ACC)
    updated, new_state = updated_by_base(own, gradient, state_at, scalars, count, KIND, ACC, M, FULL, BLOCK)
    write(weight, count, updated, W, FULL, BLOCK)
    if not PREVIEW:
        if S != W:
            write(source, count, updated, S, FULL, BLOCK)
        for i in tl.static_range(len(M)):
            write(state_at[i], count, new_state[i], M[i], FULL, BLOCK)


@triton.jit
def descent_chunk(
    table,
    rows_at,
    place,
    coefficients,
    skips_update,
    COPIES: tl.constexpr,
    PREVIEW: tl.constexpr,
    KIND: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w <- base(copy, sum_i c_i x_i); a tensor without a gradient, or all if the update is skipped, is restored."""
    ACC: tl.constexpr = tl.float64 if tl.float64 == W else tl.float32
    row = row_of(table, rows_at, place)
    first = first_of(place, BLOCK)
    flags = tl.load(row + at.FLAGS)
    held = (flags & at.HELD) != 0
    if skips_update | ((flags & at.HAS_GRADIENT) == 0):
        if COPIES:
            if held:
                restore_chunk(row, first, W, S, BLOCK)
    elif held | (not PREVIEW):
        count = tl.load(row + at.NUMEL) - first
        weight = address_of(row, at.WEIGHT, first, W)
        source = weight
        if COPIES:
            source = tl.where(held, address_of(row, at.SNAPSHOT, first, S), weight)
        xs = addresses_of(row, at.LIST, first, X)
        state_at = addresses_of(row, at.STATE, first, M)
        unscale = 1.0 / scalar(tl.load(table + at.GRAD_SCALE), tl.load(table + at.GRAD_SCALE_KIND))
        own = with_scales(table, row, coefficients, unscale, xs, ACC)
        scalars = base_scalars(table, row, flags, KIND, ACC)
        if are_aligned(weight | source, xs) & are_aligned(weight, state_at) & (count >= BLOCK):
            update_elements(
                weight, source, xs, own, state_at, scalars, count, PREVIEW, KIND, ACC, W, S, X, M, True, BLOCK
            )
        else:
            update_elements(
                weight, source, xs, own, state_at, scalars, count, PREVIEW, KIND, ACC, W, S, X, M, False, BLOCK
            )


@triton.jit
def must_skip(table, given, SOURCE: tl.constexpr):
    """Whether the descent only restores, as far as is known before its own Gram matrix."""
    skips = tl.load(table + at.SKIP) != 0
    found_inf = tl.load(table + at.FOUND_INF)
    if found_inf != 0:
        skips = skips | (tl.load(found_inf.to(tl.pointer_type(tl.float32))) != 0.0)
    if SOURCE == at.REPORT:
        skips = skips | (tl.load(doubles_at(given) + at.FINITE) == 0.0)
    return skips


@triton.jit
def count_steps(table, scratch, rows_at, rows, skips_update):
    """Counts this step in the step tensors on the device, once every program has read them."""
    if is_last_program(scratch + at.STEP_TICKET):
        if not skips_update:
            start = rows * 0
            while start < rows:
                index = start + tl.arange(0, 128)
                row = table + rows_at + index * at.ROW_WORDS
                flags = tl.load(row + at.FLAGS, mask=index < rows, other=0)
                address = tl.load(row + at.POINTERS + at.STEP, mask=index < rows, other=0)
                counted = ((flags & at.HAS_GRADIENT) != 0) & ((flags & at.STEP_ON_DEVICE) != 0)
                in_double = counted & ((flags & at.STEP_IS_DOUBLE) != 0)
                in_float = counted & ((flags & at.STEP_IS_DOUBLE) == 0)
                doubles = address.to(tl.pointer_type(tl.float64))
                tl.store(doubles, tl.load(doubles, mask=in_double, other=0.0) + 1.0, mask=in_double)
                floats = address.to(tl.pointer_type(tl.float32))
                tl.store(floats, tl.load(floats, mask=in_float, other=0.0) + 1.0, mask=in_float)
                start += 128


@triton.jit(do_not_specialize=["given", "rows_at", "rows", "chunks"])
def descent_kernel(
    table,
    places,
    scratch,
    given: tl.int64,
    rows_at,
    rows,
    chunks,
    SOURCE: tl.constexpr,
    REVERSE: tl.constexpr,
    COPIES: tl.constexpr,
    PREVIEW: tl.constexpr,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    skips = must_skip(table, given, SOURCE)
    coefficients = given_coefficients(given, SOURCE, len(X))
    if tl.program_id(0) < chunks:
        index = chunks - 1 - tl.program_id(0) if REVERSE else tl.program_id(0)
        place = tl.load(places + index)
        descent_chunk(table, rows_at, place, coefficients, skips, COPIES, PREVIEW, KIND, W, S, X, M, BLOCK)
    if COUNT:
        count_steps(table, scratch, rows_at, rows, skips)


@triton.jit(do_not_specialize=["report", "rows_at", "rows", "chunks"])
def rule_descent_kernel(
    table,
    places,
    scratch,
    report: tl.int64,
    rows_at,
    rows,
    chunks,
    RULE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COPIES: tl.constexpr,
    PREVIEW: tl.constexpr,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gram matrix, rule and descent in one cooperative launch."""
    finite, coefficients = gram_by_all(
        table, places, scratch, report, rows_at, chunks, RULE, S, X, WEIGHTED, BLOCK, LANES
    )
    skips = must_skip(table, report, at.ONES) | (not finite)
    step = tl.program_id(0)
    while step < chunks:
        place = tl.load(places + chunks - 1 - step)
        descent_chunk(table, rows_at, place, coefficients, skips, COPIES, PREVIEW, KIND, W, S, X, M, BLOCK)
        step += tl.num_programs(0)
    if COUNT:
        count_steps(table, scratch, rows_at, rows, skips)
