"""The Triton backend and rules of a user's own. Triton itself is imported when it is first needed."""

from .backend import TritonBackend, Tuning, backend
from .rule import TritonRule

__all__ = ["TritonBackend", "TritonRule", "Tuning", "backend"]
