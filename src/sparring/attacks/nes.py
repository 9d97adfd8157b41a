"""NES: PGD on gradients that are estimated from scores, by differences along random directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from sparring.core import noise
from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.errors import UsageError
from sparring.core.losses import named
from sparring.core.model import Access

Draw = Callable[[Tensor, Sequence[int], Tensor], Tensor]  # (key, shape, stream) -> (n, *shape)


@dataclass(frozen=True)
class AroundState(State):
    """The point of each row, and what is known of the gradient there."""

    k: Tensor  # (n,) queries answered
    base: Tensor  # (n, c, h, w) the point of this round
    value: Tensor  # (n,) float64 the loss there
    gradient: Tensor  # (n, c, h, w) the estimate so far


S = TypeVar("S", bound=AroundState)


@dataclass(frozen=True)
class NESState(AroundState):
    """And what earlier rounds saw."""

    momentum: Tensor  # (n, c, h, w)


@dataclass(frozen=True)
class NES:
    """Ask about a point, then about `samples` around it; climb the estimate they give; and again.

    Ilyas et al. 2018, algorithm 1 (antithetic normal samples of deviation `sigma`) with projected steps,
    and the momentum of their code. Samples are clipped to the bounds; each counts as far as it then lies
    from the point, times what the loss gained. Steps are eps / 10 unless `step_size` is given.
    """

    steps: int = 5000
    samples: int = 50
    sigma: float = 0.001
    step_size: float | None = None
    momentum: float = 0.9
    loss: str = "margin"

    name: ClassVar[str] = "nes"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.SCORE
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    paper: ClassVar[str] = "Ilyas et al. 2018, arXiv:1804.08598"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> NESState:
        """Start at the point that is given, or at the image."""
        even(self.samples)
        zero, still, x = torch.zeros_like(batch.y), torch.zeros_like(batch.x), batch.begin
        return NESState(x, torch.zeros_like(batch.targeted), zero, x, zero.double(), still, still)

    def step(self, batch: Batch, state: NESState, seen: Observation) -> NESState:
        """Add to the estimate; when it is complete, climb."""
        value = named(self.loss)(seen.logits, batch).double()
        after = estimated(batch, state, value, self.samples, self._climb)
        x = after.base + self.sigma * signed(after.k, self.samples, batch, noise.normal)
        return asking(batch, after, x, self.samples, self.steps)

    def _climb(self, batch: Batch, state: NESState) -> NESState:
        # A mean over pairs, so that momentum weighs rounds by what they saw.
        gradient = state.gradient / (self.sigma**2 * self.samples)
        momentum = self.momentum * state.momentum + gradient
        size = batch.threat.eps / 10 if self.step_size is None else self.step_size
        base = batch.project(torch.add(state.base, batch.threat.steepest(momentum, state.base), alpha=size))
        return replace(state, base=base, momentum=momentum)


def estimated(batch: Batch, state: S, value: Tensor, samples: int, climb: Callable[[Batch, S], S]) -> S:
    """Add to the estimate what the (n,) `value` of the point asked about says; where it is complete, `climb`."""
    first = state.k % (samples + 1) == 0
    base_value = torch.where(first, value, state.value)
    gain = per_row((value - base_value).nan_to_num(0.0, 0.0, 0.0).to(state.x.dtype), state.x)
    gradient = torch.where(per_row(first, gain), 0.0, state.gradient) + gain * (state.x - state.base)
    after = replace(state, k=state.k + 1, value=base_value, gradient=gradient)
    rows = (after.k % (samples + 1) == 0).nonzero().squeeze(1)
    return after.put(rows, climb(batch.take(rows), after.take(rows))) if len(rows) else after


def asking(batch: Batch, state: S, around: Tensor, samples: int, steps: int) -> S:
    """Ask about the point itself at the start of a round and in the end, else about one `around` it."""
    done = state.k >= steps
    itself = done | (state.k % (samples + 1) == 0)
    x = torch.where(per_row(itself, around), state.base, batch.threat.clip(around))
    return replace(state, x=x, done=done)


def even(samples: int) -> None:
    """Refuse samples that do not come in pairs."""
    if samples < 2 or samples % 2:
        raise UsageError(f"expected an even number of samples, 2 or more, as they come in pairs; got {samples}")


def signed(k: Tensor, samples: int, batch: Batch, draw: Draw) -> Tensor:
    """The direction of the (n,) k-th query: a new one, or the last one turned round."""
    place = k % (samples + 1) - 1
    back = place % 2
    way = draw(batch.key, batch.x.shape[1:], k - back)
    return per_row((1 - 2 * back).to(way.dtype), way) * way
