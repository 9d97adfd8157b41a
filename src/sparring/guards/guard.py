"""What a guard is: something around a trained net when it answers, which says what it does to the gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from sparring.core.errors import UsageError
from sparring.core.model import Access, Model, Prediction, Sampled, fresh, passes
from sparring.core.showing import number_of
from sparring.models.bpda import bpda
from sparring.models.eot import EOT
from sparring.models.torch import TorchModel

Net = Callable[[Tensor], Tensor]  # images (n, c, h, w) in [0, 1] to logits (n, classes)


class Guard(ABC):
    """A defense at inference. A frozen dataclass: its fields are its options.

    From `differentiable`, `randomised` and `detects` follows how somebody attacks it who knows it (`adaptive`). A
    claim that does not hold is found by `check_guard`, and by the warning signs of an audit. Write your own as a
    `Transform` or a `Detector`, or, with `answer`, as whatever else.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]
    differentiable: ClassVar[bool]  # does its gradient, and that of all inside, say how the answer changes?
    randomised: ClassVar[bool]  # does it draw from torch's, numpy's or Python's global generator?
    detects: ClassVar[bool] = False  # is the last class of its answer a flag?
    votes: ClassVar[bool] = False  # do draws decide by majority, and not by their mean probabilities?

    @property
    def gaussian_noise(self) -> float | None:
        """The sigma of independent Gaussian noise on every pixel, if that and a vote is all it does; else None.

        Of such a vote `sparring.certificates.smoothing` claims an L2 radius (Cohen et al. 2019, arXiv:1902.02918).
        """
        return None

    @abstractmethod
    def answer(self, net: Net, x: Tensor, see: See) -> Tensor:
        """(n, classes) logits, and the flag's if it detects, of images `x` (n, c, h, w); `see` does a transform."""

    @final
    def __str__(self) -> str:
        """For a person, such as `Ensemble(others=2 nets)` or `Energy(threshold=-3.14)`; `repr` tells them apart."""
        if not is_dataclass(self):
            return repr(self)
        told = (f"{option.name}={_shown(getattr(self, option.name))}" for option in fields(self) if option.repr)
        return f"{type(self).__qualname__}({', '.join(told)})"

    @final
    def naive(self, net: Net) -> Model:
        """What somebody attacks who does not know of the guard: the bare `net`.

        `sparring.transfer(guard.naive(net), guard.judged(net), ...)` judges what comes of it on the guarded one.
        """
        return TorchModel(_net(net))

    @final
    def judged(self, net: Net, n: int = 20) -> Model:
        """What decides: the guarded `net` as deployed; of a random one the answer of `n` draws together.

        They are other draws than those that an attack on `adaptive` sees. With n = 1 a single one decides.
        """
        bare: Model = TorchModel(Guarded(self, net))
        if self.randomised:
            bare = EOT(_Labels(bare) if self.votes else bare, n).fresh()
        return _Faced(bare, True) if self.detects else bare

    @final
    def adaptive(self, net: Net, n: int = 20) -> Model:
        """What somebody attacks who knows the guard. What an attack finds here is confirmed on `judged`.

        It answers as the guarded `net` does, and has the gradients that this lacks: straight through what has none
        (BPDA) and of the mean over `n` draws where it is random (EOT; both in Athalye, Carlini and Wagner 2018,
        arXiv:1802.00420), with a detector's flag as one more class (Carlini and Wagner 2017, arXiv:1705.07263).
        """
        bare = TorchModel(Guarded(self, net, through))
        if not (self.randomised or self.detects):
            return bare
        return _Faced(EOT(bare, n) if self.randomised else bare, self.detects, self.judged(net, n))


class Transform(Guard):
    """A guard that changes the image; the net looks at what came of it."""

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """What the net is shown for images `x` (n, c, h, w) in [0, 1]."""

    def stand_in(self, x: Tensor) -> Tensor:
        """What is differentiated in place of a transform without gradients: the identity, unless you know better."""
        return x

    @final
    def answer(self, net: Net, x: Tensor, see: See) -> Tensor:
        """(n, classes) logits of the changed images."""
        return net(see(self, x))


See = Callable[[Transform, Tensor], Tensor]


def plain(guard: Transform, x: Tensor) -> Tensor:
    """The transform as deployed."""
    return guard.transform(x)


def through(guard: Transform, x: Tensor) -> Tensor:
    """The same values, with a gradient where the transform has none."""
    changed: Tensor = guard.transform(x) if guard.differentiable else bpda(guard.transform, guard.stand_in)(x)
    return changed


def _net(net: Net) -> Net:
    if isinstance(net, type) or not callable(net):
        raise UsageError(f"expected a torch module from raw pixels in [0, 1] to logits, got {type(net).__name__}")
    return net


def _shown(value: object) -> str:
    """An option as a person reads it."""
    parts = value if isinstance(value, tuple) else (value,)
    if parts and all(isinstance(part, nn.Module) for part in parts):
        return number_of(len(parts), "net")
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


class Guarded(nn.Module):
    """`net` behind `guard`, as a module; `see` is `plain` as deployed and `through` for who attacks it."""

    def __init__(self, guard: Guard, net: Net, see: See = plain) -> None:
        super().__init__()
        self.guard, self.net, self.see = guard, _net(net), see
        held = [part for value in vars(guard).values() for part in (value if isinstance(value, tuple) else (value,))]
        self.held = nn.ModuleList(part for part in held if isinstance(part, nn.Module))  # nets of the guard's own
        # The options are part of the state, so that a digest tells a guard from the same one of other options.
        self.register_buffer("options", torch.tensor(list(repr(guard).encode()), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """(n, classes) logits, and the flag's if the guard detects, of images `x` (n, c, h, w)."""
        return self.guard.answer(self.net, x, self.see)


class _Faced(Sampled):
    """A guarded model; says which rows are flagged, and which model is to confirm what was found on it."""

    def __init__(self, inner: Model, detects: bool, confirming: Model | None = None) -> None:
        self.inner, self.detects, self.confirming = inner, detects, confirming
        self.access, self.bounds = inner.access, inner.bounds

    @property
    def passes(self) -> int:
        """As the model has it."""
        return passes(self.inner)

    def fresh(self) -> Model:
        """The one that confirms; else the same, of other draws if it is random."""
        return self.confirming or _Faced(fresh(self.inner), self.detects)

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        if not self.detects:
            return self.inner.query(x, access)
        said = self.inner.query(x, max(access, Access.SCORE))
        assert said.logits is not None  # detectors answer in logits
        flagged = said.labels == said.logits.shape[1] - 1
        return replace(said, logits=said.logits if access >= Access.SCORE else None, flagged=flagged)


class _Labels:
    """A model of which only the labels are seen."""

    access = Access.DECISION

    def __init__(self, inner: Model) -> None:
        self.inner, self.bounds = inner, inner.bounds

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        return self.inner.query(x, Access.DECISION)
