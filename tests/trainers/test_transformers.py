"""SharpnessAwareTrainerMixin: Hugging Face's Trainer makes the steps that a loop by hand makes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sam_optim import (
    AESAM,
    GSAM,
    SAM,
    AgnosticSAM,
    FriendlySAM,
    InvalidSettingError,
    Pass,
    SAMPa,
    SharpnessAwareTrainerMixin,
    StepOrderError,
    Update,
)
from sam_optim.trainers.micro_batches import MicroBatch, sharpness_aware

from ..optim.bases import ADAMW
from .makers import MAKERS

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SIZE, MICRO = 48, 4


class SharpnessAwareTrainer(SharpnessAwareTrainerMixin, transformers.Trainer):
    """In the order of the data set."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrder(transformers.Trainer):
    _get_train_sampler = SharpnessAwareTrainer._get_train_sampler


def make_model(dropout=0.0):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=dropout,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def dataset():
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (SIZE, 9), generator=generator).unbind()]


def arguments(folder, **options):
    options = {"max_grad_norm": 0.0, "gradient_accumulation_steps": 1, **options}
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=MICRO,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        lr_scheduler_type="constant",
        **options,
    )


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-5)


def train(cls, folder, optimizer_of, model=None, **options):
    model = make_model() if model is None else model
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(getattr(optimizer, "base_optimizer", optimizer), lambda step: 1.0)
    trainer = cls(model, arguments(folder, **options), train_dataset=dataset(), optimizers=(optimizer, scheduler))
    trainer.train()
    return weights_of(model), trainer


def by_hand(optimizer_of, accumulation, clip=0.0):
    model = make_model()
    optimizer = optimizer_of(model)
    data = torch.stack([entry["input_ids"] for entry in dataset()])
    previous = None
    for window in data.split(MICRO * accumulation):
        for p in optimizer.each_pass():
            source = previous if p.data == "previous" else window
            for ids in source.split(MICRO):
                (model(input_ids=ids, labels=ids).loss / accumulation).backward()
            if p.last and clip:
                optimizer.combine_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
        previous = window
    return weights_of(model)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_as_by_hand(tmp_path, name, accumulation):
    got, _ = train(SharpnessAwareTrainer, tmp_path, MAKERS[name], gradient_accumulation_steps=accumulation)
    assert_close(got, by_hand(MAKERS[name], accumulation))


class TakesNoCount(nn.Module):
    """A model whose loss is a mean over its micro-batch, which the Trainer divides by their number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x=None, labels=None):
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}


def test_sampa_at_the_end_of_an_epoch(tmp_path):
    """The last window has one micro-batch, and repeats the window before, which has three."""
    x, y = torch.randn(28, 3, generator=torch.Generator().manual_seed(3)), torch.arange(28) % 2
    entries = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    model = TakesNoCount()
    optimizer = MAKERS["SAMPa"](model)
    options = arguments(tmp_path, gradient_accumulation_steps=3)
    SharpnessAwareTrainer(model, options, train_dataset=entries, optimizers=(optimizer, None)).train()

    wanted = TakesNoCount()
    optimizer = MAKERS["SAMPa"](wanted)
    previous = None
    for window in (slice(0, 12), slice(12, 24), slice(24, 28)):
        for p in optimizer.each_pass():
            source = previous if p.data == "previous" else window
            wanted(x[source], y[source])["loss"].backward()
        previous = window
    assert_close(weights_of(model), weights_of(wanted))


def test_a_training_step_that_takes_inputs_apart(tmp_path):
    class Popping(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs["labels"] = inputs.pop("targets")
            return super().training_step(model, inputs, num_items_in_batch)

    class InFront(SharpnessAwareTrainerMixin, Popping):
        _get_train_sampler = SharpnessAwareTrainer._get_train_sampler

        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)

    model = make_model()
    entries = [{"input_ids": entry["input_ids"], "targets": entry["labels"]} for entry in dataset()]
    options = arguments(tmp_path, gradient_accumulation_steps=2, remove_unused_columns=False)
    InFront(model, options, train_dataset=entries, optimizers=(MAKERS["GSAM"](model), None)).train()
    assert_close(weights_of(model), by_hand(MAKERS["GSAM"], 2))


@pytest.mark.parametrize("name", ["SAM", "GSAM", "WSAM", "CRSAM", "SAMPa"])
def test_the_trainer_clips_what_the_update_is_made_of(tmp_path, name):
    got, _ = train(SharpnessAwareTrainer, tmp_path, MAKERS[name], max_grad_norm=0.1, gradient_accumulation_steps=2)
    assert_close(got, by_hand(MAKERS[name], 2, clip=0.1))


def test_schedule_free_bases(tmp_path):
    """The Trainer calls train() before each micro-batch, amid a step too, and eval() before it evaluates."""
    others = pytest.importorskip("pytorch_optimizer")

    def make(model):
        return SAM(model.parameters(), others.ScheduleFreeAdamW, rho=0.05, lr=0.01)

    def make_in_train_mode(model):
        optimizer = make(model)
        optimizer.train()
        return optimizer

    got, trainer = train(SharpnessAwareTrainer, tmp_path, make, gradient_accumulation_steps=2)
    assert_close(got, by_hand(make_in_train_mode, 2))
    trainer.evaluate(dataset())
    assert not all(torch.equal(a, b) for a, b in zip(got, weights_of(trainer.model), strict=True))


def test_step_hooks(tmp_path):
    """A hook that clips does what the Trainer's own clipping does, with a method that combines gradients."""

    def make(model):
        optimizer = MAKERS["GSAM"](model)

        def clip(*arguments):
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)

        optimizer.register_step_pre_hook(clip)
        return optimizer

    got, _ = train(SharpnessAwareTrainer, tmp_path, make, gradient_accumulation_steps=2)
    assert_close(got, by_hand(MAKERS["GSAM"], 2, clip=0.1))


