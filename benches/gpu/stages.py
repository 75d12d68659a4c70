"""Runs programs one after the other, each with a limit of time, and writes down how they ended."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from . import records

# What is left of a part's time must be worth a start.
LEAST_SECONDS = 8.0
SECONDS_TO_DIE = 5.0


@dataclass(frozen=True)
class Program:
    """A module that is run as ``python -m module arguments`` would, without the second for importing torch again."""

    module: str
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class Command:
    """A command line."""

    words: Sequence[str]


class Stages:
    """Stages that share a time.

    Args:
        folder: for what they leave behind.
        seconds: for all of them together.
        least_seconds: a stage is left out if less than this remains.
    """

    def __init__(self, folder: Path, seconds: float, least_seconds: float = LEAST_SECONDS) -> None:
        self._folder, self._ends, self._least = folder, time.monotonic() + seconds, least_seconds
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, limit: float, what: Program | Command) -> bool:
        """Runs a stage, with all of its children killed at the limit. Whether it ended well."""
        begun = time.monotonic()
        left = self._ends - begun
        row: records.Row = {"stage": name}
        if left < self._least:
            outcome = "left out: no time"
        elif isinstance(what, Command) and shutil.which(what.words[0]) is None:
            outcome = f"left out: no {what.words[0]} here"
        else:
            row["limit_s"] = round(min(limit, left), 1)
            with (self._folder / records.LOG).open("a") as log:
                log.write(f"\n=== {name}\n")
                log.flush()
                outcome = _outcome(what, log, row["limit_s"])
            row["seconds"] = round(time.monotonic() - begun, 2)
        row["outcome"] = outcome
        records.append(self._folder / records.STAGES, row)
        print(f"{name}: {outcome}" + (f", {row['seconds']:.1f} s" if "seconds" in row else ""), flush=True)
        return outcome == "passed"


def _outcome(what: Program | Command, log: IO[str], limit: float) -> str:
    if isinstance(what, Command):
        command = subprocess.Popen(
            what.words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = command.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        _kill_group(command.pid)
        with suppress(subprocess.TimeoutExpired):  # a process that is stuck in a driver cannot be waited for
            command.wait(SECONDS_TO_DIE)
    else:
        # A fork has what this process has imported. This one computes nothing: a fork would miss the threads of that.
        program = multiprocessing.get_context("fork").Process(target=_be, args=(what, log.fileno()))
        program.start()
        program.join(limit)
        code = program.exitcode
        program.kill()  # which has no group of its own yet, if it was killed at once
        _kill_group(program.pid)
        program.join(SECONDS_TO_DIE)
    if code is None:
        return "killed at its limit"
    return "passed" if code == 0 else f"failed with {code}"


def _be(program: Program, log: int) -> None:
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if torch.cuda._is_in_bad_fork():  # an import has looked for GPUs
        sys.exit(subprocess.call([sys.executable, "-m", program.module, *program.arguments]))
    sys.argv = [program.module, *program.arguments]
    importlib.import_module(program.module).main(list(program.arguments))


def _kill_group(leader: int | None) -> None:
    """What is left of a stage, its children included."""
    if leader is not None:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)
