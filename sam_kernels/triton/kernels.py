"""The kernels. One program of a kernel works on one chunk of one tensor; see Note [The table on the device].

Every formula has its paper and its plain form in ``sam_kernels.reference``; ``csrc/common`` states the same for the
other native backends. Arithmetic is float64 for float64 weights and float32 for all others; scalars and sums of
products are float64. Divisions and square roots are correctly rounded, and launches forbid the contraction of products
and sums, so that equal coefficients give the same bits as in the other native backends.

Loops whose bounds are known only when they run are ``while`` loops: the interpreter of Triton 3.6 cannot run others
with the numpy of today, and the compiler makes the same of both.

Names of compile-time parameters: ``W`` is the type of the weights, ``S`` that of their copies or masters, ``X`` the
types of the gradient lists, ``M`` those of the base optimizer's state, ``BLOCK`` the number of elements of a chunk.
Where S is not W, the copies are masters: always held, and what the weights are the rounding of.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at

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


# ---------------------------------------------------------------- reading and writing


@triton.jit
def number(word):
    """The float64 whose bits a word holds."""
    return word.to(tl.float64, bitcast=True)


@triton.jit
def scalar(word, kind):
    """A number from the table, or from where the table says that it lies."""
    value = number(word)
    if kind == at.FLOAT32:
        value = tl.load(word.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif kind == at.FLOAT64:
        value = tl.load(word.to(tl.pointer_type(tl.float64)))
    return value


# Note [Branches around tensors]
# A branch that yields a tensor makes Triton move it through shared memory into some layout of its own choice. So
# nothing that is loaded passes through one: a list that is not there is read with a count of zero, which costs no
# memory access and keeps the others' accesses of 16 bytes, and choices between tensors are `tl.where`. It took a third
# of the registers off the Gram matrix of three lists.


@triton.jit
def read(address, start, count, TYPE: tl.constexpr, FULL: tl.constexpr, SIZE: tl.constexpr):
    """The SIZE elements from `start` of the `count` at an address; zeros behind the last.

    FULL promises that all are there, or none (`count` is 0), and that the address is a multiple of 16; then 16 bytes
    are read at a time.
    """
    offsets = start + tl.arange(0, SIZE)
    pointer = address.to(tl.pointer_type(TYPE))
    if FULL:
        pointer = tl.multiple_of(pointer, 16)
        mask = tl.full((SIZE,), count, tl.int64) > 0
    else:
        mask = offsets < count
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def write(address, count, value, TYPE: tl.constexpr, FULL: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    pointer = address.to(tl.pointer_type(TYPE))
    if FULL:
        tl.store(tl.multiple_of(pointer, 16) + offsets, value.to(TYPE))
    else:
        tl.store(pointer + offsets, value.to(TYPE), mask=offsets < count)


@triton.jit
def row_of(table, rows_at, place):
    return table + rows_at + (place >> 32) * at.ROW_WORDS


@triton.jit
def first_of(place, BLOCK: tl.constexpr):
    """The chunk's first element."""
    return (place & 0xFFFFFFFF) * BLOCK


@triton.jit
def group_of(table, row):
    return table + at.HEADER_WORDS + tl.load(row + at.GROUP) * at.GROUP_WORDS


@triton.jit
def address_of(row, column, first, TYPE: tl.constexpr):
    """Of the chunk's first element in a column; 0 where the row has no tensor there."""
    address = tl.load(row + at.POINTERS + column)
    return tl.where(address == 0, address, address + first * (TYPE.primitive_bitwidth // 8))


@triton.jit
def addresses_of(row, column, first, TYPES: tl.constexpr):
    """In the columns from the given one, as many as there are types."""
    addresses = ()
    for i in tl.static_range(len(TYPES)):
        addresses = addresses + (address_of(row, column + i, first, TYPES[i]),)
    return addresses


@triton.jit
def are_aligned(address, addresses):
    for i in tl.static_range(len(addresses)):
        address = address | addresses[i]
    return address % 16 == 0


@triton.jit
def quotient(a, b):
    if a.dtype == tl.float64:
        result = a / b
    else:
        result = tl.div_rn(a, b)
    return result


@triton.jit
def root(a):
    if a.dtype == tl.float64:
        result = tl.sqrt(a)
    else:
        result = tl.sqrt_rn(a)
    return result


# ---------------------------------------------------------------- combination of lists


@triton.jit
def given_coefficients(address, SOURCE: tl.constexpr, LISTS: tl.constexpr):
    """The lists' coefficients, float64: from numbers or a report at an address, or ones."""
    numbers = address.to(tl.pointer_type(tl.float64))
    if SOURCE == at.REPORT:
        numbers = numbers + at.COEFFICIENTS
    coefficients = ()
    for i in tl.static_range(LISTS):
        if SOURCE == at.ONES:
            coefficients = coefficients + (tl.cast(1.0, tl.float64),)
        else:
            coefficients = coefficients + (tl.load(numbers + i),)
    return coefficients


@triton.jit
def with_scales(table, row, coefficients, factor, xs, ACC: tl.constexpr):
    """Coefficients in the type of the arithmetic, the group's scales included; zero where the row lacks a list."""
    group = group_of(table, row)
    kinds = tl.load(group + at.GROUP_KINDS)
    result = ()
    for i in tl.static_range(len(xs)):
        value = factor * coefficients[i] * scalar(tl.load(group + at.SCALES + i), (kinds >> (2 * i)) & 3)
        result = result + (tl.where(xs[i] == 0, 0.0, value).to(ACC),)
    return result


@triton.jit
def geometry(weight, eta):
    """T(w): |w| + eta, or 1 if eta is negative."""
    return tl.where(eta >= 0.0, tl.abs(weight) + eta, 1.0)


@triton.jit
def some_count(coefficients):
    found = coefficients[0] != 0.0
    for i in tl.static_range(1, len(coefficients)):
        found = found | (coefficients[i] != 0.0)
    return found


@triton.jit
def combination(coefficients, xs, count, ACC: tl.constexpr, X: tl.constexpr, FULL: tl.constexpr, SIZE: tl.constexpr):
    """sum_i c_i x_i. A coefficient of zero leaves its list out, whatever that holds; zero if all are."""
    total = tl.full((SIZE,), -0.0, ACC)  # changes no number that is added to it
    for i in tl.static_range(len(X)):
        counts = coefficients[i] != 0.0
        term = coefficients[i] * read(xs[i], 0, tl.where(counts, count, 0), X[i], FULL, SIZE).to(ACC)
        total = tl.where(counts, total + term, total)
    return tl.where(some_count(coefficients), total, 0.0)


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
        numbers = report.to(tl.pointer_type(tl.float64))
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
    report,
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


# ---------------------------------------------------------------- perturb, restore, combine


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
    given,
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
    report,
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
def restore_chunk(row, first, column, W: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr):
    """A column's chunk from its copy, bit for bit, or from its master, rounded."""
    count = tl.load(row + at.NUMEL) - first
    weight = address_of(row, column, first, W)
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
        restore_chunk(row, first_of(place, BLOCK), at.WEIGHT, W, S, BLOCK)


@triton.jit(do_not_specialize=["given", "rows_at", "chunks"])
def combine_kernel(
    table,
    places,
    given,
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
                restore_chunk(row, first, at.WEIGHT, W, S, BLOCK)
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
        skips = skips | (tl.load(given.to(tl.pointer_type(tl.float64)) + at.FINITE) == 0.0)
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
    given,
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
    report,
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


# ---------------------------------------------------------------- two points from one reading


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
    given,
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
    report,
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