def test_same_dropout_in_all_passes(tmp_path):
    """With rho next to nothing SAM is its base, whatever dropout draws; and later steps draw as without SAM."""
    results = []
    for cls, make in (
        (SharpnessAwareTrainer, lambda m: SAM(m.parameters(), torch.optim.SGD, rho=1e-9, lr=0.1)),
        (InOrder, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)),
    ):
        weights, _ = train(cls, tmp_path, make, model=make_model(dropout=0.3), gradient_accumulation_steps=2)
        results.append(weights)
    assert_close(*results)


def test_other_optimizers_train_as_ever(tmp_path):
    def make(model):
        return ADAMW.make(model.parameters())

    a, _ = train(SharpnessAwareTrainer, tmp_path, make)
    b, _ = train(InOrder, tmp_path, make)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_trainers_own_groups(tmp_path):
    """optimizer_cls_and_kwargs: decay for weights, none for norms."""
    model = make_model()
    settings = {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 1e-2}
    trainer = SharpnessAwareTrainer(
        model, arguments(tmp_path, weight_decay=0.1), train_dataset=dataset(), optimizer_cls_and_kwargs=(SAM, settings)
    )
    before = weights_of(model)
    trainer.train()
    optimizer = sharpness_aware(trainer.optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["rho"] == 0.05 for group in optimizer.param_groups)
    assert all(not torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))
    assert not optimizer.is_step_begun


def test_resume(tmp_path):
    straight, _ = train(SharpnessAwareTrainer, tmp_path / "a", MAKERS["SAM"])
    model = make_model()
    options = {"max_steps": 6}
    stopped, trainer = train(SharpnessAwareTrainer, tmp_path / "b", MAKERS["SAM"], model=model, **options)
    trainer._save_checkpoint(model, trial=None)
    other = make_model()
    optimizer = MAKERS["SAM"](other)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    again = SharpnessAwareTrainer(
        other, arguments(tmp_path / "b"), train_dataset=dataset(), optimizers=(optimizer, scheduler)
    )
    again.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-6"))
    assert all(torch.equal(x, y) for x, y in zip(weights_of(other), straight, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(stopped, straight, strict=True))


@pytest.mark.parametrize("failing", [3, 4, 5, 6])
def test_exceptions_leave_the_weights(tmp_path, failing):
    """In either pass, of the second step of two micro-batches and two passes each."""
    model, calls = make_model(), 0

    def count(module, inputs):
        nonlocal calls
        calls += 1
        if calls == failing + 4:
            raise KeyboardInterrupt

    steps = []
    model.register_forward_pre_hook(count)

    class Recording(SharpnessAwareTrainer):
        def training_step(self, *args):
            if not self._window:
                steps.append(weights_of(model))
            return super().training_step(*args)

    with pytest.raises(KeyboardInterrupt):
        train(Recording, tmp_path, MAKERS["SAM"], model=model, gradient_accumulation_steps=2)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), steps[-1], strict=True))


