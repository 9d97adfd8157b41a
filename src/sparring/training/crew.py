"""The processes of a training, and how they come together: this one starts the others, or torchrun started them all.

Either way the first says what is trained, looks at the net and writes; the others do their share of the steps.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from sparring.core.errors import SparringError, UsageError
from sparring.training.share import Share

_PATIENCE = timedelta(minutes=10)  # with a process that does not answer
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, to each process in its environment


def launched() -> Share | None:
    """The place of this process among those that torchrun started; None if it started no others."""
    if not all(name in os.environ for name in _TOLD) or os.environ["WORLD_SIZE"] == "1":
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Share(rank, world, int(os.environ.get("LOCAL_RANK", rank)))


def processes(devices: int) -> tuple[int, int]:
    """How many processes train when `devices` are asked for, and how many of them on this machine."""
    share = launched()
    if share is None:
        return devices, devices
    if devices not in (1, share.world):
        raise UsageError(
            f"expected 1 or {share.world} devices, since torchrun started {share.world} processes, got {devices}; "
            f"leave out --devices"
        )
    return share.world, int(os.environ.get("LOCAL_WORLD_SIZE", share.world))


def follows() -> bool:
    """Did torchrun start this process, and another as the first?"""
    share = launched()
    return share is not None and share.rank > 0


def follow(device: str) -> Any:
    """Do the work that torchrun's first process hands out, until it has a result; that."""
    share = _join(device)
    while isinstance(word := share.same(None), tuple):
        work, *given = word
        work(share, *given)
    return word


def conclude(result: Any, device: str) -> Any:
    """`result`, which those who follow get too."""
    return result if launched() is None else _join(device).same(result)


@contextmanager
def crew(world: int, device: str, work: Callable[..., None], *given: Any) -> Iterator[Share]:
    """While this lasts, `world` - 1 more processes do `work(share, *given)`; this one is the first of them all."""
    if launched() is not None:
        share = _join(device)
        share.same((work, *given))
        yield share
    elif world == 1:
        yield Share()
    else:
        with _started(world, device, work, given) as share:
            yield share


@contextmanager
def _started(world: int, device: str, work: Callable[..., None], given: tuple[Any, ...]) -> Iterator[Share]:
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
            _meet(Share(0, world), f"file://{folder}/meet", device)
            yield Share(0, world)
            for other in others:
                other.join()
        finally:
            torch.set_num_threads(threads)
            _part()
            for other in others:
                if other.is_alive():
                    other.terminate()
                    other.join()


def _member(share: Share, folder: str, device: str, threads: int) -> None:
    """One of the other processes, from its start to its end."""
    torch.set_num_threads(threads)
    work, given = pickle.loads((Path(folder) / "given").read_bytes())
    (Path(folder) / f"ready{share.rank}").touch()
    _meet(share, f"file://{folder}/meet", device)
    work(share, *given)
    _part()


def _join(device: str) -> Share:
    """The place of this process in torchrun's group, which lasts as long as the process."""
    share = launched()
    assert share is not None  # asked before
    if not dist.is_initialized():
        _meet(share, "env://", device)
        atexit.register(_part)
    return share


def _meet(share: Share, where: str, device: str) -> None:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(share.place)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=where,
        rank=share.rank,
        world_size=share.world,
        timeout=_PATIENCE,
    )


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
