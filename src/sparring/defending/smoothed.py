"""What randomised smoothing claims of a guard that says it is Gaussian noise and a vote: likely, and no proof."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.certificates.smoothing import largest_radius, smooth
from sparring.core.showing import number_of, percent, rounded
from sparring.core.threat import Threat
from sparring.defending.bench import Bench
from sparring.defending.workshop import Subject
from sparring.models.torch import TorchModel

ALPHA = 0.001  # chance that what is claimed of an image is false, at most: theirs
FIRST = 100  # draws that choose the class, as theirs
DRAWS = 1000  # that bound its share: they take 100,000, and claim 3.8 sigma at most where these claim 2.5
ROWS = 200  # images, at most


@dataclass(frozen=True)
class Claim:
    """What CERTIFY says at the radius that holds the threat model's ball."""

    figures: Mapping[str, Any]
    rows: Tensor  # (n,) bool: rows that are claimed, in the order of the images

    def told(self, held: Tensor) -> dict[str, Any]:
        """The figures, with how many of the claimed rows are not among `held` (n,) as deployed, and all in words."""
        fell = int((self.rows & ~held).sum())
        return {**self.figures, "fell": fell, "sentence": _sentence(self.figures, fell)}


def claim(bench: Bench, subject: Subject) -> Claim | None:
    """CERTIFY (Cohen et al. 2019) on some of the images, once; None where the guard is nothing of the kind."""
    sigma = None if subject.guard is None else subject.guard.gaussian_noise
    if sigma is None:
        return None
    figures, tensors = bench.once(f"smoothed--{subject.entry.slug}", lambda: _certify(bench, subject, sigma))
    return Claim(figures, tensors["radius"] >= radius(bench.threat, bench.images.x))


def radius(threat: Threat, x: Tensor) -> float:
    """The least L2 radius of a ball around an image of `x` (n, c, h, w) that holds all that is legal in `threat`.

    Apart from the range of pixels. In Linf its corners are sqrt(d) eps away; in L1 eps, as in L2.
    """
    return (threat.eps + threat.slack) * (math.sqrt(x[0].numel()) if threat.norm == "linf" else 1.0)


def _certify(bench: Bench, subject: Subject, sigma: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
    images = bench.images
    needed, largest = radius(bench.threat, images.x), largest_radius(sigma, DRAWS, ALPHA)
    told = {"sigma": sigma, "alpha": ALPHA, "n0": FIRST, "n": DRAWS, "radius": rounded(needed)}
    told |= {"largest_radius": rounded(largest), "rows": 0, "certified_accuracy": None}
    radii = torch.full_like(images.y, torch.nan, dtype=torch.float64)  # of the rows that are asked
    if needed > largest:
        return told, {"radius": radii}
    bench.tell(f"{subject.entry.name}: smoothing's certificate", 0, 1)
    at = torch.linspace(0, len(images) - 1, min(ROWS, len(images))).long()
    x, y, ids = (bench.to(part[at]) for part in (images.x, images.y, images.ids))
    found = smooth(
        TorchModel(subject.net), x, y, sigma=sigma, n0=FIRST, n=DRAWS, alpha=ALPHA, seed=bench.seed, sample=ids
    )
    radii[at] = found.radius.cpu()  # 0 where nothing, or a wrong class, is named
    told |= {"rows": len(at), "certified_accuracy": rounded(found.accuracy(needed))}
    return told, {"radius": radii}


def _sentence(figures: Mapping[str, Any], fell: int) -> str:
    draws, within = f"{figures['n']:,} draws of sigma {figures['sigma']:g}", f"{figures['radius']:.4g}"
    if figures["certified_accuracy"] is None:
        return (
            f"smoothing's certificate claims nothing here: it would need an L2 radius of {within}, and {draws} give "
            f"{figures['largest_radius']:.3g} at most"
        )
    share, sure = percent(figures["certified_accuracy"], 1), percent(1 - figures["alpha"], 1)
    asked = number_of(figures["rows"], "image")
    said = (
        f"smoothing's certificate, which is no proof, claims that {share} of {asked} keep their class "
        f"within L2 {within}, with {sure} confidence for each image ({draws}; of the vote of infinitely many)"
    )
    return f"{said}; {number_of(fell, 'row')} of these fell to the fewer draws that decide" if fell else said
