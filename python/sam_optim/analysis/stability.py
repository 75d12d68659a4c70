"""The edge of stability: how large the Hessian may be for gradient descent and for SAM, and how large it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sam_kernels
from sam_kernels import UnsupportedTensorError
from sam_kernels.sharding import is_distributed

from ..core.errors import StepOrderError
from ..core.optimizer import SharpnessAwareOptimizer
from ..core.randomness import RandomState
from ..methods.asam import ASAM
from ..methods.sam import SAM
from ..training.arguments import loss_of
from ..training.statistics import StatisticsRule, running_statistics, statistics_aside


def edge_of_stability(lr: float, rho: float, gradient_norm: float) -> float:
    """The largest Hessian norm at which SAM with plain gradient descent is stable.

    Long and Bartlett, arXiv 2309.12488: ``|g| / (2 rho) (sqrt(1 + 8 rho / (lr |g|)) - 1)``, computed here without
    cancellation. At rho 0 it is 2 / lr, the edge of gradient descent; it falls with rho, and to 0 with the gradient.

    Args:
        lr: learning rate; above 0.
        rho: radius of the perturbation; at least 0.
        gradient_norm: |g| at the unperturbed weights; at least 0.

    Raises:
        ValueError: for arguments out of range.
    """
    if not lr > 0.0 or not rho >= 0.0 or not gradient_norm >= 0.0:
        raise ValueError(f"Invalid lr, rho or gradient_norm: {lr}, {rho}, {gradient_norm}")
    if rho == 0.0:
        return 2.0 / lr
    if gradient_norm == 0.0:
        return 0.0
    return 4.0 / lr / (math.sqrt(1.0 + 8.0 * rho / (lr * gradient_norm)) + 1.0)


def gradient_descent_edge(lr: float, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0) -> float:
    """The largest Hessian norm at which ``torch.optim.SGD`` is stable on a quadratic, without weight decay.

    2 / lr without momentum mu, (2 + 2 mu) / lr with it (heavy ball), (2 + 2 mu) / (lr (1 + 2 mu)) with Nesterov's
    (Cohen et al. 2021, arXiv 2103.00065, appendix B). Dampening multiplies lr by 1 - dampening.

    Args:
        lr, momentum, nesterov, dampening: as in torch; infinite at lr 0.
    """
    if nesterov:
        lr *= 1.0 + 2.0 * momentum
    elif momentum:
        lr *= 1.0 - dampening
    return (2.0 + 2.0 * momentum) / lr if lr > 0.0 else math.inf


class Stability(NamedTuple):
    """What :meth:`StabilityMonitor.measure` found at the present weights.

    Attributes:
        loss: the loss.
        gradient_norm: |g|.
        eigenvalue: of the Hessian, the one of the largest magnitude, with its sign.
        edge: the edge of stability of the optimizer as it is: that of SAM with plain gradient descent, see
            :func:`edge_of_stability`, or, where nothing is perturbed, that of gradient descent. NaN where none is
            known.
        gradient_descent_edge: that of the base optimizer without perturbation, see :func:`gradient_descent_edge`. NaN
            where none is known.
        alignment: abs(cos) of the angle between g and the eigenvector.
        perturbed_alignment: the same for g+, the gradient at w + rho g / |g|.
        eigenvector: of that eigenvalue, a tensor for each parameter, of norm 1 together.
        edge_reason: why ``edge`` is NaN, in a sentence; empty where it is a number.
    """

    loss: float
    gradient_norm: float
    eigenvalue: float
    edge: float
    gradient_descent_edge: float
    alignment: float
    perturbed_alignment: float
    eigenvector: list[Tensor]
    edge_reason: str = ""

    @property
    def hessian_norm(self) -> float:
        """The Hessian's spectral norm."""
        return abs(self.eigenvalue)

    @property
    def relative_sharpness(self) -> float:
        """Hessian norm over the edge: training hovers around 1 at the edge of stability. NaN where no edge is known."""
        return math.inf if self.edge == 0.0 else self.hessian_norm / self.edge


