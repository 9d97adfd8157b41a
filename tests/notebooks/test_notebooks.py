"""Every notebook runs top to bottom, on the digits that need no file, and shows its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jupytext
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
CHAPTERS = sorted(FOLDER.glob("[0-9]_*.py"))
SAID = {  # what a chapter promises to say
    "1_train": ("digits: 1,437 images", "Step: 2000, Loss: "),
    "2_make": ("FGSM fools", "tempered: 10 of 10 goals", "found in 8 bits: 9 of 9, after a file 9"),
    "3_improve": ("goals reached: classic", "dense at eps 0.1"),
    "4_defend": ("zero_gradient", "PGD that knows what rounding does"),
    "5_gallery": ("nearest with 200 passes a row", "random signs: fools on", "read as 3"),
}
SHOWN = {"1_train": 2, "2_make": 0, "3_improve": 2, "4_defend": 1, "5_gallery": 1}  # objects shown as HTML
CELL = 300  # seconds until a cell counts as stuck


def execute(script: Path) -> NotebookNode:
    """The notebook with its outputs; they are kept nowhere."""
    notebook = jupytext.read(script)
    NotebookClient(
        notebook, kernel_name="python3", timeout=CELL, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    return notebook


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """All that its cells put out."""
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


def written() -> dict[Path, int]:
    """When each file of the folder was written last, but for compiled code."""
    return {path: path.stat().st_mtime_ns for path in FOLDER.rglob("*") if "__pycache__" not in path.parts}


def test_there_are_five() -> None:
    assert [script.stem for script in CHAPTERS] == list(SAID)


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda script: script.stem)
def test_opens_with_what_the_reader_will_see(script: Path) -> None:
    first = jupytext.read(script).cells[0]
    assert first.cell_type == "markdown"
    assert "**What you will see.**" in first.source


@pytest.mark.parametrize("script", CHAPTERS, ids=lambda script: script.stem)
def test_runs_on_the_digits(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("SPARRING_DATA", "XDG_CACHE_HOME"):  # so that no MNIST is at hand
        monkeypatch.setenv(place, str(tmp_path))
    monkeypatch.delenv("SPARRING_HOME", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = written()

    shown = list(outputs(execute(script)))  # a cell that raises, an assertion among them, raises here

    text = "".join(output.text for output in shown if output.get("name") == "stdout")
    for promise in SAID[script.stem]:
        assert promise in text
    data = [output.data for output in shown if "data" in output]
    assert any("image/png" in entry for entry in data)
    assert sum("text/html" in entry for entry in data) == SHOWN[script.stem]
    assert written() == before, "a notebook writes to temporary folders only"
