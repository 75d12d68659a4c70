"""The fused descent and the descent by the base itself are the same, for combinations, rules and GradScaler."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

import sam_kernels as sk
from sam_optim import Pass, Passes, SharpnessAwareOptimizer, Update

from .cases import assert_same, batches, loss_of, make_net, weights_of


class UnfusedSGD(torch.optim.SGD):
    """The same optimizer, of a class that the kernels do not know."""


class Combining(SharpnessAwareOptimizer):
    """Two gradient lists in the descent, combined by a rule."""

    takes_scaled_gradients = True
    arguments: ClassVar[dict] = {}

    def passes(self) -> Passes:
        g = yield Pass(kept=True)
        self.ascend(g, rule=sk.Normalized(), scale=0.1)
        g_plus = yield Pass(perturbed=True)
        yield Update(g_plus, g, **self.arguments)


def own_rule(gram):
    return torch.stack([gram[0, 0] / gram.diagonal().sum(), gram[0, 1] / gram.diagonal().sum()])


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": 0.5},
        {"scale": [[0.7, 0.3], [1.0, -0.5]]},
        {"rule": sk.Deflected(alpha=0.4)},
        {"rule": sk.NormMatched(), "scale": [[1.0, 1.0], [0.5, 0.5]]},
        {"rule": own_rule},
    ],
    ids=["scale", "scales of groups", "a rule", "a rule and scales", "a rule of one's own"],
)
def test_fused_equals_by_base(monkeypatch, arguments):
    monkeypatch.setattr(Combining, "arguments", arguments)
    results = []
    for base, factor in ((torch.optim.SGD, 1.0), (UnfusedSGD, 1.0), (torch.optim.SGD, 8.0), (UnfusedSGD, 8.0)):
        model = make_net()
        groups = [{"params": [p for p in model.parameters() if p.dim() == d]} for d in (2, 1)]
        optimizer = Combining(groups, base, {}, lr=0.05, momentum=0.9, weight_decay=0.01)
        for batch in batches(4):
            (factor * loss_of(model, batch)).backward()
            optimizer.advance(zero_grad=True)
            (factor * loss_of(model, batch)).backward()
            # As GradScaler does around step(), for gradients that have been scaled in both passes.
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(factor), torch.tensor(0.0)
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
            optimizer.zero_grad()
            assert optimizer.last_step.updated
        results.append(weights_of(model))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("base", [torch.optim.SGD, UnfusedSGD])
def test_a_rule_with_infinite_gradients_restores_and_skips(monkeypatch, base):
    monkeypatch.setattr(Combining, "arguments", {"rule": sk.Deflected(alpha=0.4)})
    model = make_net()
    optimizer = Combining(model.parameters(), base, {}, lr=0.05, momentum=0.9)
    before = weights_of(model)
    batch = batches(1)[0]
    loss_of(model, batch).backward()
    optimizer.advance(zero_grad=True)
    loss_of(model, batch).backward()
    next(iter(model.parameters())).grad[0, 0] = float("nan")
    optimizer.advance(zero_grad=True)
    assert_same(weights_of(model), before)
    assert not optimizer.last_step.updated
    assert not optimizer.state
