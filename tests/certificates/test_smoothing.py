"""Randomised smoothing against linear models, whose smoothed probabilities and radii are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from sparring.certificates.smoothing import Smoothed, largest_radius, lower_bound, predict, smooth
from sparring.core.errors import DataError, ModelError, UsageError
from sparring.core.model import Access, Prediction
from sparring.models.eot import EOT
from sparring.models.nets import build
from sparring.models.torch import TorchModel

UNLIKELY = 1e-5  # the p of a test that should not fail by chance
WEIGHT = torch.tensor([1.0, -2.0, 0.5, 1.5])
SIGMA = 0.25


class Linear:
    """Class 1 where w . x + b > 0; every noisy image asked about is kept."""

    access, bounds = Access.DECISION, (0.0, 1.0)

    def __init__(self, bias: float) -> None:
        self.bias, self.asked = bias, []

    def query(self, x, access):
        if access == Access.DECISION:  # the questions of the preflight see more
            self.asked.append(x)
        return Prediction(((x.flatten(1) @ WEIGHT + self.bias) > 0).long())


def corner(far, count):
    """`count` times an image at the border of the pixel range, with a model whose plane lies `far` from it."""
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 2, 2)
    model = Linear(far * WEIGHT.norm().item() - (x.flatten() @ WEIGHT).item())
    return model, x.expand(count, -1, -1, -1), torch.ones(count, dtype=torch.int64)


def chance(hits, of, p):
    """Both tails of the binomial."""
    return 2 * min(stats.binom.sf(hits - 1, of, p), stats.binom.cdf(hits, of, p))


@pytest.mark.parametrize("far", [0.02, 0.2, 0.5])
def test_the_share_of_the_draws_is_that_of_the_normal_distribution(far):
    model, x, y = corner(far, 500)
    found = smooth(model, x, y, sigma=SIGMA, n0=1, n=400, thorough=True)
    hits = torch.where(found.prediction == 1, found.count, 400 - found.count)
    p = stats.norm.cdf(far / SIGMA)
    assert chance(int(hits.sum()), 500 * 400, p) > UNLIKELY
    spread = hits.double().var().item() / (400 * p * (1 - p))  # of rows whose draws hang together it is not 1
    assert 0.75 < spread < 1.3


@pytest.mark.parametrize(("far", "alpha", "n"), [(0.1, 0.05, 200), (0.1, 0.2, 50), (0.3, 0.1, 300)])
def test_the_radius_is_above_the_distance_to_the_plane_as_often_as_alpha_allows(far, alpha, n):
    model, x, y = corner(far, 2000)
    found = smooth(model, x, y, sigma=SIGMA, n0=1, n=n, alpha=alpha, seed=3)
    kept = int((found.prediction == 1).sum())
    false = int((found.radius > far).sum())
    p = stats.norm.cdf(far / SIGMA)
    bad = lower_bound(torch.arange(n + 1), n, alpha).numpy() > p
    exact = stats.binom.pmf(range(n + 1), n, p)[bad].sum()
    assert alpha / 3 < exact <= alpha
    assert chance(false, kept, exact) > UNLIKELY


def test_the_radius_approaches_the_distance_to_the_plane():
    n, far = 200_000, 0.3
    model, x, y = corner(far, 2)
    found = smooth(model, x, y, sigma=SIGMA, n=n, width=20_000)
    p = stats.norm.cdf(far / SIGMA)
    step = math.sqrt(p * (1 - p) / n) / stats.norm.pdf(far / SIGMA) * SIGMA  # a standard error, of the radius
    assert (found.radius < far + step).all()
    assert (found.radius > far - 8 * step).all()
    assert 8 * step < 0.01


def test_sigma_is_the_unit_of_the_radius():
    model, x, y = corner(0.3, 4)
    one = smooth(model, x, y, sigma=0.2, n=500)
    model, x, y = corner(0.6, 4)
    two = smooth(model, x, y, sigma=0.4, n=500)
    assert torch.equal(one.count, two.count)
    torch.testing.assert_close(two.radius, 2 * one.radius, rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("n", [1, 10, 10_000])
def test_the_lower_bound_is_that_of_clopper_and_pearson(n, alpha):
    count = torch.tensor(sorted({0, 1, n // 2, n - 1, n}))
    lower = lower_bound(count, n, alpha)
    for hits, low in zip(count.tolist(), lower.tolist(), strict=True):
        known = stats.binomtest(hits, n, alternative="greater").proportion_ci(1 - alpha, "exact").low
        assert low == pytest.approx(known, rel=1e-9)
        if hits:  # by its definition: so many hits or more are seen with probability alpha
            assert stats.binom.sf(hits - 1, n, low) == pytest.approx(alpha, rel=1e-6)
    assert lower.dtype == torch.float64


def test_on_the_border_of_two_classes_nothing_is_claimed():
    model, x, y = corner(0.0, 1000)
    found = smooth(model, x, y, sigma=SIGMA, n0=10, n=100, alpha=0.05, thorough=True)
    claimed = int((~found.abstained).sum())
    assert stats.binom.sf(claimed - 1, 1000, 0.05) > UNLIKELY
    assert (found.radius[found.abstained] == 0).all()
    assert (found.radius[~found.abstained] > 0).all()
    said = predict(model, x, sigma=SIGMA, n=100, alpha=0.05)
    assert stats.binom.sf(int((~said.abstained).sum()) - 1, 1000, 0.05) > UNLIKELY
    assert (~said.abstained).any()


def test_predict_abstains_by_the_binomial_test():
    model, x, _ = corner(0.05, 200)
    n, alpha = 20, 0.05
    said = predict(model, x, sigma=SIGMA, n=n, alpha=alpha, seed=5)
    ones = ((torch.cat(model.asked).flatten(1) @ WEIGHT + model.bias) > 0).view(200, n).sum(1)
    assert {14, 15} <= set(ones.tolist())  # on either side of where it decides
    for row, hits in enumerate(ones.tolist()):
        assert said.prediction[row] == int(2 * hits > n)  # of a tie the first
        assert bool(said.abstained[row]) == (stats.binomtest(hits, n, 0.5).pvalue > alpha)
    assert 0 < int(said.abstained.sum()) < 200
    assert (said.forward == n).all()


def test_every_draw_is_another_and_is_asked_about_once():
    model, x, y = corner(0.2, 6)
    y = torch.tensor([1, 1, 0, 1, 0, 1])
    found = smooth(model, x, y, sigma=SIGMA, n0=20, n=150, width=64)
    asked = torch.cat(model.asked)
    assert max(len(query) for query in model.asked) == 64
    assert len(asked) == int(found.forward.sum())
    assert found.forward.tolist() == [170, 170, 20, 170, 20, 170]
    assert len(asked.flatten(1).unique(dim=0)) == len(asked)
    assert (asked > 1).any()
    assert (asked < 0).any()  # noise is not clipped


def test_a_row_does_not_hang_on_its_neighbours_or_on_the_width():
    net = TorchModel(build("conv", (1, 12, 12), 5).eval())
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(9, 1, 12, 12, generator=generator), torch.arange(9) % 5
    how = {"sigma": 0.5, "n0": 30, "n": 200, "seed": 4, "thorough": True}
    whole = smooth(net, x, y, **how)
    assert len(whole.count.unique()) > 4
    order = torch.randperm(9, generator=generator)
    for index, width in ((order, 7), (order[:3], 1), (torch.tensor([8]), 1000)):
        part = smooth(net, x[index], y[index], sample=index, width=width, **how)
        for name in ("prediction", "abstained", "count", "lower", "radius", "forward"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[index]), name
    other = smooth(net, x, y, **how | {"seed": 5})
    assert not torch.equal(other.count, whole.count)


def test_stopping_at_a_wrong_class_changes_no_figure_that_counts():
    net = TorchModel(build("conv", (1, 12, 12), 3).eval())
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(30, 1, 12, 12, generator=generator), torch.arange(30) % 3
    brief = smooth(net, x, y, sigma=0.3, n0=20, n=100)
    whole = smooth(net, x, y, sigma=0.3, n0=20, n=100, thorough=True)
    wrong = brief.prediction != y
    assert 0 < int(wrong.sum()) < 30
    assert (brief.forward == torch.where(wrong, 20, 120)).all()
    assert (whole.forward == 120).all()
    assert brief.abstained[wrong].all()
    assert not whole.abstained[wrong].all()
    assert torch.equal(brief.radius[~wrong], whole.radius[~wrong])
    assert brief.average_radius == whole.average_radius > 0
    lost = smooth(net, x[wrong], y[wrong], sigma=0.3, n0=20, n=100, sample=wrong.nonzero().squeeze(1))
    assert (lost.forward == 20).all()
    assert lost.abstained.all()
    for radius in (0.0, 0.1, brief.radius.max().item()):
        assert brief.accuracy(radius) == whole.accuracy(radius)


def test_accuracy_over_the_radius_counts_what_is_right_and_claimed():
    found = Smoothed(
        y=torch.tensor([0, 0, 0, 1]),
        prediction=torch.tensor([0, 1, 0, 1]),
        abstained=torch.tensor([False, False, True, False]),
        count=torch.zeros(4, dtype=torch.int64),
        lower=torch.zeros(4, dtype=torch.float64),
        radius=torch.tensor([0.5, 9.0, 0.0, 0.25], dtype=torch.float64),
        forward=torch.zeros(4, dtype=torch.int64),
    )
    assert [found.accuracy(r) for r in (0.0, 0.25, 0.3, 0.5, 0.51)] == [0.5, 0.5, 0.25, 0.25, 0.0]
    assert found.average_radius == pytest.approx(0.75 / 4)


def test_the_largest_radius_is_that_of_unanimous_draws():
    model, x, y = corner(50.0, 1)
    found = smooth(model, x, y, sigma=SIGMA, n=300)
    assert found.count.item() == 300
    assert found.radius.item() == largest_radius(SIGMA, 300, 0.001)
    assert found.radius.item() == pytest.approx(SIGMA * stats.norm.ppf(0.001 ** (1 / 300)), rel=1e-9)
    assert largest_radius(SIGMA, 5, 0.001) == 0  # so few draws claim nothing


class Moody(Linear):
    """Has no answer for images whose first pixel is below 0.7, alone or in company."""

    def query(self, x, access):
        if (x[:, 0, 0, 0] < 0.7).any():
            raise ModelError("too dark")
        return super().query(x, access)


def test_a_draw_without_an_answer_counts_against_the_class():
    _, x, y = corner(50.0, 40)
    model = Moody(1e6)
    found = smooth(model, x, y, sigma=SIGMA, n0=50, n=200)
    p = stats.norm.cdf(0.3 / SIGMA)
    assert (found.prediction == 1).all()
    assert chance(int(found.count.sum()), 40 * 200, p) > UNLIKELY
    x = x.clone()
    x[:, 0, 0, 0] = 0.2
    x[0, 0, 0, 0] = 1.0
    found = smooth(model, x[:3], y[:3], sigma=SIGMA, n0=50, n=100)
    assert found.prediction.tolist() == [1, -1, -1]
    assert found.abstained.tolist() == [False, True, True]
    assert predict(model, x[:3], sigma=SIGMA, n=200).abstained.tolist() == [False, True, True]


class Cramped(Linear):
    """Has room for eight images."""

    def query(self, x, access):
        if len(x) > 8:
            raise torch.OutOfMemoryError("out of memory")
        return super().query(x, access)


def test_a_model_short_of_memory_is_asked_about_fewer_at_once():
    model, x, y = corner(0.6, 3)
    whole = smooth(model, x, y, sigma=SIGMA, n0=10, n=50)
    small = Cramped(model.bias)
    found = smooth(small, x, y, sigma=SIGMA, n0=10, n=50)
    assert torch.equal(found.count, whole.count)
    assert sum(map(len, small.asked)) == 180


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"sigma": 0.0}, UsageError, "sigma > 0"),
        ({"sigma": math.nan}, UsageError, "sigma > 0"),
        ({"alpha": 0.0}, UsageError, "alpha between"),
        ({"alpha": 1.0}, UsageError, "alpha between"),
        ({"n": 0}, UsageError, "at least 1"),
        ({"n0": 0}, UsageError, "at least 1"),
        ({"width": 0}, UsageError, "at least 1"),
        ({"x": torch.full((2, 1, 2, 2), 255.0)}, DataError, "divide by 255"),
        ({"y": torch.ones(2)}, DataError, "int64 labels"),
        ({"model": EOT(nn.Flatten(), 2)}, ModelError, "smooth the model inside it"),
    ],
)
def test_bad_input_is_refused(change, error, said):
    model, x, y = corner(0.2, 2)
    how = {"model": model, "x": x, "y": y, "sigma": SIGMA, "n": 10} | change
    with pytest.raises(error, match=said):
        smooth(**how)


def test_labels_that_the_model_cannot_name_are_refused():
    net = TorchModel(build("dense", (1, 4, 4), 3).eval())
    with pytest.raises(DataError, match="from 0 to 2"):
        smooth(net, torch.rand(2, 1, 4, 4), torch.tensor([0, 3]), sigma=0.1, n=5)
