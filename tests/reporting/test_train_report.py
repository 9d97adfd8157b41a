"""The training panel: robust accuracy on images held back, the step that is kept, and what a step costs."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from sparring.auditing.run import Run
from sparring.cli.main import build
from sparring.reporting import write_report
from sparring.reporting.panels import train

LOG = [
    {"step": 100, "loss": 200.0, "accuracy": 0.9, "robust": 0.25},
    {"step": 200, "loss": 150.0, "accuracy": 0.95, "robust": 0.5},
    {"step": 300, "loss": 100.0, "accuracy": 0.9625, "robust": 0.375},
]
HELD = {"log": LOG, "best_step": 200, "robust_accuracy": 0.5, "cost_of_plain": 5.68, "accuracy": 0.95}


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def alts(html: str) -> list[str]:
    return re.findall(r'aria-label="([^"]* over training steps[^"]*)"', html)


def points(html: str, style: str) -> list[str]:
    """Where, in charts, symbols of this style stand."""
    return re.findall(rf'<use href="#train-[^"]*" (x="[\d.]*" y="[\d.]*") style="{re.escape(style)}', html)


def rings(html: str) -> list[str]:
    return points(html, "fill-opacity: 0; stroke: var(--ink)")


@pytest.fixture
def panel(make: Any, section: Any) -> Any:
    """A function from what is changed in the figures of each net to the panel."""

    def render(**nets: dict[str, Any]) -> str:
        run = make("train")
        figures, tensors = section("train")
        run.record("train", {name: figures["conv"] | changed for name, changed in nets.items()}, tensors)
        html = train.render(run)
        assert html is not None
        return html

    return render


def test_robust_accuracy_is_drawn_and_told(panel):
    html = panel(conv=HELD)
    said = text_of(html)
    assert alts(html) == [
        "Test accuracy over training steps. convolutional network: 90.0 % at step 100, 96.2 % at step 300, "
        "kept from step 200 with 95.0 %.",
        "Robust accuracy, images held back over training steps. convolutional network: 25.0 % at step 100, "
        "37.5 % at step 300, kept from step 200 with 50.0 %.",
        "Test loss over training steps. convolutional network: 200.00 at step 100, 100.00 at step 300, "
        "kept from step 200 with 150.00.",
    ]
    assert (
        "network parameters steps kept from step accuracy robust, held back loss cost of a step, × plain time "
        "convolutional network 109,386 300 200 95.00 % 50.00 % 905.1 5.7 7.2 s"
    ) in said
    assert "convolutional network 200, kept 50.0 % convolutional network 300 37.5 %" in said
    assert "Accuracy: 0.950000, Robust: 0.500000\nStep: 300, Loss: 100.000000" in html
    assert "The weights of the step where it is highest are kept" in said


def test_the_step_that_is_kept_has_a_ring_in_every_chart(panel):
    html = panel(conv=HELD)
    assert rings(html) == points(html, "fill: var(--series-1)")[1::3]  # the second of each chart's three
    assert (len(rings(html)), html.count("the step whose weights are kept")) == (3, 3)
    assert rings(panel(conv=HELD | {"best_step": 150})) == []
    two = panel(conv=HELD, dense=HELD | {"best_step": 100})
    assert (len(rings(two)), two.count("the step whose weights are kept")) == (6, 3)


def test_where_nothing_was_held_back_nothing_is_said_of_it(panel):
    html = panel(conv={})
    assert len(alts(html)) == 2
    assert (rings(html), "kept" in html, "obust" in html, "× plain" in html) == ([], False, False, False)
    mixed = panel(dense={}, conv=HELD)
    assert "dense network 109,386 300 – 99.17 % – 905.1 – 7.2 s" in text_of(mixed)
    assert "dense" not in alts(mixed)[1]
    assert "dense network: 92.5 % at step 100, 97.5 % at step 300; conv" in alts(mixed)[0]


def test_what_a_training_of_the_command_line_leaves_is_shown(tmp_path):
    options = ["train", "--net", "dense", "--steps", "2", "--every", "1", "--recipe", "trades", "--eps", "0.1"]
    done = CliRunner().invoke(
        build(), [*options, "--hold-back", "50", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert done.exit_code == 0
    page = write_report(Run(tmp_path)).read_text()
    assert len(rings(page)) == 3
    assert "cost of a step, × plain" in page
    told = re.findall(r"Step: \d, Loss: .*, Robust: .*", done.stdout)
    assert len(told) == 2
    assert "\n".join(told) in page
