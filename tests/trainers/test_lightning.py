"""Lightning: automatic optimization by closures for every pass, manual optimization by each_pass()."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sam_optim import SAM, FriendlySAM, InvalidSettingError, SAMPa, StepOrderError

from ..optim.bases import SGD
from ..optim.cases import assert_same, batches, loss_of, make_net, weights_of
from ..optim.methods import Method, named

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
METHODS = [named("SAM"), named("GSAM")]
STEPS, SIZE = 5, 12


class Automatic(lightning.LightningModule):
    def __init__(self, method, dtype=torch.float64):
        super().__init__()
        self.net, self.method = make_net(dtype), method

    def training_step(self, batch, index):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        optimizer = self.method.make(self.net, SGD, closure_runs="every_pass")
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: 1.0)}


class Manual(Automatic):
    """With accumulation over two micro-batches, and clipping."""

    accumulation, clip = 1, 0.0

    def __init__(self, method, dtype=torch.float64):
        super().__init__(method, dtype)
        self.automatic_optimization = False
        self.window = []

    def training_step(self, batch, index):
        self.window.append(batch)
        if len(self.window) < self.accumulation:
            return
        for p in self.optimizers().each_pass():
            for part in self.window:
                self.manual_backward(loss_of(self.net, part) / self.accumulation)
            if p.last and self.clip:
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
        self.window = []


def fit(module, dtype=torch.float64, **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = [torch.cat(column) for column in zip(*batches(STEPS, dtype), strict=True)]
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data), batch_size=SIZE // getattr(module, "accumulation", 1)))
    return weights_of(module.net)


def by_hand(method, clip=0.0, accumulation=1):
    model = make_net()
    optimizer = method.make(model, SGD)
    for x, y in batches(STEPS):
        for p in optimizer.each_pass():
            for part in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
                (loss_of(model, part) / accumulation).backward()
            if p.last and clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return weights_of(model)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_automatic_optimization(method):
    assert_same(fit(Automatic(method)), by_hand(method))


def test_automatic_optimization_clips():
    """Every pass's gradient, which changes nothing in the first of SAM's."""
    got = fit(Automatic(METHODS[0]), gradient_clip_val=0.05)
    for a, b in zip(got, by_hand(METHODS[0], clip=0.05), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [*METHODS, named("SAMPa")], ids=str)
def test_manual_optimization(method):
    if method.cls is SAMPa:
        model = make_net()
        optimizer = method.make(model, SGD)
        previous = None
        for batch in batches(STEPS):
            for p in optimizer.each_pass():
                loss_of(model, previous if p.data == "previous" else batch).backward()
            previous = batch

        class Module(Manual):
            before = None

            def training_step(self, batch, index):
                for p in self.optimizers().each_pass():
                    self.manual_backward(loss_of(self.net, self.before if p.data == "previous" else batch))
                self.before = batch

        assert_same(fit(Module(method)), weights_of(model))
        return
    assert_same(fit(Manual(method)), by_hand(method))


def test_manual_optimization_accumulates_and_clips():
    module = Manual(METHODS[0])
    module.accumulation, module.clip = 2, 0.05
    assert_same(fit(module), by_hand(METHODS[0], clip=0.05, accumulation=2))


def test_first_and_second_step_in_manual_optimization():
    class Module(Manual):
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            self.manual_backward(loss_of(self.net, batch))
            optimizer.first_step(zero_grad=True)
            self.manual_backward(loss_of(self.net, batch))
            optimizer.step()
            optimizer.zero_grad()

    assert_same(fit(Module(METHODS[0])), by_hand(METHODS[0]))


@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_mixed_precision(kind):
    """Lightning enters autocast around the whole training_step; the perturbed pass must see perturbed weights in it."""
    method = Method(SAM, {"rho": 2.0})
    model = make_net(torch.float32)
    optimizer = method.make(model, SGD)
    for batch in batches(STEPS, torch.float32):
        for _ in optimizer.each_pass():
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch)
            loss.backward()
    got = fit(kind(method, torch.float32), torch.float32, precision="bf16-mixed")
    for a, b in zip(got, weights_of(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what cannot work


class SecondPass(Automatic):
    def configure_optimizers(self):
        return self.method.make(self.net, SGD)


@pytest.mark.parametrize("kind", [Automatic, SecondPass])
def test_accumulation_in_automatic_optimization_is_refused(kind):
    """The closure runs the last micro-batch alone; those before it would be in the first gradient and no other."""
    module = kind(METHODS[0])
    before = weights_of(module.net)
    with pytest.raises(InvalidSettingError, match="Invalid accumulate_grad_batches: 2"):
        fit(module, accumulate_grad_batches=2)
    assert_same(weights_of(module.net), before)


@pytest.mark.parametrize(
    "method", list(map(named, ["GSAM", "CRSAM", "LookSAM", "WSAM", "FriendlySAM", "AESAM"])), ids=str
)
def test_clipping_each_pass_is_refused_where_it_changes_the_method(method):
    module = Automatic(method)
    with pytest.raises(InvalidSettingError, match="combine_gradients"):
        fit(module, gradient_clip_val=0.05)
    fit(Automatic(method), gradient_clip_val=0.0)

    class Own(Automatic):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")

    with pytest.raises(InvalidSettingError, match="configure_gradient_clipping"):
        fit(Own(method))
    for a, b in zip(fit(Own(METHODS[0])), by_hand(METHODS[0], clip=0.05), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def scaled(module):
    """float16 as on a GPU, where Lightning makes the scaler by itself."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return fit(module, torch.float32, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])


def test_grad_scaler():
    method, refused = Method(SAM, {"rho": 0.5}), Method(FriendlySAM, {"rho": 0.5})
    model = make_net(torch.float32)
    optimizer = method.make(model, SGD)
    for batch in batches(STEPS, torch.float32):
        for _ in optimizer.each_pass():
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, batch)
            loss.backward()
    for a, b in zip(scaled(Manual(method, torch.float32)), weights_of(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(StepOrderError, match="cannot be used with GradScaler"):
        scaled(Manual(refused, torch.float32))
    for own in (method, refused):
        with pytest.raises(StepOrderError, match="GradScaler"):
            scaled(Automatic(own, torch.float32))
