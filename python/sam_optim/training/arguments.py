"""The arguments of :class:`TrainStep`, looked at before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import InvalidSettingError
from .batches import Split, split_batch


def check_functions(**functions: Any) -> None:
    """Raises :class:`InvalidSettingError` for what cannot be called; so do the others for what they are named after."""
    for name, function in functions.items():
        if not callable(function) and not (function is None and name not in ("loss_fn", "statistics")):
            raise InvalidSettingError(f"Invalid {name}: {function!r}; it must be a function")


def check_modules(model: Any, others: Any) -> None:
    if not isinstance(others, (list, tuple)):
        raise InvalidSettingError(f"Invalid other_modules: {type(others).__name__}; it must be a list of modules")
    for name, module in [("model", model), *(("other_modules", other) for other in others)]:
        if not isinstance(module, nn.Module):
            raise InvalidSettingError(f"Invalid {name}: {type(module).__name__}; TrainStep drives torch.nn.Modules")
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise InvalidSettingError(
                f"Invalid {name}: TorchScript, whose buffers TrainStep cannot put aside for a pass. Give it the module "
                "that was scripted, by torch.compile if it is to be compiled; or drive the optimizer by each_pass()."
            )


def check_settings(micro_batches: Any, max_grad_norm: Any, scaler: Any, autocast: Any) -> None:
    is_whole = hasattr(type(micro_batches), "__index__") and not isinstance(micro_batches, (bool, Tensor))
    if not is_whole or micro_batches < 1:
        raise InvalidSettingError(f"Invalid micro_batches: {micro_batches!r}; it must be a whole number, at least 1")
    if max_grad_norm is not None:
        is_number = isinstance(max_grad_norm, Real) and not isinstance(max_grad_norm, bool)
        if not is_number or not max_grad_norm > 0.0:
            raise InvalidSettingError(f"Invalid max_grad_norm: {max_grad_norm!r}; it must be a number above 0, or None")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise InvalidSettingError(f"Invalid scaler: {scaler!r}; it must be a torch.amp.GradScaler, or None")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise InvalidSettingError(
            f"Invalid autocast: {autocast!r}; it must be torch.bfloat16, torch.float16 (with a scaler), or None"
        )


def check_validation(validation: Any, split: Split | None) -> None:
    if validation is None:
        return
    if isinstance(validation, (int, float, Real)):
        if isinstance(validation, bool) or not 0.0 < float(validation) < 1.0:
            raise InvalidSettingError(f"Invalid validation: {validation}; a share lies between 0 and 1")
        if split not in (None, split_batch) and validation != 0.5:
            raise InvalidSettingError(
                f"Invalid validation: {validation}; a split of your own makes parts of one size, so the share can be "
                "0.5 alone. Cut it off yourself: step(batch, validation_batch)."
            )
    elif isinstance(validation, (Tensor, str, bytes, Mapping)) or not hasattr(type(validation), "__iter__"):
        raise InvalidSettingError(
            f"Invalid validation: {type(validation).__name__}; it must be a share between 0 and 1 or an iterable of "
            "batches, as a DataLoader. A single batch is given to the step: step(batch, validation_batch)."
        )


def loss_of(output: Any) -> Tensor:
    """The loss in what ``loss_fn`` returns.

    Raises:
        TypeError: if there is none, or one of several elements.
    """
    loss = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss_fn must return the loss first, a tensor of one element, got {got}")
    return loss
