"""The documentation runs, and what is generated is up to date."""

from __future__ import annotations

import ast
import doctest
import inspect
import pkgutil
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

import curvext
from curvext.support import page

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(m.name for m in pkgutil.walk_packages(curvext.__path__, "curvext.") if not m.name.endswith("__main__"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "docs"}
    for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
        line = path.read_text(encoding="utf-8")[: block.start(1)].count("\n")
        exec(compile("\n" * line + block.group(1), str(path), "exec"), namespace)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "gallery").glob("*.py")), ids=lambda path: path.name)
def test_gallery_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib").use("Agg")
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(import_module(name)).failed == 0


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.13", reason="PyTorch 2.13 has operations that others have not")
def test_support_table_is_generated():
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == page(), "run `make docs`"


def test_links_in_the_docs_lead_somewhere():
    broken = [
        f"{path.name}: {target}"
        for path in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert not broken


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_documented(name):
    module = import_module(name)
    public = {k: v for k, v in vars(module).items() if not k.startswith("_") and getattr(v, "__module__", "") == name}
    bare = [k for k, v in public.items() if (inspect.isclass(v) or inspect.isfunction(v)) and not v.__doc__]
    assert module.__doc__ and not bare, f"without a docstring: {bare}"


def test_files_and_functions_are_short():
    lengths = []
    for path in (ROOT / "curvext").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, f"{path.name} has over 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node)
                lengths.append(node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0))
    lengths.sort()
    assert lengths[len(lengths) // 2] <= 8 and lengths[len(lengths) * 9 // 10] <= 30
