"""Descents: restoring, combining and a base optimizer's update in one pass."""

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
    read,
    row_of,
    scalar,
    with_scales,
    write,
)
from .gram import gram_by_all, is_last_program
from .perturb import restore_chunk

# Of a base optimizer the kernels are compiled with SCALARS and UPDATE, its functions in :mod:`.bases`, with
# VARIANT, the form of its update, and with STATES, the numbers of the state tensors that this has; M are their types.


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
    UPDATE: tl.constexpr,
    VARIANT: tl.constexpr,
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
    state = ()
    for i in tl.static_range(len(M)):
        state = state + (read(state_at[i], 0, count, M[i], FULL, BLOCK).to(ACC),)
    updated, new_state = UPDATE(own, gradient, state, scalars, VARIANT)
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
    SCALARS: tl.constexpr,
    UPDATE: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,
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
        state_at = ()
        for i in tl.static_range(len(M)):
            state_at = state_at + (address_of(row, at.STATE + STATES[i], first, M[i]),)
        unscale = 1.0 / scalar(tl.load(table + at.GRAD_SCALE), tl.load(table + at.GRAD_SCALE_KIND))
        own = with_scales(table, row, coefficients, unscale, xs, ACC)
        scalars = SCALARS(group_of(table, row), row, flags, ACC)
        if are_aligned(weight | source, xs) & are_aligned(weight, state_at) & (count >= BLOCK):
            update_elements(
                weight,
                source,
                xs,
                own,
                state_at,
                scalars,
                count,
                PREVIEW,
                UPDATE,
                VARIANT,
                ACC,
                W,
                S,
                X,
                M,
                True,
                BLOCK,
            )
        else:
            update_elements(
                weight,
                source,
                xs,
                own,
                state_at,
                scalars,
                count,
                PREVIEW,
                UPDATE,
                VARIANT,
                ACC,
                W,
                S,
                X,
                M,
                False,
                BLOCK,
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
    SCALARS: tl.constexpr,
    UPDATE: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,
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
        descent_chunk(
            table,
            rows_at,
            place,
            coefficients,
            skips,
            COPIES,
            PREVIEW,
            SCALARS,
            UPDATE,
            VARIANT,
            STATES,
            W,
            S,
            X,
            M,
            BLOCK,
        )
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
    SCALARS: tl.constexpr,
    UPDATE: tl.constexpr,
    VARIANT: tl.constexpr,
    STATES: tl.constexpr,
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
        descent_chunk(
            table,
            rows_at,
            place,
            coefficients,
            skips,
            COPIES,
            PREVIEW,
            SCALARS,
            UPDATE,
            VARIANT,
            STATES,
            W,
            S,
            X,
            M,
            BLOCK,
        )
        step += tl.num_programs(0)
    if COUNT:
        count_steps(table, scratch, rows_at, rows, skips)
