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
from sparring.core.defense import Defense, Moment, Replaying
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
from sparring.training.cost import PlainStep, multiple, seconds, timed
from sparring.training.crew import conclude, crew, follow, follows, processes
from sparring.training.holdback import HoldBack, best
from sparring.training.share import Share, check_shareable


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
    robust: float | None = None  # robust accuracy on the training images held back; None: none were

    def __str__(self) -> str:
        robust = "" if self.robust is None else f", Robust: {self.robust:.6f}"
        return f"Step: {self.step}, Loss: {self.loss:.6f}, Accuracy: {self.accuracy:.6f}{robust}"

    def entry(self) -> dict[str, Any]:
        """The line as JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}


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


def plan(settings: Settings, data: Dataset, defense: Defense, hold_back: HoldBack | None = None) -> dict[str, Any]:
    """All that decides the weights, as JSON values."""
    recipe = {"name": defense.name, "version": defense.version, "options": repr(defense)}
    return {
        **asdict(settings),
        "data": data.name,
        "data_sha256": data.train.digest(),
        "recipe": recipe,
        "torch": torch.__version__,
        **({"hold_back": hold_back.plan()} if hold_back else {}),
    }


def fit(
    settings: Settings,
    data: Dataset,
    defense: Defense,
    path: Path,
    *,
    hold_back: HoldBack | None = None,
    device: str = "cpu",
    devices: int = 1,
    on_step: Callable[[int], None] | None = None,
    on_line: Callable[[Line], None] | None = None,
) -> Checkpoint:
    """Train on `data.train`, score on `data.test`, and store the result at `path`, whose ending the framework sets.

    A finished checkpoint of the same plan at `path` is returned as it is, an unfinished one is taken up;
    one of another plan is refused. With `hold_back` the last training images are attacked at each line of the log
    instead of trained on, and the weights of the line where most of them hold are the result. With `devices` so many
    processes share every minibatch (on CUDA each on a device of its own), to the same weights up to rounding; so do
    those that torchrun started, where the first one's words count and all get its result.
    `on_step` is told each step, `on_line` each line of the log.
    """
    if follows():
        return _moved(follow(device), device)
    world, here = processes(devices)
    path = path.with_suffix(SUFFIXES[settings.framework])
    wanted, say = plan(settings, data, defense, hold_back), on_line or (lambda line: None)
    if path.is_file() and path.with_suffix(".json").is_file():
        done = open_checkpoint(path)
        check_same(path, wanted, done.card["plan"])
        for entry in done.card["log"]:
            say(Line(**entry))
        return _moved(conclude(done, device), device)
    given = (settings, data, defense, hold_back, path, device, wanted)
    rows = len(data.train) - (hold_back.rows if hold_back else 0)
    check_shareable(world, here, min(settings.batch_size, rows), defense, settings.framework, device)
    with crew(world, device, _help, *given) as share:
        run = _Run(share, *given)
        run.resume()
        for line in run.log:
            say(line)
        _train(run, on_step or (lambda step: None), say)
    checkpoint = store(path, run.finish(), run.card())
    run.partial.unlink(missing_ok=True)
    return _moved(conclude(checkpoint, device), device)


def _train(run: _Run, on_step: Callable[[int], None], say: Callable[[Line], None]) -> None:
    """All steps that are left; the first process alone looks at the net and writes."""
    started, before, over = time.monotonic(), run.seconds, run.over()
    while run.step < run.settings.steps and not over:
        with shared_cores():
            run.advance()
        on_step(run.step)
        if run.step % run.settings.every == 0 or run.step == run.settings.steps:
            if run.share.rank == 0:
                run.write_line()
                run.seconds = before + time.monotonic() - started
                run.keep()
                say(run.log[-1])
            over = run.share.agree(run.over(), run.device)


def _help(share: Share, *given: Any) -> None:
    """The work of a process that is not the first."""
    run = _Run(share, *given)
    run.resume()
    _train(run, lambda step: None, lambda line: None)


def _moved(checkpoint: Checkpoint, device: str) -> Checkpoint:
    net = checkpoint.net
    return replace(checkpoint, net=net.to(device)) if isinstance(net, nn.Module) else checkpoint


class _Run:
    """A training in progress."""

    def __init__(
        self,
        share: Share,
        settings: Settings,
        data: Dataset,
        defense: Defense,
        hold_back: HoldBack | None,
        path: Path,
        device: str,
        wanted: dict[str, Any],
    ) -> None:
        self.data, self.held = hold_back.split(data) if hold_back else (data, data.train)
        train = self.data.train
        self.settings, self.defense, self.hold_back = settings, defense, hold_back
        self.replaying = defense if isinstance(defense, Replaying) else None
        self.share, self.wanted, self.device = share, wanted, share.device(device)
        net = build(settings.net, train.x.shape[1:], len(train.classes), settings.seed)
        if settings.framework == "torch":
            self.net: nn.Module = net.to(self.device).train()
        else:
            self.net = KerasModule(convert(net, train.x.shape[1:]), train.x.shape[1:]).to(self.device).train()
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=settings.rate)
        self.plain = PlainStep(self.net)
        self.partial = path.with_suffix(".partial")
        self.size = min(settings.batch_size, len(train))
        self.step, self.seconds = 0, 0.0
        self.log: list[Line] = []
        self.ratios: list[float] = []  # of the time of a step and of a plain one, where both were taken
        self.carried: Tensor | None = None
        self.best: dict[str, Tensor] = {}  # the weights of the best line so far, if images are held back
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _rows(self, shown: int) -> Tensor:
        epoch, place = divmod(shown, len(self.data.train) // self.size)
        if epoch != self._epoch:
            mixed = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.data.train), generator=mixed)
        return self._order[place * self.size : (place + 1) * self.size]

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The images of this step, their labels and noise keys."""
        settings, train = self.settings, self.data.train
        shown = self.step // self.replaying.replays if self.replaying else self.step
        rows = self.share.of(self._rows(shown))
        ids = train.ids[rows].to(self.device)
        key = noise.keys(settings.seed, ids, torch.full_like(ids, shown))
        x, y = train.x[rows].to(self.device), train.y[rows].to(self.device)
        return shift(x, key, settings.shift if min(x.shape[2:]) >= 16 else 0), y, key

    def advance(self) -> None:
        """Take one step, and now and then time it beside a plain one."""
        if timed(self.step, self.settings.steps):
            self._plain_step()  # its weights, unlike the net's, have left the cache since the last time
            plain = seconds(self._plain_step, self.device)
            self.ratios.append(seconds(self._descend, self.device) / plain)
        else:
            self._descend()
        self.step += 1

    def _plain_step(self) -> None:
        self.plain.take(*self._batch()[:2])

    def _descend(self) -> None:
        settings, progress = self.settings, self.step / self.settings.steps
        rate = settings.rate * (
            min(1.0, (self.step + 1) / (0.2 * settings.steps)) if progress < 0.2 else (1 - progress) / 0.8
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        x, y, key = self._batch()
        moment = Moment(progress, key, self.carried)
        x.requires_grad_(self.replaying is not None)
        self.optimiser.zero_grad()
        self.defense.loss(self.net, x, y, moment).backward()  # type: ignore[no-untyped-call]  # torch
        if self.replaying and x.grad is not None:
            self.carried = self.replaying.hand_on(x.detach(), x.grad, moment)
        self.share.average(self.net.parameters(), len(x) / self.size)
        self.optimiser.step()

    def write_line(self) -> None:
        """Add a line to the log: how the net does on the test images, and on those held back."""
        model = TorchModel(self.net.eval())
        result, robust = score(model, self.data.test, self.device), None
        if self.hold_back:
            robust = self.hold_back.robust_accuracy(model, self.held, self.settings.seed, self.device)
        self.net.train()
        self.log.append(Line(self.step, result.loss, result.accuracy, robust))
        if self.hold_back and self._best() is self.log[-1]:
            self.best = {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}

    def _robust(self) -> list[float]:
        return [line.robust for line in self.log if line.robust is not None]

    def _best(self) -> Line:
        """The line whose weights are the result."""
        return self.log[best(self._robust()) if self.hold_back else -1]

    def over(self) -> bool:
        """Has the training had no gain for so long that it is to end?"""
        return self.hold_back is not None and self.hold_back.over(self._robust())

    def finish(self) -> Any:
        """The trained net, with the best weights."""
        if self.best:
            self.net.load_state_dict(self.best)
        return self.net.finish() if isinstance(self.net, KerasModule) else self.net.eval()

    def keep(self) -> None:
        """Store all that the next step needs."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        if self.carried is not None:
            tensors["carried"] = self.carried
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in state.items()}
        note = {
            "plan": self.wanted,
            "step": self.step,
            "seconds": self.seconds,
            "log": [line.entry() for line in self.log],
            "ratios": self.ratios,
        }
        held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_atomic(self.partial, save(held, {"note": json.dumps(note)}))

    def _kept(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What `keep` stored, if it is there."""
        if not self.partial.is_file():
            return None
        try:
            with safe_open(self.partial, framework="pt") as file:
                note = json.loads(file.metadata()["note"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, ValueError, KeyError) as error:
            raise UsageError(f"{self.partial}: damaged ({error}); remove it to start anew") from error
        check_same(self.partial, self.wanted, note["plan"])
        return note, tensors

    def resume(self) -> None:
        """Go on from what the first process finds stored."""
        kept = self.share.same(self._kept() if self.share.rank == 0 else None)
        if kept is None:
            return
        note, tensors = kept
        self.net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        self.best = {k[5:]: v.to(self.device) for k, v in tensors.items() if k.startswith("best.")}
        self.carried = tensors["carried"].to(self.device) if "carried" in tensors else None
        frame = self.optimiser.state_dict()
        frame["state"] = {}
        for name, tensor in tensors.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                frame["state"].setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict(frame)
        self.step, self.seconds, self.ratios = note["step"], note["seconds"], note.get("ratios", [])
        self.log = [Line(**entry) for entry in note["log"]]

    def card(self) -> dict[str, Any]:
        """What the finished weights are."""
        train, line = self.data.train, self._best()
        held = {"robust_accuracy": line.robust, "best_step": line.step} if self.hold_back else {}
        return {
            "schema": 1,
            "net": self.settings.net,
            "framework": self.settings.framework,
            "shape": list(train.x.shape[1:]),
            "classes": len(train.classes),
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "data": self.data.name,
            "accuracy": line.accuracy,
            "loss": line.loss,
            **held,
            "steps": self.log[-1].step,
            "seconds": round(self.seconds, 3),
            "cost_of_plain": multiple(self.ratios),
            "devices": self.share.world,
            "seed": self.settings.seed,
            "plan": self.wanted,
            "versions": {
                "sparring": version("sparring"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                **(self.net.versions if isinstance(self.net, KerasModule) else {}),
            },
            "log": [line.entry() for line in self.log],
        }
