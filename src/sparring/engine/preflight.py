"""What is checked before a run, so that a wrong input is one clear line and not a wrong figure."""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.core.attack import Attack
from sparring.core.errors import AttackError, DataError, ModelError
from sparring.core.model import Access, Model
from sparring.core.threat import Threat
from sparring.engine.asking import ask


def check_images(x: Tensor, bounds: tuple[float, float]) -> None:
    """Refuse what is no batch of images (n, c, h, w) inside `bounds`."""
    if x.dim() != 4 or x.shape[0] < 1:
        raise DataError(f"expected images (n, channels, height, width), got {tuple(x.shape)}; reshape them")
    if x.dtype != torch.float32:
        raise DataError(f"expected float32 images, got {x.dtype}; convert them (uint8: x.float() / 255)")
    if not x.isfinite().all():
        row = int((~x.flatten(1).isfinite().all(1)).nonzero()[0])
        raise DataError(f"expected finite pixels, got NaN or infinity in image {row}")
    low, high = bounds
    for name, value in (("maximum", x.max().item()), ("minimum", x.min().item())):
        if not low <= value <= high:
            remedy = (
                "divide by 255"
                if (low, high) == (0, 1) and 1 < value <= 255
                else ("give raw pixels, and mean and std to the model: wrap(net, mean=..., std=...)")
            )
            raise DataError(f"expected images in [{low:g}, {high:g}], got a {name} of {value}; {remedy}")


def check_labels(y: Tensor, rows: int, what: str = "labels", classes: int | None = None) -> None:
    """Refuse what are no class numbers, one a row."""
    if y.dtype != torch.int64 or y.shape[:1] != (rows,):
        raise DataError(f"expected {rows} int64 {what}, got {y.dtype} {tuple(y.shape)}")
    if rows and (int(y.min()) < 0 or (classes is not None and int(y.max()) >= classes)):
        top = "" if classes is None else f" to {classes - 1}"
        raise DataError(
            f"expected {what} from 0{top}, got {int(y.min())} to {int(y.max())}; does the model fit the data?"
        )


def check_model(model: Model, x: Tensor, needs: Access = Access.SCORE) -> int | None:
    """Ask a few questions whose answers betray a model that cannot be judged; returns its number of classes.

    Raises `ModelError` for probabilities, answers that vary from call to call, answers that depend on the
    other rows of the batch, and a model that has none with the access that it `needs`. One that declares itself
    random (`EOT`) may vary; if it does not, its rows keep their places, where they see the same draws.
    """
    low, high = model.bounds
    rows = x[:4].clone()  # a model that writes to its input must not reach the caller's images
    crowd = torch.cat([rows, low + high - rows])
    first = ask(model, crowd, Access.SCORE)
    if len(first.failed) == len(crowd):
        rows = _answerable(model, x, first.failed[0])
        crowd = torch.cat([rows, low + high - rows])
        first = ask(model, crowd, Access.SCORE)
    random = first.prediction.votes is not None
    few = torch.cat([rows, rows.flip(0)]) if random else rows
    second, third = ask(model, crowd, Access.SCORE), ask(model, few, max(needs, Access.SCORE))
    if len(third.failed) == len(few):
        raise ModelError(third.failed[0])
    if first.prediction.logits is None or second.prediction.logits is None or third.prediction.logits is None:
        return None  # labels only
    fine = [row for row in range(2 * len(rows)) if row not in first.failed | second.failed]
    both = [row for row in fine if row < len(rows) and row not in third.failed]
    together, again = first.prediction.logits[fine], second.prediction.logits[fine]
    whole, alone = first.prediction.logits[both], third.prediction.logits[both]
    if bool((together > -1e-5).all()) and bool(((together.double().sum(1) - 1).abs() < 1e-5).all()):
        raise ModelError(
            "expected logits, got probabilities (rows that sum to 1); drop the final softmax, "
            "or say so: wrap(net, probabilities=True)"
        )
    classes = together.shape[1] - (first.prediction.flagged is not None)  # a detector's flag is none
    scale = 1e-4 * float(together.abs().max().clamp_min(1e-6))
    same = torch.allclose(together, again, rtol=0, atol=scale)
    if random and (not same or first.failed or third.failed):  # drawn from where nobody can seed, or elsewhere seated
        return classes
    if not same:
        raise ModelError(
            "expected the same answer twice, got different logits; call net.eval() if it has dropout, "
            "or attack the mean of n draws if it is meant to be random: EOT(net, n)"
        )
    if not torch.allclose(whole, alone, rtol=0, atol=10 * scale):
        raise ModelError(
            "expected each row to be answered by itself, but the logits change with the rest of the batch; "
            "call net.eval() if it has batch norm"
        )
    return classes


def _answerable(model: Model, x: Tensor, reason: str) -> Tensor:
    """Up to four of 64 images that the model has an answer for; `ModelError` with `reason` if there are none."""
    rows = x[torch.linspace(0, len(x) - 1, min(64, len(x)), device=x.device).long()]
    failed = ask(model, rows.clone(), Access.SCORE).failed
    fine = [row for row in range(len(rows)) if row not in failed]
    if not fine:
        raise ModelError(f"{reason}; no image tried has an answer: check the weights and the preprocessing")
    return rows[fine[:4]]


def check_attack(model: Model, attack: Attack, threat: Threat, targets: Tensor | None) -> None:
    """Refuse an attack that this model, this threat model or these targets do not suit."""
    if model.access < attack.needs:
        raise AttackError(
            f"{attack.name} needs {attack.needs.name} access, the model gives {model.access.name}; "
            f"see `sparring ls` for attacks that need less"
        )
    if threat.norm not in attack.norms:
        raise AttackError(
            f"{attack.name} works in {', '.join(attack.norms)}, not in {threat.norm}; name another norm"
        )
    if attack.needs_target and targets is None:
        raise AttackError(f"{attack.name} works towards a class; give targets")
    if targets is not None and (targets.dim() != 2 or targets.shape[1] < 1):
        raise AttackError(f"expected targets (n, tries), got {tuple(targets.shape)}")
