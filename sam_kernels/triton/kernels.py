"""The kernels. One program of a kernel works on one chunk of one tensor; see Note [The table on the device].

Every formula has its paper and its plain form in ``sam_kernels.backends.reference``; ``csrc/common`` states the same
for the other native backends. Arithmetic is float64 for float64 weights and float32 for all others; scalars and sums of
products are float64. Divisions and square roots are correctly rounded, and launches forbid the contraction of products
and sums, so that equal coefficients give the same bits as in the other native backends.

Loops whose bounds are known only when they run are ``while`` loops: the interpreter of Triton 3.6 cannot run others
with the numpy of today, and the compiler makes the same of both.

Names of compile-time parameters: ``W`` is the type of the weights, ``S`` that of their copies or masters, ``X`` the
types of the gradient lists, ``M`` those of the base optimizer's state, ``BLOCK`` the number of elements of a chunk.
Where S is not W, the copies are masters: always held, and what the weights are the rounding of.
"""

from __future__ import annotations

from .gram import deflected, fixed, gram_kernel, norm_matched, normalized, normalized_sum
from .perturb import ascent_kernel, combine_kernel, perturb_kernel, restore_kernel
from .updates import descent_kernel, rule_descent_kernel

__all__ = [
    "ascent_kernel",
    "combine_kernel",
    "deflected",
    "descent_kernel",
    "fixed",
    "gram_kernel",
    "norm_matched",
    "normalized",
    "normalized_sum",
    "perturb_kernel",
    "restore_kernel",
    "rule_descent_kernel",
]
