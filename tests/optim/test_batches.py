"""Batches in parts: what is cut, what is refused, and what parts weigh."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, smooth_l1_loss
from torch.nn.utils.rnn import pack_sequence

from sam_optim import ASAM, GSAM, SAM, AgnosticSAM, InvalidSettingError, SAMPa, TrainStep, split_batch

from .cases import assert_same, batches, loss_of, make_net, weights_of

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    names: list
    scale: float = 2.0


class Unknown:
    """A batch class of somebody's own."""

    def __init__(self, rows):
        self.rows = rows


def images(count, same=True):
    return [torch.full((3, 8, 8 if same else 8 + i), float(i)) for i in range(count)]


def boxes(count):
    return [
        {"boxes": torch.full((1 + i % 3, 4), float(i)), "labels": torch.full((1 + i % 3,), i)} for i in range(count)
    ]


X = torch.arange(12.0).reshape(6, 2)
Y = torch.arange(6)

# A batch of six samples, and from a part to the numbers of the samples in it, each time they stand there.
READ = {
    "tensor": (Y, lambda p: [p]),
    "[x, y]": ([X, Y], lambda p: [p[0][:, 0] / 2, p[1]]),
    "(x, x)": ((X, X), lambda p: [p[0][:, 0] / 2, p[1][:, 0] / 2]),
    "[x]": ([X], lambda p: [p[0][:, 0] / 2]),
    "dict": ({"x": X, "y": Y, "task": "a", "n": 7, "c": torch.tensor(3.0)}, lambda p: [p["x"][:, 0] / 2, p["y"]]),
    "UserDict": (UserDict({"x": X, "y": Y}), lambda p: [p["x"][:, 0] / 2, p["y"]]),
    "named tuple": (Pair(X, Y), lambda p: [p.x[:, 0] / 2, p.y]),
    "dataclass": (Record(X, list("012345")), lambda p: [p.x[:, 0] / 2, list(map(int, p.names))]),
    "arrays": ({"x": X.numpy(), "y": np.arange(6)}, lambda p: [p["x"][:, 0] / 2, p["y"]]),
    "strings": ((X, list("012345")), lambda p: [p[0][:, 0] / 2, list(map(int, p[1]))]),
    "images, targets": (
        (torch.stack(images(6)), boxes(6)),
        lambda p: [p[0][:, 0, 0, 0], [t["labels"][0] for t in p[1]]],
    ),
    "lists": ((images(6), boxes(6)), lambda p: [[i[0, 0, 0] for i in p[0]], [t["labels"][0] for t in p[1]]]),
    "tuples": ((tuple(images(6, False)), tuple(boxes(6))), lambda p: [[i[0, 0, 0] for i in p[0]]]),
    "images, labels": ((images(6), Y), lambda p: [[i[0, 0, 0] for i in p[0]], p[1]]),
    "images, numbers": (
        {"images": images(6), "y": [0, 1, 2, 3, 4, 5]},
        lambda p: [[i[0, 0, 0] for i in p["images"]], p["y"]],
    ),
    "samples": (
        [(image, i) for i, image in enumerate(images(6))],
        lambda p: [[s[0][0, 0, 0] for s in p], [s[1] for s in p]],
    ),
    "dicts": ([{"x": image, "y": i} for i, image in enumerate(images(6))], lambda p: [[s["x"][0, 0, 0] for s in p]]),
    "ragged": ([torch.full((2 + i,), i) for i in range(6)], lambda p: [[s[0] for s in p]]),
    "objects": ({"y": Y, "o": [Unknown(i) for i in range(6)]}, lambda p: [p["y"], [o.rows for o in p["o"]]]),
    "one row": ((X, Y, torch.ones(1, 4)), lambda p: [p[0][:, 0] / 2, p[1]]),
    "sparse": ((X.to_sparse(), Y), lambda p: [p[0].to_dense()[:, 0] / 2, p[1]]),
    "nested": ({"a": [X, "name"], "b": (Y, {"c": Y})}, lambda p: [p["a"][0][:, 0] / 2, p["b"][0], p["b"][1]["c"]]),
    "as many boxes as images": (
        (Y, [{"boxes": torch.full((6, 4), i)} for i in range(6)]),
        lambda p: [p[0], [t["boxes"][0, 0] for t in p[1]]],
    ),
    "missing": ((Y, [None, *boxes(6)[1:]]), lambda p: [p[0]]),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("count", [2, 4])
def test_cut_along_samples(kind, count):
    """Every sample comes once, whole and in order, in all that is of it; containers stay what they are."""
    batch, numbers = READ[kind]
    parts = split_batch(batch, count)
    assert len(parts) == count and all(type(part) is type(batch) for part in parts)
    columns = zip(*(numbers(part) for part in parts), strict=True)
    for column in columns:
        assert [float(number) for part in column for number in part] == [0, 1, 2, 3, 4, 5]
    if kind == "dict":
        assert all((part["task"], part["n"], part["c"].item()) == ("a", 7, 3.0) for part in parts)
    if kind == "tuples":
        assert torch.equal(parts[-1][0][-1], batch[0][-1])


REFUSED = {
    "images alone": (images(6), "can be read as 3 or 6 samples"),
    "images of other sizes": (images(6, False), "can be read as 3 or 6"),
    "vectors": ([torch.zeros(5)] * 4, "can be read as 4 or 5"),
    "as many images as channels": ((images(3), torch.arange(3)), "a list of 3 entries, each with 3 rows"),
    "sequences behind one another": (
        {"ids": torch.arange(12)[None], "labels": torch.arange(12)[None], "bounds": torch.tensor([0, 3, 7, 12])},
        "can be read as 1 or 4 samples",
    ),
    "no target": ((X[:2], None), "a tuple of 2 entries, each with 2 rows"),
    "two tasks": ([{"x": X[:2]}, {"x": X[:2]}], "a list of 2 entries, each with 2 rows"),
    "one row beside several": ([X[:1], X[:3], X[:3]], "a list of 3 entries, each with 3 rows"),
    "one row beside six": ((X, X[:1]), "can be read as 2 or 6"),
    "flattened boxes": ((torch.zeros(4, 3, 8, 8), torch.zeros(7, 6)), r"shape \(7, 6\) does not have the 4 rows"),
    "another length": ((X, ["a", "b"]), "2 entries does not have the 6"),
    "number lists": (([1, 2, 3], [4, 5, 6]), "can be read as 2 or 3"),
    "one dict in a list": ([{"x": X, "y": Y}], "can be read as 1 or 6"),
    "object": (Unknown(X), "an Unknown holds nothing"),
    "object beside": ((X, Unknown(X)), "an Unknown cannot be cut"),
    "packed": (pack_sequence([torch.zeros(3), torch.zeros(2)]), "a PackedSequence holds nothing"),
    "csr": (lambda: (X.to_sparse_csr(), Y), "layout torch.sparse_csr cannot be cut"),
    "jagged": ((torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), Y), "cannot be cut"),
    "iterator": (iter([X]), "list_iterator holds nothing"),
    "text": ("text", "holds nothing"),
    "numbers": ({"a": 3.0}, "holds nothing"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_not_plain_is_refused(kind):
    batch, message = REFUSED[kind]
    batch = batch() if callable(batch) else batch
    with pytest.raises(ValueError, match=f"{message}.*; give TrainStep a split of your own"):
        split_batch(batch, 2)


def test_too_few_samples():
    with pytest.raises(ValueError, match="3 samples cannot be split into 4"):
        split_batch(torch.ones(3), 4)
    with pytest.raises(ValueError, match="0 samples cannot be split into 2"):
        split_batch((torch.ones(0, 3), torch.ones(0)), 2)
    with pytest.raises(ValueError, match="1 samples cannot be split into 2"):
        split_batch([(images(1)[0], 5)], 2)


def test_batch_encoding_and_model_output():
    transformers = pytest.importorskip("transformers")
    for cls in (transformers.BatchEncoding, transformers.modeling_outputs.CausalLMOutput):
        batch = cls({"input_ids": X}) if cls is transformers.BatchEncoding else cls(loss=None, logits=X)
        parts = split_batch(batch, 3)
        assert all(type(part) is cls for part in parts)
        key = next(iter(batch.keys()))
        assert torch.equal(torch.cat([part[key] for part in parts]), X)
        assert torch.equal(getattr(parts[1], key), X[2:4])


# ---------------------------------------------------------------- steps


METHODS = {
    "SAM": lambda m: SAM(m.parameters(), torch.optim.SGD, rho=0.1, **SGD),
    "GSAM": lambda m: GSAM(m.parameters(), torch.optim.SGD, rho=0.1, **SGD),
    "ASAM": lambda m: ASAM(m.named_parameters(), torch.optim.AdamW, rho=0.5, lr=0.01),
    "SAMPa": lambda m: SAMPa(m.parameters(), torch.optim.SGD, rho=0.1, **SGD),
    "AgnosticSAM": lambda m: AgnosticSAM(m.parameters(), torch.optim.SGD, rho_train=0.1, **SGD),
}


def steps(make, loss_fn, data, **options):
    torch.manual_seed(1)
    model = nn.Linear(3, 5, dtype=torch.float64)
    optimizer = make(model)
    step = TrainStep(model, optimizer, loss_fn, **options)
    losses = []
    for number, batch in enumerate(data):
        if isinstance(optimizer, AgnosticSAM):
            losses.append(step(batch, data[number - 1]))
        else:
            losses.append(step(batch))
    return [*weights_of(model), *losses]


def assert_close(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_targets_in_a_list(name):
    """Stacked images and a dict for each of them: the step is that of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(3):
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        data.append((x, [{"y": torch.randn(5, generator=generator, dtype=torch.float64)} for _ in range(6)]))

    def loss(model, batch):
        assert len(batch[0]) == len(batch[1])
        return torch.stack([((model(x) - t["y"]) ** 2).mean() for x, t in zip(*batch, strict=True)]).mean()

    assert_close(steps(METHODS[name], loss, data, micro_batches=4), steps(METHODS[name], loss, data))


def tokens(count=4, ignored=-100, shift=0):
    """Sentences of unequal numbers of labelled tokens."""
    generator = torch.Generator().manual_seed(3)
    data = []
    for _ in range(count):
        x = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
        y = torch.randint(1, 5, (5, 6), generator=generator)
        for row in range(5):
            y[row, 1 + shift + int(torch.randint(4, (), generator=generator)) :] = ignored
        data.append({"x": x, "labels": y})
    return data


def token_mean(model, part, ignored=-100, shift=0, **settings):
    logits = model(part["x"])[:, : 6 - shift]
    return cross_entropy(logits.flatten(0, 1), part["labels"][:, shift:].flatten(), ignore_index=ignored, **settings)


def labelled(part):
    return (part["labels"] != -100).sum()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "options", [{}, {"weight": labelled}, {"max_grad_norm": 0.1}], ids=["found", "told", "clipped"]
)
def test_means_over_tokens(name, options):
    """Labels of -100 are not counted; the step is that of the whole batch."""
    whole = {key: value for key, value in options.items() if key != "weight"}
    wanted = steps(METHODS[name], token_mean, tokens(), **whole)
    assert_close(steps(METHODS[name], token_mean, tokens(), micro_batches=3, **options), wanted)
    by_samples = steps(METHODS[name], token_mean, tokens(), micro_batches=3, weight=lambda part: len(part["x"]))
    assert not torch.allclose(by_samples[0], wanted[0], rtol=1e-6)


def test_m_sam_with_means_over_tokens():
    """Each sentence its own perturbation, and as many votes as it has tokens."""
    data = tokens()
    got = steps(METHODS["SAM"], token_mean, data, micro_batches=5, perturbation="micro_batch")[:2]
    torch.manual_seed(1)
    model = nn.Linear(3, 5, dtype=torch.float64)
    base = torch.optim.SGD(model.parameters(), **SGD)
    params = list(model.parameters())
    for batch in data:
        total = [torch.zeros_like(p) for p in params]
        for part in split_batch(batch, 5):
            before = weights_of(model)
            gradients = torch.autograd.grad(token_mean(model, part), params)
            norm = torch.sqrt(sum((g**2).sum() for g in gradients))
            with torch.no_grad():
                for p, g in zip(params, gradients, strict=True):
                    p.add_(0.1 * g / norm)
            share = labelled(part).item() / labelled(batch).item()
            for t, g in zip(total, torch.autograd.grad(token_mean(model, part), params), strict=True):
                t.add_(share * g)
            with torch.no_grad():
                for p, b in zip(params, before, strict=True):
                    p.copy_(b)
        for p, t in zip(params, total, strict=True):
            p.grad = t
        base.step()
    assert_close(got, weights_of(model))


def test_a_part_without_labels_counts_nothing():
    """The mean over it would be 0 / 0."""
    data = tokens()
    data[1]["labels"][0] = -100
    wanted = steps(METHODS["SAM"], token_mean, data)
    assert_close(steps(METHODS["SAM"], token_mean, data, micro_batches=5), wanted)
    data[1]["labels"].fill_(-100)
    with pytest.raises(ValueError, match=r"weigh \[0.0, 0.0\]"):
        steps(METHODS["SAM"], token_mean, data, micro_batches=2)


def masked_mean(model, part):
    mask = part["labels"] != 0
    losses = cross_entropy(model(part["x"]).flatten(0, 1), part["labels"].flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


def positives(part):
    """Of a detector's loss: how many positions are none of the background."""
    return (part["labels"] != 0).sum()


CLASS_WEIGHTS = torch.arange(1, 6, dtype=torch.float64) ** 3
OTHER_MEANS = {
    "padding": lambda m, p: token_mean(m, p, ignored=0),
    "smoothed": lambda m, p: 0.5 + 2.0 * token_mean(m, p, ignored=0, label_smoothing=0.1),
    "planes": lambda m, p: cross_entropy(m(p["x"]).transpose(1, 2), p["labels"], ignore_index=0),
    "class weights": lambda m, p: cross_entropy(m(p["x"])[:, 0], p["labels"][:, 0], weight=CLASS_WEIGHTS),
    "masked": masked_mean,
    "selected": lambda m, p: (m(p["x"])[p["labels"] != 0] ** 2).mean(),
    "a term": lambda m, p: 0.1 * sum((w**2).mean() for w in m.parameters()) + token_mean(m, p, ignored=0),
    "scaled before": lambda m, p: 2.0 * (m(p["x"]) ** 2).sum() / positives(p),
    "by the inverse": lambda m, p: (m(p["x"]) ** 2).sum() * (1.0 / positives(p).item()),
    "each divided": lambda m, p: ((m(p["x"]) ** 2) / positives(p)).sum(),
    "each times a number": lambda m, p: (positives(p).reciprocal() * (m(p["x"]) ** 2)).sum(),
    "a loss's own sum": lambda m, p: mse_loss(m(p["x"]), torch.ones_like(m(p["x"])), reduction="sum") / positives(p),
    "a loss's own mean": lambda m, p: smooth_l1_loss(m(p["x"])[p["labels"] != 0], torch.ones(positives(p), 5).double()),
    "a product": lambda m, p: (m(p["x"]).flatten() @ m(p["x"]).flatten()) / positives(p),
    "a root": lambda m, p: (m(p["x"]) ** 2).mean().sqrt(),
    "a ratio": lambda m, p: 1.0 - (2.0 * m(p["x"]).sigmoid()[p["labels"] != 0].sum() + 1.0) / m(p["x"]).exp().sum(),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_MEANS)
@pytest.mark.parametrize("options", [{}, {"perturbation": "micro_batch"}], ids=["batch", "micro_batch"])
def test_means_over_something_else_are_refused(kind, options):
    """Nobody has said what they are over, and samples are not it; nothing is updated."""
    model = nn.Linear(3, 5, dtype=torch.float64)
    before = weights_of(model)
    step = TrainStep(model, METHODS["SAM"](model), OTHER_MEANS[kind], micro_batches=2, **options)
    with pytest.raises(InvalidSettingError, match=r"the loss is a mean over .*: give TrainStep weight="):
        step(tokens(ignored=0)[0])
    assert_same(weights_of(model), before)


def summed_entropy(model, part):
    return cross_entropy(model(part["x"])[:, 0], part["labels"][:, 0], reduction="sum")


SUMS = {
    "cross entropy": summed_entropy,
    "with a term": lambda m, p: (m.weight**2).mean() + summed_entropy(m, p),
    "squares": lambda m, p: (m(p["x"]) ** 2).sum(),
    "negative": lambda m, p: -m(p["x"]).tanh().sum().squeeze(),
}  # fmt: skip


@pytest.mark.parametrize("kind", SUMS)
def test_sums_are_refused(kind):
    with pytest.raises(InvalidSettingError, match="the loss is a sum"):
        steps(METHODS["SAM"], SUMS[kind], tokens(1, ignored=0), micro_batches=2)


def dice(model, part, dims):
    """Of each class, over all samples or within each."""
    found, wanted = model(part["x"]).sigmoid(), torch.nn.functional.one_hot(part["labels"], 5).double()
    shared, total = (found * wanted).sum(dims), (found + wanted).sum(dims)
    return (1.0 - (2.0 * shared + 1.0) / (total + 1.0).clamp(min=1e-6)).mean()


@pytest.mark.parametrize("dims", [(0, 1), (-3, -2), 0], ids=str)
def test_ratios_over_all_samples_are_refused(dims):
    with pytest.raises(InvalidSettingError, match="ratios of sums over the batch"):
        steps(METHODS["SAM"], lambda m, p: dice(m, p, dims), tokens(1, ignored=0), micro_batches=2)


MEANS = {
    "ratios within samples": lambda m, p: dice(m, p, 1),
    "over samples, then a sum": lambda m, p: (m(p["x"]) ** 2).mean((0, 1)).sum(),
    "divided": lambda m, p: (m(p["x"]) ** 2).sum() / len(p["x"]),
    "multiplied": lambda m, p: (m(p["x"]) ** 2).sum() * (1.0 / len(p["x"])),
    "of tasks": lambda m, p: torch.stack([m(p["x"]).mean(), (m(p["x"]) ** 2).mean()]).sum(),
    "with a sum of weights": lambda m, p: 0.1 * (m.weight**2).sum() + (m(p["x"]) ** 2).mean(),
    "and a plain sum of weights": lambda m, p: (m.weight**2).sum() + (m(p["x"]) ** 2).mean(),
    "and a norm of weights": lambda m, p: 0.1 * (m.weight**2).sum().sqrt() + (m(p["x"]) ** 2).mean(),
    "each divided": lambda m, p: ((m(p["x"]) ** 2) / len(p["x"])).sum(),
    "a loss's own sum": lambda m, p: mse_loss(m(p["x"]), torch.ones_like(m(p["x"])), reduction="sum") / len(p["x"]),
    "weighed by what is learnt": lambda m, p: (-m.bias[0]).exp() * (m(p["x"]) ** 2).mean() + m.bias[0],
    "divided by what is learnt": lambda m, p: (m(p["x"]) ** 2).mean() / (2.0 * m.bias.exp().sum()) + m.bias[0],
    "ratios of samples": lambda m, p: (m(p["x"]).tanh().sum((1, 2)) / m(p["x"]).exp().sum((1, 2))).mean(),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEANS)
def test_means_that_look_like_sums(kind):
    data = tokens(ignored=0)
    assert_close(steps(METHODS["SAM"], MEANS[kind], data, micro_batches=3), steps(METHODS["SAM"], MEANS[kind], data))


def test_shifted_labels_are_told():
    """As causal language models shift them: the first is not counted."""
    data = tokens(shift=1)
    assert (
        len(
            {(part["labels"] != -100).sum() / (part["labels"][:, 1:] != -100).sum() for part in split_batch(data[0], 2)}
        )
        > 1
    )

    def loss(model, part):
        return token_mean(model, part, shift=1)

    with pytest.raises(InvalidSettingError, match="mean over"):
        steps(METHODS["SAM"], loss, data, micro_batches=2)
    got = steps(METHODS["SAM"], loss, data, micro_batches=2, weight=lambda p: (p["labels"][:, 1:] != -100).sum())
    assert_close(got, steps(METHODS["SAM"], loss, data))


def test_means_over_samples_are_not_refused():
    """However they are made, with parts of unequal sizes and a regulariser."""

    def by_sample(model, part):
        rows = [cross_entropy(x, y) for x, y in zip(model(part["x"]), part["labels"], strict=True)]
        return torch.stack(rows).mean() + 0.1 * (model.weight**2).mean()

    def summed(model, part):
        return summed_entropy(model, part) / len(part["x"])

    for loss in (by_sample, summed):
        data = tokens(ignored=0)
        assert_close(steps(METHODS["SAM"], loss, data, micro_batches=3), steps(METHODS["SAM"], loss, data))


def test_several_tensors_with_ignored_labels():
    first = tokens()[0]
    second = {**first, "more": first["labels"].clone()}
    options = {"micro_batches": 2}
    assert_close(steps(METHODS["SAM"], token_mean, [second], **options), steps(METHODS["SAM"], token_mean, [first]))
    second["more"][0, 0] = -100
    with pytest.raises(ValueError, match=r"several tensors.*weight="):
        steps(METHODS["SAM"], token_mean, [second], **options)


def halves_of(batch, count):
    """Three samples and two."""
    return [{k: v[:3] for k, v in batch.items()}, {k: v[3:] for k, v in batch.items()}]


def plain_loss(model, part):
    return ((model(part["x"]) - 1.0) ** 2).mean()


@pytest.mark.parametrize("name", METHODS)
def test_unequal_parts_of_a_split_of_ones_own(name):
    data = [{"x": batch["x"]} for batch in tokens()]
    wanted = steps(METHODS[name], plain_loss, data)
    assert_close(steps(METHODS[name], plain_loss, data, micro_batches=2, split=halves_of), wanted)


def test_a_batch_class_of_ones_own():
    """Its samples cannot be counted; the weight is all that is missing."""
    data = [Unknown(batch["x"]) for batch in tokens()]

    def loss(model, batch):
        return plain_loss(model, {"x": batch.rows})

    options = {"micro_batches": 2, "split": lambda batch, n: [Unknown(batch.rows[:3]), Unknown(batch.rows[3:])]}
    with pytest.raises(ValueError, match=r"part of your own split cannot be counted.*weight="):
        steps(METHODS["SAM"], loss, data, **options)
    got = steps(METHODS["SAM"], loss, data, **options, weight=lambda part: len(part.rows))
    assert_close(got, steps(METHODS["SAM"], loss, data))


@pytest.mark.parametrize("weight", [lambda part: None, lambda part: torch.ones(2), lambda part: "3"])
def test_a_weight_that_is_no_number(weight):
    with pytest.raises(ValueError, match="weight returned"):
        steps(METHODS["SAM"], plain_loss, tokens(1), micro_batches=2, weight=weight)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 0.0])
def test_a_weight_that_cannot_be_one(value):
    with pytest.raises(ValueError, match="weigh"):
        steps(METHODS["SAM"], plain_loss, tokens(1), micro_batches=2, weight=lambda part: value)


# ---------------------------------------------------------------- a share for validation


def test_a_share_of_samples_in_lists():
    model, other = make_net(), make_net()
    make = METHODS["AgnosticSAM"]

    def loss(model, batch):
        return loss_of(model, (torch.stack(batch[0]), batch[1]))

    step, wanted = TrainStep(model, make(model), loss, validation=0.25), TrainStep(other, make(other), loss_of)
    for x, y in batches(3, size=8):
        step((list(x), y))
        wanted((x[:6], y[:6]), (x[6:], y[6:]))
    assert_same(weights_of(model), weights_of(other))


def test_a_share_by_a_split_of_ones_own():
    model, other = make_net(), make_net()
    make = METHODS["AgnosticSAM"]

    def split(batch, count):
        return [Unknown((batch.rows[0][i::count], batch.rows[1][i::count])) for i in range(count)]

    def loss(model, batch):
        return loss_of(model, batch.rows)

    step = TrainStep(model, make(model), loss, validation=0.5, split=split)
    wanted = TrainStep(other, make(other), loss_of)
    for x, y in batches(3, size=8):
        step(Unknown((x, y)))
        wanted((x[::2], y[::2]), (x[1::2], y[1::2]))
    assert_same(weights_of(model), weights_of(other))
    with pytest.raises(InvalidSettingError, match=r"Invalid validation: 0.25.*the share can be 0.5 alone"):
        TrainStep(model, make(model), loss, validation=0.25, split=split)
