"""Perturbing, restoring and combining."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .elements import (
    address_of,
    addresses_of,
    are_aligned,
    combination,
    first_of,
    geometry,
    given_coefficients,
    number,
    read,
    row_of,
    some_count,
    with_scales,
    write,
)
from .gram import gram_by_all


@triton.jit
def perturb_elements(
    weight,
    snapshot,
    held,
    xs,
    coefficients,
    eta,
    count,
    TAKE: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    own = read(tl.where(held, snapshot, weight), 0, count, S, FULL, BLOCK)
    if TAKE and S == W:
        if not held:
            write(snapshot, count, own, S, FULL, BLOCK)
    if some_count(coefficients):
        step = combination(coefficients, xs, count, eta.dtype, X, FULL, BLOCK)
        wide = own.to(eta.dtype)
        scale = geometry(wide, eta)
        write(weight, count, wide + scale * scale * step, W, FULL, BLOCK)
    elif held:
        write(weight, count, own, W, FULL, BLOCK)


@triton.jit
def perturb_chunk(
    table,
    rows_at,
    place,
    coefficients,
    TAKE: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w <- w + T(w)^2 d. Where a copy of w is held already, w is that copy, whatever the weights hold now."""
    ACC: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    row = row_of(table, rows_at, place)
    flags = tl.load(row + at.FLAGS)
    if (flags & (at.HELD | at.HAS_GRADIENT)) != 0:
        held = (flags & at.HELD) != 0
        first = first_of(place, BLOCK)
        count = tl.load(row + at.NUMEL) - first
        weight = address_of(row, at.WEIGHT, first, W)
        snapshot = weight
        if TAKE:
            snapshot = address_of(row, at.SNAPSHOT, first, S)
        eta = number(tl.load(row + at.ETA)).to(ACC)
        xs = addresses_of(row, at.LIST, first, X)
        own = with_scales(table, row, coefficients, 1.0, xs, ACC)
        if are_aligned(weight | snapshot, xs) & (count >= BLOCK):
            perturb_elements(weight, snapshot, held, xs, own, eta, count, TAKE, W, S, X, True, BLOCK)
        else:
            perturb_elements(weight, snapshot, held, xs, own, eta, count, TAKE, W, S, X, False, BLOCK)


@triton.jit(do_not_specialize=["given", "rows_at", "chunks"])
def perturb_kernel(
    table,
    places,
    given: tl.int64,
    rows_at,
    chunks,
    SOURCE: tl.constexpr,
    REVERSE: tl.constexpr,
    TAKE: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # After a Gram matrix the cache still holds the gradients of the last chunks.
    index = chunks - 1 - tl.program_id(0) if REVERSE else tl.program_id(0)
    coefficients = given_coefficients(given, SOURCE, len(X))
    perturb_chunk(table, rows_at, tl.load(places + index), coefficients, TAKE, W, S, X, BLOCK)


@triton.jit(do_not_specialize=["report", "rows_at", "chunks"])
def ascent_kernel(
    table,
    places,
    scratch,
    report: tl.int64,
    rows_at,
    chunks,
    RULE: tl.constexpr,
    TAKE: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gram matrix, rule and perturbation in one cooperative launch."""
    _, coefficients = gram_by_all(table, places, scratch, report, rows_at, chunks, RULE, S, X, True, BLOCK, LANES)
    step = tl.program_id(0)
    while step < chunks:
        perturb_chunk(table, rows_at, tl.load(places + chunks - 1 - step), coefficients, TAKE, W, S, X, BLOCK)
        step += tl.num_programs(0)


@triton.jit
def restore_chunk(row, first, W: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of a weight from its copy, bit for bit, or from its master, rounded."""
    count = tl.load(row + at.NUMEL) - first
    weight = address_of(row, at.WEIGHT, first, W)
    snapshot = address_of(row, at.SNAPSHOT, first, S)
    if ((weight | snapshot) % 16 == 0) & (count >= BLOCK):
        write(weight, count, read(snapshot, 0, count, S, True, BLOCK), W, True, BLOCK)
    else:
        write(weight, count, read(snapshot, 0, count, S, False, BLOCK), W, False, BLOCK)


@triton.jit(do_not_specialize=["rows_at", "chunks"])
def restore_kernel(table, places, rows_at, chunks, W: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.load(places + tl.program_id(0))
    row = row_of(table, rows_at, place)
    if (tl.load(row + at.FLAGS) & at.HELD) != 0:
        restore_chunk(row, first_of(place, BLOCK), W, S, BLOCK)


@triton.jit(do_not_specialize=["given", "rows_at", "chunks"])
def combine_kernel(
    table,
    places,
    given: tl.int64,
    rows_at,
    chunks,
    SOURCE: tl.constexpr,
    W: tl.constexpr,
    X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out <- sum_i c_i x_i, with the outputs in the weights' column."""
    ACC: tl.constexpr = tl.float64 if W == tl.float64 else tl.float32
    coefficients = given_coefficients(given, SOURCE, len(X))
    place = tl.load(places + tl.program_id(0))
    row = row_of(table, rows_at, place)
    first = first_of(place, BLOCK)
    count = tl.load(row + at.NUMEL) - first
    out = address_of(row, at.WEIGHT, first, W)
    xs = addresses_of(row, at.LIST, first, X)
    own = with_scales(table, row, coefficients, 1.0, xs, ACC)
    if are_aligned(out, xs) & (count >= BLOCK):
        write(out, count, combination(own, xs, count, ACC, X, True, BLOCK), W, True, BLOCK)
    else:
        write(out, count, combination(own, xs, count, ACC, X, False, BLOCK), W, False, BLOCK)
