"""Corruptions: blurs beside SciPy, boxes beside Pillow, brightness beside HSV, noises beside their laws."""

from __future__ import annotations

import colorsys
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from sparring.attacks.corruption import KINDS, Corruption, corrupt
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.model import Access, Prediction
from sparring.core.threat import Unbounded
from sparring.engine.loop import run
from sparring.testing import Probe

SHAPES = [(1, 8, 8), (3, 32, 32), (1, 5, 9), (1, 1, 1), (2, 3, 1)]
SEVERITIES = range(1, 6)
KEY = torch.arange(3)


def graded(*constants):
    """(severity, constant) from 1 to 5."""
    return list(zip(SEVERITIES, constants, strict=True))


def images(shape, rows=3):
    return noise.uniform(torch.arange(rows) + 40, shape).double()


def asked(attack, x, limit):
    """(queries, n, ...) all that is asked while nothing fools."""
    zero = torch.zeros(len(x), dtype=torch.int64)
    batch = Batch(x, zero, zero - 1, torch.arange(len(x)) + 7, limit)
    seen = Observation(batch, Prediction(zero), zero > 0, Access.DECISION)
    state = attack.init(batch)
    points = [state.x]
    while not state.done.any():
        state = attack.step(batch, state, seen)
        points.append(state.x)
    assert state.done.all()
    return torch.stack(points)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("severity", "sigma"), graded(0.4, 0.6, 0.7, 0.8, 1.0))
