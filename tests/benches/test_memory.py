"""What an optimizer holds beside parameters and gradients, in units of the parameters."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("benches.memory")
from benches.memory import peak_bytes
from per_tensor_sam import PerTensorSAM
from sam_optim import SAM

SHAPES = [(512, 512), (2048, 128), (512,), (7,)]
COUNT = sum(torch.Size(shape).numel() for shape in SHAPES)


def copies(method, dtype=torch.float32, **settings):
    """Peak, as a multiple of what the parameters take in float32."""
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)

    def make_step():
        optimizer = method(params, torch.optim.SGD, lr=0.1, momentum=0.9, **settings)

        def step():
            optimizer.first_step()
            optimizer.second_step()

        return step

    return peak_bytes(make_step) / (4 * COUNT)


def test_one_copy_of_the_weights():
    """And the momentum. The common way holds more: what norms and products are computed into."""
    assert copies(SAM) == pytest.approx(2.0, abs=0.02)
    assert copies(SAM, adaptive=True) == pytest.approx(2.0, abs=0.02)
    assert copies(PerTensorSAM) > 2.2


def test_masters_take_the_place_of_the_copy():
    """A model in bfloat16: float32 masters and momentum; without them both are in bfloat16, as torch has it.

    A tensor at a time is compared with its weight, to see whether somebody else has written it.
    """
    assert copies(SAM, torch.bfloat16, master_weights=True) == pytest.approx(2.0, abs=0.15)
    assert copies(SAM, torch.bfloat16) == pytest.approx(1.0, abs=0.02)
