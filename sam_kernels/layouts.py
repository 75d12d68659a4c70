"""Where a tensor's elements lie, of which types they may be, and what the kernels can read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UnsupportedTensorError

__all__ = ["Layout", "wide_dtype"]

REAL_DTYPE = {torch.complex64: torch.float32, torch.complex128: torch.float64}
SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, *REAL_DTYPE)

# Types too coarse to hold a perturbation or an update that is small beside the weight, and that of their masters.
LOW_PRECISION = (torch.bfloat16, torch.float16)
MASTER_DTYPE = torch.float32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a weight's master and its optimizer's state are kept, where weights have masters."""
    return MASTER_DTYPE if dtype in LOW_PRECISION else dtype


def has_own_memory(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a dense tensor whose memory holds its values.

    Tensor subclasses that compute elsewhere (DTensor, fake and wrapped tensors) are not.
    """
    dispatches = type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return tensor.layout is torch.strided and (plain or not dispatches) and tensor.device.type != "meta"


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, each once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def is_overlapping(tensor: Tensor) -> bool:
    """Whether several elements are one number in memory, as those of an expanded tensor."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return False
        if size > 1:
            if stride <= reach:
                return stride == 0 or offsets_of(tensor).unique().numel() < tensor.numel()
            reach += stride * (size - 1)
    return False


def offsets_of(tensor: Tensor) -> Tensor:
    """How far each element lies behind the first, in elements; int64, one dimension."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = offsets.unsqueeze(-1) + stride * torch.arange(size, dtype=torch.int64, device="cpu")
    return offsets.flatten()


class Layout(NamedTuple):
    """Where a parameter's elements lie."""

    shape: torch.Size
    strides: tuple[int, ...]  # the tensor's own, or those of a contiguous copy where it is not dense
    numel: int  # real elements
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor, name: str) -> Layout:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor but {type(tensor).__name__}")
        check_supported(tensor, name)
        own_order = tensor.numel() > 0 and is_dense(tensor)
        strides = tensor.stride() if own_order else torch.empty(tensor.shape, device="meta").stride()
        numel = tensor.numel() * (2 if tensor.is_complex() else 1)
        return Layout(tensor.shape, strides, numel, tensor.dtype, tensor.device)

    def matches(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has this shape, and this order in memory (strides of dimensions of size 1 say nothing)."""
        if tensor.shape != self.shape or tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor():
            return False
        pairs = zip(tensor.stride(), self.strides, self.shape, strict=True)
        return self.numel == 0 or all(own == wanted for own, wanted, size in pairs if size != 1)

    def check(self, tensor: Tensor, role: str) -> None:
        """Raises unless ``tensor`` can be a gradient or state of the parameter.

        Raises:
            UnsupportedTensorError: if no kernel can read it.
            ValueError: if its shape, device or kind of numbers is another.
        """
        check_supported(tensor, role)
        if tensor.shape != self.shape:
            raise ValueError(f"{role} has shape {tuple(tensor.shape)}, expected {tuple(self.shape)}")
        if tensor.device != self.device:
            raise ValueError(f"{role} is on {tensor.device}, expected {self.device}")
        if tensor.is_complex() and not self.dtype.is_complex:
            raise ValueError(f"{role} is complex ({tensor.dtype}), expected {self.dtype}")

    def is_of(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is of this type, shape and device; its order in memory may be another."""
        return tensor.dtype == self.dtype and tensor.device == self.device and tensor.shape == self.shape

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor that matches."""
        return torch.empty_strided(self.shape, self.strides, dtype=dtype or self.dtype, device=self.device)


def check_supported(tensor: Tensor, name: str) -> None:
    """Raises :class:`UnsupportedTensorError` unless the kernels can read ``tensor``."""
    if tensor.layout is not torch.strided:
        kind, instead = ("nested", "Pad it") if tensor.is_nested else ("sparse", "Use sparse=False in the embedding")
        raise UnsupportedTensorError(
            f"{name} is {kind} ({tensor.layout}); the kernels need dense tensors. {instead}, or give {kind} parameters "
            "an optimizer of their own."
        )
    if not has_own_memory(tensor):
        raise UnsupportedTensorError(
            f"{name} is a {type(tensor).__name__} on {tensor.device}, which has no memory that a kernel can read; "
            "pass the plain tensor that it is made of, or keep it frozen: without a gradient it is passed over."
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise UnsupportedTensorError(f"{name} is of {tensor.dtype}; supported are {supported}")
