"""The reservoir and the loss of dark experience replay."""

from __future__ import annotations

import pytest
import torch

from sam_optim import ReservoirMemory, dark_experience_loss


def fill(memory, count, batch, start=0):
    for first in range(start, count, batch):
        numbers = torch.arange(first, min(first + batch, count))
        memory.add(numbers, numbers.float()[:, None].expand(-1, 3))


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("capacity", [1, 10, 50])
def test_algorithm_r(capacity, batch):
    """Sample by sample as it is written down, whatever the batches."""
    memory = ReservoirMemory(capacity, seed=3)
    generator = torch.Generator().manual_seed(3)
    wanted = []
    for n in range(200):
        if n < capacity:
            wanted.append(n)
        else:
            r = int(torch.randint(n + 1, (), generator=generator))
            if r < capacity:
                wanted[r] = n
    fill(memory, 200, batch)
    assert len(memory) == capacity and memory.seen == 200
    numbers, rows = memory.sample(capacity)
    assert sorted(numbers.tolist()) == sorted(wanted)
    assert torch.equal(rows, numbers.float()[:, None].expand(-1, 3))


def test_every_sample_is_kept_equally_often():
    """Of 40 samples 8 are kept: each in a fifth of 2,000 memories; five standard deviations are 4.5 %."""
    kept = torch.zeros(40)
    for seed in range(2000):
        memory = ReservoirMemory(8, seed=seed)
        memory.add(torch.arange(40))
        kept[memory.sample(8)[0]] += 1
    assert (kept / 2000 - 0.2).abs().max() < 0.045


def test_draws_are_different_samples_and_the_memorys_own():
    memory = ReservoirMemory(20)
    fill(memory, 20, 5)
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    draws = [memory.sample(15)[0] for _ in range(3)]
    assert torch.equal(torch.rand(3), wanted)
    assert all(len(set(d.tolist())) == 15 for d in draws)
    assert not torch.equal(draws[0], draws[1])
    assert len(memory.sample(100)[0]) == 20


def test_resuming():
    one, other = ReservoirMemory(10), ReservoirMemory(10, seed=9)
    fill(one, 30, 4)
    other.load_state_dict(one.state_dict())
    for memory in (one, other):
        fill(memory, 60, 4, start=30)
    for a, b in zip(one.sample(5), other.sample(5), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="10 samples, not 11"):
        ReservoirMemory(11).load_state_dict(one.state_dict())


def test_what_is_added_may_change_afterwards():
    memory = ReservoirMemory(4)
    x = torch.ones(4, 2, requires_grad=True)
    memory.add(x * 1.0)
    with torch.no_grad():
        x.zero_()
    drawn = memory.sample(4)[0]
    assert torch.equal(drawn, torch.ones(4, 2)) and not drawn.requires_grad


def test_what_is_refused():
    memory = ReservoirMemory(4)
    for capacity in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match="Invalid capacity"):
            ReservoirMemory(capacity)
    with pytest.raises(ValueError, match="Invalid count"):
        memory.sample(0.5)
    with pytest.raises(ValueError, match="memory of 0"):
        memory.sample(1)
    with pytest.raises(ValueError, match="one length"):
        memory.add(torch.zeros(2), torch.zeros(3))
    memory.add(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        memory.add(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="holds"):
        memory.add(torch.zeros(2, 3))
    assert memory.seen == 2


def test_dark_experience_loss():
    logits, stored = torch.randn(4, 3), torch.randn(4, 3)
    other, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    squares = ((logits - stored) ** 2).sum() / 12
    entropy = -(other.log_softmax(1)[torch.arange(5), labels]).sum() / 5
    der = dark_experience_loss(logits, stored, alpha=0.3)
    torch.testing.assert_close(der, 0.3 * squares)
    both = dark_experience_loss(logits, stored, alpha=0.3, labelled_logits=other, labels=labels, beta=0.8)
    torch.testing.assert_close(both, 0.3 * squares + 0.8 * entropy)
    with pytest.raises(ValueError, match="labels were given without labelled_logits"):
        dark_experience_loss(logits, stored, labels=labels)
    with pytest.raises(ValueError, match="labelled_logits were given without labels"):
        dark_experience_loss(logits, stored, labelled_logits=other)
    with pytest.raises(ValueError, match="new outputs"):  # torch would compare each row with this one
        dark_experience_loss(logits, stored[:1])


def test_only_tensors_are_kept():
    memory = ReservoirMemory(3)
    for columns in [({"x": torch.ones(2)},), ([torch.ones(2)],), (torch.ones(2), [1, 2])]:
        with pytest.raises(TypeError, match=r"a memory keeps tensors, got a (dict|list).*add\(x, y\)"):
            memory.add(*columns)
    assert memory.seen == 0


def test_a_state_that_was_loaded_to_another_device():
    """``torch.load(map_location=...)`` moves the generator's state as well, which generators take on the CPU alone."""

    class Elsewhere:
        def __init__(self, state):
            self.state = state

        def cpu(self):
            return self.state

    memory, resumed = ReservoirMemory(5), ReservoirMemory(5)
    fill(memory, 40, 8)
    state = memory.state_dict()
    resumed.load_state_dict({**state, "generator": Elsewhere(state["generator"])})
    assert torch.equal(memory.sample(3)[0], resumed.sample(3)[0])


def test_what_was_computed_in_inference_mode_is_trained_on():
    memory, model = ReservoirMemory(4), torch.nn.Linear(3, 2)
    with torch.inference_mode():
        x = torch.randn(2, 3) + 1
        memory.add(x, model(x))
        drawn = memory.sample(2)
    memory.add(torch.randn(2, 3), torch.randn(2, 2))
    for inputs, logits in (drawn, memory.sample(2)):
        dark_experience_loss(model(inputs), logits).backward()
