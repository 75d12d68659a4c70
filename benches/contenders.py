"""Who is compared: this package and what people use today, all with first_step() and second_step()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.per_tensor_sam import PerTensorSAM
from sam_optim import SAM

from .shapes import Shape

THREADS = 2
RHO = 0.05

BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD momentum": (torch.optim.SGD, {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-6, "weight_decay": 1e-2}),
}

# Bytes a parameter that a step has to move in float32, reads and writes: ascent + descent. See docs/design.md.
FLOOR_BYTES = {
    ("SAM", "SGD momentum"): 20 + 20,
    ("ASAM", "SGD momentum"): 24 + 20,
    ("SAM", "AdamW"): 20 + 28,
    ("ASAM", "AdamW"): 24 + 28,
}


# The same for bfloat16 weights and gradients with float32 masters and state.
MASTERS_FLOOR_BYTES = {"SGD momentum": 10 + 20, "AdamW": 10 + 28}


class ForeachSAM:
    """SAM written with care in torch's foreach operations, the base optimizer fused by torch."""

    def __init__(self, params: list[Tensor], base: type, rho: float, adaptive: bool, **settings: Any) -> None:
        self.params, self.rho, self.adaptive = params, rho, adaptive
        self.copies = [torch.empty_like(p) for p in params]
        # Lists that are allocated anew in each step cost as much again, where the allocator gives memory back.
        self.operators, self.direction = ([torch.empty_like(p) for p in params if adaptive] for _ in range(2))
        self.base = base(params, fused=True, **settings)

    @torch.no_grad()
    def first_step(self) -> None:
        torch._foreach_copy_(self.copies, self.params)
        direction = [p.grad for p in self.params]
        if self.adaptive:
            torch._foreach_copy_(self.operators, self.params)
            torch._foreach_abs_(self.operators)
            torch._foreach_copy_(self.direction, direction)
            torch._foreach_mul_(self.direction, self.operators)
            direction = self.direction
        norm = torch.stack(torch._foreach_norm(direction)).norm()
        if self.adaptive:
            torch._foreach_mul_(direction, self.operators)
        scale = self.rho / (norm + 1e-12)
        if scale.is_cuda:  # reading the number would wait for the GPU
            torch._foreach_add_(self.params, torch._foreach_mul(direction, scale))
        else:
            torch._foreach_add_(self.params, direction, alpha=float(scale))

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.params, self.copies)
        self.base.step()


class ForeachMasters:
    """The same for weights in bfloat16, with float32 masters that the base optimizer works on."""

    def __init__(self, params: list[Tensor], base: type, rho: float, **settings: Any) -> None:
        self.params, self.rho = params, rho
        self.masters = [p.detach().float() for p in params]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.gradients = [master.grad for master in self.masters]
        self.base = base(self.masters, fused=True, **settings)

    @torch.no_grad()
    def first_step(self) -> None:
        torch._foreach_copy_(self.gradients, [p.grad for p in self.params])
        scale = self.rho / (torch.stack(torch._foreach_norm(self.gradients)).norm() + 1e-12)
        torch._foreach_mul_(self.gradients, scale)
        torch._foreach_add_(self.gradients, self.masters)
        torch._foreach_copy_(self.params, self.gradients)

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self.gradients, [p.grad for p in self.params])
        self.base.step()
        torch._foreach_copy_(self.params, self.masters)


def _pytorch_optimizer(params: list[Tensor], base: type, rho: float, adaptive: bool, **settings: Any) -> Any:
    from pytorch_optimizer import SAM as PytorchOptimizerSAM  # noqa: N811

    return PytorchOptimizerSAM(params, base, rho=rho, adaptive=adaptive, **settings)


CONTENDERS: dict[str, Callable[..., Any]] = {
    "sam-kernels": SAM,
    "per-tensor SAM": PerTensorSAM,
    "foreach SAM": ForeachSAM,
    "pytorch-optimizer": _pytorch_optimizer,
}


