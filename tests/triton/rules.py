"""Rules as a user writes them."""

import triton
import triton.language as tl


@triton.jit
def half_and_half(gram, parameters):
    """Unified SAM: between the gradient and its direction."""
    coefficients = ()
    for i in tl.static_range(len(gram)):
        coefficients = coefficients + (parameters[0] + (1.0 - parameters[0]) / tl.sqrt(gram[i][i]),)
    return coefficients


@triton.jit
def projected(gram, parameters):
    """x_0 with a part of its projection on x_1."""
    return 1.0, parameters[1] * gram[0][1] / gram[1][1]
