"""The CUDA backend and how its kernels are launched."""

from .backends.cuda import CudaBackend, Tuning, backend

__all__ = ["CudaBackend", "Tuning", "backend"]