class StabilityMonitor:
    """Measures where training stands beside its edge of stability::

        monitor = StabilityMonitor(model, optimizer, loss_fn)
        if step % 100 == 0:
            found = monitor.measure(batch)
            print(found.eigenvalue, found.edge, found.perturbed_alignment)

    The theory is that of full batches, for SAM with T = 1 over SGD without momentum and weight decay, and for SGD by
    itself, also with momentum. Elsewhere ``edge`` is NaN and ``edge_reason`` says why; all else is measured for any
    optimizer. Give a batch as large as can be.

    Eigenvalues come from SciPy's Lanczos solver on products of the Hessian with vectors; a product costs about two
    gradients, a measurement some twenty to a hundred products. The next one starts from the eigenvector of the last.

    The model is differentiated twice. Scaled-dot-product attention uses torch's math kernel meanwhile, the only one
    that can be. Activation checkpointing needs ``use_reentrant=False``. Complex parameters are pairs of real ones.

    A measurement leaves everything as it was, bit for bit: weights, ``p.grad``, running statistics, random generators.

    Args:
        model: whose parameters the optimizer's are.
        optimizer: any torch optimizer; ``lr``, and ``rho`` if it has one, are read from its groups.
        loss_fn: called as ``loss_fn(model, batch)``; returns the loss, or a tuple or list whose first entry it is.
        tolerance: relative accuracy of the eigenvalue.
        statistics: names running statistics, see :func:`running_statistics`.

    Raises:
        ImportError: if SciPy is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[nn.Module, Any], Any],
        *,
        tolerance: float = 1e-4,
        statistics: StatisticsRule = running_statistics,
    ) -> None:
        try:
            import scipy.sparse.linalg  # noqa: F401
        except ImportError as error:
            raise ImportError("StabilityMonitor needs SciPy: pip install 'sam-kernels[stability]'") from error
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.tolerance, self._statistics = tolerance, statistics
        self._start: Any = None

    def measure(self, batch: Any) -> Stability:
        """Measures at the present weights.

        Raises:
            StepOrderError: in the middle of a step.
            ValueError: if groups differ in lr or rho, for which there is no theory; if the gradient or second
                derivatives are not finite, or there is no gradient; or for reentrant checkpointing, through which there
                are no second derivatives.
            TypeError: if ``loss_fn`` returns something else than a loss of one element, or one with more behind it.
            UnsupportedTensorError: for DTensors and with a process_group; measure on a whole model.
        """
        if isinstance(self.optimizer, SharpnessAwareOptimizer) and self.optimizer.is_step_begun:
            raise StepOrderError("measure() was called in the middle of a step, while the weights are perturbed")
        # Of a plain optimizer, Adadelta, rho is something else.
        is_wrapper = hasattr(self.optimizer, "base_optimizer")
        lr, rho = self._one_of("lr", None), self._one_of("rho", 0.0) if is_wrapper else 0.0
        listed = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        params = list(dict.fromkeys(listed))  # one that stands twice is one direction of the loss
        if any(is_distributed(p) for p in params) or getattr(self.optimizer, "process_group", None) is not None:
            raise UnsupportedTensorError(
                "StabilityMonitor cannot measure a model that is spread over ranks; use one that is whole"
            )
        from torch.nn.attention import SDPBackend, sdpa_kernel

        random = RandomState({p.device for p in params})
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), statistics_aside(self.model, self._statistics):
                loss, gradients = self._gradients(params, batch, graph=True)
                flat = [g.detach() for g in gradients]
                norm = math.sqrt(float(sam_kernels.gram([flat])[0, 0]))
                if not math.isfinite(norm):
                    raise ValueError("the gradient is not finite; there is no edge of stability to compare with")
                eigenvalue, eigenvector = self._top_eigenpair(params, gradients)
                del gradients
                random.restore()
                perturbed = self._perturbed_gradients(params, flat, rho, batch)
        finally:
            random.restore()
        edge, descent_edge, reason = self._edges(lr, rho, norm)
        return Stability(
            loss,
            norm,
            eigenvalue,
            edge,
            descent_edge,
            _alignment(flat, eigenvector),
            _alignment(perturbed, eigenvector),
            eigenvector,
            reason,
        )

    def _edges(self, lr: float, rho: float, norm: float) -> tuple[float, float, str]:
        """The optimizer's edge, that of its base by itself, and why the first is NaN."""
        base = getattr(self.optimizer, "base_optimizer", self.optimizer)
        groups = [group for group in base.param_groups if group["params"]]
        reason = _why_no_edge_of_base(base, groups)
        if reason:
            return math.nan, math.nan, reason
        momentum = float(groups[0]["momentum"])
        descent_edge = gradient_descent_edge(lr, momentum, groups[0]["nesterov"], float(groups[0]["dampening"]))
        reason = _why_no_edge_of_method(self.optimizer)
        if reason:
            return math.nan, descent_edge, reason
        if rho == 0.0 or not any(group.get("perturb", True) for group in groups):
            return descent_edge, descent_edge, ""
        reason = _why_no_edge_of_sam(groups, momentum)
        if reason:
            return math.nan, descent_edge, reason
        return edge_of_stability(lr, rho, norm) if lr > 0.0 else math.inf, descent_edge, ""

    def _one_of(self, name: str, default: float | None) -> float:
        values = {float(group[name] if default is None else group.get(name, default)) for group in self._groups()}
        if len(values) != 1:
            raise ValueError(
                f"the groups differ in {name}: {sorted(values)}; the edge of stability is that of one {name}"
            )
        return values.pop()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self.optimizer.param_groups if group["params"]]

    def _gradients(self, params: Sequence[Tensor], batch: Any, graph: bool) -> tuple[float, list[Tensor]]:
        loss = loss_of(self.loss_fn(self.model, batch))
        _check_graph(loss)
        gradients = torch.autograd.grad(loss, params, create_graph=graph, allow_unused=True)
        return loss.item(), [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, params, strict=True)]

    def _perturbed_gradients(
        self, params: list[Tensor], gradients: list[Tensor], rho: float, batch: Any
    ) -> list[Tensor]:
        plan = sam_kernels.Plan(params)
        snapshot = sam_kernels.Snapshot(plan)
        try:
            sam_kernels.ascent_(plan, [gradients], scale=rho, snapshot=snapshot)
            return self._gradients(params, batch, graph=False)[1]
        finally:
            sam_kernels.restore_(plan, snapshot)

    def _top_eigenpair(self, params: Sequence[Tensor], gradients: list[Tensor]) -> tuple[float, list[Tensor]]:
        """The Hessian's eigenvalue of the largest magnitude and its eigenvector."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        size = sum(_real_numel(p) for p in params)
        curved = [i for i, g in enumerate(gradients) if g.requires_grad]
        if not curved:  # a loss that is linear in the weights
            return 0.0, _split(torch.full((size,), size**-0.5, dtype=torch.float64, device="cpu"), params)

        def product(vector: Any) -> Any:
            parts = _split(torch.from_numpy(vector.reshape(-1)), params)
            result = torch.autograd.grad(
                [gradients[i] for i in curved],
                params,
                grad_outputs=[parts[i] for i in curved],
                retain_graph=True,
                allow_unused=True,
            )
            flat = torch.cat(
                [
                    torch.zeros(_real_numel(p), dtype=torch.float64, device="cpu")
                    if r is None
                    else _real(r).reshape(-1).cpu().double()
                    for r, p in zip(result, params, strict=True)
                ]
            )
            if not flat.isfinite().all():
                raise ValueError(
                    "second derivatives of the loss are not finite at these weights, as those of a square root, a norm "
                    "or abs(x)**1.5 at 0 are: add a small number within it"
                )
            return flat.numpy()

        if self._start is None or len(self._start) != size or not product(self._start).any():
            generator = torch.Generator("cpu").manual_seed(0)
            self._start = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").numpy()
        if not product(self._start).any():  # without curvature here, as where ReLU alone bends it
            value, vector = 0.0, self._start / math.sqrt(float(self._start @ self._start))
        elif size == 1:
            value, vector = float(product(self._start * 0.0 + 1.0)[0]), self._start * 0.0 + 1.0
        else:
            operator = LinearOperator((size, size), matvec=product, dtype="float64")
            values, vectors = eigsh(operator, k=1, which="LM", v0=self._start, tol=self.tolerance)
            value, vector = float(values[0]), vectors[:, 0].copy()
        self._start = vector
        return value, _split(torch.from_numpy(vector), params)


def _split(vector: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """A long vector as tensors of the parameters' shapes, types and devices."""
    parts = vector.split([_real_numel(p) for p in params])
    shaped = [
        torch.view_as_complex(part.view(*p.shape, 2)) if p.is_complex() else part.view(p.shape)
        for part, p in zip(parts, params, strict=True)
    ]
    # Converted first: the device may have no float64.
    return [part.to(p.dtype).to(p.device) for part, p in zip(shaped, params, strict=True)]


