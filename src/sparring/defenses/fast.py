"""Fast adversarial training: one step from a random start, and a watch on whether one step is still enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core.attack import Attack
from sparring.core.defense import Moment
from sparring.core.errors import UsageError
from sparring.core.threat import Threat
from sparring.defenses.madry import Madry


@dataclass(frozen=True)
class Fast:
    """Madry's training with one step of `step` eps from a uniform start: Wong et al. 2020, algorithm 3.

    One-step training can collapse: the net learns to withstand the one step, and every longer attack breaks it. So
    before each update the first `watch` images of the batch are attacked with `attack` too. If of those that
    withstand the one step more than the share `tolerance` fall to the attack, this update trains on the attack's
    points for the whole batch, as `Madry` would. (Wong et al. stop for good where PGD's accuracy on one batch falls
    by 0.2 in an epoch; Li et al. 2020, arXiv:2006.03089, let PGD bring the net back.) An update costs 2 passes, and
    the attack's for the watched images; where the guard fires, the attack's for the whole batch too. `watch=0`
    leaves the guard out. It sees no further than `attack`: a weak one misses a collapse.
    """

    attack: Attack
    threat: Threat
    step: float = 1.25
    watch: int = 16
    tolerance: float = 0.2
    warmup: float = 0.3

    name: ClassVar[str] = "fast"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "Wong et al. 2020, arXiv:2001.03994"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.step > 0 or self.watch < 0 or not 0 <= self.tolerance <= 1:
            raise UsageError(
                f"expected step > 0, watch >= 0 and a tolerance from 0 to 1, "
                f"got {self.step}, {self.watch} and {self.tolerance}"
            )

    @property
    def whole(self) -> bool:
        """With the watch on, a few images decide for all."""
        return self.watch > 0

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """Mean cross-entropy at the points found."""
        return self.cost(net, x, y, self.points(net, x, y, moment))

    def points(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) where one step ends, or the attack where one step is not enough; searched in eval mode."""
        mode = net.training
        net.eval()
        found = self.jump(net, x, y, moment)
        if self.watch and self.fires(net, x[: self.watch], y[: self.watch], found[: self.watch], moment):
            found = self._madry.points(net, x, y, moment)
        net.train(mode)
        return found

    def fires(self, net: nn.Module, x: Tensor, y: Tensor, found: Tensor, moment: Moment) -> bool:
        """Does the attack break too many of the images `x` that withstand the one step, to `found`?"""
        worst = self._madry.points(net, x, y, Moment(moment.progress, moment.key[: len(x)]))
        with torch.no_grad():
            held = net(found).argmax(1) == y
            fallen = held & (net(worst).argmax(1) != y)
        return bool(fallen.sum() > self.tolerance * held.sum())

    def jump(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """(n, c, h, w) one step of `step` eps from a random point of the ball, projected.

        The point may leave the range of the pixels, as theirs may. Cut off there, half of all black pixels would
        start at black, and the step would end at an edge of the ball from wherever it started.
        """
        threat = moment.limit(self.threat, self.warmup)
        start = threat.changes.sample(torch.zeros_like(x), moment.key)
        leaf = (x + start).detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(net(leaf).double(), y, reduction="sum")  # double: it saturates later
        (gradient,) = torch.autograd.grad(loss, leaf)
        change = start + self.step * threat.eps * threat.steepest(gradient, leaf.detach())
        return threat.project(x + threat.changes.project(change, torch.zeros_like(x)), x)

    def cost(self, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, points: Tensor) -> Tensor:
        """Mean cross-entropy at `points`."""
        return cross_entropy(net(points), y)

    @property
    def _madry(self) -> Madry:
        return Madry(self.attack, self.threat, self.warmup)
