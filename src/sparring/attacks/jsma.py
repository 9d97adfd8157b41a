"""JSMA: push the two features that speak most for a class, again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparring.core.attack import Observation, State
from sparring.core.batch import Batch, per_row
from sparring.core.model import Access


@dataclass(frozen=True)
class JSMAState(State):
    """Which class each row is pushed to."""

    goal: Tensor  # (n,) the class; -1 before the first look


@dataclass(frozen=True)
class JSMA:
    """Add `theta` pixel ranges to the pair of features with the largest saliency, until the class is reached.

    Papernot et al. 2016, algorithms 2 and 3 and equation 8, with F the logits: among pairs that raise the goal and
    lower the sum of the others it takes the one with the largest product (equation 9 where `theta` is negative).
    Two things are not in the paper, and `strict` leaves them out: a feature counts by how far the bounds let it go,
    and where no pair does both, the one that raises the goal most, or harms it least, is pushed; else the row ends.
    It also ends where eps or the share `gamma` of all features is used up. Rows without a target go to the class that
    comes second on the clean image. Few pairs are looked at and none is left out: a feature that two others beat in
    both respects is in no best pair.
    """

    theta: float = 1.0
    gamma: float = 1.0
    strict: bool = False

    name: ClassVar[str] = "jsma"
    version: ClassVar[int] = 1
    needs: ClassVar[Access] = Access.GRADIENT
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    paper: ClassVar[str] = "Papernot et al. 2016, arXiv:1511.07528"
    minimizes: ClassVar[bool] = False
    needs_target: ClassVar[bool] = False

    def init(self, batch: Batch) -> JSMAState:
        """Start at the clean image."""
        return JSMAState(batch.x, torch.zeros_like(batch.targeted), torch.full_like(batch.y, -1))

    def step(self, batch: Batch, state: JSMAState, seen: Observation) -> JSMAState:
        """Push the best pair."""
        second = seen.logits.scatter(1, batch.y[:, None], -torch.inf).argmax(1)
        goal = torch.where(state.goal < 0, torch.where(batch.targeted, batch.target, second), state.goal)
        chosen = goal[:, None]
        _, towards = seen.value_and_grad(lambda logits, _: logits.gather(1, chosen).squeeze(1), keep=True)
        _, others = seen.value_and_grad(lambda logits, _: logits.scatter(1, chosen, 0.0).sum(1))

        x, origin = state.x.flatten(1), batch.x.flatten(1)
        low, high = batch.threat.bounds
        movable = x < high if self.theta > 0 else x > low
        changed = x != origin
        full = changed.sum(1) >= min(batch.threat.eps, self.gamma * x.shape[1])
        movable = movable & (changed | ~full[:, None])
        move = torch.full_like(x, self.theta * (high - low))
        move = move if self.strict else batch.threat.clip(x + move) - x
        gain = (move * towards.flatten(1)).masked_fill(~movable, -torch.inf)
        relief = (-move * others.flatten(1)).masked_fill(~movable, -torch.inf)
        pair, saliency = best_pair(gain, relief)
        found = saliency > 0
        if not self.strict:
            most = gain.topk(min(2, gain.shape[1]), dim=1)  # an image may have one feature only
            pair = torch.where(found[:, None], pair, most.indices)
            found = found | (most.values.sum(1).isfinite() & (towards != 0).flatten(1).any(1))
        push = torch.zeros_like(x).scatter(1, pair, self.theta * (high - low)) * found[:, None]
        pushed = batch.threat.clip(x + push).view_as(state.x)
        pushed = torch.where(per_row(found, pushed), batch.project(pushed), state.x)
        return replace(state, x=pushed, goal=goal, done=~found)


def best_pair(gain: Tensor, relief: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 2) the two features with the largest product of summed `gain` and summed `relief` (n, d), and that.

    Both sums must be positive, else the product counts as 0; -inf marks features that may not be moved.
    """
    order = gain.argsort(dim=1, descending=True, stable=True)
    behind = relief.gather(1, order)
    never = torch.full_like(behind[:, :1], -torch.inf)
    best = torch.cat([never, behind.cummax(1).values[:, :-1]], 1)
    runner_up = torch.cat([never, torch.minimum(behind, best).cummax(1).values[:, :-1]], 1)
    stays = behind > runner_up  # at most one feature with as much gain has as much relief
    count = max(2, int(stays.sum(1).amax()))
    place = stays.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    who = order.gather(1, place)
    out = ~stays.gather(1, place)
    a, b = (values.gather(1, who).masked_fill(out, -torch.inf) for values in (gain, relief))
    product = (a[:, :, None] + a[:, None]).clamp_min(0.0) * (b[:, :, None] + b[:, None]).clamp_min(0.0)
    same = torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
    saliency, at = product.masked_fill(same, 0.0).flatten(1).max(1)
    pair = torch.stack([at // a.shape[1], at % a.shape[1]], 1)
    return who.gather(1, pair), saliency
