"""An adversarial patch: the known optimum of a linear model, a slow reference of the paste, counts and refusals."""

from __future__ import annotations

import math

import pytest
import torch

import sparring
from sparring.core import noise
from sparring.core.errors import DataError, UsageError
from sparring.core.patch import Patch
from sparring.fitted.ascent import Ascent
from sparring.fitted.paste import Paste
from sparring.fitted.patch import AdversarialPatch, fit_patch

STILL = {"rotation": 0.0, "scale": (1.0, 1.0)}


def drawn(size, channels=1):
    return noise.uniform(torch.tensor([3]), (channels, size, size)).squeeze(0)


@pytest.mark.parametrize("bounds", [(-2.0, 2.0), (-1.5, 2.5)])
@pytest.mark.parametrize("target", [None, 1])
def test_the_optimum_of_a_linear_model_at_a_fixed_place(plane, bounds, target):
    case = plane(12.0, bounds, (2, 6, 7))
    how = Paste(2, location=(1, 2), **STILL)
    fit = fit_patch(case.model, (case.x, case.y), how, target=target, steps=80, batch=6, cap=100.0)
    window = case.weight[:, 1:3, 2:4]
    optimum = torch.where(window > 0, bounds[0], bounds[1]).float()
    assert torch.equal(fit.patch, optimum)
    attacked = case.x.clone()
    attacked[:, :, 1:3, 2:4] = optimum
    closed = case.margin(attacked) < 0
    assert 0 < closed.sum() < len(closed)
    judged = fit.judge(case.model, (case.x, case.y), draws=2)
    assert torch.equal(judged.fooled, closed[:, None].expand(-1, 2))
    assert judged.rate == closed.double().mean()


def slow_paste(patch, x, how, key, stream):
    """One image, pixel by pixel in float64, from the same four random numbers."""
    share = noise.uniform(key[None], (4,), stream)[0].double().tolist()
    turn = math.radians(how.rotation) * (2 * share[0] - 1)
    factor = how.scale[0] + share[1] * (how.scale[1] - how.scale[0])
    half = factor * how.size / 2
    around = half * (abs(math.cos(turn)) + abs(math.sin(turn))) if how.shape == "square" else half
    middle = []
    for side, part in zip(x.shape[1:], share[2:], strict=True):
        places = math.floor(side - 2 * around) + 1
        middle.append(side / 2 if places < 1 else around + math.floor(part * places))
    result, mask = x.clone(), torch.zeros(x.shape[1:], dtype=torch.bool)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            down, right = i + 0.5 - middle[0], j + 0.5 - middle[1]
            across = (math.cos(turn) * right + math.sin(turn) * down) / factor
            along = (math.cos(turn) * down - math.sin(turn) * right) / factor
            far = math.hypot(across, along) if how.shape == "circle" else max(abs(across), abs(along))
            if far > how.size / 2:
                continue
            mask[i, j] = True
            row = min(max(along + how.size / 2 - 0.5, 0.0), how.size - 1.0)
            column = min(max(across + how.size / 2 - 0.5, 0.0), how.size - 1.0)
            r, c = min(int(row), how.size - 2), min(int(column), how.size - 2)
            a, b = row - r, column - c
            cell = patch[:, r : r + 2, c : c + 2].double()
            weights = torch.tensor([[(1 - a) * (1 - b), (1 - a) * b], [a * (1 - b), a * b]], dtype=torch.float64)
            result[:, i, j] = (cell * weights).sum((1, 2)).float()
    return result, mask


@pytest.mark.parametrize(
    "how",
    [
        Paste(3, rotation=180.0, scale=(0.7, 1.4)),
        Paste(4, "circle", rotation=40.0, scale=(0.8, 1.9)),
        Paste(5, rotation=45.0, scale=(1.0, 1.3)),  # does not always fit: then it is centred
    ],
)
def test_the_paste_is_that_of_a_slow_reference(how):
    x = noise.uniform(torch.arange(30), (3, 7, 9))
    key = noise.keys(1, torch.arange(30), torch.zeros(30, dtype=torch.int64))
    points, masks = how.paste(drawn(how.size, 3), x, how.grid(key, 5, 7, 9))
    for row in range(30):
        point, mask = slow_paste(drawn(how.size, 3), x[row], how, key[row], 5)
        assert torch.equal(masks[row, 0], mask)
        torch.testing.assert_close(points[row], point, rtol=0, atol=3e-6)


