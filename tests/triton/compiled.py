"""Compiles the Triton kernels for GPUs that need not be there, and prints what came out as JSON.

    python -m tests.triton.compiled

In a process of its own: one whose kernels run in the interpreter cannot compile them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sam_kernels.bases import Base
from sam_kernels.triton import Tuning, kernels
from sam_kernels.triton.bases import BASES

from ..kernels.cases import FORMS

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {"fp32": tl.float32, "fp64": tl.float64, "bf16": tl.bfloat16, "fp16": tl.float16}
POINTERS = {"table": "*i64", "places": "*i64", "scratch": "*i32"}
NUMBERS = {"report": "i64", "given": "i64"}  # others are i32


def forms() -> list[tuple[type[Base], Any]]:
    """Of each base settings for every form of its update."""
    found: dict[tuple[str, int], tuple[type[Base], Any]] = {}
    for base, several in FORMS.items():
        for settings in several:
            found.setdefault((base.code, base.variant(settings)), (base, settings))
    return list(found.values())


def variants(full: bool) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and compile-time arguments of each kernel in the forms to look at."""
    found = []
    # Weights, their copies or masters and their state, gradients.
    triples = [("fp32", "fp32", "fp32"), ("bf16", "bf16", "bf16"), ("fp32", "fp32", "bf16"), ("bf16", "fp32", "bf16")]
    if full:
        triples += [("fp16", "fp16", "fp16"), ("fp64", "fp64", "fp64"), ("fp16", "fp32", "fp16")]
    for own, copy, gradient in triples:
        w, s, x = TYPES[own], TYPES[copy], TYPES[gradient]
        has_master = own != copy
        lanes = {"LANES": min(Tuning().block, Tuning().threads * 16 // (x.primitive_bitwidth // 8))}
        for lists in (1, 2, 3) if full else (1, 3):
            xs = (x,) * lists
            name = f"{own}/{gradient} x{lists}" + (f" {copy} masters" if has_master else "")
            rule = {"RULE": kernels.normalized}
            if not has_master:  # a Gram matrix does not ask whose type it is
                gram = {"FINISH": True, "S": s, "X": xs, "WEIGHTED": False, **rule, **lanes}
                found.append((f"gram {name}", kernels.gram_kernel, gram))
                found.append((f"weighted gram {name}", kernels.gram_kernel, {**gram, "WEIGHTED": True}))
                found.append((f"combine {name}", kernels.combine_kernel, {"SOURCE": 0, "W": w, "X": xs}))
            found.append(
                (
                    f"perturb {name}",
                    kernels.perturb_kernel,
                    {"SOURCE": 2, "REVERSE": True, "TAKE": True, "W": w, "S": s, "X": xs},
                )
            )
            ascent = {"TAKE": True, "W": w, "S": s, "X": xs, **rule, **lanes}
            found.append((f"ascent {name}", kernels.ascent_kernel, ascent))
        found.append((f"restore {own}" + (" masters" if has_master else ""), kernels.restore_kernel, {"W": w, "S": s}))
        for number, (base, settings) in enumerate(forms()):
            states = base.states(settings)
            for count in (1, 2) if full or number % 2 else (1,):
                name = f"{base.code} {base.variant(settings)} {own}/{gradient} x{count}"
                name += f" {copy} masters" if has_master else ""
                constants = {
                    "COPIES": True,
                    "PREVIEW": False,
                    "COUNT": base.counts_steps,
                    "SCALARS": BASES[base.code].scalars,
                    "UPDATE": BASES[base.code].update,
                    "VARIANT": base.variant(settings),
                    "STATES": states,
                    "W": w,
                    "S": s,
                    "X": (x,) * count,
                    "M": (s,) * len(states),
                }
                found.append((f"descent {name}", kernels.descent_kernel, {"SOURCE": 0, "REVERSE": False, **constants}))
                if count == 2:
                    together = {"WEIGHTED": False, "RULE": kernels.deflected, **lanes, **constants}
                    found.append((f"rule descent {name}", kernels.rule_descent_kernel, together))
    return found


def compile_one(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    constants = {**constants, "BLOCK": Tuning().block}
    signature = {
        name: "constexpr" if name in constants else POINTERS.get(name) or NUMBERS.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in POINTERS}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": Tuning().threads // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def resources_of(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report)
    assert found, report
    return {"registers": int(found[1]), "stack": int(found[2]), "spills": int(found[3])}


def facts(name: str, kernel: Any, constants: dict[str, Any], target: str) -> dict[str, Any]:
    compiled = compile_one(kernel, constants, TARGETS[target])
    row: dict[str, Any] = {"name": name, "target": target}
    if target.startswith("sm"):
        text = compiled.asm["ptx"]
        row |= resources_of(compiled.asm["cubin"])
        row["local"] = ".local" in text
        row["fused"] = len(re.findall(r"\bfma\.rn\.f(?:32|64)", text))
        row["loads"] = sorted(set(re.findall(r"ld\.global\S*", text)))
        row["stores"] = sorted(set(re.findall(r"st\.global\S*", text)))
        row["wide_loads"] = len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)", text))
        row["wide_stores"] = len(re.findall(r"st\.global\S*\.v(?:4\.b32|2\.b64)", text))
    else:
        text = compiled.asm["amdgcn"]
        row["wide_loads"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
        row["wide_stores"] = len(re.findall(r"(?:global|buffer)_store_dwordx4", text))
        # Scalar registers spill into vector registers; what would go to memory is in "stack".
        row["spills"] = sum(map(int, re.findall(r"vgpr_spill_count:\s*(\d+)", text)))
        found = re.search(r"\.vgpr_count:\s*(\d+)", text)
        row["registers"] = int(found[1]) if found else -1
        row["stack"] = sum(map(int, re.findall(r"private_segment_fixed_size:\s*(\d+)", text)))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more types and numbers of lists")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    arguments = parser.parse_args()
    rows = [facts(*variant, target) for variant in variants(arguments.full) for target in arguments.targets]
    print(json.dumps({"triton": triton.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
