"""SharpnessAwareHook: MMEngine's Runner makes the steps that a loop by hand makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from sam_optim import (
    SAM,
    AgnosticSAM,
    FriendlySAM,
    InvalidSettingError,
    StepOrderError,
)

from .makers import MAKERS

pytest.importorskip("mmengine")
# MMEngine's own: torch.jit.script, pkg_resources, runners without visualizers.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZE, BATCH, MAX_NORM = 42, 4, 0.05  # eleven batches, the last of two


@pytest.fixture(scope="module")
def mm():
    """What of MMEngine the tests use; imported here, where its warnings are not errors."""
    import warnings
    from types import SimpleNamespace

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmengine
        from mmengine.config import Config
        from mmengine.hooks import Hook
        from mmengine.model import BaseModel
        from mmengine.registry import OPTIMIZERS
        from mmengine.runner import Runner

        from sam_optim import openmmlab

    return SimpleNamespace(
        mmengine=mmengine,
        BaseModel=BaseModel,
        Runner=Runner,
        Hook=Hook,
        Config=Config,
        OPTIMIZERS=OPTIMIZERS,
        SharpnessAwareHook=openmmlab.SharpnessAwareHook,
    )


class Data(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(SIZE, 7, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (SIZE,), generator=generator)

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


def make_model(mm, dropout=0.0, batch_norm=False):
    class Classifier(mm.BaseModel):
        def __init__(self):
            super().__init__()
            norm = nn.BatchNorm1d(33) if batch_norm else nn.Identity()
            self.net = nn.Sequential(nn.Linear(7, 33), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(33, 3))

        def forward(self, x, y, mode="loss"):
            assert mode == "loss"
            return {"loss": nn.functional.cross_entropy(self.net(x), y)}

    torch.manual_seed(1)
    return Classifier().double()


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def make_runner(mm, folder, optimizer, model, accumulation=1, clip=False, hooks=(), epochs=2, **more):
    wrapper = {"type": more.pop("wrapper", "OptimWrapper"), "optimizer": optimizer, "accumulative_counts": accumulation}
    if clip:
        wrapper["clip_grad"] = {"max_norm": MAX_NORM}
    loader = {
        "dataset": Data(),
        "batch_size": BATCH,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": "default_collate"},
    }
    return mm.Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=more.pop("train_cfg", {"by_epoch": True, "max_epochs": epochs}),
        optim_wrapper=wrapper,
        default_hooks={"logger": None, "checkpoint": None, **more.pop("default_hooks", {})},
        custom_hooks=[{"type": "SharpnessAwareHook"}, *hooks],
        experiment_name=f"{folder.name}-{torch.randint(2**40, ()).item()}",
        log_level="ERROR",
        **more,
    )


def take_hook_away(mm, runner):
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, mm.SharpnessAwareHook)]


def by_hand(mm, optimizer_of, accumulation=1, clip=False, epochs=2):
    """MMEngine makes an update after so many batches, and one more at the end of training."""
    model, data = make_model(mm), Data()
    optimizer = optimizer_of(model)
    batches = list(zip(data.x.split(BATCH), data.y.split(BATCH), strict=True)) * epochs
    previous = None
    for start in range(0, len(batches), accumulation):
        window = batches[start : start + accumulation]
        for p in optimizer.each_pass():
            source = previous if p.data == "previous" else window
            for x, y in source:
                (model(x, y)["loss"] / len(source)).backward()
            if p.last and clip:
                optimizer.combine_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        previous = window
    return weights_of(model)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("accumulation", "clip"), [(1, False), (1, True), (2, False), (4, True)])
def test_steps_as_by_hand(mm, tmp_path, name, accumulation, clip):
    model = make_model(mm)
    make_runner(mm, tmp_path, MAKERS[name](model), model, accumulation, clip).train()
    torch.testing.assert_close(weights_of(model), by_hand(mm, MAKERS[name], accumulation, clip), rtol=1e-9, atol=1e-12)


def test_by_iterations(mm, tmp_path):
    """As loops that count iterations, and go through the data again and again, make them."""
    model = make_model(mm)
    runner = make_runner(
        mm,
        tmp_path,
        MAKERS["SAM"](model),
        model,
        2,
        train_cfg={"by_epoch": False, "max_iters": 22, "val_interval": 100},
    )
    runner.train()
    torch.testing.assert_close(weights_of(model), by_hand(mm, MAKERS["SAM"], 2), rtol=1e-9, atol=1e-12)


def test_from_a_configuration(mm, tmp_path):
    """The lines that the module's docstring and the docs give, with groups of MMEngine's own."""
    path = tmp_path / "config.py"
    path.write_text(
        "custom_imports = dict(imports='sam_optim.openmmlab')\n"
        "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SharpnessAware', method='SAM', rho=0.1,\n"
        "                     base_optimizer='SGD', lr=0.1, momentum=0.9, weight_decay=0.1),\n"
        "                     paramwise_cfg=dict(bias_decay_mult=0.0))\n"
        "custom_hooks = [dict(type='SharpnessAwareHook')]\n"
    )
    config = mm.Config.fromfile(str(path))
    model = make_model(mm)
    runner = make_runner(mm, tmp_path, None, model)
    runner.optim_wrapper = runner.build_optim_wrapper(config.optim_wrapper)
    runner.train()
    optimizer = runner.optim_wrapper.optimizer
    assert type(optimizer) is SAM and type(optimizer.base_optimizer) is torch.optim.SGD
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1, 0.0}

    def by_names(model):
        groups = [
            {"params": [p], "weight_decay": 0.0 if name.endswith("bias") else 0.1}
            for name, p in model.named_parameters()
        ]
        return SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)

    torch.testing.assert_close(weights_of(model), by_hand(mm, by_names), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("changes", [{"method": "Nonsense"}, {"method": "TrainStep"}, {"base_optimizer": "Nonsense"}])
def test_names_that_are_not_known(mm, changes):
    settings = {"method": "SAM", "base_optimizer": "SGD", "lr": 0.1, **changes}
    with pytest.raises(InvalidSettingError, match=next(iter(changes))):
        mm.OPTIMIZERS.build({"type": "SharpnessAware", "params": make_model(mm).parameters(), **settings})


def test_other_optimizers_train_as_ever(mm, tmp_path):
    results = []
    for hooked in (True, False):
        model = make_model(mm, dropout=0.3)
        runner = make_runner(mm, tmp_path, torch.optim.SGD(model.parameters(), lr=0.1), model)
        if not hooked:
            take_hook_away(mm, runner)
        torch.manual_seed(3)
        runner.train()
        results.append(weights_of(model))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_the_hook_it_says_so(mm, tmp_path):
    model = make_model(mm)
    before = weights_of(model)
    runner = make_runner(mm, tmp_path, MAKERS["SAM"](model), model)
    take_hook_away(mm, runner)
    with pytest.raises(StepOrderError):
        runner.train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


def test_same_dropout_in_all_passes_and_statistics_once(mm, tmp_path):
    """With rho next to nothing SAM is its base, whatever dropout draws and statistics learn."""
    results = []
    for make in (
        lambda m: SAM(m.parameters(), torch.optim.SGD, rho=1e-13, lr=0.1),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    ):
        model = make_model(mm, dropout=0.3, batch_norm=True)
        runner = make_runner(mm, tmp_path, make(model), model, accumulation=2)
        torch.manual_seed(3)
        runner.train()
        results.append([*weights_of(model), *(b.clone() for b in model.buffers())])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["SAM", "SAMPa", "MomentumSAM"])
@pytest.mark.parametrize("failing", [9, 10, 11, 12])
def test_exceptions_leave_the_weights(mm, tmp_path, name, failing):
    """In any pass and between them: what a step has moved by then is moved back, and the Runner is as it was."""
    model = make_model(mm)
    optimizer = MAKERS[name](model)
    calls, at_rest = [], []

    def count(module, inputs):
        calls.append(None)
        if not optimizer.is_step_begun or (optimizer.waiting and not optimizer.waiting.perturbed and name == "SAM"):
            at_rest[:] = weights_of(model)
        if len(calls) == failing:
            raise KeyboardInterrupt

    class Watch(mm.Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if not optimizer.is_step_begun:
                at_rest[:] = weights_of(model)

    model.net[0].register_forward_pre_hook(count)
    runner = make_runner(mm, tmp_path, optimizer, model, accumulation=2)
    runner.register_hook(Watch())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), at_rest, strict=True))
    assert "train_step" not in vars(model) and "run" not in vars(runner.train_loop)
    assert not optimizer.is_step_begun


def test_a_hook_that_fails_in_the_middle_of_a_window(mm, tmp_path):
    """SAMPa holds its y point while a window fills."""
    model = make_model(mm)
    optimizer = MAKERS["SAMPa"](model)
    at_rest = []

    class Failing(mm.Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if not optimizer.is_step_begun:
                at_rest[:] = weights_of(model)
            elif batch_idx == 5:
                assert not torch.equal(at_rest[0], model.net[0].weight)
                raise ValueError("a hook's own")

    runner = make_runner(mm, tmp_path, optimizer, model, accumulation=2)
    runner.register_hook(Failing())
    with pytest.raises(ValueError, match="own"):
        runner.train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), at_rest, strict=True))


def test_checkpoints_in_the_middle_of_a_window(mm, tmp_path):
    """Eleven batches make three windows of three and two batches over, when MMEngine saves after the epoch."""
    model = make_model(mm)
    runner = make_runner(
        mm,
        tmp_path,
        MAKERS["SAM"](model),
        model,
        accumulation=3,
        epochs=1,
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
    )
    runner.train_loop._max_iters = 100  # the epoch's end is not the end of training
    runner.train()
    saved = torch.load(tmp_path / "epoch_1.pth", weights_only=False)
    assert all(
        torch.equal(a, b) for a, b in zip(saved["state_dict"].values(), model.state_dict().values(), strict=True)
    )
    other = make_model(mm)
    optimizer = MAKERS["SAM"](other)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.state[next(other.parameters())]["step"].item() == 3


def test_methods_that_want_other_batches(mm, tmp_path):
    from sam_optim.trainers.micro_batches import MicroBatch

    def make(model):
        return AgnosticSAM(model.parameters(), torch.optim.SGD, rho_train=0.1, lr=0.1)

    model = make_model(mm)
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="validation batch"):
        make_runner(mm, tmp_path, make(model), model).train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))

    data = Data()
    validation = {"x": data.x[:5], "y": data.y[:5]}

    class WithValidation(mm.SharpnessAwareHook):
        def batches_for(self, data, window):
            return [MicroBatch(validation)] if data == "validation" else super().batches_for(data, window)

    runner = make_runner(mm, tmp_path, make(model), model, epochs=1)
    take_hook_away(mm, runner)
    runner.register_hook(WithValidation())
    runner.train()
    other = make_model(mm)
    optimizer = make(other)
    for x, y in zip(data.x.split(BATCH), data.y.split(BATCH), strict=True):
        for p in optimizer.each_pass():
            other(**(validation if p.data == "validation" else {"x": x, "y": y}))["loss"].backward()
    torch.testing.assert_close(weights_of(model), weights_of(other), rtol=1e-9, atol=1e-12)


def test_grad_scaler(mm, tmp_path):
    """AmpOptimWrapper wants a GPU; this one does what it does."""
    from mmengine.optim import OptimWrapper

    class Scaling(OptimWrapper):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.loss_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

        def backward(self, loss, **settings):
            self.loss_scaler.scale(loss).backward(**settings)
            self._inner_count += 1

        def step(self, **settings):
            self.loss_scaler.step(self.optimizer, **settings)
            self.loss_scaler.update()

    model = make_model(mm)
    make_runner(mm, tmp_path, MAKERS["GSAM"](model), model, wrapper=Scaling).train()
    torch.testing.assert_close(weights_of(model), by_hand(mm, MAKERS["GSAM"]), rtol=1e-9, atol=1e-12)
    model = make_model(mm)
    before = weights_of(model)
    optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    with pytest.raises(StepOrderError, match="cannot be used with GradScaler"):
        make_runner(mm, tmp_path, optimizer, model, wrapper=Scaling).train()
    torch.testing.assert_close(weights_of(model), before, rtol=0.0, atol=0.0)
