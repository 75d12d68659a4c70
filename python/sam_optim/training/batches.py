"""Batches in parts: how many samples a batch holds, where it may be cut, and how much each part counts.

Note [How a batch is read]. A batch has a number of samples B if everything in it does: a tensor or array has B rows; a
list or tuple is either of fields, each of which has B samples, or of B samples, one entry for each. Dicts, named tuples
and dataclasses are of fields. Single values (numbers, strings, None, tensors without dimensions or of one row) belong
to every part. Entries of a list of samples are alike: all tensors of one type and number of dimensions, all dicts, all
plain values. If everything fits one number alone, that is B; what fits none is refused. Where several fit:

* Up to three tensors of equal length in the outermost list or tuple are fields, as ``[x, y]`` of torch's DataLoader is.
  Tensors that might as well be single samples are refused: images (C, H, W) with up to four channels, four or more of
  the same shape, a vector alone, or one row beside several.
* Entries that hold a number, or a tensor without dimensions, are samples: ``[(image, 3), (image, 5)]``.
* A list of B dicts or values beside something else with B samples is of samples.

Refused too are vectors of integers beside nothing but rows of one sample, which may be where sequences begin that a
collator has laid one behind the other. Everything else is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from itertools import pairwise
from numbers import Number, Real
from pathlib import PurePath
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# What stands for "no label" in the targets of torch's cross entropy, and of whatever follows it.
IGNORED = -100
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)

_VALUES = (str, bytes, Number, Enum, type(None), type, FunctionType, PurePath, torch.Size, torch.dtype, torch.device)
_HELP = (
    "give TrainStep a split of your own, split=..., from a batch and a number to that many parts; it may call "
    "split_batch() on what can be cut"
)

_WEIGHT = (
    "give TrainStep weight=..., from a part to how much the mean over it counts: its samples, or what else the loss "
    "is a mean over, as lambda part: (part['labels'] != -100).sum()"
)

Split = Callable[[Any, int], Sequence[Any]]
Weight = Callable[[Any], Any]
# Of the batch's mean; on the device, without waiting for it, where a step is recorded.
Factor = float | Tensor

# A cut of something: from start and end to the samples in between; None for what belongs to every part.
_Cut = Callable[[int, int], Any]


class _MisfitError(Exception):
    """Why something cannot be read with so many samples."""


def split_batch(batch: Any, count: int) -> list[Any]:
    """Cuts a batch into ``count`` parts of nearly equal size, along its samples.

    Args:
        batch: tensors, numpy arrays and lists of samples in any nesting of tuples, lists, dicts (``UserDict`` and
            ``BatchEncoding`` too), named tuples and dataclasses. Tensors are cut along their first dimension, lists
            with an entry for each sample between entries. Numbers, strings, None, tensors without dimensions or with
            one row go into every part. A tensor that has as many rows as there are samples is taken for theirs.
        count: at most the number of samples.

    Raises:
        ValueError: if there are fewer samples than parts, or it is not plain how many there are: if entries differ in
            length, if a list could be of fields as well as of samples, or for objects that nobody here knows.
    """
    return [part for _, part in _cut_evenly(batch, count)]


@contextmanager
def containers_kept(batch: Any) -> Iterator[None]:
    """Around a pass: what it takes out of a batch's dicts and lists, or replaces there, is put back for the next pass.

    As ``batch.pop("labels")``, and ``batch["x"] = batch["x"] / 255``. What is added stays.
    """
    kept = list(_contents(batch))
    try:
        yield
    finally:
        for node, content in kept:
            if isinstance(node, list):
                if len(node) != len(content) or any(a is not b for a, b in zip(node, content, strict=True)):
                    node[:] = content
            else:
                for key, value in content.items():
                    if key not in node or node[key] is not value:
                        node[key] = value


def _contents(node: Any) -> Iterator[tuple[Any, Any]]:
    """The dicts and lists of a batch, and what they hold."""
    if isinstance(node, (dict, UserDict)):
        content = dict(node.items())
        yield node, content
        children: Any = content.values()
    elif isinstance(node, (list, tuple)):
        if isinstance(node, list):
            yield node, list(node)
        children = node
    else:
        return
    for child in children:
        if isinstance(child, (dict, UserDict, list, tuple)):
            yield from _contents(child)


def weighed_parts(
    batch: Any, count: int, split: Split | None, weight: Weight | None, waits: bool = True
) -> list[tuple[Factor, Any]]:
    """Micro-batches, and how much the mean over each counts in the mean over the batch.

    Args:
        split: what cuts; None for :func:`split_batch`.
        weight: of a part; None for its samples, or its labels where some are -100.
        waits: a GPU may be waited for. Then factors are numbers.

    Raises:
        ValueError: if the batch cannot be cut, or weights cannot be told or used.
    """
    if split is None or split is split_batch:
        counted = _cut_evenly(batch, count)
        parts: list[Any] = [part for _, part in counted]
    else:
        parts = list(split(batch, count))
        counted = []
    if not parts:
        raise ValueError("split made no parts of the batch")
    if weight is not None:
        weights: list[float | Tensor] = [_checked(weight(part)) for part in parts]
    else:
        samples = [number for number, _ in counted] or [samples_of(part) for part in parts]
        weights = list(samples)
        columns = _columns_of_labels(parts)
        if columns:
            weights = (_labels(columns) or weights) if waits else _labels_or(columns, samples)
    if waits:
        numbers = _numbers(weights)
        total = math.fsum(numbers)
        if not (all(math.isfinite(w) and w >= 0.0 for w in numbers) and total > 0.0):
            raise ValueError(f"micro-batches weigh {numbers}; weights must be at least 0, and one of them above")
        return [(w / total, part) for w, part in zip(numbers, parts, strict=True)]
    if not any(isinstance(w, Tensor) for w in weights):
        total = math.fsum(weights)  # type: ignore[arg-type]
        return [(w / total, part) for w, part in zip(weights, parts, strict=True)]
    device = next(w.device for w in weights if isinstance(w, Tensor))
    column = torch.stack([_number_on(device, weight) for weight in weights])
    return list(zip((column / column.sum()).unbind(), parts, strict=True))


def _cut_evenly(batch: Any, count: int) -> list[tuple[int, Any]]:
    """Parts, and the number of samples in each."""
    samples, cut = _read(batch)
    if samples < count:
        raise ValueError(f"a batch of {samples} samples cannot be split into {count} micro-batches")
    bounds = [samples * number // count for number in range(count + 1)]
    return [(end - start, cut(start, end)) for start, end in pairwise(bounds)]


def split_off(batch: Any, share: float) -> tuple[Any, Any]:
    """A batch without its last samples, and these; at least one sample in either. Read as by :func:`split_batch`."""
    samples, cut = _read(batch)
    if samples < 2:
        raise ValueError("a batch of one sample cannot be split into a training and a validation batch")
    end = min(max(round(samples * (1.0 - share)), 1), samples - 1)
    return cut(0, end), cut(end, samples)


def samples_of(part: Any) -> int:
    """How many samples a part holds that somebody else has cut.

    Raises:
        ValueError: if that is not plain.
    """
    try:
        return _read(part)[0]
    except ValueError as error:
        raise ValueError(
            f"the samples in a part of your own split cannot be counted ({str(error).split(';')[0]}); {_WEIGHT}"
        ) from error


# ---------------------------------------------------------------- what parts weigh


def _columns_of_labels(parts: Sequence[Any]) -> list[list[Tensor]]:
    """What may be targets: the tensors of integers that stand in one place of all parts.

    Raises:
        ValueError: if some are -100 and parts have different numbers of such tensors.
    """
    rows = [[t for t in _tensors(part) if t.dtype in _INTEGERS and t.dim() > 0] for part in parts]
    if len({len(row) for row in rows}) > 1:
        if any(bool((t == IGNORED).any()) for row in rows for t in row):
            raise ValueError(f"some labels are {IGNORED} in lists of samples; {_WEIGHT}")
        return []
    return [list(column) for column in zip(*rows, strict=True)]


def _labels(columns: list[list[Tensor]]) -> list[float | Tensor] | None:
    """The labels in each part that are not -100; None if there is no -100.

    Raises:
        ValueError: if several tensors hold it and do not agree.
    """
    counts = [[_count(t) for t in column] for column in columns]
    numbers = _numbers([c for row in counts for c in row])
    rows = [numbers[i * len(columns[0]) : (i + 1) * len(columns[0])] for i in range(len(columns))]
    found = [
        row
        for row, column in zip(rows, columns, strict=True)
        if any(n < t.numel() for n, t in zip(row, column, strict=True))
    ]
    if not found:
        return None
    first = found[0]
    if any(a * sum(first) != b * sum(row) for row in found[1:] for a, b in zip(row, first, strict=True)):
        raise ValueError(f"several tensors of the batch have labels {IGNORED}, not at the same share; {_WEIGHT}")
    return list(first)


def _labels_or(columns: list[list[Tensor]], samples: list[int]) -> list[float | Tensor]:
    """As :func:`_labels` of at most one such tensor, without waiting; the samples if there is none."""
    # No number is copied to the device, for which the host would wait.
    found, labels = [], []
    for column in columns:
        counts = [_count(t) for t in column]
        found.append(torch.stack([n < t.numel() for n, t in zip(counts, column, strict=True)]).any())
        labels.append(torch.stack(counts) * found[-1])
    is_found, total = torch.stack(found).any(), torch.stack(labels).sum(0)
    return [torch.where(is_found, n, float(number)) for n, number in zip(total.unbind(), samples, strict=True)]


def _count(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    """Numbers; tensors are waited for once."""
    tensors = [value.detach().reshape(()).double() for value in values if isinstance(value, Tensor)]
    is_one_device = len({tensor.device for tensor in tensors}) == 1
    read = iter(torch.stack(tensors).tolist() if is_one_device else [tensor.item() for tensor in tensors])
    return [next(read) if isinstance(value, Tensor) else float(value) for value in values]


def _number_on(device: torch.device, value: float | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _checked(weight: Any) -> float | Tensor:
    if isinstance(weight, Tensor) and weight.numel() == 1:
        return weight
    if not isinstance(weight, Real):
        raise ValueError(
            f"weight returned {weight!r} for a micro-batch; it must return a number or a tensor of one element"
        )
    return float(weight)


# ---------------------------------------------------------------- reading


def _read(batch: Any) -> tuple[int, _Cut]:
    """The number of samples, and how to cut; see Note [How a batch is read]."""
    candidates = list(dict.fromkeys(_lengths(batch)))
    found: dict[int, _Cut] = {}
    reasons = []
    for samples in candidates:
        try:
            cut = _fit(batch, samples, is_outermost=True)
        except _MisfitError as reason:
            reasons.append(str(reason))
        else:
            if cut is not None:
                found[samples] = cut
    if not found:
        if candidates:
            raise ValueError(f"{reasons[0] if reasons else 'the batch holds single values alone'}; {_HELP}")
        raise ValueError(f"{_named(batch)} holds nothing that could be cut; {_HELP}")
    if len(found) > 1:
        found = _decided(batch, found)
    elif 1 not in found and _may_be_packed(batch):
        raise _several(batch, {1, *found})
    return next(iter(found.items()))


def _may_be_packed(batch: Any) -> bool:
    """Whether the rows to be cut may be the bounds of sequences that lie one behind the other in rows of one sample."""
    tensors = [t for t in _tensors(batch) if t.dim() > 0]
    cut = [t for t in tensors if t.shape[0] != 1]
    return any(t.dim() > 1 for t in tensors if t.shape[0] == 1) and all(
        t.dim() == 1 and t.dtype in _INTEGERS for t in cut
    )


def _decided(batch: Any, found: dict[int, _Cut]) -> dict[int, _Cut]:
    """Of several readings the one that holds."""
    as_samples = len(batch) if _is_sequence(batch) else 0
    if as_samples in found and len(found) == 2:
        [as_fields] = [samples for samples in found if samples != as_samples]
        if all(isinstance(entry, Tensor) or _is_array(entry) for entry in batch):
            if not _may_be_samples(batch):
                return {as_fields: found[as_fields]}
        elif all(_has_whole_value(entry, as_fields) for entry in batch):
            return {as_samples: found[as_samples]}
    raise _several(batch, found)


def _several(batch: Any, found: Iterable[int]) -> ValueError:
    numbers = " or ".join(str(samples) for samples in sorted(found))
    return ValueError(f"{_named(batch)} can be read as {numbers} samples; {_HELP}")


def _may_be_samples(tensors: Sequence[Any]) -> bool:
    """Whether tensors may be one sample each, although they could be fields."""
    shapes = [tuple(t.shape) for t in tensors]
    if len({shape[0] for shape in shapes}) > 1 or all(len(shape) == 3 and shape[0] <= 4 for shape in shapes):
        return True
    return (len(shapes) > 3 and len(set(shapes)) == 1) or (len(shapes) == 1 and len(shapes[0]) == 1)


def _lengths(node: Any) -> Iterator[int]:
    """Everything that could be the number of samples."""
    if isinstance(node, Tensor) or _is_array(node):
        if node.ndim > 0:
            yield int(node.shape[0])
    elif not isinstance(node, PackedSequence):
        if _is_sequence(node) and len(node) > 0 and _are_alike(node):
            yield len(node)
        for child in _children(node) or ():
            yield from _lengths(child)


def _fit(node: Any, samples: int, is_outermost: bool = False) -> _Cut | None:
    """How to cut something that has so many samples; None if it belongs to every part.

    Raises:
        _MisfitError: if it cannot have so many.
    """
    if isinstance(node, Tensor):
        return _fit_tensor(node, samples)
    if _is_array(node):
        return _fit_rows(node, samples, "an array")
    if is_single_value(node):
        return None
    children = None if isinstance(node, PackedSequence) else _children(node)
    if children is None:
        raise _MisfitError(f"{_named(node)} cannot be cut")
    if not _is_sequence(node):
        return _of_fields(node, [_fit(child, samples) for child in children])
    return _fit_sequence(node, samples, is_outermost)


def _fit_tensor(tensor: Tensor, samples: int) -> _Cut | None:
    if tensor.is_nested or tensor.layout not in (torch.strided, torch.sparse_coo):
        raise _MisfitError(f"a tensor of layout {tensor.layout} cannot be cut")
    cut = _fit_rows(tensor, samples, "a tensor")
    if cut is None or tensor.layout == torch.strided:
        return cut
    return lambda start, end: tensor.index_select(0, torch.arange(start, end, device=tensor.device))


def _fit_rows(rows: Any, samples: int, name: str) -> _Cut | None:
    if rows.ndim == 0 or (rows.shape[0] == 1 and samples != 1):
        return None
    if rows.shape[0] != samples:
        raise _MisfitError(f"{name} of shape {tuple(rows.shape)} does not have the {samples} rows that others have")
    return lambda start, end: rows[start:end]


def _fit_sequence(entries: Sequence[Any], samples: int, is_outermost: bool) -> _Cut | None:
    is_samples = len(entries) == samples and _are_alike(entries)
    reason = None
    fields: list[_Cut | None] | None = None
    try:
        fields = [_fit(entry, samples) for entry in entries]
    except _MisfitError as error:
        reason = error
    is_fields = fields is not None and any(cut is not None for cut in fields)
    if is_samples and is_fields:
        if _are_tensors(entries):
            is_samples, is_plain = False, is_outermost and not _may_be_samples(entries)
        elif is_outermost:
            is_plain = all(_has_whole_value(entry, samples) for entry in entries)
        else:
            is_plain = not any(entry is None for entry in entries)
        if not is_plain:
            raise ValueError(
                f"a {type(entries).__name__} of {samples} entries, each with {samples} rows, can be read as fields and "
                f"as samples; {_HELP}"
            )
    if is_samples:
        return lambda start, end: _rebuilt(entries, entries[start:end])
    if is_fields:
        assert fields is not None
        return _of_fields(entries, fields)
    if len(entries) <= 1 and fields is not None:
        return None
    raise reason or _MisfitError(
        f"a {type(entries).__name__} of {len(entries)} entries does not have the {samples} that others have"
    )


def _of_fields(node: Any, cuts: list[_Cut | None]) -> _Cut | None:
    if all(cut is None for cut in cuts):
        return None
    children = list(_children(node) or ())

    def cut_each(start: int, end: int) -> Any:
        pairs = zip(cuts, children, strict=True)
        return _rebuilt(node, [child if cut is None else cut(start, end) for cut, child in pairs])

    return cut_each


# ---------------------------------------------------------------- kinds of containers


def _is_array(node: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(node, numpy.ndarray)


def is_single_value(node: Any) -> bool:
    """Whether something is a number, a string or the like, which belongs to every part of a batch."""
    numpy = sys.modules.get("numpy")
    return isinstance(node, _VALUES) or (numpy is not None and isinstance(node, numpy.generic))


def _is_sequence(node: Any) -> bool:
    """A list or tuple whose entries have no names."""
    return isinstance(node, (list, tuple)) and not isinstance(node, torch.Size) and not hasattr(node, "_fields")


def _are_tensors(entries: Sequence[Any]) -> bool:
    return all((isinstance(entry, Tensor) or _is_array(entry)) and entry.ndim > 0 for entry in entries)


def _children(node: Any) -> Iterator[Any] | Sequence[Any] | None:
    """What a container holds; None for what is none, or of a kind that nobody here can make anew."""
    if isinstance(node, (list, tuple)):
        return None if isinstance(node, torch.Size) else node
    if isinstance(node, (dict, UserDict)):
        return list(node.values())
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [getattr(node, field.name) for field in dataclasses.fields(node)]
    return None


def _rebuilt(node: Any, children: Sequence[Any]) -> Any:
    """A container of the same kind with these entries."""
    if isinstance(node, (list, tuple)):
        if type(node) in (list, tuple):
            return type(node)(children)
        return node._make(children) if hasattr(node, "_make") else type(node)(children)  # type: ignore[call-arg]
    if isinstance(node, UserDict):
        try:
            return type(node)(dict(zip(node, children, strict=True)))
        except TypeError:  # a constructor of its own
            pass
    new = copy.copy(node)
    if isinstance(node, (dict, UserDict)):
        for key, child in zip(node, children, strict=True):
            new[key] = child
    else:
        for field, child in zip(dataclasses.fields(node), children, strict=True):
            object.__setattr__(new, field.name, child)  # of frozen ones too
    return new


def _are_alike(entries: Sequence[Any]) -> bool:
    """Whether entries may be one sample each; None stands for a sample that lacks something."""
    return len({_kind_of(entry) for entry in entries if entry is not None}) <= 1


def _kind_of(entry: Any) -> Any:
    if isinstance(entry, Tensor) or _is_array(entry):
        return type(entry).__name__, entry.ndim, entry.dtype
    if isinstance(entry, (Mapping, UserDict)):
        return "mapping"
    if _is_sequence(entry):
        return "sequence", frozenset(_kind_of(child) for child in entry if child is not None)
    if is_single_value(entry):
        return "value"
    return type(entry)


def _has_whole_value(entry: Any, samples: int) -> bool:
    """Whether a number of an entry would go into every part if the entry had so many samples."""
    if isinstance(entry, Tensor) or _is_array(entry):
        return bool(entry.ndim == 0)
    if entry is None or isinstance(entry, (str, bytes)):
        return False
    if is_single_value(entry):
        return True
    if _is_sequence(entry) and len(entry) == samples and _are_alike(entry):
        return False
    return any(_has_whole_value(child, samples) for child in _children(entry) or ())


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    for child in _children(node) or ():
        yield from _tensors(child)


def _named(node: Any) -> str:
    name = type(node).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
