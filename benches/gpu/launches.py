"""How many kernels a SAM step of ours launches: python -m benches.gpu.launches --records FILE"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..contenders import BASES
from ..shapes import GPU_MODELS
from . import records
from .core import first_line
from .forms import FORMS, make_parameters
from .timer import WARM_UP_CALLS, launches_of


def rows(models: Sequence[str], device: torch.device) -> Iterator[records.Row]:
    """A step of each of our forms, when state and tables are there."""
    ours = {name: form for name, form in FORMS.items() if form.is_ours and form.missing(device) is None}
    for model in models:
        for name, form in ours.items():
            for base in BASES:
                for dtype in form.dtypes:
                    row = {"table": "launches", "form": name, "model": model, "base": base, "dtype": dtype}
                    try:
                        with form.launching():
                            step = form.step(make_parameters(GPU_MODELS[model], dtype, device), base, dtype)
                            for _ in range(WARM_UP_CALLS):
                                step()
                            row["launches"] = launches_of(step, device)
                    except Exception as error:  # of whatever kind: compilers and drivers have their own
                        row["error"] = first_line(error)
                    yield row


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="file that rows are added to")
    parser.add_argument("--models", nargs="+", choices=list(GPU_MODELS), default=["resnet50"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(words)
    for row in rows(arguments.models, torch.device(arguments.device)):
        records.append(arguments.records, row)


if __name__ == "__main__":
    main()
