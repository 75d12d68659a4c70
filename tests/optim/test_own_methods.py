"""Mistakes in a passes() of one's own: an error that says what to do, with the weights as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_kernels import Normalized
from sam_optim import SAM, InvalidSettingError, Pass, SharpnessAwareOptimizer, StepOrderError, TrainStep, Update

from .cases import assert_same, batches, loss_of, make_net, weights_of


def ascend(self, *lists, scale=0.1):
    self.ascend(*lists, rule=Normalized(), scale=scale)


def no_update(self):
    g = yield Pass()
    ascend(self, g)
    yield Pass(perturbed=True, last=True)


def no_update_and_no_pass(self):
    ascend(self, [torch.ones_like(p) for p in self.param_groups[0]["params"]])
    if False:
        yield


def not_kept(self):
    g = yield Pass()
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g, g_plus, scale=0.5)


def not_kept_for_an_ascent(self):
    g = yield Pass()
    ascend(self, g)
    yield Pass(perturbed=True)
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g_plus)


def not_kept_for_arithmetic(self):
    g = yield Pass()
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update([a + b for a, b in zip(g_plus, g, strict=True)])


def not_kept_for_a_norm(self):
    g = yield Pass()
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g_plus, scale=float(g[0].norm()))


def not_kept_together(self):
    g, _ = yield [Pass(), Pass("validation")]
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g_plus)


def flat_scale(self):
    g = yield Pass()
    ascend(self, g, scale=[0.1])
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g_plus)


def scale_of_too_few_lists(self):
    g = yield Pass(kept=True)
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g, g_plus, scale=[[0.5]])


def infinite_scale(self):
    g = yield Pass()
    ascend(self, g, scale=float("inf"))
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g_plus)


def too_many_lists(self):
    g = yield Pass(kept=True)
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, kept=True, last=True)
    yield Update(g, g_plus, g, g_plus)


def no_list(self):
    g = yield Pass()
    ascend(self, g)
    yield Pass(perturbed=True, last=True)
    yield Update()


def a_name(self):
    g = yield Pass()
    ascend(self, g)
    yield "train"


def a_name_first(self):
    yield "train"


def an_empty_list(self):
    g = yield Pass()
    ascend(self, g)
    yield []


def other_data(self):
    g = yield Pass()
    ascend(self, g)
    yield Pass(data="valid", perturbed=True, last=True)


def more_than_the_last(self):
    g = yield Pass(last=True)
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g_plus)


def no_generator(self):
    return None


def returned(self):
    return [Pass(), Pass(perturbed=True)]


def raises_by_itself(self):
    g = yield Pass()
    ascend(self, g)
    g_plus = yield Pass(perturbed=True, last=True)
    yield Update(g_plus, rule=lambda gram: gram)


MISTAKES = [
    (no_update, StepOrderError, "has to yield Update"),
    (no_update_and_no_pass, StepOrderError, "has to yield Update"),
    (not_kept, StepOrderError, "kept=True"),
    (not_kept_for_an_ascent, StepOrderError, "kept=True"),
    (not_kept_for_arithmetic, StepOrderError, "kept=True"),
    (not_kept_for_a_norm, StepOrderError, "kept=True"),
    (not_kept_together, StepOrderError, "kept=True"),
    (flat_scale, ValueError, "a list of 1 for each group"),
    (scale_of_too_few_lists, ValueError, "2 numbers for each group"),
    (infinite_scale, ValueError, "Invalid scale: inf"),
    (too_many_lists, ValueError, "it must be 1 to 3"),
    (no_list, ValueError, "it must be 1 to 3"),
    (a_name, TypeError, "yields 'train'; it may yield Pass"),
    (a_name_first, TypeError, "yields 'train'; it may yield Pass"),
    (an_empty_list, StepOrderError, "yields an empty list"),
    (other_data, InvalidSettingError, "'valid'; it is one of train, validation, previous, memory"),
    (more_than_the_last, StepOrderError, "after a pass that it said was the last"),
    (no_generator, TypeError, "returned NoneType: it has to be a generator"),
    (returned, TypeError, "returned list: it has to be a generator"),
    (raises_by_itself, ValueError, "coefficients of shape"),
]


def make(passes, base=torch.optim.SGD, **settings):
    model = make_net()
    cls = type("Own", (SharpnessAwareOptimizer,), {"passes": passes})
    return model, cls(model.parameters(), base, {}, lr=0.1, **settings)


def each_pass(model, optimizer, batch):
    for _ in optimizer.each_pass():
        loss_of(model, batch).backward()


def in_place(model, optimizer, batch):
    """Gradients stay where they are, as in captured passes: what is not kept is written over."""
    loss_of(model, batch).backward()
    optimizer.advance()
    while optimizer.is_step_begun:
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch).backward()
        optimizer.advance()


def closure(model, optimizer, batch):
    run = lambda: loss_of(model, batch).backward()  # noqa: E731
    optimizer.step(run, run, closure_runs="every_pass")


def train_step(model, optimizer, batch):
    TrainStep(model, optimizer, loss_of)(batch, batch)


@pytest.mark.filterwarnings("ignore:each_pass")
@pytest.mark.parametrize("drive", [each_pass, in_place, closure, train_step])
@pytest.mark.parametrize(("passes", "error", "message"), MISTAKES)
def test_mistakes(passes, error, message, drive):
    model, optimizer = make(passes)
    before = weights_of(model)
    with pytest.raises(error, match=message):
        drive(model, optimizer, batches(1)[0])
    assert_same(weights_of(model), before)
    assert not optimizer.is_step_begun
    assert not optimizer.state


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RAdam])
@pytest.mark.parametrize("second", [Update, Pass])
def test_an_update_that_is_not_the_last_thing(base, second):
    """It has been made by then, and nothing else: that of one step."""

    def passes(self):
        g = yield Pass(kept=True)
        yield Update(g)
        yield Update(g) if second is Update else Pass()

    model, optimizer = make(passes, base)
    plain = make_net()
    batch = batches(1)[0]
    with pytest.raises(StepOrderError, match="after its Update, which is the last thing of a step"):
        each_pass(model, optimizer, batch)
    loss_of(plain, batch).backward()
    base(plain.parameters(), lr=0.1).step()
    for a, b in zip(weights_of(model), weights_of(plain), strict=True):
        torch.testing.assert_close(a, b)
    assert not optimizer.is_step_begun


def test_a_step_without_an_update_is_allowed_at_the_weights_themselves():
    def passes(self):
        g = yield Pass()
        ascend(self, g)
        yield Pass(perturbed=True, last=True)
        self.return_to_copies()

    model, optimizer = make(passes)
    before = weights_of(model)
    each_pass(model, optimizer, batches(1)[0])
    assert_same(weights_of(model), before)
    assert not optimizer.last_step.updated


@pytest.mark.parametrize("kept", [False, True])
def test_a_gradient_that_is_not_kept_is_let_go(kept):
    """Its memory is free in the second pass."""
    import weakref

    def passes(self):
        g = yield Pass(kept=kept)
        ascend(self, g)
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    model, optimizer = make(passes)
    loss_of(model, batches(1)[0]).backward()
    gradients = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.first_step(zero_grad=True)
    assert all((gradient() is not None) == kept for gradient in gradients)


def test_a_perturbation_of_two_steps():
    """By both gradients together; each ascent starts at the weights themselves."""

    def passes(self):
        g1 = yield Pass(kept=True)
        ascend(self, g1, scale=0.2)
        g2 = yield Pass(perturbed=True, kept=True)
        ascend(self, g1, g2, scale=0.2)
        g_plus = yield Pass(perturbed=True, last=True)
        yield Update(g_plus)

    # L(w) = 1/2 w' diag(1, 4) w from (3, 1), by hand: g1 = (3, 4), e1 = (.12, .16); g2 = (3.12, 4.64).
    weight = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    cls = type("TwoSteps", (SharpnessAwareOptimizer,), {"passes": passes})
    optimizer = cls([weight], torch.optim.SGD, {}, lr=0.1)
    seen = []
    for _ in optimizer.each_pass():
        seen.append(weight.detach().clone())
        (0.5 * curvature * weight**2).sum().backward()
    norm = (3.12**2 + 4.64**2) ** 0.5
    wanted = [[3.0, 1.0], [3.12, 1.16], [3.12 + 0.2 * 3.12 / norm, 1.16 + 0.2 * 4.64 / norm]]
    for point, numbers in zip(seen, wanted, strict=True):
        assert point.tolist() == pytest.approx(numbers, abs=1e-12)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_a_radius_out_of_range(rho):
    class Own(SharpnessAwareOptimizer):
        def passes(self):
            g = yield Pass()
            self.ascend(g, rule=Normalized(), scale=self.radii())
            g_plus = yield Pass(perturbed=True, last=True)
            yield Update(g_plus)

    model = make_net()
    with pytest.raises(InvalidSettingError, match="Invalid rho"):
        Own(model.parameters(), torch.optim.SGD, {"rho": rho}, lr=0.1)
    optimizer = Own(model.parameters(), torch.optim.SGD, {"rho": 0.1}, lr=0.1)
    before = weights_of(model)
    optimizer.param_groups[0]["rho"] = rho
    with pytest.raises(InvalidSettingError, match="Invalid rho"):
        each_pass(model, optimizer, batches(1)[0])
    assert_same(weights_of(model), before)
    optimizer.param_groups[0]["rho"] = 0.2
    each_pass(model, optimizer, batches(1)[0])
    assert optimizer.last_step.updated


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RAdam])
def test_numpys_numbers_and_rows_of_tensors_are_scales(base, maximize):
    numpy = pytest.importorskip("numpy")

    class Scaled(SAM):
        kind = float

        def passes(self):
            g = yield Pass()
            self.ascend(g, rule=Normalized(), scale=self.kind(0.125))
            g_plus = yield Pass(last=True)
            yield Update(g_plus, scale=self.kind(0.5))

    class ByNumpy(Scaled):
        kind = numpy.float32

    class ByRows(Scaled):
        @staticmethod
        def kind(value):
            return [torch.tensor([value])]

    models = [make_net(), make_net(), make_net()]
    for cls, model in zip((Scaled, ByNumpy, ByRows), models, strict=True):
        optimizer = cls(model.parameters(), base, lr=0.1, maximize=maximize)
        for batch in batches(2):
            for _ in optimizer.each_pass():
                loss_of(model, batch).backward()
    for other in models[1:]:
        assert_same(weights_of(models[0]), weights_of(other))
