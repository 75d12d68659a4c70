"""The operations on lists of tensors.

Everywhere ``params`` is a :class:`Plan` or a list of tensors (from which a plan is made for this call alone), ``xs`` is
a list of one to three gradient lists, and a gradient list has an entry for each parameter: a tensor of the parameter's
shape and device, or None. A tensor for which no list has an entry is left alone.

Supported are float32, float64, bfloat16, float16, complex64 and complex128, in any mixture. Of DTensors (FSDP2, tensor
parallelism) each rank works on its own part; operations with a Gram matrix are then collective, and take separate
launches for it, as with a plan that has :class:`Peers`.

``scale`` is a number, or for each group a sequence of one number for each list; it multiplies the coefficients. A
number may be a tensor of one element; one that lies on a GPU is read when the kernels run, and no operation waits for a
GPU. No operation records gradients.

``snapshot`` may hold masters of weights in bfloat16 or float16, see :class:`Snapshot`: the operations that take one
then start from the masters, as if copies were held, and round what they write into the weights.

Tensors may share memory: one may stand twice in the list, two may be views of one. Copies are then taken of all before
the first is written, and updates are made one after the other, in the order of the list, as torch's optimizers make
them. Such a launch is made by :mod:`sam_kernels.backends.reference`, whichever backend was asked for: slower, never
wrong.

All operations raise :class:`UnsupportedTensorError` for tensors that no kernel can work on (sparse, integer, without
memory, expanded) and that have an entry in a list, and ``ValueError`` for lists, shapes or devices that do not fit
together, for gradients in the memory of what is written, and for masters of weights that share memory; nothing has been
changed then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from .backends import reference
from .backends.contract import (
    AscentArguments,
    Backend,
    CombinationArguments,
    DescentArguments,
    GramArguments,
    MemoryArguments,
    RestoreArguments,
)
from .bases import Base, TensorList
from .errors import DeviceChangedError, SharedMemoryError
from .host import forget_old_weights, inverse_of, is_set, pick
from .plan import Plan
from .registry import backend_of
from .report import LaunchReport
from .rules import Fixed, LaunchRule, Normalized, RuleLike, is_known
from .scales import Scale, flattened, float64
from .snapshot import Snapshot

MAX_LISTS = 3

Params = Plan | Sequence[Tensor]

_Result = TypeVar("_Result")
_Arguments = TypeVar(
    "_Arguments",
    GramArguments,
    CombinationArguments,
    RestoreArguments,
    AscentArguments,
    DescentArguments,
    MemoryArguments,
)

_FIXED = Fixed()
_NORMALIZED = Normalized()


def gram(xs: Sequence[TensorList], params: Params | None = None, *, backend: str | None = None) -> Tensor:
    """The Gram matrix of the gradient lists, G[i, j] = sum over tensors of <T x_i, T x_j>.

    The sum runs in float64 in an order that depends on nothing but the shapes, so its bits are the same on every run
    and for every number of threads.

    Args:
        xs: k gradient lists.
        params: the weights, for their geometry; without them T = 1.

    Returns:
        Float64 tensor of shape (k, k) on the tensors' device; on the CPU where no kernels serve that.
    """
    if params is None:
        _check_lists(xs, len(xs[0]) if len(xs) > 0 else 0)
        plan = Plan([_first_entry(entries) for entries in zip(*xs, strict=True)])
    else:
        plan = _plan(params)
        _check_lists(xs, len(plan))
    return _gram_of_all(plan, xs, plan.is_weighted, None, backend)


def apply_rule(
    rule: RuleLike, xs: Sequence[TensorList], params: Params, *, weighted: bool = False, backend: str | None = None
) -> LaunchReport:
    """Gram matrix and what a rule makes of it, without using it; coefficients are zeros if G is not finite.

    Args:
        weighted: whether the Gram matrix is taken in the tensors' geometry.
    """
    plan = _plan(params)
    _check_lists(xs, len(plan))
    report, _ = _apply(rule, _gram_of_all(plan, xs, weighted, None, backend))
    return report


def perturb_(
    params: Params,
    xs: Sequence[TensorList],
    coefficients: Tensor | Sequence[float],
    *,
    scale: Scale = 1.0,
    snapshot: Snapshot | None = None,
    backend: str | None = None,
) -> None:
    """snapshot <- w, then w <- w + T(w)^2 sum_i c_i x_i, with given coefficients.

    Where the snapshot holds a copy already, w is that copy, so that one perturbation replaces another; tensors with a
    copy but no entry in any list are restored, and keep their copy.

    Args:
        coefficients: k numbers, or a tensor of shape (k,) on the parameters' device. A list whose coefficient is zero
            is left out, whatever it holds.
        snapshot: takes the weights' copies; None if none are wanted.
    """
    plan = _plan(params)
    _check_lists(xs, len(plan))
    flat = flattened(scale, plan.group_count, len(xs))
    coefficients = _coefficients(coefficients, len(xs))
    for part in _parts(plan, xs, snapshot):
        own = coefficients.cpu() if plan.parts else coefficients
        perturbation = CombinationArguments(part.plan, part.xs, own, flat, part.snapshot)
        _launch(_perturb, perturbation, backend)


def restore_(params: Params, snapshot: Snapshot, *, backend: str | None = None) -> None:
    """w <- snapshot for each tensor of which a copy is held, bit for bit, or a master, rounded.

    The snapshot is then empty but for masters.

    Raises:
        WeightsConvertedError: for other dtypes, devices or layouts than were copied; see :meth:`Snapshot.put_back`.
    """
    plan = _plan(params)
    for part in _parts(plan, [], snapshot):
        assert part.snapshot is not None
        restoring = RestoreArguments(part.plan, part.snapshot)
        _launch(_restore, restoring, backend)
    snapshot.discard()


def combine_(
    out: Params,
    xs: Sequence[TensorList],
    coefficients: Tensor | Sequence[float],
    *,
    scale: Scale = 1.0,
    backend: str | None = None,
) -> None:
    """out <- sum_i c_i x_i; zero for tensors of which no list has an entry. ``out`` may be one of the lists."""
    plan = _plan(out)
    _check_lists(xs, len(plan))
    for error in plan.unreadable.values():
        raise error
    flat = flattened(scale, plan.group_count, len(xs))
    coefficients = _coefficients(coefficients, len(xs))
    for part in _parts(plan, xs, None):
        own = coefficients.cpu() if plan.parts else coefficients
        combination = CombinationArguments(part.plan, part.xs, own, flat)
        _launch(_combine, combination, backend)


def ascent_(
    params: Params,
    xs: Sequence[TensorList],
    *,
    rule: RuleLike = _NORMALIZED,
    scale: Scale = 1.0,
    snapshot: Snapshot | None = None,
    backend: str | None = None,
) -> LaunchReport:
    """Gram matrix, rule, and perturbation with snapshot, in one launch.

    w <- w + T(w)^2 sum_i scale_i c_i x_i with c = rule(G), and w the copy where one is held, as in
    :func:`perturb_`. SAM is one list, :class:`Normalized` and ``scale=rho``.

    Args:
        rule: of :mod:`sam_kernels.rules`, or any callable from the Gram matrix (float64, shape (k, k)) to k
            coefficients, which takes separate launches for Gram matrix and perturbation.
        snapshot: takes the weights' copies.

    Returns:
        The launch's scalars. If the Gram matrix is not finite, the weights are the unperturbed ones.
    """
    plan = _plan(params)
    _check_lists(xs, len(plan))
    flat = flattened(scale, plan.group_count, len(xs))
    if _is_fused(rule, plan, backend):
        ascent = AscentArguments(plan, xs, rule, flat, snapshot)
        return _launch(_ascent, ascent, backend)
    report, _ = _apply(rule, _gram_of_all(plan, xs, plan.is_weighted, snapshot, backend))
    # Coefficients of zero, where the Gram matrix is not finite, leave or restore the weights themselves.
    perturb_(plan, xs, report.coefficients, scale=scale, snapshot=snapshot, backend=backend)
    return report


def descent_(
    params: Params,
    xs: Sequence[TensorList],
    base: Base,
    *,
    rule: RuleLike = _FIXED,
    scale: Scale = 1.0,
    weighted: bool = False,
    snapshot: Snapshot | None = None,
    grad_scale: Tensor | float | None = None,
    found_inf: Tensor | bool | None = None,
    backend: str | None = None,
) -> LaunchReport:
    """[Gram matrix, rule,] combination, restoring and the base optimizer's update, in one launch.

    w <- base(snapshot, sum_i scale_i c_i x_i / grad_scale), with w itself where no copy is held. Tensors with a copy
    but no entry in any list are restored. The snapshot is empty afterwards, but for masters, which are updated.

    Args:
        base: the update and its state, see :mod:`sam_kernels.bases`.
        rule: as for :func:`ascent_`; :class:`Fixed` needs no Gram matrix.
        weighted: whether the Gram matrix is taken in the tensors' geometry, at the weights as they are now.
        grad_scale: what the gradients have been multiplied by (one element), as torch's GradScaler gives it.
        found_inf: nonzero (one element) to restore without an update, as torch's GradScaler gives it.

    Returns:
        The launch's scalars. If the Gram matrix is not finite, the weights were restored and not updated.
    """
    plan = _plan(params)
    _check_lists(xs, len(plan))
    flat = flattened(scale, plan.group_count, len(xs))
    if _is_fused(rule, plan, backend):
        whole = DescentArguments(plan, xs, base, snapshot, rule, flat, weighted, grad_scale, found_inf)
        return _launch(_descent, whole, backend)

    coefficients = None
    if is_known(rule) and not rule.needs_gram:
        report = LaunchReport.without_gram(len(xs))
    else:
        report, overflow = _apply(rule, _gram_of_all(plan, xs, weighted, snapshot, backend))
        coefficients = report.coefficients
        found_inf = overflow if found_inf is None else torch.maximum(overflow, _flag(found_inf, overflow))
    if plan.parts:
        # Each device would need a copy of these scalars; they are few and the case is rare.
        grad_scale, found_inf = 1.0 / inverse_of(grad_scale), is_set(found_inf)
        coefficients = None if coefficients is None else coefficients.cpu()
    for part in _parts(plan, xs, snapshot, base):
        assert part.base is not None
        descent = DescentArguments(
            part.plan,
            part.xs,
            part.base,
            part.snapshot,
            _FIXED,
            flat,
            weighted,
            grad_scale,
            found_inf,
            coefficients=coefficients,
        )
        _launch(_descent, descent, backend)
    return report


def check_memory(
    params: Params, xs: Sequence[TensorList], *, snapshot: Snapshot | None = None, backend: str | None = None
) -> None:
    """Raises as the operations do for gradients in the memory of weights, for updates that others make of them."""
    plan = _plan(params)
    _check_lists(xs, len(plan))
    for part in _parts(plan, xs, snapshot):
        memory = MemoryArguments(part.plan, part.xs, part.snapshot)
        _launch(_check_memory, memory, backend)


def look_ahead_(
    params: Params,
    xs: Sequence[TensorList],
    base: Base,
    *,
    snapshot: Snapshot,
    scale: Scale = 1.0,
    found_inf: Tensor | bool | None = None,
    backend: str | None = None,
) -> None:
    """w <- base(snapshot, sum_i scale_i x_i), as :func:`descent_` would, with the base's state left untouched.

    The copies stay. Tensors of which no copy is held are left alone; those with a copy but no entry are restored.

    Args:
        found_inf: nonzero (one element) to restore all that have a copy instead.
    """
    plan = _plan(params)
    _check_lists(xs, len(plan))
    flat = flattened(scale, plan.group_count, len(xs))
    skip = is_set(found_inf) if plan.parts else found_inf
    for part in _parts(plan, xs, snapshot, base):
        assert part.base is not None
        preview = DescentArguments(
            part.plan, part.xs, part.base, part.snapshot, _FIXED, flat, found_inf=skip, is_preview=True
        )
        _launch(_descent, preview, backend)


class _Part:
    """What one device has of a launch's arguments."""

    def __init__(self, plan: Plan, xs: Sequence[TensorList], snapshot: Snapshot | None, base: Base | None) -> None:
        self.plan, self.xs, self.snapshot, self.base = plan, xs, snapshot, base


