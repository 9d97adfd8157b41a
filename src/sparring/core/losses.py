"""What gradient attacks climb: one number a row, larger when the row is nearer to its goal.

Every loss takes logits (n, classes) and the batch. Rows with a target climb towards it, the others away
from their true label. `margin`, `log_odds` and `dlr` are positive exactly where the goal is reached (for
`log_odds`: where the goal holds more than half of the probability).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparring.core.batch import Batch
from sparring.core.errors import unknown

Loss = Callable[[Tensor, Batch], Tensor]


def _labels(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.label[:, None], batch.sign


def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """-log p(y), or log p(target); in float64, where 1 - p is not 0 as soon as the logits are 17 apart."""
    return -batch.sign * torch.nn.functional.cross_entropy(logits.double(), batch.label, reduction="none")


def margin(logits: Tensor, batch: Batch) -> Tensor:
    """max z_other - z_y, or z_target - max z_other (Carlini and Wagner 2017, f_6, without its cut)."""
    label, sign = _labels(batch)
    chosen = logits.gather(1, label).squeeze(1)
    return sign * (chosen - logits.scatter(1, label, -torch.inf).amax(1))


def lead(logits: Tensor, batch: Batch) -> Tensor:
    """z_target - z_y (MultiTargeted: Gowal et al. 2019, section 3), whatever the other classes do; else `margin`."""
    right = logits.gather(1, batch.y[:, None]).squeeze(1)
    goal = logits.gather(1, batch.target.clamp_min(0)[:, None]).squeeze(1)
    return torch.where(batch.targeted, goal - right, margin(logits, batch))


def log_odds(logits: Tensor, batch: Batch) -> Tensor:
    """log(p / (1 - p)) of the target, or the same of not being y; unlike p itself it never saturates."""
    label, sign = _labels(batch)
    chosen = logits.gather(1, label).squeeze(1)
    return sign * (chosen - logits.scatter(1, label, -torch.inf).logsumexp(1))


def dlr(logits: Tensor, batch: Batch) -> Tensor:
    """The margin over z_1 - z_3 (Croce and Hein 2020, equations 6 and 7); with two classes, the margin.

    The targeted form divides by z_1 - (z_3 + z_4) / 2, and with three classes by z_1 - z_3.
    """
    label, sign = _labels(batch)
    chosen = logits.gather(1, label).squeeze(1)
    if logits.shape[1] < 3:
        return margin(logits, batch)
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    away = (logits.scatter(1, label, -torch.inf).amax(1) - chosen) / (top[:, 0] - top[:, 2] + 1e-12)
    towards = (chosen - logits.gather(1, batch.y[:, None]).squeeze(1)) / (
        top[:, 0] - (top[:, 2] + top[:, -1]) / 2 + 1e-12
    )
    return torch.where(sign > 0, towards, away)


def quadratic(logits: Tensor, batch: Batch) -> Tensor:
    """-1/2 ||y_goal - y(x)||^2 with y(x) = softmax (the classic cost), or its negative around y.

    Computed in float64: where softmax saturates its gradient is tiny long before it is zero.
    """
    label, sign = _labels(batch)
    probability = logits.double().softmax(1)
    goal = torch.zeros_like(probability).scatter(1, label, 1.0)
    return -sign * 0.5 * (goal - probability).square().sum(1)


def tempered(logits: Tensor, batch: Batch) -> Tensor:
    """The classic cost with y(x) = softmax(z / T), which does not stall.

    T is 1 where the goal leads, and (max z - z_goal) / 2 where it trails by more than 2: just enough heat to
    keep the goal in sight, so that neither saturation nor an even spread over wrong classes is a resting place.
    """
    label, _ = _labels(batch)
    gap = logits.amax(1, keepdim=True) - logits.gather(1, label)
    return quadratic(logits / (gap.detach() / 2).clamp_min(1.0), batch)


def unflagged(logits: Tensor, y: Tensor) -> Tensor:
    """(n, classes) logits as the attacker must see those (n, classes + 1) of a model that detects.

    Its last class is the flag (Carlini and Wagner 2017, arXiv:1705.07263, section 3.2), which serves the defense as
    well as the true class `y` (n,): there the larger of the two stands.
    """
    named, right = logits[:, :-1], y[:, None]
    return named.scatter(1, right, torch.maximum(named.gather(1, right), logits[:, -1:]))


LOSSES: dict[str, Loss] = {f.__name__: f for f in (cross_entropy, margin, lead, log_odds, dlr, quadratic, tempered)}


def named(name: str) -> Loss:
    """The loss with this name."""
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    return LOSSES[name]
