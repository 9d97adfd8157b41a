"""What one process does of a training that several share: its part of every minibatch, with gradients averaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparring.core.defense import Defense, Replaying, Whole
from sparring.core.errors import UsageError


@dataclass(frozen=True)
class Share:
    """Which of `world` processes this one is, and which of those on its machine, if they are not all there."""

    rank: int = 0
    world: int = 1
    local: int | None = None

    def of(self, rows: Tensor) -> Tensor:
        """This process's part of the rows of a minibatch."""
        return rows[self.rank :: self.world]

    def average(self, weights: Iterable[nn.Parameter], part: float) -> None:
        """Make the gradients of a mean over `part` of a minibatch those of the mean over all of it."""
        if self.world == 1:
            return
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        whole = part * torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(whole)
        for gradient, mean in zip(gradients, torch.split(whole, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def agree(self, yes: bool, device: str) -> bool:
        """What the first process says."""
        if self.world == 1:
            return yes
        word = torch.tensor([int(yes)], device=device)
        dist.broadcast(word, 0)
        return bool(word.item())

    def same(self, thing: Any) -> Any:
        """What the first process has, whatever `thing` is here; it is pickled."""
        if self.world == 1:
            return thing
        box = [thing if self.rank == 0 else None]
        dist.broadcast_object_list(box, 0)
        return box[0]

    @property
    def place(self) -> int:
        """Which of the devices of its machine is this process's own."""
        return self.rank if self.local is None else self.local

    def device(self, device: str) -> str:
        """The device of this process: on CUDA each has its own."""
        return f"cuda:{self.place}" if self.world > 1 and torch.device(device).type == "cuda" else device


def check_shareable(world: int, here: int, size: int, defense: Defense, framework: str, device: str) -> None:
    """Refuse what `world` processes, `here` of them on this machine, cannot train together to the weights of one."""
    if world < 1:
        raise UsageError(f"expected at least 1 device, got {world}")
    if world == 1:
        return
    if size < world:
        raise UsageError(f"expected at least an image of each minibatch for each of {world} devices, got {size}")
    if isinstance(defense, Replaying) or (isinstance(defense, Whole) and defense.whole):
        raise UsageError(
            f"expected a recipe whose loss is a mean over images, to share a minibatch, got {defense.name}; "
            f"train it on one device"
        )
    if framework != "torch":
        raise UsageError(f"expected a net that torch computes on {world} devices, got {framework}; use one")
    if torch.device(device).type == "cuda" and torch.cuda.device_count() < here:
        raise UsageError(f"expected {here} CUDA devices, found {torch.cuda.device_count()}")
