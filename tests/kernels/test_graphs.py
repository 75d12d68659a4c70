"""What a capture must not leave behind, without a GPU: torch is made to say that it captures a graph."""

from __future__ import annotations

import pytest
import torch

import sam_kernels as sk
from sam_kernels import graphs
from sam_kernels.backends import cuda as cuda_module

from .cases import Problem, same_bits

CUDA = torch.device("cuda")


@pytest.fixture
def capturing(monkeypatch):
    """Whether a graph is being captured, to be set."""
    state = {"is": True}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["is"])
    return state


def test_a_capture_is_refused_with_what_to_do(capturing):
    with pytest.raises(RuntimeError, match=r"cannot be captured in a CUDA graph: because\. Make a few steps before"):
        graphs.refuse_capture(CUDA, "because")
    graphs.refuse_capture(torch.device("cpu"), "because")
    capturing["is"] = False
    graphs.refuse_capture(CUDA, "because")


def test_memory_for_sums_that_a_graph_zeroes_serves_no_other_launch(shim, capturing, monkeypatch):
    """A launch whose tickets are not zero at first never finishes its sum, or too early."""
    monkeypatch.setattr(cuda_module, "is_capturing", lambda device: capturing["is"])
    problem = Problem.random([2049, 7])
    wanted = sk.gram(problem.xs, problem.plan(), backend="reference")
    plan = problem.plan()
    sk.gram(problem.xs, plan, backend=shim.name)
    captured = plan.bindings[shim.name].scratch
    captured.view(torch.int32).fill_(1)  # what no replay has zeroed
    capturing["is"] = False
    for _ in range(2):
        found = sk.gram(problem.xs, plan, backend=shim.name)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    own = plan.bindings[shim.name].scratch
    assert plan.bindings[shim.name].has_zeros and own is not captured
    capturing["is"] = True  # a graph may use what is zero already
    assert same_bits(sk.gram(problem.xs, plan, backend=shim.name), found)
    assert plan.bindings[shim.name].scratch is own


@pytest.fixture
def buckets(monkeypatch):
    """Of Triton's backend for tensors on a GPU; and how its words got there."""
    pytest.importorskip("triton")
    from sam_kernels.triton.buckets import Buckets

    sent = []

    def to(words, device, non_blocking=False):
        sent.append((getattr(words, "is_pinned_now", False), device, non_blocking))
        return words

    def pin_memory(words):
        words = words.clone()
        words.is_pinned_now = True
        return words

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return Buckets([700, 3], [0, 0], 256, CUDA), sent


def codes():
    from sam_kernels.triton import layout as at

    return bytes([1] * at.COLUMNS * 2)


def test_a_first_launch_of_triton_does_not_wait(buckets, capturing):
    capturing["is"] = False
    own, sent = buckets
    [bucket] = own.of(codes(), 1, None)
    assert bucket.places.tolist() == [0, 1, 2, 1 << 32]
    assert sent == [(True, CUDA, True)]


def test_a_first_launch_of_triton_is_not_captured(buckets, capturing):
    own, sent = buckets
    with pytest.raises(
        RuntimeError, match="cannot be captured in a CUDA graph: the kernels have not walked over these"
    ):
        own.of(codes(), 1, None)
    assert not sent
    capturing["is"] = False
    own.of(codes(), 1, None)
    capturing["is"] = True
    own.of(codes(), 1, None)
    assert len(sent) == 1


def test_a_table_of_triton_is_not_made_in_a_capture(interpreter, capturing, monkeypatch):
    plan = sk.Plan([torch.ones(4)])
    monkeypatch.setattr(graphs, "is_capturing", lambda device: capturing["is"])
    with pytest.raises(RuntimeError, match="have not seen these tensors before"):
        sk.gram([[torch.ones(4)]], plan, backend="triton")
    assert "triton" not in plan.bindings
    capturing["is"] = False
    assert sk.gram([[torch.ones(4)]], plan, backend="triton").item() == 4.0
