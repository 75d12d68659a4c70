"""Errors of the kernel layer."""

__all__ = ["BackendUnavailableError", "UnsupportedTensorError", "WeightsConvertedError"]


class UnsupportedTensorError(TypeError, RuntimeError):
    """A tensor that the kernels cannot work on: sparse, of an unsupported dtype, without memory of its own.

    Both a ``TypeError`` and a ``RuntimeError``, because torch's own optimizers raise the latter for sparse gradients.
    """


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name that is not there; the message says why and what to do."""


class DeviceChangedError(Exception):
    """Internal: a plan's parameters are others than it knew, as on another device; the launch must be chosen anew."""


class SharedMemoryError(Exception):
    """Internal: what a launch writes shares memory, so its tensors have to be worked on one after the other."""


class WeightsConvertedError(RuntimeError):
    """Weights were given another dtype, device, shape or order in memory while copies of them were held."""
