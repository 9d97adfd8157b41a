"""How the networks learned, and which images they still get wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
_HELD = (
    "Robust accuracy is the share of training images held back, which it never learned from, that a short attack "
    "does not break. The weights of the step where it is highest are kept; a stronger attack may find it lower."
)
_COST = "cost of a step, × plain"
_KEPT = "the step whose weights are kept"
_RING = "M17.5 2.2a4.8 4.8 0 1 0 .01 0z"


def render(run: Run) -> str | None:
    """The learning curves, the figures, and tiles of right and wrong predictions."""
    figures = run.figures("train")
    if not figures:
        return None
    nets = {name: net for name, net in figures.items() if isinstance(net, dict)}
    tensors = run.tensors("train")
    learned = {name: net for name, net in nets.items() if net.get("log")}
    held = {name: net for name, net in learned.items() if any("robust" in entry for entry in net["log"])}
    curves = {"accuracy": learned, "robust": held, "loss": learned}
    shown = [_curve(those, what) for what, those in curves.items() if those]
    shown += [_predictions(run, name, net, tensors) for name, net in nets.items() if f"{name}_right_x" in tensors]
    parts = [paragraph(f"{_LEAD} {_HELD}" if held else _LEAD, "lead"), _summary(nets)]
    parts += [block("pair", *shown)] if shown else []
    parts += [details(f"Training log: {net_name(name)}", _log(net["log"])) for name, net in learned.items()]
    return join(parts)


def _summary(nets: Nets) -> Markup:
    """One network a line, and a column for each figure that one of them has."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "parameters": ("parameters", count),
        "steps": ("steps", count),
        "best_step": ("kept from step", count),
        "accuracy": ("accuracy", lambda share: percent(share, 2)),
        "robust_accuracy": ("robust, held back", lambda share: percent(share, 2)),
        "loss": ("loss", lambda loss: number(loss, 1)),
        "cost_of_plain": (_COST, lambda times: number(times, 1)),
        "seconds": ("time", duration),
    }
    shown = {key: column for key, column in columns.items() if any(net.get(key) is not None for net in nets.values())}
    rows = [(net_name(name), *(said(net.get(key)) for key, (_, said) in shown.items())) for name, net in nets.items()]
    return table("The networks", ("network", *(head for head, _ in shown.values())), rows)


@dataclass(frozen=True)
class _Curve:
    """What a chart shows of the log."""

    title: str
    shown: Callable[[float], str]
    axis: Callable[[Axes], None]


_CURVES = {
    "accuracy": _Curve("Test accuracy", percent, lambda axes: charts.percent_axis(axes, "test accuracy")),
    "robust": _Curve(
        "Robust accuracy, images held back", percent, lambda axes: charts.percent_axis(axes, "robust accuracy")
    ),
    "loss": _Curve("Test loss", number, lambda axes: charts.log_axis(axes, "y", "test loss (log scale)")),
}


def _curve(nets: Nets, what: str) -> Markup:
    """A figure of the log over training steps, one line a network, with a ring where the weights are kept from."""
    curve = _CURVES[what]
    lines = {
        name: [(entry["step"], entry[what]) for entry in net["log"] if entry.get(what) is not None]
        for name, net in nets.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    kept = {
        name: [point for point in points if point[0] == nets[name].get("best_step")] for name, points in lines.items()
    }

    def draw(axes: Axes) -> None:
        for place, (name, points) in enumerate(lines.items()):
            charts.series(place).plot(axes, *zip(*points, strict=True))
            for at in kept[name]:
                axes.plot(*at, "o", markersize=11, markerfacecolor="none", markeredgecolor=charts.INK)
        charts.count_axis(axes, "training step")
        curve.axis(axes)

    def told(name: str) -> str:
        (first, low), (last, high) = lines[name][0], lines[name][-1]
        best = "".join(f", kept from step {step} with {curve.shown(value)}" for step, value in kept[name])
        return f"{net_name(name)}: {curve.shown(low)} at step {first}, {curve.shown(high)} at step {last}{best}"

    marks = [charts.mark(_RING, _KEPT, 1.5)] if any(kept.values()) else []
    return chart(
        Chart(
            title=curve.title,
            alt=f"{curve.title} over training steps. {'; '.join(map(told, lines))}.",
            svg=charts.svg(f"train-{what}", draw),
            head=("network", "step", what),
            rows=[
                (net_name(name), f"{step}, kept" if (step, value) in kept[name] else step, curve.shown(value))
                for name, points in lines.items()
                for step, value in points
            ],
            legend=charts.legend((net_name(name) for name in lines), *marks),
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
        + (f", Robust: {entry['robust']:.6f}" if entry.get("robust") is not None else "")
        for entry in log
    ]
    return Markup('<pre tabindex="0">{}</pre>').format("\n".join(lines))
