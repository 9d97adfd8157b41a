"""The nets that are audited: trained here, plainly and in the ways that harden or only seem to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from sparring.attacks.pgd import PGD
from sparring.core.defense import Defense
from sparring.core.threat import Linf
from sparring.data import Images, load
from sparring.defenses.madry import Madry
from sparring.defenses.standard import Standard
from sparring.defenses.trades import TRADES
from sparring.training.fit import Settings, fit

# name: data, steps, highest rate, defense
RECIPES: dict[str, tuple[str, int, float, Defense]] = {
    "undefended": ("mnist", 2000, 4e-3, Standard()),
    "fgsm": ("mnist", 3000, 2e-3, Madry(PGD(steps=1, step_size=0.25), Linf(0.3))),  # one step: it hides gradients
    "pgd": ("mnist", 3000, 4e-3, Madry(PGD(steps=10), Linf(0.3))),
    "trades": ("mnist", 3000, 4e-3, TRADES(Linf(0.3), beta=1.0)),
    "digits": ("digits", 1500, 4e-3, Madry(PGD(steps=7), Linf(0.2))),
    "cifar": ("cifar10", 2000, 2e-3, Madry(PGD(steps=3), Linf(8 / 255))),
}


def victim(name: str, folder: Path, data_dir: Path | None, say: Callable[[str], None]) -> tuple[nn.Module, Images]:
    """The net called `name`, trained if `folder` does not hold it yet, and its test images."""
    spec, steps, rate, defense = RECIPES[name]
    inside = data_dir / spec if data_dir is not None else None
    data = load(str(inside) if inside and not (inside / "train-images-idx3-ubyte.gz").exists() and inside.is_dir()
                else spec, data_dir)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    say(f"victim {name}: conv on {data.name}, {steps} steps")
    checkpoint = fit(Settings("conv", steps, rate=rate), data, defense, folder / f"{name}.safetensors")
    return checkpoint.net.eval(), data.test
