"""Expectation over transformation: a model that answers at random, asked for the mean of many draws."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparring.core import noise
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Model, Prediction, Pullback, Sampled
from sparring.models.foreign import comes_from
from sparring.models.wrap import wrap

_SIMPLEX = 1e-5  # how far from the simplex a row may lie and still be probabilities


class EOT(Sampled):
    """log of the mean over `n` draws of softmax(logits): what the random `model` says on average.

    Athalye et al. 2018, arXiv:1707.07397, equation 1; for randomised defenses Athalye, Carlini and Wagner 2018,
    arXiv:1802.00420, section 4.2. `model` is anything that `wrap` takes, to which `options` go; a torch module may
    have dropout left on. Where it gives labels only, the most frequent one is the answer.

    Equation 1 has the mean of log p, which a single draw with a tiny p decides. The mean of p is the probability
    that the model names the class; a draw moves it by 1/n at most, and the judge's confidence is that very number.

    A query costs n forward passes and a pullback n backward passes, and the n graphs are held in between. Draw i is
    always made under the same seed: torch, numpy and Python's `random` are seeded by (seed, stream, i) and then given
    back as they were, so that the same batch gets the same answer. What the model draws once for a whole call is the
    same for all rows, and a row's answer hangs on that row alone. What it draws row by row hangs on the row's place
    and on the batch's width too; on neither in a run with `width=1`. Draws from elsewhere (a generator of the model's
    own, another framework, a server) are averaged, but are not repeated.

    What was found under some draws may fool those draws only: the engine confirms it under others (`fresh`).
    """

    def __init__(self, model: object, n: int = 20, *, seed: int = 0, **options: Any) -> None:
        if type(n) is not int or n < 1:
            raise UsageError(f"expected a number n of draws of at least 1, got {n!r}; such as EOT(model, n=20)")
        if isinstance(model, EOT):
            raise UsageError(f"expected a model to draw from, got {model!r}, which averages already; give its model")
        torchs = isinstance(model, nn.Module) and not comes_from(model, "keras")  # whose models may be both
        self.model: Model = wrap(model, **({"dropout": True} if torchs else {}) | options)
        self.n, self.seed = n, seed
        self.access, self.bounds = self.model.access, self.model.bounds
        self._stream(0)

    def _stream(self, number: int) -> None:
        self.stream = number
        draw = torch.arange(self.n)
        self._seeds: list[int] = noise.keys(self.seed, draw, torch.full_like(draw, number)).tolist()

    def __repr__(self) -> str:
        """Such as `EOT(TorchModel, n=20, seed=0)`."""
        return f"EOT({type(self.model).__name__}, n={self.n}, seed={self.seed})"

    @property
    def passes(self) -> int:
        """One a draw."""
        return self.n

    def fresh(self) -> EOT:
        """The mean over n other draws."""
        other = object.__new__(EOT)
        other.__dict__.update(self.__dict__)
        other._stream(self.stream + 1)
        return other

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        asked = max(access, min(self.access, Access.SCORE))
        with apart(x.device) as seed:
            draws = [self._draw(x, asked, seed, number) for number in self._seeds]
        logits = [draw.logits for draw in draws if draw.logits is not None]
        if len(logits) < self.n:
            named = torch.stack([draw.labels for draw in draws])
            labels = named.mode(0).values
            return Prediction(labels, votes=_share(named, labels))
        stacked = torch.stack(logits)
        if bool((stacked > -_SIMPLEX).all()) and bool(((stacked.double().sum(2) - 1).abs() < _SIMPLEX).all()):
            raise ModelError(
                "expected logits, got probabilities (rows that sum to 1); drop the final softmax, "
                "or say so: EOT(net, n, probabilities=True)"
            )
        values = _mean(stacked)
        labels = values.argmax(1)
        votes = _share(stacked.argmax(2), labels)
        pulls = [draw.vjp for draw in draws if draw.vjp is not None]
        vjp = self._pullback(stacked, pulls, x.device) if access >= Access.GRADIENT and len(pulls) == self.n else None
        return Prediction(labels, values if access >= Access.SCORE else None, vjp, votes)

    def _draw(self, x: Tensor, access: Access, seed: Callable[[int], None], number: int) -> Prediction:
        seed(number)
        return self.model.query(x, access)

    def _pullback(self, stacked: Tensor, pulls: list[Pullback], device: torch.device) -> Pullback:
        """v -> sum over draws of v^T d mean / d logits_i d logits_i / d x."""

        def pull(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            with torch.enable_grad():
                leaf = stacked.detach().requires_grad_()
                (parts,) = torch.autograd.grad(_mean(leaf), leaf, cotangent)
            total = torch.zeros(())
            with apart(device) as seed:
                for index, (vjp, part) in enumerate(zip(pulls, parts, strict=True)):
                    seed(self._seeds[index])  # a backward pass may draw as well
                    gradient = vjp(part, keep=keep)
                    total = gradient if index == 0 else total + gradient
            return total

        return pull


def _mean(stacked: Tensor) -> Tensor:
    """(rows, classes) log of the mean probabilities of logits (draws, rows, classes)."""
    return stacked.log_softmax(2).logsumexp(0) - math.log(len(stacked))


def _share(named: Tensor, labels: Tensor) -> Tensor:
    """(rows,) float32 share of the draws whose labels (draws, rows) are `labels` (rows,)."""
    return (named == labels).float().mean(0)


@contextmanager
def apart(device: torch.device) -> Iterator[Callable[[int], None]]:
    """What seeds every global generator that a model may draw from; afterwards they are as they were."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    legacy, plain = np.random.get_state(), random.getstate()  # noqa: NPY002 - models draw from it

    def seed(number: int) -> None:
        for generator in generators:
            generator.manual_seed(number)
        np.random.seed(number & 0xFFFFFFFF)  # noqa: NPY002 - models draw from it
        random.seed(number)

    try:
        yield seed
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(legacy)  # noqa: NPY002 - models draw from it
        random.setstate(plain)
