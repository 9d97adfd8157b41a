"""The shape of the house: light to import, small files and functions, no prints, no machine's paths."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparring

SOURCE = Path(sparring.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
TEXT = [p for p in sorted(SOURCE.rglob("*")) if p.suffix in {".py", ".html", ".css", ".md", ".toml", ".json"}]
HEAVY = ["tensorflow", "jax", "ray", "matplotlib", "sklearn", "rich", "typer", "scipy"]

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))


def test_the_search_finds_the_source():
    assert {"threat.py", "loop.py", "pgd.py"} <= {path.name for path in MODULES}


def test_import_is_light():
    code = f"import sys, sparring; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_public_names_are_those_in_all():
    names = getattr(sparring, "__all__", None)
    if names is None:
        pytest.skip("sparring defines no __all__ yet")
    assert len(names) == len(set(names))
    for name in names:
        assert hasattr(sparring, name), name
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    imported = {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imported - {"annotations"} <= set(names) | {n for n in imported if n.startswith("_")}


@each_module
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, "split it: one idea, one file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60, f"{node.name} has {lines} lines"


@each_module
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@each_module
def test_nothing_prints_but_the_command_line(path):
    if path.relative_to(SOURCE).parts[0] == "cli":
        return
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]


@pytest.mark.parametrize("path", TEXT, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_path_of_one_machine(path):
    found = re.findall(r"(?<![\w.])/(?:work|root|home|tmp|mnt|Users)\b[\w/.-]*", path.read_text())
    assert not found
