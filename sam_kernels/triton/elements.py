"""Reading and writing the elements of a chunk, and combining them. See :mod:`.kernels` for what names mean."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at


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
def doubles_at(address):
    """Pointer to float64 numbers at an address that is an argument of the launch, also a small one."""
    return address.to(tl.int64).to(tl.pointer_type(tl.float64))


@triton.jit
def given_coefficients(address, SOURCE: tl.constexpr, LISTS: tl.constexpr):
    """The lists' coefficients, float64: from numbers or a report at an address, or ones."""
    numbers = doubles_at(address)
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
