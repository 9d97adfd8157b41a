"""Randomised smoothing: the class a model names most often under Gaussian noise, and an L2 radius around the image.

Cohen, Rosenfeld and Kolter 2019 (arXiv:1902.02918), algorithms PREDICT and CERTIFY. What is said here is about the
smoothed classifier, which takes that vote, never about the model alone; it comes of draws, and is wrong with
probability alpha at most, for each image. So it is no proof, and nothing here counts as `Verdict.CERTIFIED`.

The theorem is about x + e with e ~ N(0, sigma^2 I), so noisy images leave the range of pixels and are not clipped.
No adapter minds: `query` checks no bounds, and what a model itself does with such pixels is part of what is smoothed.
The noise is that of a generator, in float32, where the theorem has real numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparring.core import noise
from sparring.core.batch import Rows
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Model, Sampled
from sparring.engine import width as widths
from sparring.engine.asking import ask
from sparring.engine.preflight import check_images, check_labels, check_model

_RANK = -1  # of the noise keys: attacks and training, whose ranks start at 0, draw other noise from the same seed


@dataclass(frozen=True)
class Predicted(Rows):
    """What the smoothed classifier says of each row, by PREDICT."""

    prediction: Tensor  # (n,) int64: the class named most often; -1 where the model mostly had no answer
    abstained: Tensor  # (n,) bool: too close a vote, so nothing is claimed
    forward: Tensor  # (n,) int64: forward passes spent


@dataclass(frozen=True)
class Smoothed(Rows):
    """What is claimed of each row, by CERTIFY: no image nearer than `radius` has another class when smoothed."""

    y: Tensor  # (n,) int64: true labels
    prediction: Tensor  # (n,) int64: the class that the first n0 draws name; -1: mostly no answer
    abstained: Tensor  # (n,) bool: nothing is claimed: too close a vote, or a wrong class, of which no more was asked
    count: Tensor  # (n,) int64: how many of the next n draws name it
    lower: Tensor  # (n,) float64: a bound that lies above the probability of naming it with probability alpha at most
    radius: Tensor  # (n,) float64: L2, in the units of the input; 0 where nothing is claimed
    forward: Tensor  # (n,) int64: forward passes spent

    @property
    def right(self) -> Tensor:
        """(n,) bool: the true class is claimed."""
        return (self.prediction == self.y) & ~self.abstained

    @property
    def average_radius(self) -> float:
        """The mean radius, 0 where nothing or a wrong class is claimed (ACR: Zhai et al. 2020, MACER)."""
        return torch.where(self.right, self.radius, 0.0).mean().item()

    def accuracy(self, radius: float) -> float:
        """Certified accuracy: the share of the rows whose true class is claimed with at least this radius."""
        return (self.right & (self.radius >= radius)).double().mean().item()


def smooth(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    seed: int = 0,
    sample: Tensor | None = None,
    thorough: bool = False,
    width: int | None = None,
) -> Smoothed:
    """CERTIFY for images `x` (n, c, h, w) with labels `y` (n,): n0 draws choose a class, n others bound its share.

    `sample` (n,) are ids that seed each row's noise (default: 0 to n - 1). A row's draws depend on seed, id and their
    own number, not on its neighbours or on `width`, the images a model call.

    A row for which the first draws name a wrong class is asked no further unless `thorough`: nothing is claimed of
    it, so no claim can be false, and accuracy and average radius stay what they are, since only right rows count
    there. The n draws always run to their end: to stop as soon as the bound suffices would need a smaller alpha.
    """
    voters = _Voters.of(model, x, sigma, n0, alpha, seed, sample, width)
    check_labels(y, len(x), classes=check_model(model, x, Access.DECISION))
    if n < 1:
        raise UsageError(f"expected n draws of at least 1, got {n}")
    guess = _first(voters.ask(range(n0)))
    kept = (guess >= 0) if thorough else (guess == y)
    at = kept.nonzero().squeeze(1)
    votes = voters.take(at).ask(range(n0, n0 + n), max(0, int(guess.max())))
    count = torch.zeros_like(y).index_put((at,), votes.gather(1, guess[at, None] + 1).squeeze(1))
    lower = lower_bound(count, n, alpha)
    abstained = lower <= 0.5
    return Smoothed(
        y=y,
        prediction=guess,
        abstained=abstained,
        count=count,
        lower=lower,
        radius=torch.where(abstained, 0.0, sigma * _quantile(lower)),
        forward=n0 + n * kept.long(),
    )


def predict(
    model: Model,
    x: Tensor,
    *,
    sigma: float,
    n: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    sample: Tensor | None = None,
    width: int | None = None,
) -> Predicted:
    """PREDICT for images `x` (n, c, h, w): the class that wins the vote of n draws, or that nobody can say.

    It abstains unless a two-sided test of the two leading classes against a fair coin gives a p of at most alpha
    (Hung and Fithian 2019); another class than the smoothed classifier's is named with probability alpha at most.
    """
    voters = _Voters.of(model, x, sigma, n, alpha, seed, sample, width)
    check_model(model, x, Access.DECISION)
    votes = voters.ask(range(n))
    (first, second), prediction = votes.topk(2).values.unbind(1), _first(votes)
    close = _chance(first, first + second) > alpha
    return Predicted(prediction, close | (prediction < 0), torch.full_like(prediction, n))


def check_noise(sigma: float, alpha: float) -> None:
    """`UsageError` for what can be no size of noise, or no probability of a false claim."""
    if not (sigma > 0 and math.isfinite(sigma)):
        raise UsageError(f"expected sigma > 0, got {sigma}; give it in the units of the input")
    if not 0 < alpha < 1:
        raise UsageError(f"expected alpha between 0 and 1, got {alpha}; such as 0.001")


def lower_bound(count: Tensor, n: int, alpha: float) -> Tensor:
    """(m,) float64: below the probability of what `count` (m,) of n draws showed, but with probability alpha.

    The exact one-sided bound of Clopper and Pearson 1934, a quantile of beta(count, n - count + 1).
    """
    from scipy.special import betaincinv  # scipy.stats takes a second to load

    hits = count.cpu().numpy()
    quantile = torch.as_tensor(betaincinv(hits.clip(1), n - hits.clip(1) + 1, alpha), dtype=torch.float64)
    return quantile.to(count.device).masked_fill(count == 0, 0.0)


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """The radius that n unanimous draws give: no more can be claimed, whatever the model."""
    lower = lower_bound(torch.tensor([n]), n, alpha)
    return sigma * max(0.0, _quantile(lower).item())


def _quantile(share: Tensor) -> Tensor:
    """Phi^-1, of float64."""
    value: Tensor = torch.special.ndtri(share)
    return value


def _chance(first: Tensor, both: Tensor) -> Tensor:
    """(m,) float64: the probability that of `both` fair tosses the more frequent side shows `first` times or more."""
    from scipy.special import betainc

    most, of = first.cpu().numpy(), both.cpu().numpy()
    tail = torch.as_tensor(betainc(most, of - most + 1, 0.5), dtype=torch.float64)
    return (2 * tail).clamp_max(1.0).to(first.device)


def _first(votes: Tensor) -> Tensor:
    """(m,) the class with the most of `votes` (m, 1 + classes); -1 where most draws had no answer."""
    return votes.argmax(1) - 1


@dataclass(frozen=True)
class _Voters(Rows):
    """Rows whose model is asked about them under noise."""

    x: Tensor
    key: Tensor
    model: Model
    sigma: float
    width: int

    @classmethod
    def of(
        cls,
        model: Model,
        x: Tensor,
        sigma: float,
        draws: int,
        alpha: float,
        seed: int,
        sample: Tensor | None,
        width: int | None,
    ) -> _Voters:
        """The voters of these rows, once all that was asked for can be meant."""
        if isinstance(model, Sampled):
            raise ModelError(
                f"expected a model that answers each image by itself, got {model!r}, whose draws are shared by a "
                f"batch; smooth the model inside it"
            )
        check_noise(sigma, alpha)
        if draws < 1 or (width is not None and width < 1):
            raise UsageError(f"expected draws and width of at least 1, got {draws} and {width}")
        check_images(x, model.bounds)
        sample = torch.arange(len(x), device=x.device) if sample is None else sample
        key = noise.keys(seed, sample, torch.full_like(sample, _RANK))
        return cls(x, key, model, sigma, width or widths.automatic(x[0]))

    def ask(self, draws: range, top: int = 0) -> Tensor:
        """(n, 1 + classes) int64: how many of `draws` had no answer, and named each class, at least up to `top`."""
        votes = torch.zeros(len(self.x), 2 + top, dtype=torch.int64, device=self.x.device)
        pairs, start, width = len(self.x) * len(draws), 0, self.width
        while start < pairs:
            pair = torch.arange(start, min(start + width, pairs), device=self.x.device)
            row, draw = pair // len(draws), draws.start + pair % len(draws)
            try:
                named = self._labels(row, draw) + 1
            except RuntimeError as error:
                if width == 1 or not widths.out_of_memory(error):
                    raise
                width //= 2
                continue
            votes = pad(votes, (0, max(0, int(named.max()) + 1 - votes.shape[1])))
            votes = votes.index_put((row, named), torch.ones_like(named), accumulate=True)
            start += len(pair)
        return votes

    def _labels(self, row: Tensor, draw: Tensor) -> Tensor:
        """(m,) int64: what the model says of rows `row` (m,) under draws `draw` (m,); -1 where it has no answer."""
        noisy = self.x[row] + self.sigma * noise.normal(self.key[row], self.x.shape[1:], draw)
        return ask(self.model, noisy, Access.DECISION).prediction.labels