def test_without_turns_and_scales_the_patch_lies_on_whole_pixels_anywhere():
    how, patch = Paste(3, **STILL), drawn(3)
    x = noise.uniform(torch.arange(400), (1, 6, 7))
    points, masks = AdversarialPatch(patch, how).apply(x, torch.arange(400))
    seen = set()
    for point, mask in zip(points, masks[:, 0], strict=True):
        top, left = int(mask.any(1).int().argmax()), int(mask.any(0).int().argmax())
        assert mask.sum() == 9
        assert mask[top : top + 3, left : left + 3].all()
        torch.testing.assert_close(point[:, top : top + 3, left : left + 3], patch, rtol=0, atol=1e-6)
        seen.add((top, left))
    assert seen == {(top, left) for top in range(4) for left in range(5)}


def test_outside_its_mask_every_bit_stays_and_inside_it_is_legal():
    how = Paste(4, rotation=30.0, scale=(0.6, 1.5))
    x = noise.uniform(torch.arange(60), (2, 9, 9)) * 3 - 1
    fit = AdversarialPatch(drawn(4, 2).round() * 3 - 1, how, (-1.0, 2.0))
    points, mask = fit.apply(x, torch.arange(60))
    apart = (~mask).expand_as(x)
    assert torch.equal(points[apart], x[apart])
    assert Patch(mask=mask, bounds=(-1.0, 2.0)).contains(points, x).all()
    assert (points != x)[~apart].float().mean() > 0.9


def test_a_circle_is_the_pixels_whose_middles_it_holds():
    assert Paste(3, "circle").footprint().tolist() == [[True] * 3] * 3
    assert Paste(4, "circle").footprint().sum() == 12
    assert Paste(8, "circle").footprint().sum() == 52
    assert Paste(4).footprint().all()


def test_one_step_goes_where_finite_differences_point(net, rows):
    how, cap = Paste(3, rotation=20.0, scale=(0.8, 1.2)), 3.0
    fit = fit_patch(net, rows, how, steps=1, batch=40, rate=0.25, cap=cap, seed=9)
    ids = torch.arange(40)
    grid = how.grid(noise.keys(9, ids, torch.zeros_like(ids)), 0, 8, 8).double()
    twin = torch.nn.Sequential(*(type(m)(m.in_features, m.out_features) if hasattr(m, "bias") else m for m in net))
    twin.load_state_dict(net.state_dict())
    twin.double()

    def goal(patch):
        with torch.no_grad():
            z = twin(how.paste(patch, rows[0].double(), grid)[0])
        right = z.gather(1, rows[1][:, None]).squeeze(1)
        return (z.scatter(1, rows[1][:, None], -torch.inf).amax(1) - right).clamp_max(cap).mean()

    grey = torch.full((1, 3, 3), 0.5, dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            bump = torch.zeros_like(grey)
            bump[0, i, j] = 1e-6
            slope = goal(grey + bump) - goal(grey - bump)
            assert abs(slope) > 1e-9
            assert fit.patch[0, i, j] == 0.5 + 0.25 * slope.sign()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-20.0, 20.0)])
def test_a_step_is_a_share_of_the_pixel_range(net, rows, bounds):
    low, high = bounds
    wide = sparring.wrap(lambda x: net((x - low) / (high - low)), bounds=bounds)
    fit = fit_patch(wide, (low + (high - low) * rows[0], rows[1]), 3, steps=1, rate=0.25)
    moved = (fit.patch - (low + high) / 2).abs()
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 0.25 * (high - low)))
    assert (moved > 0).sum() >= 8


def test_every_step_and_every_judging_has_places_of_its_own(net, rows, monkeypatch):
    grid, asked = Paste.grid, []

    def noted(self, key, stream, *size):
        asked.append(grid(self, key, stream, *size))
        return asked[-1]

    monkeypatch.setattr(Paste, "grid", noted)
    fit = fit_patch(net, (rows[0][:1], rows[1][:1]), 3, steps=6, seed=4)
    fit.judge(net, (rows[0][:1], rows[1][:1]), draws=3, seed=4)
    assert len(asked) == 9
    assert len({tuple(one.flatten().tolist()) for one in asked}) == 9


def test_what_is_left_out_stays_what_it_was():
    """The defaults are behaviour: a patch or a perturbation fitted without a word on them hangs on all of these."""
    assert Ascent() == Ascent(steps=300, batch=100, rate=0.1, cap=5.0, seed=0)
    assert Paste(3) == Paste(3, shape="square", rotation=15.0, scale=(0.9, 1.1), location=None)