def test_gaussian_blur_is_that_of_scipy(shape, severity, sigma):
    x = images(shape)
    wanted = ndimage.gaussian_filter(x.numpy(), sigma, mode="nearest", truncate=4.0, axes=(2, 3))
    torch.testing.assert_close(corrupt(x, "gaussian_blur", severity, KEY), torch.tensor(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("severity", "radius", "sigma"), [(1, 0.3, 0.4), (2, 0.4, 0.5), (3, 0.5, 0.6), (4, 1, 0.2), (5, 1.5, 0.1)]
)
def test_defocus_blur_is_a_soft_disk_in_scipy(shape, severity, radius, sigma):
    x, at = images(shape), np.arange(-8, 9)
    disk = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    bell = np.exp(-(np.array([-1, 0, 1]) ** 2) / (2 * sigma**2))
    bell /= bell.sum()
    soft = ndimage.correlate(disk / disk.sum(), bell[:, None] * bell, mode="constant")
    wanted = [[ndimage.correlate(part, soft, mode="mirror") for part in image] for image in x.numpy()]
    got = corrupt(x, "defocus_blur", severity, KEY)
    torch.testing.assert_close(got, torch.tensor(np.array(wanted)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (8, 8), (64, 48), (33, 17)])
@pytest.mark.parametrize(("severity", "share"), graded(0.95, 0.9, 0.85, 0.75, 0.65))
def test_pixelate_is_that_of_pillow(size, severity, share):
    height, width = size
    grey = images((1, height, width), 1)[0, 0].float()
    small = int(width * share), int(height * share)
    wanted = Image.fromarray(grey.numpy()).resize(small, Image.Resampling.BOX)
    wanted = np.array(wanted.resize((width, height), Image.Resampling.BOX))
    got = corrupt(grey.double()[None, None], "pixelate", severity, KEY[:1])[0, 0]
    torch.testing.assert_close(got.float(), torch.tensor(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("severity", "more"), graded(0.05, 0.1, 0.15, 0.2, 0.3))
def test_brightness_raises_the_value_of_hsv(severity, more):
    x = images((3, 6, 6))
    x[0, :, 0, 0], x[1, :, 2, 3] = 0.0, 0.4  # black, and a grey
    got = corrupt(x, "brightness", severity, KEY)
    for row in range(3):
        for place in np.ndindex(6, 6):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[row, :, *place].tolist())
            wanted = colorsys.hsv_to_rgb(hue, saturation, min(value + more, 1.0))
            assert got[row, :, *place].tolist() == pytest.approx(wanted, abs=1e-12)
    grey = images((1, 4, 4))
    torch.testing.assert_close(corrupt(grey, "brightness", severity, KEY), (grey + more).clamp_max(1.0))


@pytest.mark.parametrize(("severity", "share"), graded(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_shrinks_towards_the_mean_of_each_channel(severity, share):
    x = images((3, 5, 7))
    got = corrupt(x, "contrast", severity, KEY)
    torch.testing.assert_close(got.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(got.amax((2, 3)) - got.amin((2, 3)), share * (x.amax((2, 3)) - x.amin((2, 3))))
    pairs = got.flatten(2)[..., :-1] - got.flatten(2)[..., 1:]
    torch.testing.assert_close(pairs, share * (x.flatten(2)[..., :-1] - x.flatten(2)[..., 1:]))


@pytest.mark.parametrize(("severity", "photons"), graded(500, 250, 100, 75, 50))
@pytest.mark.parametrize("level", [0.0, 0.01, 0.3, 0.7])
def test_shot_noise_is_poisson(severity, photons, level):
    x = torch.full((1, 1, 100, 100), level, dtype=torch.float64)
    counts = corrupt(x, "shot_noise", severity, KEY[:1]) * photons
    whole = counts.round()
    assert (counts - whole).abs().max() < 1e-9
    law = stats.poisson(level * photons)
    if level == 0:
        assert not counts.any()
        return
    cuts = np.unique(law.ppf(np.linspace(0.05, 0.95, 10)))
    seen = np.diff(np.searchsorted(np.sort(whole.flatten().numpy()), [-1, *(cuts + 0.5), 1e9]))
    chances = np.diff([0.0, *law.cdf(cuts), 1.0])
    keep = chances > 0
    assert stats.chisquare(seen[keep], chances[keep] * 10_000).pvalue > 1e-3
    assert float(corrupt(torch.ones_like(x), "shot_noise", severity, KEY[:1]).max()) == 1.0


@pytest.mark.parametrize(("severity", "scale"), graded(0.04, 0.06, 0.08, 0.09, 0.10))
def test_gaussian_noise_is_normal(severity, scale):
    x = torch.full((1, 1, 100, 100), 0.5, dtype=torch.float64)
    change = corrupt(x, "gaussian_noise", severity, KEY[:1]) - x
    assert stats.kstest(change.flatten().numpy(), stats.norm(0, scale).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("severity", "scale"), graded(0.06, 0.1, 0.12, 0.16, 0.2))
def test_speckle_noise_is_normal_in_proportion(severity, scale):
    x = torch.full((1, 2, 100, 50), 0.5, dtype=torch.float64)
    x[:, 1] = 0.1
    change = (corrupt(x, "speckle_noise", severity, KEY[:1]) - x) / x
    for part in change[0]:
        assert stats.kstest(part.flatten().numpy(), stats.norm(0, scale).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("severity", "share"), graded(0.01, 0.02, 0.03, 0.05, 0.07))
def test_impulse_noise_is_salt_and_pepper(severity, share):
    x = torch.full((1, 3, 100, 100), 0.5, dtype=torch.float64)
    got = corrupt(x, "impulse_noise", severity, KEY[:1])
    for value in (0.0, 1.0):
        low, high = stats.binom.interval(0.999, 30_000, share / 2)
        assert low <= int((got == value).sum()) <= high
    assert got.unique().tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_stays_in_range_and_a_row_does_not_hang_on_the_others(kind, shape):
    x = images(shape)
    for severity in SEVERITIES:
        got = corrupt(x, kind, severity, KEY)
        assert got.shape == x.shape
        assert ((got >= 0) & (got <= 1)).all()
        assert torch.equal(corrupt(x[1:2], kind, severity, KEY[1:2]), got[1:2])
        if kind.endswith("noise") and shape[1] > 4:
            assert not torch.equal(corrupt(x, kind, severity, KEY + 9), got)
        elif not kind.endswith("noise"):
            assert torch.equal(corrupt(x, kind, severity, KEY + 9), got)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_all_are_asked_from_the_mildest_on_in_the_units_of_the_input(bounds):
    low, high = bounds
    share = images((3, 32, 32)).float()
    points = asked(Corruption(), low + (high - low) * share, Unbounded(bounds))
    assert len(points) == 45
    for query, point in enumerate(points):
        kind, severity = list(KINDS)[query % 9], query // 9 + 1
        if not kind.endswith("noise"):
            wanted = low + (high - low) * corrupt(share.double(), kind, severity, KEY).float()
            torch.testing.assert_close(point, wanted, rtol=0, atol=2e-6 * (high - low))
    flat = points.flatten(2).transpose(0, 1)
    assert all(len(row.unique(dim=0)) == 45 for row in flat)


def test_noise_is_drawn_anew_for_every_kind_and_severity():
    """The same draw at another scale would be the same direction again."""
    x = torch.full((1, 1, 20, 20), 0.5)
    points = asked(Corruption(), x, Unbounded()).flatten(2)[:, 0]
    gaussian = [points[query] - 0.5 for query in range(0, 45, 9)]
    speckle = [points[query] - 0.5 for query in range(3, 45, 9)]
    for one, two in itertools.combinations([*gaussian, *speckle], 2):
        assert abs(float(torch.nn.functional.cosine_similarity(one, two, dim=0))) < 0.25  # five deviations of 1 / 20


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 45), ({"severity": 2}, 18), ({"kinds": "contrast"}, 5), ({"kinds": "shot_noise", "severity": 1}, 1)],
)
def test_the_count_of_queries_is_exact(options, count):
    x, y = images((1, 6, 6)).float(), torch.zeros(3, dtype=torch.int64)
    outcome = run(Probe(lambda flat: torch.stack([flat.sum(1) * 0 + 5, flat[:, 0]], 1)), Corruption(**options),
                  Unbounded(), x, y)  # fmt: skip
    assert outcome.forward.tolist() == [count] * 3
    assert not outcome.found.any()


def test_the_mildest_that_fools_is_kept():
    """Fooled by a mean above 0.62, a spot of grey 0.5 is so from brightness 0.15 on."""
    x, y = torch.full((2, 1, 6, 6), 0.5), torch.zeros(2, dtype=torch.int64)
    model = Probe(lambda flat: torch.stack([flat.mean(1) * 0, 9 * (flat.mean(1) - 0.62)], 1))
    outcome = run(model, Corruption("brightness"), Unbounded(), x, y)
    assert outcome.forward.tolist() == [3, 3]
    torch.testing.assert_close(outcome.best, torch.full_like(x, 0.65))


@pytest.mark.parametrize("options", [{"kinds": "contrst"}, {"severity": 0}, {"severity": 6}])
def test_what_is_no_corruption_is_refused(options):
    with pytest.raises(UsageError, match=r"did you mean 'contrast'|expected a severity"):
        Corruption(**options)
