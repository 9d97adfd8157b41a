"""How the networks learned, and which images they still get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from torch import Tensor

from sparring.auditing.run import Run
from sparring.reporting import charts
from sparring.reporting.markup import Chart, block, chart, details, heading, join, paragraph, table, tile
from sparring.reporting.pictures import picture
from sparring.reporting.wording import class_namer, confidence, count, duration, net_name, number, percent

ORDER = 10
TITLE = "Training"

Nets = Mapping[str, Mapping[str, Any]]
_LEAD = (
    "Each network learns from the training images; the figures are measured on test images it never saw. "
    "Accuracy is the share it names right. Loss is the cross-entropy, summed over the test images."
)


def render(run: Run) -> str | None:
    """The learning curves, the figures, and tiles of right and wrong predictions."""
    figures = run.figures("train")
    if not figures:
        return None
    nets = {name: net for name, net in figures.items() if isinstance(net, dict)}
    tensors = run.tensors("train")
    learned = {name: net for name, net in nets.items() if net.get("log")}
    parts = [paragraph(_LEAD, "lead"), _summary(nets)]
    if learned:
        parts.append(block("pair", _curve(learned, "accuracy"), _curve(learned, "loss")))
    grids = [_predictions(run, name, net, tensors) for name, net in nets.items() if f"{name}_right_x" in tensors]
    parts += [block("pair", *grids)] if grids else []
    parts += [details(f"Training log: {net_name(name)}", _log(net["log"])) for name, net in learned.items()]
    return join(parts)


def _summary(nets: Nets) -> Markup:
    """One network a line."""
    head = ("network", "parameters", "steps", "accuracy", "loss", "time")
    rows = [
        (
            net_name(name),
            count(net.get("parameters")),
            count(net.get("steps")),
            percent(net.get("accuracy"), 2),
            number(net.get("loss"), 1),
            duration(net.get("seconds")),
        )
        for name, net in nets.items()
    ]
    return table("The networks", head, rows)


def _curve(nets: Nets, what: str) -> Markup:
    """Test accuracy or test loss over training steps, one line a network."""
    shown = percent if what == "accuracy" else number
    lines = {
        name: [(entry["step"], entry[what]) for entry in net["log"] if entry.get(what) is not None]
        for name, net in nets.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    ends = [
        f"{net_name(name)}: {shown(points[0][1])} at step {points[0][0]}, "
        f"{shown(points[-1][1])} at step {points[-1][0]}"
        for name, points in lines.items()
    ]

    def draw(axes: Axes) -> None:
        for place, points in enumerate(lines.values()):
            charts.series(place).plot(axes, [step for step, _ in points], [value for _, value in points])
        charts.count_axis(axes, "training step")
        if what == "accuracy":
            charts.percent_axis(axes, "test accuracy")
        else:
            charts.log_axis(axes, "y", "test loss (log scale)")

    return chart(
        Chart(
            title=f"Test {what}",
            alt=f"Test {what} over training steps. {'; '.join(ends)}.",
            svg=charts.svg(f"train-{what}", draw),
            head=("network", "step", what),
            rows=[(net_name(name), step, shown(value)) for name, points in lines.items() for step, value in points],
            legend=charts.legend(net_name(name) for name in lines),
        )
    )


def _predictions(run: Run, net: str, figures: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Markup:
    """Left three columns of right predictions, right three of wrong ones."""
    accuracy = figures.get("accuracy")
    error = None if accuracy is None else 1 - accuracy
    sides = (("right", "correct", accuracy), ("wrong", "incorrect", error))
    columns = [
        block(
            f"side {side}",
            Markup("<h4>{} ({})</h4>").format(word, percent(share)),
            _tiles(run, f"{net}_{side}", tensors) or paragraph(f"No {word} image is on record.", "note"),
        )
        for side, word, share in sides
    ]
    note = "Each tile: what the network says / what it is."
    return block(
        "predictions",
        heading(f"Predictions of the {net_name(net)}"),
        block("sides", *columns),
        paragraph(note, "note"),
    )


def _tiles(run: Run, prefix: str, tensors: Mapping[str, Tensor]) -> Markup | None:
    """The stored images of one side, each captioned prediction/actual."""
    images = tensors.get(f"{prefix}_x")
    if images is None or not len(images):
        return None
    name = class_namer(run.plan)
    said, meant, sure = (tensors[f"{prefix}_{key}"].tolist() for key in ("prediction", "y", "confidence"))
    tiles = []
    for place, image in enumerate(images):
        alt = f"{name(meant[place])}, read as {name(said[place])} with {confidence(sure[place])}"
        tiles.append(tile(picture(image, alt), f"{name(said[place])}/{name(meant[place])}"))
    return block("three", *tiles)


def _log(log: list[Mapping[str, Any]]) -> Markup:
    """The log, a line for each measurement."""
    lines = [
        f"Step: {entry['step']}, Loss: {entry.get('loss', float('nan')):.6f}, "
        f"Accuracy: {entry.get('accuracy', float('nan')):.6f}"
        for entry in log
    ]
    return Markup('<pre tabindex="0">{}</pre>').format("\n".join(lines))
