"""The training loop. A killed training goes on from its last checkpoint to the same weights.

Nothing in a step depends on what ran before it but the weights and the optimiser: the order of the images
and the noise of a step come from (seed, epoch) and (seed, image, step).
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sparring.core import noise
from sparring.core.defense import Defense, Moment
from sparring.core.errors import UsageError, unknown
from sparring.core.files import write_atomic
from sparring.core.model import Access, Model
from sparring.core.plan import check_same
from sparring.data.images import Dataset, Images
from sparring.engine.process import shared_cores
from sparring.models.checkpoint import SUFFIXES, Checkpoint, open_checkpoint, store
from sparring.models.keras_nets import KerasModule, convert
from sparring.models.nets import build
from sparring.models.torch import TorchModel
from sparring.training.augment import shift


@dataclass(frozen=True)
class Settings:
    """How to train: Adam, its rate rising to `rate` over the first fifth of the steps and falling to 0."""

    net: str
    steps: int
    batch_size: int = 128
    rate: float = 4e-3
    shift: int = 1  # pixels; images under 16 pixels are not moved
    seed: int = 0
    every: int = 100  # steps between two lines of the log
    framework: str = "torch"  # that computes the net and its gradients: torch, or tensorflow by Keras

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if min(self.steps, self.batch_size, self.every) < 1:
            raise UsageError(f"expected steps and batch size of at least 1, got {self.steps} and {self.batch_size}")
        if not self.rate > 0:
            raise UsageError(f"expected a rate above 0, got {self.rate}")
        if self.framework not in SUFFIXES:
            raise unknown("framework", self.framework, SUFFIXES)


@dataclass(frozen=True)
class Line:
    """One line of the training log; `loss` is the cross-entropy summed over the test images."""

    step: int
    loss: float
    accuracy: float

    def __str__(self) -> str:
        return f"Step: {self.step}, Loss: {self.loss:.6f}, Accuracy: {self.accuracy:.6f}"


@dataclass(frozen=True)
class Score:
    """How a network does on images."""

    accuracy: float
    loss: float  # cross-entropy, summed
    labels: Tensor  # (n,) int64
    confidence: Tensor  # (n,) of the label named


def score(model: Model, images: Images, device: str = "cpu") -> Score:
    """Accuracy, summed cross-entropy and answers of `model` on `images`."""
    parts = [model.query(x.to(device), Access.SCORE).logits for x in torch.split(images.x, 2000)]
    logits = torch.cat([part.cpu().double() for part in parts if part is not None])
    confidence, labels = logits.softmax(1).max(1)
    loss = nn.functional.cross_entropy(logits, images.y, reduction="sum").item()
    return Score((labels == images.y).double().mean().item(), loss, labels, confidence)


def plan(settings: Settings, data: Dataset, defense: Defense) -> dict[str, Any]:
    """All that decides the weights, as JSON values."""
    recipe = {"name": defense.name, "version": defense.version, "options": repr(defense)}
    return {
        **asdict(settings),
        "data": data.name,
        "data_sha256": data.train.digest(),
        "recipe": recipe,
        "torch": torch.__version__,
    }


def fit(
    settings: Settings,
    data: Dataset,
    defense: Defense,
    path: Path,
    *,
    device: str = "cpu",
    on_step: Callable[[int], None] | None = None,
    on_line: Callable[[Line], None] | None = None,
) -> Checkpoint:
    """Train on `data.train`, score on `data.test`, and store the result at `path`, whose ending the framework sets.

    A finished checkpoint of the same plan at `path` is returned as it is, an unfinished one is taken up;
    one of another plan is refused. `on_step` is told each step, `on_line` each line of the log.
    """
    path = path.with_suffix(SUFFIXES[settings.framework])
    wanted, say = plan(settings, data, defense), on_line or (lambda line: None)
    if path.is_file() and path.with_suffix(".json").is_file():
        done = open_checkpoint(path)
        check_same(path, wanted, done.card["plan"])
        for entry in done.card["log"]:
            say(Line(**entry))
        return _moved(done, device)
    run = _Run(settings, data, defense, path, device, wanted)
    log = run.resume()
    for line in log:
        say(line)
    started = time.monotonic()
    for step in range(run.step, settings.steps):
        with shared_cores():
            run.advance(step)
        if on_step:
            on_step(step + 1)
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            result = run.score()
            log.append(Line(step + 1, result.loss, result.accuracy))
            run.keep(step + 1, log, run.seconds + time.monotonic() - started)
            say(log[-1])
    seconds = run.seconds + time.monotonic() - started
    net = run.net.finish() if isinstance(run.net, KerasModule) else run.net.eval()
    checkpoint = store(path, net, run.card(log, seconds))
    run.partial.unlink(missing_ok=True)
    return _moved(checkpoint, device)


def _moved(checkpoint: Checkpoint, device: str) -> Checkpoint:
    net = checkpoint.net
    return replace(checkpoint, net=net.to(device)) if isinstance(net, nn.Module) else checkpoint


class _Run:
    """A training in progress."""

    def __init__(
        self,
        settings: Settings,
        data: Dataset,
        defense: Defense,
        path: Path,
        device: str,
        wanted: dict[str, Any],
    ) -> None:
        train = data.train
        self.settings, self.data, self.defense, self.path = settings, data, defense, path
        self.wanted, self.device = wanted, device
        net = build(settings.net, train.x.shape[1:], len(train.classes), settings.seed)
        if settings.framework == "torch":
            self.net: nn.Module = net.to(device).train()
        else:
            self.net = KerasModule(convert(net, train.x.shape[1:]), train.x.shape[1:]).to(device).train()
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=settings.rate)
        self.partial = path.with_suffix(".partial")
        self.size = min(settings.batch_size, len(train))
        self.step, self.seconds = 0, 0.0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _rows(self, step: int) -> Tensor:
        epoch, place = divmod(step, len(self.data.train) // self.size)
        if epoch != self._epoch:
            mixed = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.data.train), generator=mixed)
        return self._order[place * self.size : (place + 1) * self.size]

    def advance(self, step: int) -> None:
        """Take one step."""
        settings, train = self.settings, self.data.train
        progress = step / settings.steps
        rate = settings.rate * (
            min(1.0, (step + 1) / (0.2 * settings.steps)) if progress < 0.2 else (1 - progress) / 0.8
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        rows = self._rows(step)
        ids = train.ids[rows].to(self.device)
        key = noise.keys(settings.seed, ids, torch.full_like(ids, step))
        x, y = train.x[rows].to(self.device), train.y[rows].to(self.device)
        x = shift(x, key, settings.shift if min(x.shape[2:]) >= 16 else 0)
        self.optimiser.zero_grad()
        self.defense.loss(self.net, x, y, Moment(progress, key)).backward()  # type: ignore[no-untyped-call]  # torch
        self.optimiser.step()

    def score(self) -> Score:
        """How the net does on the test images."""
        result = score(TorchModel(self.net.eval()), self.data.test, self.device)
        self.net.train()
        return result

    def keep(self, step: int, log: list[Line], seconds: float) -> None:
        """Store all that the next step needs."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in state.items()}
        note = {"plan": self.wanted, "step": step, "seconds": seconds, "log": [asdict(line) for line in log]}
        held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_atomic(self.partial, save(held, {"note": json.dumps(note)}))

    def resume(self) -> list[Line]:
        """Take up what `keep` stored, if it is there; returns the log so far."""
        if not self.partial.is_file():
            return []
        try:
            with safe_open(self.partial, framework="pt") as file:
                note = json.loads(file.metadata()["note"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, ValueError, KeyError) as error:
            raise UsageError(f"{self.partial}: damaged ({error}); remove it to start anew") from error
        check_same(self.partial, self.wanted, note["plan"])
        self.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        frame = self.optimiser.state_dict()
        frame["state"] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                frame["state"].setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict(frame)
        self.step, self.seconds = note["step"], note["seconds"]
        return [Line(**entry) for entry in note["log"]]

    def card(self, log: list[Line], seconds: float) -> dict[str, Any]:
        """What the finished weights are."""
        train = self.data.train
        return {
            "schema": 1,
            "net": self.settings.net,
            "framework": self.settings.framework,
            "shape": list(train.x.shape[1:]),
            "classes": len(train.classes),
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "data": self.data.name,
            "accuracy": log[-1].accuracy,
            "loss": log[-1].loss,
            "steps": self.settings.steps,
            "seconds": round(seconds, 3),
            "seed": self.settings.seed,
            "plan": self.wanted,
            "versions": {
                "sparring": version("sparring"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                **(self.net.versions if isinstance(self.net, KerasModule) else {}),
            },
            "log": [asdict(line) for line in log],
        }
