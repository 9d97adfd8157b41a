"""Points that attacks end at on a bare net: a naive attack on what stands around it, and what is carried over."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from sparring.attacks.fgsm import FGSM
from sparring.attacks.mifgsm import MIFGSM
from sparring.attacks.pgd import PGD
from sparring.auditing.run import Run
from sparring.core.attack import Attack
from sparring.core.threat import Threat
from sparring.data.images import Images
from sparring.defending.plan import slug
from sparring.defending.workshop import Tell
from sparring.engine.loop import run as play
from sparring.models.torch import TorchModel
from sparring.transferability import Never

NAIVE: tuple[Attack, ...] = (FGSM(), PGD())
CARRIED: tuple[Attack, ...] = (MIFGSM(), PGD())  # the first that works in the norm


def naive(threat: Threat) -> tuple[Attack, ...]:
    """The attacks that ignore a defense, as far as they work in the norm.

    They are as published: FGSM, and PGD in one run, up the cross-entropy of the net as it answers, judged at the
    last point. That is what most defenses were first reported under, be it on their own net (a trained one, whose
    saturated softmax may leave them no gradient: distillation) or on the bare one (whatever stands around a net).
    """
    return tuple(attack for attack in NAIVE if threat.norm in attack.norms)


def carried(threat: Threat) -> Attack:
    """The attack that is made on one net and tried on another."""
    return next(attack for attack in CARRIED if threat.norm in attack.norms)


def craft(
    run: Run, key: str, net: torch.nn.Module, images: Images, threat: Threat, seed: int, device: str, tell: Tell
) -> dict[str, Tensor]:
    """(n, c, h, w) where each attack ends on the net called `key`, by its name; kept in the run once it is whole."""
    section = f"crafted--{slug(key)}"
    if not (stored := run.tensors(section)):
        x, y, ids = (part.to(device) for part in (images.x, images.y, images.ids))
        for attack in dict.fromkeys((*naive(threat), carried(threat))):
            hears = partial(tell, f"{attack.name} on {key}")
            made = play(
                TorchModel(net), attack, threat, x, y, sample=ids, seed=seed, judge=Never(), on_progress=hears
            )
            stored[attack.name] = made.best.cpu()
        run.keep(section, stored)
    return stored
