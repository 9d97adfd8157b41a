"""What the notebooks draw with: one style for charts, and strips of small images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

# Okabe and Ito's palette: colours that the colour-blind tell apart too.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F"
WIDTH = 9.0  # inches, of every figure

STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}
plt.rcParams.update(STYLE)


@dataclass(frozen=True)
class Strip:
    """A row of images (n, c, h, w) with a name at its left and a caption under each; `signed` runs from -1 to 1."""

    name: str
    images: Tensor
    captions: Sequence[str] = ()
    signed: bool = False
    colour: str = "black"  # of the captions


def strips(*rows: Strip) -> None:
    """Show rows of images, one under another; a row that ends early leaves its last places empty."""
    columns = max(len(row.images) for row in rows)
    side = min((WIDTH - 1.2) / columns, 1.5)
    lines = max((caption.count("\n") + 1 for row in rows for caption in row.captions), default=0)
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(WIDTH, len(rows) * (side + 0.17 * lines + 0.1)), squeeze=False
    )
    for row, places in zip(rows, axes, strict=True):
        for place, at in enumerate(places):
            _bare(at)
            if place < len(row.images):
                shown = _draw(at, row.images[place], row.signed)
                if row.captions:
                    at.set_xlabel(row.captions[place], color=row.colour, fontsize=9, labelpad=3)
            else:
                at.set_visible(False)
        places[0].set_ylabel(row.name, rotation=0, ha="right", va="center", labelpad=8)
        if row.signed:
            figure.colorbar(shown, ax=places.tolist(), ticks=[-1, 0, 1], fraction=0.02, pad=0.01)
    plt.show()


def trio(name: str, clean: Tensor, change: Tensor, attacked: Tensor, captions: Sequence[str]) -> None:
    """Show an image (c, h, w), what was added (from -1 to 1) and the result in a row, each with its caption."""
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH / 2, 1.9))
    figure.suptitle(name, x=0.01, ha="left", fontsize=10)
    for at, image, caption, signed in zip(
        axes, (clean, change, attacked), captions, (False, True, False), strict=True
    ):
        _bare(at)
        shown = _draw(at, image, signed)
        at.set_xlabel(caption, fontsize=8, labelpad=3)
        if signed:
            figure.colorbar(shown, ax=at, ticks=[-1, 0, 1], fraction=0.05, pad=0.02)
    plt.show()


def tiles(images: Tensor, captions: Sequence[str], title: str, colour: str = "black", columns: int = 8) -> None:
    """Show images in a grid under a title, with a caption under each."""
    lines = -(-len(images) // columns)
    height = lines * (WIDTH / columns + 0.25) + 0.4
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, height), squeeze=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for place, at in enumerate(axes.flat):
        _bare(at)
        if place < len(images):
            _draw(at, images[place], signed=False)
            at.set_xlabel(captions[place], color=colour, fontsize=9, labelpad=3)
        else:
            at.set_visible(False)
    plt.show()


def charts(count: int = 1, height: float = 3.2, share_y: bool = False) -> list[Axes]:
    """Empty charts side by side, together as wide as every figure."""
    _, axes = plt.subplots(1, count, figsize=(WIDTH, height), sharey=share_y, squeeze=False)
    return list(axes[0])


def percent(axes: Axes, which: str = "y") -> None:
    """Read the y or x axis as a share in percent."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.4g} %"))


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain figures at its ticks."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def share(value: float, digits: int = 1, up: bool = False) -> str:
    """A share in percent, rounded down, so that 100 % is said of what is certain only; an upper bound goes `up`."""
    scale = 10 ** (digits + 2)
    whole = math.ceil(value * scale - 1e-6) if up else math.floor(value * scale + 1e-6)
    return f"{whole / scale * 100:.{digits}f} %"


def said(labels: Tensor, confidence: Tensor, digits: int = 1) -> list[str]:
    """A caption for each row: what the net says, and how sure it is."""
    pairs = zip(labels.tolist(), confidence.tolist(), strict=True)
    return [f"{label}\n{share(sure, digits)}" for label, sure in pairs]


def _bare(at: Axes) -> None:
    at.grid(False)
    at.set(xticks=[], yticks=[])
    for spine in at.spines.values():
        spine.set(visible=True, color="#C8C8C8", linewidth=0.8)


def _draw(at: Axes, image: Tensor, signed: bool) -> AxesImage:
    pixels = image.permute(1, 2, 0)
    if signed:
        return at.imshow(pixels.mean(2), cmap="RdBu_r", vmin=-1, vmax=1)
    return at.imshow(pixels.expand(-1, -1, 3) if pixels.shape[2] == 1 else pixels, vmin=0, vmax=1)
