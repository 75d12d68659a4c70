"""Two points from one reading: what an ascent and a look-ahead would write."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .elements import (
    address_of,
    addresses_of,
    are_aligned,
    first_of,
    geometry,
    given_coefficients,
    number,
    read,
    row_of,
    with_scales,
    write,
)
from .gram import gram_by_all
from .perturb import restore_chunk
from .updates import base_scalars, must_skip, updated_by_base


@triton.jit
def points_elements(
    weight,
    point,
    source,
    x,
    coefficient,
    eta,
    state_at,
    scalars,
    count,
    KIND: tl.constexpr,
    ACC: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gradient = read(x, 0, count, X, FULL, BLOCK).to(ACC)
    copy = read(source, 0, count, S, FULL, BLOCK)
    own = copy.to(ACC)
    updated, _ = updated_by_base(own, gradient, state_at, scalars, count, KIND, ACC, M, FULL, BLOCK)
    write(weight, count, updated, W, FULL, BLOCK)
    scale = geometry(own, eta)
    ascended = (own + scale * scale * (coefficient * gradient)).to(W)
    write(point, count, tl.where(coefficient != 0.0, ascended, copy.to(W)), W, FULL, BLOCK)


@triton.jit
def points_chunk(
    table,
    rows_at,
    place,
    coefficients,
    stays,
    KIND: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """point <- w + T(w)^2 c x and weights <- base(w, x), with w the copy: an ascent's and a look-ahead's results."""
    ACC: tl.constexpr = tl.float64 if tl.float64 == W else tl.float32
    row = row_of(table, rows_at, place)
    first = first_of(place, BLOCK)
    flags = tl.load(row + at.FLAGS)
    if stays | ((flags & at.HAS_GRADIENT) == 0):
        restore_chunk(row, first, at.WEIGHT, W, S, BLOCK)
        restore_chunk(row, first, at.POINT, W, S, BLOCK)
    else:
        count = tl.load(row + at.NUMEL) - first
        weight = address_of(row, at.WEIGHT, first, W)
        point = address_of(row, at.POINT, first, W)
        source = address_of(row, at.SNAPSHOT, first, S)
        xs = addresses_of(row, at.LIST, first, X)
        state_at = addresses_of(row, at.STATE, first, M)
        eta = number(tl.load(row + at.ETA)).to(ACC)
        c = with_scales(table, row, coefficients, 1.0, xs, ACC)[0]
        own = base_scalars(table, row, flags, KIND, ACC)
        if are_aligned(weight | point | source, xs) & are_aligned(weight, state_at) & (count >= BLOCK):
            points_elements(
                weight, point, source, xs[0], c, eta, state_at, own, count, KIND, ACC, W, S, X[0], M, True, BLOCK
            )
        else:
            points_elements(
                weight, point, source, xs[0], c, eta, state_at, own, count, KIND, ACC, W, S, X[0], M, False, BLOCK
            )


@triton.jit(do_not_specialize=["given", "rows_at", "chunks"])
def points_kernel(
    table,
    places,
    given: tl.int64,
    rows_at,
    chunks,
    KIND: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """After a Gram matrix, whose report has the ascent's coefficient."""
    coefficients = given_coefficients(given, at.REPORT, 1)
    place = tl.load(places + chunks - 1 - tl.program_id(0))
    stays = must_skip(table, given, at.REPORT)
    points_chunk(table, rows_at, place, coefficients, stays, KIND, W, S, X, M, BLOCK)


@triton.jit(do_not_specialize=["report", "rows_at", "chunks"])
def rule_points_kernel(
    table,
    places,
    scratch,
    report: tl.int64,
    rows_at,
    chunks,
    RULE: tl.constexpr,
    KIND: tl.constexpr,
    W: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gram matrix, rule and both points in one cooperative launch."""
    finite, coefficients = gram_by_all(table, places, scratch, report, rows_at, chunks, RULE, S, X, True, BLOCK, LANES)
    step = tl.program_id(0)
    while step < chunks:
        place = tl.load(places + chunks - 1 - step)
        points_chunk(table, rows_at, place, coefficients, not finite, KIND, W, S, X, M, BLOCK)
        step += tl.num_programs(0)
