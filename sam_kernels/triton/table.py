"""What the host does for a launch: it fills the table (see :mod:`.layout`), brings it to the device, and launches."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .. import bases
from ..graphs import is_capturing, keep, refuse_capture
from ..plan import Plan
from ..rules import Deflected, Fixed, Normalized, NormalizedSum, NormMatched, Rule
from . import kernels
from . import layout as at
from .bases import BASES
from .buckets import Bucket, Buckets, Form
from .rule import TritonRule

_FUNCTIONS = {
    Fixed: kernels.fixed,
    Normalized: kernels.normalized,
    Deflected: kernels.deflected,
    NormMatched: kernels.norm_matched,
    NormalizedSum: kernels.normalized_sum,
}

_BASES = {base.code: base for base in bases.BASES}

# Of a multiprocessor, for cooperative launches: NVIDIA's all have as many.
_REGISTERS = 65536

# Ready-made host buffers, so that nothing has to be allocated while a CUDA graph is captured.
_SPARES = 8


class _Upload:
    """A table on the device and what it holds."""

    def __init__(self, words: Tensor) -> None:
        self.words = words
        self.content = b""


class Table:
    """A plan's tensors, and the launches over them.

    Args:
        pointers: addresses and types of the tensors.
        plan: whose tensors they are.

    Attributes:
        launches: of the last operation.
        uploads: of tables to the device, so far.
    """

    def __init__(self, pointers: Any, plan: Plan) -> None:
        self.launches = self.uploads = 0
        self._pointers = pointers
        self._device = plan.device
        self._on_gpu = plan.device.type == "cuda"
        self._numels = [layout.numel for layout in plan.layouts]
        self._groups, self._group_count = plan.groups, plan.group_count
        self._uploads: dict[str, _Upload] = {}
        self._spares: list[Tensor] = []
        self._captured: list[Any] = []
        self._compiled: dict[Any, tuple[Any, list[Any]]] = {}

        self._rows_at = at.HEADER_WORDS + self._group_count * at.GROUP_WORDS
        self._buffer = bytearray(8 * (self._rows_at + max(len(plan), 1) * at.ROW_WORDS))
        self._words = torch.frombuffer(self._buffer, dtype=torch.int64)
        rows = self._words[self._rows_at :].view(-1, at.ROW_WORDS)
        for row, (numel, group, eta) in enumerate(zip(self._numels, plan.groups, plan.geometry, strict=True)):
            rows[row, at.NUMEL] = numel
            rows[row, at.GROUP] = group
            rows.view(torch.float64)[row, at.ETA] = -1.0 if eta is None else eta
        self._scratch = self._make_scratch(at.VIRTUAL_BLOCKS)

    def has_host_step(self) -> bool:
        return bool(self._pointers.has_host_step())

    def tune(self, block: int, threads: int, programs_per_multiprocessor: int, one_launch: bool) -> None:
        if block < 128 or block > 65536 or block & (block - 1):
            raise ValueError(f"Invalid block: {block}; it must be a power of two, 128 to 65536")
        if threads < 64 or threads > 1024 or threads & (threads - 1):
            raise ValueError(f"Invalid threads: {threads}; it must be a power of two, 64 to 1024")
        if programs_per_multiprocessor < 1:
            raise ValueError(f"Invalid programs_per_multiprocessor: {programs_per_multiprocessor}; it must be positive")
        warp = torch.cuda.get_device_properties(self._device).warp_size if self._on_gpu else 32
        self._block, self._threads, self._warps = block, threads, threads // warp
        self._programs, self._one_launch = programs_per_multiprocessor, one_launch
        self._buckets = Buckets(self._numels, self._groups, block, self._device)
        self._compiled.clear()

    # ------------------------------------------------------------------ launches
    #
    # ``report`` is the address of REPORT_SIZE float64 numbers on the device, which hold NaN where a launch writes none.

    def gram(self, lists: int, rule: Rule | TritonRule, weighted: bool, taken: bytearray | None, report: int) -> None:
        self.launches = 0
        self._pointers.select_gradients(lists, None)
        self._pack(rule=rule)
        table = self._upload("gram", lists, taken if weighted else None)
        self._launch_gram(table, self._buckets_of(lists, taken, weights=weighted), lists, rule, weighted, report)

    def perturb(self, lists: int, scale: Sequence[float | Tensor], coefficients: int, taken: bytearray | None) -> None:
        self.launches = 0
        self._pointers.select_gradients(lists, taken)
        self._pack(scale, lists=lists)
        table = self._upload("perturb", lists, taken)
        self._launch_perturb(
            table, self._buckets_of(lists, taken), taken, coefficients, at.NUMBERS if coefficients else at.ONES
        )
        self._mark(taken, True)

    def restore(self, taken: bytearray) -> None:
        self.launches = 0
        self._pointers.select_copies(taken)
        self._pack()
        table = self._upload("restore", 0, taken)
        for b in self._buckets_of(0, taken):
            self._launch(
                kernels.restore_kernel,
                b.chunks,
                table,
                b.places,
                self._rows_at,
                b.chunks,
                W=b.weights,
                S=b.copies,
            )

    def combine(self, lists: int, scale: Sequence[float | Tensor], coefficients: int) -> None:
        self.launches = 0
        self._pointers.select_all()
        self._pack(scale, lists=lists)
        table = self._upload("combine", lists, None)
        for b in self._buckets_of(lists, None):
            self._launch(
                kernels.combine_kernel,
                b.chunks,
                table,
                b.places,
                coefficients,
                self._rows_at,
                b.chunks,
                SOURCE=at.NUMBERS if coefficients else at.ONES,
                W=b.weights,
                X=b.lists,
            )

    def ascent(
        self,
        lists: int,
        rule: Rule | TritonRule,
        scale: Sequence[float | Tensor],
        taken: bytearray | None,
        report: int,
    ) -> None:
        self.launches = 0
        self._pointers.select_gradients(lists, taken)
        buckets = self._buckets_of(lists, taken)
        together = self._fits_one_launch(buckets)
        self._pack(scale, lists=lists, rule=rule)
        table = self._upload("ascent", lists, taken)
        if together:
            b = buckets[0]
            self._launch_together(
                kernels.ascent_kernel,
                (table, b.places, self._scratch, report, self._rows_at, b.chunks),
                RULE=self._function(rule),
                TAKE=taken is not None,
                W=b.weights,
                S=b.copies,
                X=b.lists,
                LANES=self._lanes(b),
            )
        else:
            self._launch_gram(table, buckets, lists, rule, True, report)
            self._launch_perturb(table, buckets, taken, report, at.REPORT)
        self._mark(taken, True)

    def descent(
        self,
        lists: int,
        rule: Rule | TritonRule,
        needs_gram: bool,
        weighted: bool,
        scale: Sequence[float | Tensor],
        taken: bytearray | None,
        base: str,
        settings: Sequence[Any],
        lr: Sequence[float | Tensor],
        first: bytearray | None,
        grad_scale: float | Tensor,
        found_inf: int,
        skip_update: bool,
        preview: bool,
        coefficients: int,
        report: int,
    ) -> None:
        self.launches = 0
        self._pointers.select_gradients(lists, taken)
        if not skip_update:
            self._pointers.check_complete(lists, base, list(settings))
        known = _BASES[base]
        forms = tuple(Form(known.variant(own), known.states(own)) for own in settings)
        buckets = self._buckets_of(lists, taken, forms=forms)
        together = needs_gram and self._fits_one_launch(buckets)
        own_gram = needs_gram and not together
        self._pack(
            scale,
            lists=lists,
            rule=rule,
            settings=settings,
            lr=lr,
            grad_scale=grad_scale,
            found_inf=found_inf,
            skip=skip_update,
        )
        if known.counts_steps:
            address = self._words.data_ptr() + 8 * self._rows_at
            self._pointers.fill_corrections(address, at.ROW_WORDS, at.CORRECTIONS, lists, base, list(settings))
        counts = known.counts_steps and not skip_update and not preview
        counts_here = counts and self._pointers.has_step_on_device()
        table = self._upload("descent", lists, taken, first)
        functions = BASES[base]
        constants: dict[str, Any] = {
            "COPIES": taken is not None,
            "PREVIEW": preview,
            "SCALARS": functions.scalars,
            "UPDATE": functions.update,
        }
        if together:
            b = buckets[0]
            self._launch_together(
                kernels.rule_descent_kernel,
                (table, b.places, self._scratch, report, self._rows_at, len(self._numels), b.chunks),
                RULE=self._function(rule),
                WEIGHTED=weighted,
                COUNT=counts_here,
                VARIANT=b.form.variant,
                STATES=b.form.states,
                W=b.weights,
                S=b.copies,
                X=b.lists,
                M=b.state,
                LANES=self._lanes(b),
                **constants,
            )
        else:
            given, source = coefficients, at.NUMBERS if coefficients else at.ONES
            if own_gram:
                self._launch_gram(table, buckets, lists, rule, weighted, report)
                given, source = report, at.REPORT
            for b in buckets:
                self._launch(
                    kernels.descent_kernel,
                    max(1, b.chunks),  # somebody has to count steps
                    table,
                    b.places,
                    self._scratch,
                    given,
                    self._rows_at,
                    len(self._numels),
                    b.chunks,
                    SOURCE=source,
                    REVERSE=own_gram,
                    # Steps are counted when all launches have read them.
                    COUNT=counts_here and b is buckets[-1],
                    VARIANT=b.form.variant,
                    STATES=b.form.states,
                    W=b.weights,
                    S=b.copies,
                    X=b.lists,
                    M=b.state,
                    **constants,
                )
        if counts:
            self._pointers.count_steps()
        if not preview:
            self._mark(taken, False)

    def _launch_gram(
        self, table: Tensor, buckets: list[Bucket], lists: int, rule: Rule | TritonRule, weighted: bool, report: int
    ) -> None:
        wanted = sum(min(b.chunks, at.VIRTUAL_BLOCKS) for b in buckets)
        if wanted > self._slots:
            refuse_capture(self._device, "it needs more memory for sums than the steps before it")
            self._captured.append(self._scratch)  # a captured graph may still use it
            self._scratch = self._make_scratch(wanted)
        slots = 0
        for b in buckets:
            first_slot, slots = slots, slots + min(b.chunks, at.VIRTUAL_BLOCKS)
            self._launch(
                kernels.gram_kernel,
                max(1, min(b.chunks, at.VIRTUAL_BLOCKS)),  # somebody has to report
                table,
                b.places,
                self._scratch,
                report,
                self._rows_at,
                b.chunks,
                slots,
                first_slot,
                RULE=self._function(rule),
                FINISH=b is buckets[-1],
                S=b.copies,
                X=b.lists,
                WEIGHTED=weighted,
                LANES=self._lanes(b),
            )

    def _make_scratch(self, slots: int) -> Tensor:
        """Tickets and room for the partial sums of so many virtual blocks."""
        self._slots = slots
        words = at.PARTIALS + at.MAX_PAIRS * slots
        return torch.zeros(2 * words, dtype=torch.int32, device=self._device)

    def _launch_perturb(
        self, table: Tensor, buckets: list[Bucket], taken: bytearray | None, given: int, source: int
    ) -> None:
        for b in buckets:
            self._launch(
                kernels.perturb_kernel,
                b.chunks,
                table,
                b.places,
                given,
                self._rows_at,
                b.chunks,
                SOURCE=source,
                REVERSE=source == at.REPORT,
                TAKE=taken is not None,
                W=b.weights,
                S=b.copies,
                X=b.lists,
            )

    def _launch(
        self, kernel: Any, programs: int, *arguments: Any, options: dict[str, Any] | None = None, **constants: Any
    ) -> None:
        """Launches a kernel; ``constants`` are its compile-time parameters but BLOCK, in any order."""
        if programs == 0:
            return
        self.launches += 1
        # Triton looks at all arguments of a launch to find what it compiled for their likes. Here they are always
        # alike: addresses that are multiples of 16 and numbers that it is told not to look at. So that is done once.
        key = (kernel, *constants.values())
        with self._device_guard():
            if key in self._compiled:
                compiled, rest = self._compiled[key]
                compiled[(programs, 1, 1)](*arguments, *rest)
                return
            constants["BLOCK"] = self._block
            compiled = kernel[(programs,)](
                *arguments, num_warps=self._warps, enable_fp_fusion=False, **constants, **(options or {})
            )
        if compiled is not None:  # as it is in the interpreter
            self._compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(arguments) :]]

    def _launch_together(self, kernel: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
        """A cooperative launch, unless the interpreter makes it, where programs run one after the other."""
        if isinstance(kernel, InterpretedFunction):
            self._launch(kernel, 1, *arguments, **constants)
            return
        multiprocessors = 1
        if self._on_gpu:
            multiprocessors = torch.cuda.get_device_properties(self._device).multi_processor_count
        programs = max(1, min(multiprocessors * self._programs, arguments[-1]))
        registers = _REGISTERS // (self._programs * self._threads)
        options = {"launch_cooperative_grid": True, "maxnreg": min(registers, 255)}
        self._launch(kernel, programs, *arguments, options=options, **constants)

    def _fits_one_launch(self, buckets: list[Bucket]) -> bool:
        return self._one_launch and len(buckets) == 1 and torch.version.hip is None

    def _buckets_of(
        self, lists: int, taken: bytearray | None, weights: bool = True, forms: tuple[Form, ...] | None = None
    ) -> list[Bucket]:
        return self._buckets.of(self._pointers.dtypes(), lists, taken, weights, forms)

    def _device_guard(self) -> AbstractContextManager[Any]:
        if self._on_gpu and torch.cuda.current_device() != self._device.index:
            return torch.cuda.device(self._device)
        return nullcontext()

    def _mark(self, flags: bytearray | None, taken: bool) -> None:
        if flags is not None:
            self._pointers.mark_rows(flags, taken)

    # ------------------------------------------------------------------ what a launch is compiled for

    def _lanes(self, bucket: Bucket) -> int:
        """Elements that a sum of products takes at a time: 16 bytes of each list for each thread."""
        size = min(t.primitive_bitwidth for t in bucket.lists) // 8
        return int(min(self._block, self._threads * (16 // size)))

    def _function(self, rule: Rule | TritonRule) -> Any:
        if isinstance(rule, TritonRule):
            return rule.function
        return _FUNCTIONS[type(rule)]

    # ------------------------------------------------------------------ the table

    def _pack(
        self,
        scale: Sequence[float | Tensor] = (),
        *,
        lists: int = 0,
        rule: Rule | TritonRule | None = None,
        settings: Sequence[Any] = (),
        lr: Sequence[float | Tensor] = (),
        grad_scale: float | Tensor = 1.0,
        found_inf: int = 0,
        skip: bool = False,
    ) -> None:
        """Writes the header and the groups' records."""
        if isinstance(rule, TritonRule):
            parameters = [*rule.parameters, *[0.0] * (at.MAX_RULE_PARAMETERS - len(rule.parameters))]
        else:
            parameters = [0.0, 0.0, 0.0, 0.0] if rule is None else [rule.epsilon, rule.alpha, 0.0, 0.0]
        form, word, kind = _scalar(grad_scale)
        struct.pack_into(f"=4d{form}3q", self._buffer, 0, *parameters, word, kind, found_inf, int(skip))
        for number in range(self._group_count):
            forms, words, kinds = "", [], 0
            scalars = [*scale[number * lists : (number + 1) * lists], *[0.0] * (at.MAX_LISTS - lists)]
            scalars.append(lr[number] if lr else 0.0)
            for i, value in enumerate(scalars):
                form, word, kind = _scalar(value)
                forms += form
                words.append(word)
                kinds |= kind << (2 * i)
            own = settings[number][1:] if settings else ()
            place = 8 * (at.HEADER_WORDS + number * at.GROUP_WORDS)
            struct.pack_into(f"=q{forms}{len(own)}d", self._buffer, place, kinds, *words, *own)

    def _upload(self, operation: str, lists: int, taken: bytearray | None, first: bytearray | None = None) -> Tensor:
        """Completes the table with the tensors' records and returns it as it lies on the device."""
        address = self._words.data_ptr() + 8 * self._rows_at
        self._pointers.fill(address, at.ROW_WORDS, at.FLAGS, at.POINTERS, lists, taken, first)
        if is_capturing(self._device):
            return self._captured_upload()
        upload = self._uploads.get(operation)
        if upload is None:
            upload = self._uploads[operation] = _Upload(torch.empty_like(self._words, device=self._device))
        content = bytes(self._buffer)
        if upload.content != content:
            self.uploads += 1
            while len(self._spares) < _SPARES:
                self._spares.append(self._host_buffer())
            # A buffer of its own for each copy: torch gives its memory to others only when the copy is made.
            upload.words.copy_(self._host_buffer().copy_(self._words), non_blocking=True)
            upload.content = content
        return upload.words

    def _captured_upload(self) -> Tensor:
        """A table that belongs to the graph being captured: each replay copies it anew, so it has to stay as it is."""
        source = self._spares.pop() if self._spares else self._host_buffer()
        words = torch.empty_like(self._words, device=self._device)
        words.copy_(source.copy_(self._words), non_blocking=True)
        keep((source, words, self._buckets.places), self._captured)
        return words

    def _host_buffer(self) -> Tensor:
        """As long as the table, and pinned, so that nobody waits for its copy to the device."""
        return torch.empty(len(self._words), dtype=torch.int64, device="cpu", pin_memory=self._on_gpu)


def _scalar(value: float | Tensor) -> tuple[str, float | int, int]:
    """How :mod:`struct` packs it, its word, and its kind."""
    if not isinstance(value, Tensor):
        return "d", float(value), at.VALUE
    return "q", value.data_ptr(), at.FLOAT64 if value.dtype == torch.float64 else at.FLOAT32
