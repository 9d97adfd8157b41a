"""A defense as deployed: what it says of untouched images, and of points that were made without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.errors import ModelError
from sparring.core.model import Model
from sparring.defending import craft
from sparring.defending.bench import Bench
from sparring.defending.workshop import Subject
from sparring.engine import width as widths
from sparring.guards.check import check_guard
from sparring.models.eot import apart

LOOKED_AT = 64  # rows on which claims and gradients are looked at
NAIVE, CARRIED = "naive: ", "transfer: "
_FELL = "fell: "


@dataclass(frozen=True)
class Deployed:
    """What one defense says; the masks are (n,) bool in the order of the images."""

    claims: tuple[str, ...]  # that do not hold
    silent: float  # share of rows without a gradient of the cross-entropy
    right: Tensor  # untouched
    said: Tensor  # (n,) int64: the label of the untouched image
    fell: Mapping[str, Tensor]  # to points made elsewhere, by what they are

    def fallen(self, prefix: str) -> Tensor:
        """(n,) bool: rows that fell to any of the points whose name begins so."""
        found = [mask for name, mask in self.fell.items() if name.startswith(prefix)]
        return torch.stack([torch.zeros_like(self.right), *found]).any(0)

    @property
    def naive(self) -> Tensor:
        """(n,) bool: rows that hold against the attack that ignores the defense."""
        return self.right & ~self.fallen(NAIVE)


def deployed(bench: Bench, subject: Subject, judged: Model) -> Deployed:
    """Ask `judged` about everything, once."""
    figures, masks = bench.once(f"judged--{subject.entry.slug}", lambda: _look(bench, subject, judged))
    fell = {name.removeprefix(_FELL): mask for name, mask in sorted(masks.items()) if name.startswith(_FELL)}
    return Deployed(tuple(figures["claims"]), figures["silent"], masks["right"], masks["said"], fell)


def _look(bench: Bench, subject: Subject, judged: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The untouched images and all points made elsewhere, one query each; claims and gradients on a few rows."""
    x, y, ids = bench.to(bench.images.x), bench.to(bench.images.y), bench.to(bench.images.ids)
    key = noise.keys(bench.seed, ids, torch.zeros_like(ids))
    clean = bench.judge(judged, x)
    right = (~clean.hit & (clean.label >= 0)).cpu()
    masks = {"right": right, "said": clean.label.cpu()}
    for name, points in _points(bench, subject).items():
        masks[f"{_FELL}{name}"] = bench.judge(judged, points).hit.cpu()
    few = right.nonzero().squeeze(1)
    few = few[torch.linspace(0, len(few) - 1, min(LOOKED_AT, len(few))).long()] if len(few) else few
    with apart(x.device) as seed:
        seed(bench.seed)
        silent = _silent(subject.deployed, x[bench.to(few)], y[bench.to(few)])
    claims = _claims(subject, _off_the_grid(x[:LOOKED_AT], key[:LOOKED_AT]))
    return {"claims": claims, "silent": silent}, masks


def _points(bench: Bench, subject: Subject) -> dict[str, Tensor]:
    """What was made on the bare net by who ignores the defense, and what is carried over from other nets.

    What was made on a net is carried over to a guard around it, too, as nobody carries it to that very net.
    """
    mine = bench.crafted[subject.key]
    ignoring = {f"{NAIVE}{attack.name}": mine[attack.name] for attack in craft.naive(bench.threat)}
    name = craft.carried(bench.threat).name
    return ignoring | {
        f"{CARRIED}{name} on {key}": made[name]
        for key, made in bench.crafted.items()
        if key != subject.key or subject.guard is not None
    }


def _off_the_grid(x: Tensor, key: Tensor) -> Tensor:
    """Images (n, c, h, w) moved a little, off the levels and the ties of stored pixels, at which slopes may jump."""
    return 0.95 * x + 0.05 * noise.uniform(key, x.shape[1:])


def _claims(subject: Subject, x: Tensor) -> list[str]:
    """Which claim of the guard does not hold, if it has a guard."""
    if subject.guard is None:
        return []
    try:
        check_guard(subject.guard, subject.net, x)
    except ModelError as error:
        return [f"false_claim: {error}"]
    except (RuntimeError, TypeError, ValueError) as error:  # the guard's own, in float64 or with a gradient asked for
        return [f"claims_not_measured: {type(error).__name__}: {error}"]
    return []


def _silent(net: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of rows whose cross-entropy, in the precision of the net, has no gradient or one of zeros or NaN."""
    if not len(x):
        return 0.0
    leaf = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(net(leaf), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as error:
        if widths.out_of_memory(error):
            raise
        return 1.0  # nothing that leads from the image to the answer
    flat = gradient.flatten(1)
    return float((~flat.isfinite().all(1) | (flat == 0).all(1)).double().mean())
