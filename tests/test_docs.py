"""What the pages name is there: files, headings, tests, and the package's own names in samples."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not PAGES[0].exists() or len(PAGES) < 2, reason="the pages are not here")


def anchors_of(page: Path) -> set[str]:
    """Of its headings, as they are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(linked), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_tests_that_are_named(page):
    text = page.read_text()
    for path, name in re.findall(r"`((?:tests|benches|examples|csrc|python|sam_kernels)/[\w/.]+)(?:::(\w+))?`", text):
        if path == "benches/results/gpu":  # written by a run on a GPU
            continue
        file = ROOT / path
        assert file.exists(), f"{page.name}: {path}"
        if name:
            defined = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
            assert name in defined, f"{page.name}: {path}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_samples(page):
    """Samples are Python, and what they import is there. (They train models that are not here, and are not run.)"""
    import sam_kernels.triton
    import sam_optim

    modules = {"sam_optim": sam_optim, "sam_kernels.triton": sam_kernels.triton, "sam_kernels": sam_kernels}
    for sample in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(sample)):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                for alias in node.names:
                    assert hasattr(modules[node.module], alias.name), f"{page.name}: {alias.name}"