def _parts(
    plan: Plan, xs: Sequence[TensorList], snapshot: Snapshot | None, base: Base | None = None
) -> Iterator[_Part]:
    """The arguments device by device, of DTensors this rank's parts.

    The snapshot's flags are brought home after each part, also on an exception.
    """
    if plan.shares:
        xs = [plan.local(x) for x in xs]
        base = None if base is None else base.local(plan)
    if not plan.parts:
        yield _Part(plan, xs, snapshot, base)
        return
    for part, index in plan.parts:
        lists = [pick(x, index) for x in xs]
        share = None if snapshot is None else snapshot.subset(index)
        try:
            yield _Part(part, lists, share, None if base is None else base.subset(index))
        finally:
            if snapshot is not None and share is not None:
                for position, i in enumerate(index):
                    snapshot.taken[i] = share.taken[position]
                    # Other memory where the launch has found tensors of another type.
                    snapshot.tensors[i], snapshot.layouts[i] = share.tensors[position], share.layouts[position]


def _is_fused(rule: RuleLike, plan: Plan, backend: str | None) -> TypeGuard[LaunchRule]:
    """Whether one launch can take the Gram matrix, apply the rule and use its coefficients."""
    if plan.parts or plan.sums_over_ranks:
        return False
    return is_known(rule) or backend_of(plan, backend).knows(rule)