def test_a_callback_that_fails_between_passes_and_step_leaves_the_weights(tmp_path):
    class Failing(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            raise ValueError("a callback's own")

    model = make_model()
    before = weights_of(model)
    optimizer = MAKERS["SAM"](model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = SharpnessAwareTrainer(
        model, arguments(tmp_path), train_dataset=dataset(), optimizers=(optimizer, scheduler), callbacks=[Failing()]
    )
    with pytest.raises(ValueError, match="own"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


def test_methods_that_want_other_batches(tmp_path):
    def make(model):
        return AgnosticSAM(model.parameters(), torch.optim.SGD, rho_train=0.1, lr=0.1)

    model = make_model()
    before = weights_of(model)
    with pytest.raises(StepOrderError, match="validation batch"):
        train(SharpnessAwareTrainer, tmp_path, make, model=model)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))

    class WithValidation(SharpnessAwareTrainer):
        def batches_for(self, data, window):
            if data != "validation":
                return super().batches_for(data, window)
            ids = torch.stack([entry["input_ids"] for entry in dataset()[:MICRO]])
            return [MicroBatch({"input_ids": ids, "labels": ids}, window[0].more)]

    got, _ = train(WithValidation, tmp_path, make)
    model = make_model()
    optimizer = make(model)
    data = torch.stack([entry["input_ids"] for entry in dataset()])
    for window in data.split(MICRO):
        for p in optimizer.each_pass():
            ids = window if p.data == "train" else data[:MICRO]
            model(input_ids=ids, labels=ids).loss.backward()
    assert_close(got, weights_of(model))


def with_scaler(folder, method, **settings):
    """As with fp16, which the Trainer has for GPUs alone."""
    model = make_model()
    optimizer = method(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer.base_optimizer, lambda step: 1.0)
    trainer = SharpnessAwareTrainer(
        model, arguments(folder), train_dataset=dataset(), optimizers=(optimizer, scheduler)
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    return weights_of(model)


def test_grad_scaler(tmp_path):
    def optimizer_of(model):
        return GSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)

    assert_close(with_scaler(tmp_path, GSAM), by_hand(optimizer_of, 1))
    with pytest.raises(StepOrderError, match="cannot be used with GradScaler"):
        with_scaler(tmp_path, FriendlySAM)


class Silent(SAM):
    def passes(self):
        g = yield Pass()
        self.ascend(g, rule=self._rule, scale=self.radii())
        g_plus = yield Pass(perturbed=True)
        yield Update(g_plus)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Silent, {}, "last=True"),
        (AESAM, {"c": 10.0}, "last=True"),
        (SAMPa, {"warm_start": "zero"}, "wants no gradient"),
    ],
)
def test_steps_whose_end_a_trainer_cannot_know(tmp_path, cls, settings, message):
    """They are refused before anything is updated without the Trainer's clipping."""
    model = make_model()
    optimizer = cls(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, **settings)
    weights = []
    optimizer.register_step_post_hook(lambda *_: weights.append(weights_of(model)))
    with pytest.raises(StepOrderError, match=message):
        train(SharpnessAwareTrainer, tmp_path, lambda m: optimizer, model=model)
    # AE-SAM's first step is one of SAM's.
    before = weights[-1] if weights else weights_of(make_model())
    assert len(weights) == (cls is AESAM)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), before, strict=True))


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_what_hides_parameters_is_refused(tmp_path, monkeypatch, kind):
    model = make_model()
    optimizer = MAKERS["SAM"](model)
    trainer = SharpnessAwareTrainer(model, arguments(tmp_path), train_dataset=dataset(), optimizers=(optimizer, None))
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", accelerate_kind(kind))
    with pytest.raises(InvalidSettingError, match="does not see the whole"):
        trainer._refuse_what_hides_parameters(optimizer)


def accelerate_kind(name):
    from accelerate.utils import DistributedType

    return DistributedType[name]