def make_parameters(shapes: list[Shape], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random parameters with random gradients; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    return parameters


def make_optimizer(contender: str, parameters: list[Tensor], method: str, base: str, **changes: Any) -> Any:
    cls, settings = BASES[base]
    return CONTENDERS[contender](parameters, cls, RHO, method == "ASAM", **{**settings, **changes})


# How models in bfloat16 are trained with SAM: with masters, by hand and by ours, and without.
IN_BFLOAT16 = ("sam-kernels", "foreach masters", "sam-kernels, no masters")


def make_in_bfloat16(contender: str, parameters: list[Tensor], base: str, **changes: Any) -> Any:
    cls, settings = BASES[base]
    settings = {**settings, **changes}
    if contender == "foreach masters":
        return ForeachMasters(parameters, cls, RHO, **settings)
    return SAM(parameters, cls, RHO, master_weights=contender == "sam-kernels", **settings)


def in_bfloat16_call(contender: str, shapes: list[Shape], base: str) -> Callable[[], object]:
    """The optimizer side of a step of weights in bfloat16."""
    torch.set_num_threads(THREADS)
    return step_of(make_in_bfloat16(contender, make_parameters(shapes, torch.bfloat16), base))


def step_of(optimizer: Any) -> Callable[[], object]:
    """The optimizer side of a step."""

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def step_call(contender: str, shapes: list[Shape], method: str, base: str) -> Callable[[], object]:
    """The optimizer side of a step, ready to be called again and again."""
    torch.set_num_threads(THREADS)
    return step_of(make_optimizer(contender, make_parameters(shapes), method, base))


class _PeerGSAM:
    """pytorch-optimizer's GSAM, which wants a model and closures, by the moves that its step() makes."""

    def __init__(self, params: list[Tensor], base: type, rho: float, alpha: float, **settings: Any) -> None:
        from pytorch_optimizer import GSAM as PytorchOptimizerGSAM  # noqa: N811

        class Constant:
            @staticmethod
            def step() -> float:
                return rho

        self.rho, self.alpha, self.base = rho, alpha, base(params, **settings)
        self.gsam = PytorchOptimizerGSAM(params, self.base, None, Constant(), alpha=alpha)

    def first_step(self) -> None:
        self.gsam.perturb_weights(self.rho)

    def second_step(self) -> None:
        self.gsam.gradient_decompose(self.alpha)
        self.gsam.un_perturb()
        self.base.step()


def make_variant(contender: str, params: list[Tensor], method: str, base: str, **changes: Any) -> Any:
    """A method of SAM's family, ours or pytorch-optimizer's, with the settings that both have."""
    import pytorch_optimizer

    import sam_optim

    cls, settings = BASES[base]
    settings = {**settings, **changes}
    own = {"GSAM": {"alpha": 0.4}, "WSAM": {"gamma": 0.9}, "FriendlySAM": {}, "LookSAM": {"k": 5}}[method]
    if contender == "sam-kernels":
        return getattr(sam_optim, method)(params, cls, rho=RHO, **own, **settings)
    if method == "GSAM":
        return _PeerGSAM(params, cls, RHO, **own, **settings)
    peer = getattr(pytorch_optimizer, method)
    # Its WSAM hands all of its own settings on to the base optimizer's groups.
    first = (None, params, cls) if method == "WSAM" else (params, cls)
    return peer(*first, rho=RHO, **own, **settings)


def variant_call(contender: str, shapes: list[Shape], method: str, base: str) -> Callable[[], object]:
    """The optimizer side of a step of a method of SAM's family.

    Gradients are put back before each move: ours takes away those that it needs again, the peer writes into them.
    """
    torch.set_num_threads(THREADS)
    parameters = make_parameters(shapes)
    optimizer = make_variant(contender, parameters, method, base)
    generator = torch.Generator().manual_seed(1)
    gradients = [[p.grad for p in parameters], [torch.randn(p.shape, generator=generator) for p in parameters]]

    def step() -> None:
        if method == "LookSAM":  # always the step that takes two passes
            for group in optimizer.param_groups:
                group["looksam_step"] = 0
        for own, move in zip(gradients, (optimizer.first_step, optimizer.second_step), strict=True):
            for p, g in zip(parameters, own, strict=True):
                p.grad = g
            move()

    return step


def copy_call(count: int) -> Callable[[], object]:
    """torch's copy of ``count`` float32 numbers: the bandwidth that everything is measured against."""
    torch.set_num_threads(THREADS)
    source, target = torch.randn(count), torch.empty(count)
    return lambda: target.copy_(source)
