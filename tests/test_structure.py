"""The house: rooms import as they may, and a gradient's way from the optimizer to the kernels is short."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from sam_optim import SAM

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "sam_optim"
MAY_IMPORT = {
    "core": set(),
    "methods": {"core"},
    "training": {"core"},
    "trainers": {"core", "training"},
    "analysis": {"core", "methods", "training"},
    "continual": {"core", "training"},
}

sources = pytest.mark.skipif(not PACKAGE.exists(), reason="the sources are not here")


def imported_rooms(path):
    """The rooms of the package that a module in one of them imports from; not for type checkers alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            yield (node.module or node.names[0].name).split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("sam_optim."):
            yield node.module.split(".")[1]


@sources
def test_rooms_import_as_they_may():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(MAY_IMPORT)
    for room, others in MAY_IMPORT.items():
        for path in (PACKAGE / room).glob("*.py"):
            wrong = set(imported_rooms(path)) - others - {room}
            assert not wrong, f"{path.name} of {room} imports from {wrong}"


def test_no_test_module_imports_from_another():
    """What tests share is in modules beside them."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                last = (node.module or "").split(".")[-1]
                assert not last.startswith("test_"), f"{path.name} imports from {last}"


@sources
def test_the_kernels_know_nothing_of_the_methods():
    for path in (ROOT / "sam_kernels").rglob("*.py"):
        assert "sam_optim" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }, path


@sources
def test_the_methods_take_what_the_kernels_export():
    """From the package itself, or from a module of it that has an ``__all__``."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sam_kernels":
                names = [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "sam_kernels":
                names = [("sam_kernels", node.attr)]
            for module, name in names:
                if name not in getattr(import_module(module), "__all__", ()):
                    wrong.append(f"{path.name}: {module}.{name}")
    assert not wrong


def files_on_the_way(call, kernel):
    """Our files on the stack when a native kernel is called."""
    found = []

    def look(frame, event, function):
        if event == "c_call" and getattr(function, "__name__", "") == kernel:
            files = set()
            while frame is not None:
                files.add(frame.f_code.co_filename)
                frame = frame.f_back
            found.append({name for name in files if "sam_optim" in name or "sam_kernels" in name})

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("move, kernel", [("first_step", "ascent"), ("second_step", "descent")])
def test_a_gradient_goes_through_few_files(move, kernel):
    pytest.importorskip("sam_kernels._cpu")
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([weight], torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    for _ in range(2):
        found = []
        for name in ("first_step", "second_step"):
            weight.grad = torch.ones(3)
            made = files_on_the_way(getattr(optimizer, name), kernel)
            found += made if name == move else []
    assert len(found) == 1
    assert len(found[0]) <= 8, sorted(found[0])
