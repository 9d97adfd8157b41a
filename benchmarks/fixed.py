"""The attacks within a radius that a peer has too: the same eps, steps and step sizes for everybody.

What no peer has stands alone or is left out: `pgd0` (torchattacks' PGDRSL2 is PGD on a smoothed model in L2), `nes`,
`rays`, `surfree`, `sprint`, `fooling`, `corruption`. `square`, `spsa`, `simba`, `one_pixel` and `pointwise`, which
see no gradient, are in blackbox.py. The methods made to transfer (`nifgsm` and below) attack here the net they see.

Where they differ by more than chance. Ours end at the first point that fools; the peers' `bim` and the methods made
to transfer return the last one, which need not. Foolbox's `mifgsm` adds up gradients of any length, the paper's those
of length 1. In L1 ours moves few features and projects onto ball and box at once; ART and Foolbox move all of them,
or clip after projecting. ART's `acg` takes any beta, ours none below zero; its `spatial` turns all rows by the one
transform that fools most. The peers' `fab` spends nine backward passes a step on all classes, and torchattacks' fails
in L1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peers import INF, Entry, N, advlib, art, foolbox, ours, torchattacks
from sparring.core.errors import unknown

_GRID = 5  # rotations, and moves each way
_TURN, _MOVE = 30.0, 3.0  # degrees and pixels


def entries(norm: str, classes: int, features: int, eps: float) -> list[Entry]:
    """Who takes part in `norm` within `eps`, the same attacks side by side; images have so many `features`."""

    def per(share: float) -> Callable[[int], float]:
        return lambda steps: share * eps / steps

    quiet: dict[str, Any] = {"batch_size": 512, "verbose": False}
    order = {"linf": np.inf, "l2": 2, "l1": 1}.get(norm, 0)
    kind = {"linf": "Linf", "l2": "L2", "l1": "L1"}.get(norm, "")
    pairs = max(int(eps) // 2, 1) if eps < INF else 0

    def mine(spec: str, cost: float = 2.0, *, aimed: bool = False) -> Entry:
        return ours(spec, norm, cost, eps=eps, aimed=aimed)

    gradient = [
        mine("pgd"),
        foolbox("pgd", f"{kind}ProjectedGradientDescentAttack", 2, epsilon=eps, steps=N,
                rel_stepsize=lambda steps: 2.5 / steps),
        art("pgd", "ProjectedGradientDescentPyTorch", 2, norm=order, eps=eps, eps_step=per(2.5), max_iter=N,
            num_random_init=1, **quiet),
    ]  # fmt: skip
    automatic = [
        mine("apgd" if norm != "l1" else "apgd_l1"),
        art("apgd", "AutoProjectedGradientDescent", 3, norm=order, eps=eps, eps_step=2 * eps, max_iter=N,
            nb_random_init=1, loss_type="cross_entropy", **quiet),
        advlib("apgd", "auto_pgd", "apgd", 2, eps=eps, norm=order, n_iter=N, loss_function="ce"),
        mine("fab"),
        torchattacks("fab", "FAB", 11, norm=kind, eps=eps, steps=N, n_classes=classes),
        advlib("fab", "fast_adaptive_boundary", "fab", 11, norm=order, n_iter=N),
    ]  # fmt: skip
    smooth = [
        torchattacks("apgd", "APGD", 2, norm=kind, eps=eps, steps=N, loss="ce"),
        mine("bim"),
        foolbox("bim", f"{kind}BasicIterativeAttack", 2, epsilon=eps, steps=N, random_start=False,
                rel_stepsize=lambda steps: 1.25 / steps),
        mine("mifgsm"),
        foolbox("mifgsm", f"{kind}MomentumIterativeFastGradientMethod", 2, epsilon=eps, steps=N,
                rel_stepsize=lambda steps: 1 / steps),
        art("mifgsm", "MomentumIterativeMethod", 2, norm=order, eps=eps, eps_step=per(1), max_iter=N, **quiet),
        mine("fgsm:"),
        foolbox("fgsm", f"{kind}FastGradientAttack", 2, epsilon=eps),
        art("fgsm", "FastGradientMethod", 2, norm=order, eps=eps, batch_size=512),
        mine("noise", 1),
        foolbox("noise", f"{kind}RepeatedAdditiveUniformNoiseAttack", 1, epsilon=eps, repeats=N),
    ]  # fmt: skip
    still: dict[str, Any] = {"eps": eps, "alpha": per(1), "steps": N, "decay": 1.0}
    cube = [
        torchattacks("pgd", "PGD", 2, eps=eps, alpha=per(2.5), steps=N),
        advlib("pgd", "projected_gradient_descent", "pgd_linf", 2, ε=eps, steps=N, absolute_step_size=per(2.5)),
        mine("acg"),
        art("acg", "AutoConjugateGradient", 3, norm=order, eps=eps, eps_step=2 * eps, max_iter=N, nb_random_init=1,
            loss_type="difference_logits_ratio", **quiet),
        torchattacks("bim", "BIM", 2, eps=eps, alpha=per(1.25), steps=N),
        art("bim", "BasicIterativeMethod", 2, eps=eps, eps_step=per(1.25), max_iter=N, **quiet),
        torchattacks("mifgsm", "MIFGSM", 2, **still),
        torchattacks("fgsm", "FGSM", 2, eps=eps),
        mine("nifgsm"),
        torchattacks("nifgsm", "NIFGSM", 2, **still),
        mine("difgsm"),
        torchattacks("difgsm", "DIFGSM", 2, **still),
        mine("tifgsm"),
        torchattacks("tifgsm", "TIFGSM", 2, **still, diversity_prob=0.0),
        mine("sifgsm", 10),
        torchattacks("sifgsm", "SINIFGSM", 10, **still, m=5),
        mine("vmifgsm:steps={},neighbours=5", 12),
        torchattacks("vmifgsm", "VMIFGSM", 12, **still, N=5),
    ]  # fmt: skip
    tables = {
        "linf": [*gradient, *automatic, *smooth, *cube],
        "l2": [*gradient, torchattacks("pgd", "PGDL2", 2, eps=eps, alpha=per(2.5), steps=N), *automatic, *smooth],
        "l1": [
            *gradient,
            foolbox("pgd:sparse", "SparseL1DescentAttack", 2, epsilon=eps, steps=N,
                    rel_stepsize=lambda steps: 2.5 / steps),
            *automatic,
        ],
        "l0": [
            mine("pgd0"),
            mine("jsma:"),
            mine("jsma:", aimed=True),
            torchattacks("jsma:aimed", "JSMA", 2, gamma=2 * pairs / features),
            art("jsma:aimed", "SaliencyMapMethod", 2, aimed=True, theta=1.0, gamma=2 * pairs / features, **quiet),
        ],
        "unbounded": [
            mine(f"spatial:angle={_TURN},shift={_MOVE},angles={_GRID},shifts={_GRID}"),
            foolbox("spatial", "SpatialAttack", 1, max_translation=_MOVE, max_rotation=_TURN, num_translations=_GRID,
                    num_rotations=_GRID),
            art("spatial", "SpatialTransformation", 1, max_translation=100 * _MOVE / 28, num_translations=_GRID,
                max_rotation=_TURN, num_rotations=_GRID, verbose=False),
        ],
    }  # fmt: skip
    if norm not in tables:
        raise unknown("norm", norm, tables)
    available = [entry for entry in tables[norm] if entry.available]
    families = list(dict.fromkeys(_family(entry) for entry in available))
    return sorted(available, key=lambda entry: families.index(_family(entry)))


def _family(entry: Entry) -> str:
    """Without a variant, and whatever the norm."""
    return entry.family.split(":")[0].removesuffix("_l1")