def test_what_is_judged_is_what_the_net_says(net, rows, others):
    fit = fit_patch(net, rows, 3, steps=30, batch=10)
    assert fit.patch.shape == (1, 3, 3)
    assert 0 <= fit.patch.min() < fit.patch.max() <= 1
    judged, (x, y) = fit.judge(net, others, draws=3, seed=6), others
    right = net(x).argmax(1) == y
    assert torch.equal(judged.held, right)
    for draw in range(3):
        said = net(fit.apply(x, torch.arange(100), draw=draw, seed=6)[0]).argmax(1)
        assert torch.equal(judged.fooled[:, draw], right & (said != y))
    assert judged.illegal == 0
    assert judged.rate == pytest.approx(judged.fooled[right].double().mean().item())
    assert not torch.equal(judged.fooled[:, 0], judged.fooled[:, 1])
    assert torch.equal(judged.fooled, fit.judge(net, others, draws=3, seed=6).fooled)
    assert not torch.equal(judged.fooled, fit.judge(net, others, draws=3, seed=7).fooled)
    assert fit.control().judge(net, others, draws=3, seed=6).rate < judged.rate


def test_a_paste_that_leaves_its_mask_counts_as_not_fooling(net, rows, monkeypatch):
    fit = fit_patch(net, rows, 3, steps=1)
    apply = AdversarialPatch.apply

    def spill(self, x, sample, **how):
        points, mask = apply(self, x, sample, **how)
        return points, mask.roll(1, 2)

    monkeypatch.setattr(AdversarialPatch, "apply", spill)
    judged = fit.judge(net, rows, draws=1)
    assert judged.rate == 0
    assert judged.illegal == 40


def test_with_a_target_only_that_class_counts(net, rows, others):
    fit = fit_patch(net, rows, 4, target=8, steps=30, batch=20)
    judged = fit.judge(net, others, draws=1)
    said = net(fit.apply(others[0], torch.arange(100))[0]).argmax(1)
    right = (net(others[0]).argmax(1) == others[1]) & (others[1] != 8)
    assert torch.equal(judged.held, right)
    assert torch.equal(judged.fooled.squeeze(1), right & (said == 8))
    assert judged.rate > 0


def test_passes_are_those_that_the_model_saw(counting, rows):
    fit = fit_patch(counting, rows, 3, steps=7, batch=16, width=20)
    assert (fit.forward, fit.backward) == (40 + 7 * 16, 7 * 16)
    assert (counting.asked, counting.pulled) == (fit.forward + 20, fit.backward)
    counting.asked = 0
    judged = fit.judge(counting, rows, draws=3, width=20)
    assert judged.forward == 40 + 3 * 40
    assert counting.asked == judged.forward + 20


def test_the_seed_decides_and_nothing_else(net, rows):
    before = torch.random.get_rng_state()
    one, two, other = (fit_patch(net, rows, 3, steps=9, batch=8, seed=seed) for seed in (4, 4, 5))
    one.control()
    one.judge(net, rows)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.patch, two.patch)
    assert not torch.equal(one.patch, other.patch)


def test_controls_are_what_their_names_say():
    fit = AdversarialPatch(drawn(3), Paste(3), (-1.0, 3.0))
    levels = {kind: fit.control(kind).patch.unique().tolist() for kind in ("low", "grey", "high")}
    assert levels == {"low": [-1.0], "grey": [1.0], "high": [3.0]}
    assert not torch.equal(fit.control().patch, fit.control(seed=1).patch)
    with pytest.raises(UsageError, match="did you mean 'noise'"):
        fit.control("nosie")


@pytest.mark.parametrize(
    ("how", "options", "said"),
    [
        (lambda: 9, {}, "a patch of at most 8 pixels, got 9"),
        (lambda: 0, {}, "a size of at least 1"),
        (lambda: Paste(3, "sqare"), {}, "did you mean 'square'"),
        (lambda: Paste(3, scale=(1.1, 0.9)), {}, "0 < low <= high"),
        (lambda: Paste(3, scale=(0.0, 0.9)), {}, "0 < low <= high"),
        (lambda: Paste(3, rotation=-1.0), {}, "a rotation from 0 to 180"),
        (lambda: Paste(3, location=(6, 0)), {}, "a location from (0, 0) to (5, 5), got (6, 0)"),
        (lambda: 3, {"target": 10}, "a target from 0 to 9, got 10"),
        (lambda: 3, {"steps": 0}, "steps and batch of at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(net, rows, how, options, said):
    with pytest.raises(UsageError) as refusal:
        sparring.fit_patch(net, rows, how(), **options)
    assert said in str(refusal.value)


def test_what_does_not_fit_the_judging_is_refused(net, rows):
    x, y = rows
    fit = fit_patch(net, rows, 3, steps=1)
    with pytest.raises(DataError, match="got none among 40"):
        fit_patch(net, (x, (y + 1) % 10), 3)
    with pytest.raises(UsageError, match="at least 1 draw"):
        fit.judge(net, rows, draws=0)
    with pytest.raises(UsageError, match="expected images of 2 channels, got 1"):
        AdversarialPatch(drawn(3, 2), Paste(3)).judge(net, rows)
    with pytest.raises(UsageError, match="at most 8 pixels, got 9"):
        AdversarialPatch(drawn(9), Paste(9)).judge(net, rows)
