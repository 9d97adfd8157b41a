"""One training by several processes: each takes its share of every minibatch, and gradients are averaged."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparring.core.defense import Defense, Replaying
from sparring.core.errors import SparringError, UsageError

_WHOLE = ("awp", "fast")  # a step of theirs looks at the minibatch as a whole, not at each image by itself
_PATIENCE = timedelta(minutes=10)  # with a process that does not answer


@dataclass(frozen=True)
class Share:
    """Which of `world` processes this one is."""

    rank: int = 0
    world: int = 1

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

    def device(self, device: str) -> str:
        """The device of this process: on CUDA each has its own."""
        return f"cuda:{self.rank}" if self.world > 1 and torch.device(device).type == "cuda" else device


def check_shareable(world: int, size: int, defense: Defense, framework: str, device: str) -> None:
    """Refuse what `world` processes cannot train together to the weights of one."""
    if world < 1:
        raise UsageError(f"expected at least 1 device, got {world}")
    if world == 1:
        return
    if size < world:
        raise UsageError(f"expected at least an image of each minibatch for each of {world} devices, got {size}")
    if defense.name in _WHOLE or isinstance(defense, Replaying):
        raise UsageError(
            f"expected a recipe whose loss is a mean over images, to share a minibatch, got {defense.name}; "
            f"train it on one device"
        )
    if framework != "torch":
        raise UsageError(f"expected a net that torch computes on {world} devices, got {framework}; use one")
    if torch.device(device).type == "cuda" and torch.cuda.device_count() < world:
        raise UsageError(f"expected {world} CUDA devices, found {torch.cuda.device_count()}")


@contextmanager
def crew(world: int, device: str, work: Callable[..., None], *given: Any) -> Iterator[Share]:
    """While this lasts, `world` - 1 more processes do `work(share, *given)`; this one is the first of them all."""
    if world == 1:
        yield Share()
        return
    threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        (Path(folder) / "given").write_bytes(pickle.dumps((work, given)))
        start = multiprocessing.get_context("spawn").Process
        others = [
            start(target=_member, args=(Share(rank, world), folder, device, max(1, threads // world)), daemon=True)
            for rank in range(1, world)
        ]
        try:
            for other in others:
                other.start()
            while not all((Path(folder) / f"ready{rank}").exists() for rank in range(1, world)):
                if not all(other.is_alive() for other in others):
                    raise SparringError("a process of the training did not start; what it said stands above")
                time.sleep(0.02)
            torch.set_num_threads(max(1, threads // world))
            _meet(Share(0, world), folder, device)
            yield Share(0, world)
            for other in others:
                other.join()
        finally:
            torch.set_num_threads(threads)
            if dist.is_initialized():
                dist.destroy_process_group()
            for other in others:
                if other.is_alive():
                    other.terminate()
                    other.join()


def _member(share: Share, folder: str, device: str, threads: int) -> None:
    """One of the other processes, from its start to its end."""
    torch.set_num_threads(threads)
    work, given = pickle.loads((Path(folder) / "given").read_bytes())
    (Path(folder) / f"ready{share.rank}").touch()
    _meet(share, folder, device)
    work(share, *given)
    dist.destroy_process_group()


def _meet(share: Share, folder: str, device: str) -> None:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(share.rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/meet",
        rank=share.rank,
        world_size=share.world,
        timeout=_PATIENCE,
    )