def _real_numel(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _check_graph(loss: Tensor) -> None:
    """Raises ValueError for a loss that gradients do not reach the parameters of."""
    cure = "give torch.utils.checkpoint.checkpoint use_reentrant=False"
    if not loss.requires_grad:
        raise ValueError(
            f"the loss has no gradient: it was computed under no_grad(), or by reentrant checkpointing; then {cure}"
        )
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            raise ValueError(
                "the model uses reentrant checkpointing, which hides the parameters within from second derivatives, so "
                f"that they would count as zero; {cure}"
            )
        waiting += [following for following, _ in node.next_functions]


def _why_no_edge_of_base(base: Optimizer, groups: Sequence[dict[str, Any]]) -> str:
    name = type(base).__name__
    if type(base) is not torch.optim.SGD:
        return f"the edge of stability is known of gradient descent, torch.optim.SGD, not of {name}"
    if any(float(group["weight_decay"]) != 0.0 for group in groups):
        return "weight decay bends what is trained: the edge of stability is that of a loss without it"
    if any(group["maximize"] for group in groups):
        return "the edge of stability is that of minimising, and a group has maximize=True"
    kinds = {(float(g["momentum"]), bool(g["nesterov"]), float(g["dampening"])) for g in groups}
    if len(kinds) > 1:
        return "the groups differ in momentum; the edge of stability is that of one momentum"
    return ""


def _alignment(a: list[Tensor], b: list[Tensor]) -> float:
    """abs(cos) of the angle between two lists of tensors; 0 where one is zero."""
    gram = sam_kernels.gram([a, b]).cpu()
    lengths = (gram[0, 0] * gram[1, 1]).sqrt().item()
    return abs(gram[0, 1].item()) / lengths if lengths > 0.0 else 0.0


def _why_no_edge_of_method(optimizer: Optimizer) -> str:
    if type(optimizer) in (SAM, ASAM, torch.optim.SGD):
        return ""
    return f"the edge of stability is known of sam_optim.SAM and of torch.optim.SGD, not of {type(optimizer).__name__}"


def _why_no_edge_of_sam(groups: Sequence[dict[str, Any]], momentum: float) -> str:
    if any(group.get("adaptive") for group in groups):
        return "the edge of stability is known of SAM with T = 1, not in ASAM's geometry"
    if not all(group.get("perturb", True) for group in groups):
        return "the edge of stability is known of SAM that perturbs all parameters; a group has perturb=False"
    if momentum:
        return f"the edge of stability is known of SAM without momentum, not with {momentum}"
    return ""
