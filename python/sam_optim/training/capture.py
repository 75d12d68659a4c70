"""Whole training steps as CUDA graphs: recorded once for each kind of batch, then replayed."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sam_kernels.graphs import owned_by
from sam_kernels.host import forget_old_weights

from ..core.errors import InvalidSettingError
from ..core.optimizer import SharpnessAwareOptimizer
from ..core.randomness import Draws
from ..core.report import StepReport
from .batches import is_single_value

# Steps that are made one kernel at a time before the first is recorded: state comes into being, libraries choose.
WARMUP_STEPS = 3
# Graphs that are kept. A learning rate that is a number and changes makes a new one each time.
_MAX_GRAPHS = 8

Record = Callable[[Callable[[], Any]], Callable[[], Any]]


class Recorder:
    """Records calls on a device as CUDA graphs that share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Within it, work goes to the stream that recording will use."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # whoever catches an exception goes on with what the step has left behind
            current.wait_stream(self._stream)

    def record(self, call: Callable[[], Any], generators: Sequence[torch.Generator]) -> Callable[[], Any]:
        """Records what ``call`` does, without doing it; the result does it, and returns what ``call`` returned.

        Args:
            generators: states of random generators that the call uses, besides the default one.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Other threads, such as a DataLoader's that pins memory, may go on with what a capture does not allow.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            outputs = call()
        self._pool = graph.pool()

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay

    def wait(self) -> None:
        """Until all replays have been made."""
        torch.cuda.synchronize(self._device)


class _Recorded:
    """A recorded step and the tensors that it reads."""

    def __init__(self, inputs: list[Tensor], draws: CapturedDraws) -> None:
        self.inputs, self.draws = inputs, draws
        self.kept: list[Any] = []  # what the graph reads besides
        self.replay: Callable[[], Any]
        self.report: StepReport


class CapturedDraws:
    """Random draws in a recorded step: each pass has a generator of its own, and passes on one batch the same seed.

    Seeds are drawn anew for each replay, by the generator of the CPU. What the host draws is drawn while the step is
    recorded, alike in passes on one batch, and is the same in every replay.

    Args:
        device: of everything.
        generators: of the program's own, see :class:`RandomState`.
    """

    def __init__(self, device: torch.device, generators: Sequence[Any] = ()) -> None:
        self._device = device
        self._on_host = Draws((), generators=generators)
        self._generators: dict[str, list[torch.Generator]] = {}
        self._seeds: dict[str, int] = {}
        self._used: dict[str, int] = {}

    def prepare(self, names: Sequence[str], count: int) -> list[torch.Generator]:
        """Generators for so many passes on each batch; to be registered with the graph."""
        if self._device.type != "cuda":
            return []
        default = torch.cuda.default_generators[self._device.index or 0]
        self._generators = {name: [default.clone_state() for _ in range(count)] for name in names}
        return [generator for own in self._generators.values() for generator in own]

    def seed(self, seeds: dict[str, int]) -> None:
        """Before each replay."""
        for name, own in self._generators.items():
            for generator in own:
                generator.manual_seed(seeds[name])

    @contextmanager
    def of(self, name: str, perturbed: bool) -> Iterator[None]:
        """For one pass on a batch: the next of its generators is the default one within."""
        own = self._generators.get(name)
        number = self._used.get(name, 0)
        self._used[name] = number + 1
        with self._on_host.of(name, perturbed), self._on_device(own[number % len(own)] if own else None):
            yield

    @contextmanager
    def _on_device(self, own: torch.Generator | None) -> Iterator[None]:
        if own is None:
            yield
            return
        default = torch.cuda.default_generators[self._device.index or 0]
        before = default.graphsafe_get_state()
        default.graphsafe_set_state(own)
        try:
            yield
        finally:
            default.graphsafe_set_state(before)

    def begin_part(self) -> None:
        """Parts of one batch draw alike."""

    def first_of(self, name: str) -> None:
        """Seeds take the place of states."""


class CapturedSteps:
    """Makes steps by replaying graphs.

    Args:
        optimizer: whose steps they are.
        device: of everything.
        make_step: makes a step from batches, in the order and structure in which they are given to :meth:`step`.
        recorder: records it.
    """

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        device: torch.device,
        make_step: Callable[[Any, CapturedDraws | None], Any],
        recorder: Recorder,
    ) -> None:
        self._optimizer, self._device, self._make_step, self._recorder = optimizer, device, make_step, recorder
        self._recorded: OrderedDict[Any, _Recorded] = OrderedDict()
        self._warm, self._loads = 0, optimizer.stepper.loads
        self._has_warned = False
        self._last_seed: int | None = None
        self.is_recording = False
        optimizer.stepper.keep_state_in_place()

    @property
    def count(self) -> int:
        """Graphs that are kept."""
        return len(self._recorded)

    def step(self, batches: dict[str, Any]) -> Any:
        """A step, by a graph after the first ``WARMUP_STEPS``; one is made without it after state has been loaded."""
        if self._optimizer.stepper.loads != self._loads:
            self._loads = self._optimizer.stepper.loads
            if self._recorded:
                self._recorder.wait()  # for those that still read what is dropped now
                self._recorded.clear()
            self._warm = min(self._warm, WARMUP_STEPS - 1)
        if self._warm < WARMUP_STEPS:
            self._warm += 1
            with self._recorder.warming_up():
                return self._make_step(batches, None)
        self._optimizer.catch_up()
        leaves, structure = tree_flatten(batches)
        key = (str(structure), tuple(map(_kind_of, leaves)), _settings_of(self._optimizer))
        found = self._recorded.get(key)
        if found is None:
            found = self._recorded[key] = self._record(leaves, structure)
            self._forget_oldest()
        self._recorded.move_to_end(key)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for own, given in zip(found.inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)
        found.draws.seed(self._seeds(list(batches)))
        outputs = found.replay()
        # A replay writes where nobody looks: autograd and autocast are told, and the last step's report is read anew.
        increment_version([p for group in self._optimizer.param_groups for p in group["params"]])
        forget_old_weights()
        self._optimizer.stepper.replayed(found.report)
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs)

    def _record(self, leaves: list[Any], structure: Any) -> _Recorded:
        own = [leaf.to(self._device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batches = tree_unflatten(own, structure)
        draws = CapturedDraws(self._device, self._optimizer.generators)
        recorded = _Recorded([leaf for leaf in own if isinstance(leaf, Tensor)], draws)
        generators = draws.prepare(list(batches), 4)
        self.is_recording = True
        try:
            with owned_by(recorded.kept):
                recorded.replay = self._recorder.record(lambda: self._make_step(batches, draws), generators)
        finally:
            self.is_recording = False
        recorded.report = self._optimizer.last_step
        return recorded

    def _seeds(self, names: list[str]) -> dict[str, int]:
        """For each batch; that of the batch of the step before is the one it had then."""
        seed = int(torch.randint(2**31, (), device="cpu").item())
        before, self._last_seed = self._last_seed, seed
        return {name: seed + number for number, name in enumerate(sorted(names))} | (
            {"previous": before + sorted(names).index("train")} if before is not None and "train" in names else {}
        )

    def _forget_oldest(self) -> None:
        if len(self._recorded) <= _MAX_GRAPHS:
            return
        self._recorder.wait()
        self._recorded.popitem(last=False)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "TrainStep(capture=True) has recorded more than eight kinds of steps and forgets the oldest. Let "
                "batches have few shapes (drop_last=True), and lr and rho be tensors on the GPU if they change.",
                stacklevel=4,
            )


def _kind_of(leaf: Any) -> Any:
    """What a recorded step depends on: of a tensor its shape and type, of anything else its value.

    Raises:
        InvalidSettingError: for what has no value that could be compared, and may hold tensors that a graph must read.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    if not is_single_value(leaf):
        raise InvalidSettingError(
            f"capture=True reads batches of tensors in tuples, lists and dicts, not a {type(leaf).__name__}"
        )
    return repr(leaf)


def _settings_of(optimizer: SharpnessAwareOptimizer) -> Any:
    """Settings of all groups: numbers by value, since a graph keeps them, and tensors by where they are."""
    return tuple(
        (key, ("tensor", value.data_ptr()) if isinstance(value, Tensor) else repr(value))
        for group in optimizer.param_groups
        for key, value in group.items()
        if key not in ("params", "param_names")
    )