def _launch(operation: Callable[[Backend, _Arguments], _Result], arguments: _Arguments, backend: str | None) -> _Result:
    """An operation by the backend that serves the plan's device, or by the reference where tensors share memory."""
    plan = arguments.plan
    try:
        try:
            return operation(backend_of(plan, backend), arguments)
        except DeviceChangedError:
            if plan.parts:
                raise ValueError("parameters have been moved to several devices; make a new plan") from None
            return operation(backend_of(plan, backend), arguments)
    except SharedMemoryError:
        return operation(reference.backend, arguments)
    finally:
        forget_old_weights()


def _gram(backend: Backend, arguments: GramArguments) -> Tensor:
    return backend.gram(arguments)


def _perturb(backend: Backend, arguments: CombinationArguments) -> None:
    backend.perturb(arguments)


def _restore(backend: Backend, arguments: RestoreArguments) -> None:
    backend.restore(arguments)


def _combine(backend: Backend, arguments: CombinationArguments) -> None:
    backend.combine(arguments)


def _ascent(backend: Backend, arguments: AscentArguments) -> LaunchReport:
    return backend.ascent(arguments)


def _descent(backend: Backend, arguments: DescentArguments) -> LaunchReport:
    return backend.descent(arguments)


def _check_memory(backend: Backend, arguments: MemoryArguments) -> None:
    backend.check_memory(arguments)


