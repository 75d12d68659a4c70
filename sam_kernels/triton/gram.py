"""Gram matrices: products of gradient lists, and the rules that make coefficients of them."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .elements import address_of, addresses_of, are_aligned, doubles_at, first_of, geometry, number, read, row_of

RULE_PARAMETERS: tl.constexpr = tl.constexpr(at.MAX_RULE_PARAMETERS)

# ---------------------------------------------------------------- rules: from a Gram matrix to coefficients
#
# gram[i][j] = <x_i, x_j>, float64 scalars; len(gram) is the number of lists. A rule returns a tuple of one coefficient
# for each list; what it returns for a Gram matrix that is not finite does not matter.


@triton.jit
def fixed(gram, parameters):
    coefficients = ()
    for i in tl.static_range(len(gram)):
        coefficients = coefficients + (1.0,)
    return coefficients


@triton.jit
def normalized(gram, parameters):
    coefficients = ()
    for i in tl.static_range(len(gram)):
        coefficients = coefficients + (1.0 / (tl.sqrt(gram[i][i]) + parameters[0]),)
    return coefficients


@triton.jit
def deflected(gram, parameters):
    squared = gram[0][0]
    along = tl.where(squared > 0.0, gram[0][1] / squared, 0.0)
    return 1.0 + parameters[1] * along, -parameters[1]


@triton.jit
def norm_matched(gram, parameters):
    return tl.sqrt(gram[1][1]) / (tl.sqrt(gram[0][0]) + parameters[0]), 0.0


@triton.jit
def normalized_sum(gram, parameters):
    squared = tl.cast(0.0, tl.float64)
    for i in tl.static_range(len(gram)):
        for j in tl.static_range(len(gram)):
            squared += gram[i][j]
    # Lists that cancel may leave a rounding error below zero.
    unit = 1.0 / (tl.sqrt(tl.where(squared > 0.0, squared, 0.0)) + parameters[0])
    coefficients = ()
    for i in tl.static_range(len(gram)):
        coefficients = coefficients + (unit,)
    return coefficients


# ---------------------------------------------------------------- Gram matrix


@triton.jit
def with_products(
    sums,
    xs,
    weight,
    eta,
    count,
    S: tl.constexpr,
    X: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The sums of LANES lanes, pair by pair, with one chunk's products added; those of float32 elements are exact."""
    for part in tl.static_range(BLOCK // LANES):
        values = ()
        for i in tl.static_range(len(X)):
            value = read(xs[i], part * LANES, tl.where(xs[i] == 0, 0, count), X[i], FULL, LANES)
            values = values + (value.to(tl.float64),)
        if WEIGHTED:
            own = read(weight, part * LANES, tl.where(eta >= 0.0, count, 0), S, FULL, LANES).to(tl.float64)
            scale = geometry(own, eta)
            scaled = ()
            for i in tl.static_range(len(X)):
                scaled = scaled + (values[i] * scale,)
            values = scaled
        added = ()
        for i in tl.static_range(len(X)):
            for j in tl.static_range(i, len(X)):
                added = added + (sums[len(added)] + values[i] * values[j],)
        sums = added
    return sums


@triton.jit
def gram_of_virtual_block(
    v,
    table,
    places,
    partials,
    rows_at,
    chunks,
    S: tl.constexpr,
    X: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes the sums over chunks v, v + VIRTUAL_BLOCKS, ... to `partials`."""
    sums = ()
    for i in tl.static_range(len(X) * (len(X) + 1) // 2):
        sums = sums + (tl.zeros((LANES,), tl.float64),)
    index = v
    while index < chunks:
        place = tl.load(places + index)
        row = row_of(table, rows_at, place)
        flags = tl.load(row + at.FLAGS)
        # Rows that only hold a copy take part in what follows, not in the sums.
        if (flags & at.HAS_GRADIENT) != 0:
            first = first_of(place, BLOCK)
            count = tl.load(row + at.NUMEL) - first
            xs = addresses_of(row, at.LIST, first, X)
            weight = xs[0] * 0
            eta = number(tl.load(row + at.ETA))
            if WEIGHTED:
                # The geometry is that of the weights themselves, not of perturbed ones.
                own = tl.where((flags & at.HELD) != 0, at.SNAPSHOT, at.WEIGHT)
                weight = address_of(row, own, first, S)
            if are_aligned(weight, xs) & (count >= BLOCK):
                sums = with_products(sums, xs, weight, eta, count, S, X, WEIGHTED, True, BLOCK, LANES)
            else:
                sums = with_products(sums, xs, weight, eta, count, S, X, WEIGHTED, False, BLOCK, LANES)
        index += at.VIRTUAL_BLOCKS
    for pair in tl.static_range(len(sums)):
        tl.store(partials + v * len(sums) + pair, tl.sum(sums[pair]))


@triton.jit
def sum_of_partials(partials, slots, pair, PAIRS: tl.constexpr):
    """One entry of the Gram matrix: its partial sums, in a fixed order."""
    lanes = tl.arange(0, 256)
    sums = tl.zeros((256,), tl.float64)
    slot = lanes
    start = slots * 0
    while start < slots:
        # Past the first-level cache: other programs wrote them.
        sums += tl.load(partials + slot * PAIRS + pair, mask=slot < slots, other=0.0, cache_modifier=".cg")
        slot += 256
        start += 256
    return tl.sum(sums)


@triton.jit
def finish_gram(table, partials, slots, report, writes_report, RULE: tl.constexpr, LISTS: tl.constexpr):
    """Sums the partials and applies the rule. Returns whether the Gram matrix is finite, and the coefficients."""
    PAIRS: tl.constexpr = LISTS * (LISTS + 1) // 2
    pairs = ()
    total = tl.cast(0.0, tl.float64)
    for pair in tl.static_range(PAIRS):
        entry = sum_of_partials(partials, slots, pair, PAIRS)
        pairs = pairs + (entry,)
        total += entry * 0.0  # NaN if one of them is not finite
    finite = total == 0.0
    gram = ()
    for i in tl.static_range(LISTS):
        row = ()
        for j in tl.static_range(LISTS):
            if i <= j:
                row = row + (pairs[i * LISTS - i * (i - 1) // 2 + j - i],)
            else:
                row = row + (pairs[j * LISTS - j * (j - 1) // 2 + i - j],)
        gram = gram + (row,)
    parameters = ()
    for i in tl.static_range(RULE_PARAMETERS):
        parameters = parameters + (number(tl.load(table + at.RULE_PARAMETERS + i)),)
    found = RULE(gram, parameters)
    tl.static_assert(len(found) == LISTS, "a rule must return a tuple of one coefficient for each gradient list")
    coefficients = ()
    for i in tl.static_range(LISTS):
        coefficients = coefficients + (tl.where(finite, found[i], 0.0).to(tl.float64),)
    if writes_report:
        numbers = doubles_at(report)
        tl.store(numbers + at.FINITE, tl.where(finite, 1.0, 0.0).to(tl.float64))
        for i in tl.static_range(LISTS):
            tl.store(numbers + at.COEFFICIENTS + i, coefficients[i])
            for j in tl.static_range(LISTS):
                tl.store(numbers + at.GRAM + i * at.MAX_LISTS + j, gram[i][j])
    return finite, coefficients


@triton.jit
def partials_in(scratch):
    return scratch.to(tl.pointer_type(tl.float64)) + at.PARTIALS


@triton.jit
def is_last_program(ticket):
    """Whether this program is the last to come here. It sees what the others wrote, and they read nothing more."""
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if is_last:
        tl.store(ticket, 0)
    tl.debug_barrier()
    return is_last


@triton.jit
def grid_barrier(scratch):
    """Every program waits for all others, which must be resident: for cooperative launches alone."""
    programs = tl.num_programs(0)
    tl.debug_barrier()
    tl.atomic_add(scratch + at.ARRIVED, 1, sem="acq_rel")
    while tl.atomic_add(scratch + at.ARRIVED, 0, sem="acquire") < programs:
        pass
    if tl.atomic_add(scratch + at.DEPARTED, 1, sem="acq_rel") == programs - 1:
        tl.store(scratch + at.ARRIVED, 0)
        tl.store(scratch + at.DEPARTED, 0)
    tl.debug_barrier()


@triton.jit
def gram_by_all(
    table,
    places,
    scratch,
    report,
    rows_at,
    chunks,
    RULE: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """Gram matrix and rule in a cooperative launch: every program sums the partials for itself."""
    partials = partials_in(scratch)
    slots = min(chunks, at.VIRTUAL_BLOCKS)
    v = tl.program_id(0)
    while v < slots:
        gram_of_virtual_block(v, table, places, partials, rows_at, chunks, S, X, WEIGHTED, BLOCK, LANES)
        v += tl.num_programs(0)
    grid_barrier(scratch)
    return finish_gram(table, partials, slots, report, tl.program_id(0) == 0, RULE, len(X))


@triton.jit(do_not_specialize=["report", "rows_at", "chunks", "slots", "first_slot"])
def gram_kernel(
    table,
    places,
    scratch,
    report: tl.int64,
    rows_at,
    chunks,
    slots,
    first_slot,
    RULE: tl.constexpr,
    FINISH: tl.constexpr,
    S: tl.constexpr,
    X: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """A virtual block for each program. With FINISH, the last program to end sums up for this and earlier launches."""
    v = tl.program_id(0)
    partials = partials_in(scratch)
    if v < chunks:
        own = partials + first_slot * (len(X) * (len(X) + 1) // 2)
        gram_of_virtual_block(v, table, places, own, rows_at, chunks, S, X, WEIGHTED, BLOCK, LANES)
    if FINISH:
        if is_last_program(scratch + at.GRAM_TICKET):
            finish_gram(table, partials, slots, report, True, RULE, len(X))