def _gram_of_all(
    plan: Plan, xs: Sequence[TensorList], weighted: bool, snapshot: Snapshot | None, backend: str | None
) -> Tensor:
    """Summed over devices, over the ranks that hold parts of the tensors, and over those that hold other tensors."""
    if plan.peers is None:
        return _gram_of_shares(plan, xs, weighted, snapshot, backend)
    counted = [plan.peers.without_uncounted(x) for x in xs]
    return plan.peers.sum(_gram_of_shares(plan, counted, weighted, snapshot, backend))


def _gram_of_shares(
    plan: Plan, xs: Sequence[TensorList], weighted: bool, snapshot: Snapshot | None, backend: str | None
) -> Tensor:
    if len(plan.shares) > 1:
        matrices = []
        for share, own in zip(plan.shares, plan.by_share, strict=True):
            copies = None if snapshot is None else snapshot.subset(share.index)
            lists = [pick(x, share.index) for x in xs]
            matrices.append(_gram_of_shares(own, lists, weighted, copies, backend))
        return torch.stack([matrix.to(plan.device) for matrix in matrices]).sum(0)
    total: Tensor | None = None
    for part in _parts(plan, xs, snapshot):
        arguments = GramArguments(part.plan, part.xs, weighted, part.snapshot)
        matrix = _launch(_gram, arguments, backend)
        total = matrix if total is None else total + matrix.to(total.device)
    assert total is not None
    return plan.shares[0].sum(total) if plan.shares else total


def _apply(rule: RuleLike, matrix: Tensor) -> tuple[LaunchReport, Tensor]:
    """A rule's coefficients, zero if the Gram matrix is not finite, and a flag that says so, float32, nonzero then."""
    count = matrix.shape[0]
    finite = matrix.isfinite().all()
    if matrix.device.type == "cpu" and not finite:
        coefficients = torch.zeros_like(matrix[0])
    else:
        coefficients = torch.as_tensor(rule(matrix), dtype=torch.float64, device=matrix.device).detach()
    if coefficients.shape != (count,):
        raise ValueError(f"the rule gave coefficients of shape {tuple(coefficients.shape)} for {count} lists")
    coefficients = torch.where(finite, coefficients, 0.0)
    return LaunchReport(finite, matrix, coefficients), finite.logical_not().float()


def _flag(value: Tensor | bool, like: Tensor) -> Tensor:
    """A flag as a tensor of the same kind."""
    return torch.as_tensor(value, device=like.device).to(like.dtype).reshape(like.shape)


def _plan(params: Params) -> Plan:
    return params if isinstance(params, Plan) else Plan(params)


def _first_entry(entries: tuple[Tensor | None, ...]) -> Tensor:
    found = next((entry for entry in entries if entry is not None), None)
    return torch.empty(0, device="cpu") if found is None else found


def _check_lists(xs: Sequence[TensorList], count: int) -> None:
    if not 1 <= len(xs) <= MAX_LISTS:
        raise ValueError(f"Invalid number of gradient lists: {len(xs)}; it must be 1 to {MAX_LISTS}")
    for number, x in enumerate(xs):
        if len(x) != count:
            raise ValueError(f"gradient list {number} has {len(x)} entries for {count} tensors")


def _coefficients(coefficients: Tensor | Sequence[float], count: int) -> Tensor:
    result = float64(coefficients).detach()
    if result.shape != (count,):
        raise ValueError(f"expected {count} coefficients, got shape {tuple(result.shape)}")
    return result
