"""Threat models: legal means legal in float64, near means nearest, and steepest means steepest."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.threat import L0, L1, L2, Linf, Threat, Unbounded, threat

NORMS = ["linf", "l2", "l1", "l0"]
RADII = {
    "linf": st.floats(1e-3, 2),
    "l2": st.floats(1e-2, 20),
    "l1": st.floats(1e-2, 200),
    "l0": st.integers(0, 60).map(float),
}
BOUNDS = st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-3.0, 5.0)])


def rows(count: int, seed: int = 0) -> Tensor:
    return noise.keys(seed, torch.arange(count), torch.zeros(count, dtype=torch.int64))


@st.composite
def setting(draw: st.DrawFn, norm: str, far: float = 3.0) -> tuple[Threat, Tensor, Tensor]:
    """A threat model, clean images inside its bounds, and points up to `far` widths away."""
    low, high = bounds = draw(BOUNDS)
    scale = 1.0 if norm == "l0" else high - low
    shape = draw(st.sampled_from([(1, 1, 1), (1, 3, 4), (3, 8, 8), (1, 28, 28)]))
    key = rows(draw(st.integers(1, 5)), draw(st.integers(0, 1000)))
    limit = threat(norm, draw(RADII[norm]) * scale, bounds)
    x0 = low + (high - low) * noise.uniform(key, shape)
    x = x0 + draw(st.floats(1e-4, far)) * (high - low) * noise.normal(key, shape, 1)
    return limit, x0, x


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_project_is_legal_idempotent_and_keeps_legal_points(norm, data):
    limit, x0, x = data.draw(setting(norm))
    once = limit.project(x, x0)
    assert limit.contains(once, x0).all()
    assert once.min() >= limit.bounds[0]
    assert once.max() <= limit.bounds[1]
    tolerance = 2e-6 * (limit.bounds[1] - limit.bounds[0])
    torch.testing.assert_close(limit.project(once, x0), once, rtol=0, atol=tolerance)
    inside = x0 + 0.99 * (once - x0) if norm != "l0" else once
    torch.testing.assert_close(limit.project(inside, x0), inside, rtol=0, atol=tolerance)
    assert torch.equal(limit.project(x0, x0), x0)


@pytest.mark.parametrize("norm", [*NORMS, "unbounded"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_samples_are_legal_and_depend_on_the_key_alone(norm, data):
    limit, x0, _ = data.draw(setting(norm if norm != "unbounded" else "l2"))
    limit = Unbounded(limit.bounds) if norm == "unbounded" else limit
    key = rows(len(x0), 5)
    x = limit.sample(x0, key)
    assert limit.contains(x, x0).all()
    assert torch.equal(limit.sample(x0[-1:], key[-1:])[0], x[-1])
    if limit.eps >= 1:
        assert not torch.equal(limit.sample(x0, key, 1), x)


@pytest.mark.parametrize("norm", NORMS)
def test_samples_reach_far_into_the_ball(norm):
    """A sample that always stays at the centre would be legal too."""
    eps = 4.0 if norm == "l0" else 0.4
    limit, x0 = threat(norm, eps), torch.full((200, 1, 4, 4), 0.5)
    far = limit.distance(limit.sample(x0, rows(200)), x0)
    assert far.max() > 0.9 * eps
    assert (far > 0).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.05, 3), size=st.integers(1, 6))
def test_l1_projection_is_the_nearest_point(seed, eps, size):
    """Against an independent solver: least squares over (positive part, negative part) by SLSQP."""
    key = rows(1, seed)
    x0 = noise.uniform(key, (1, 1, size))
    x = x0 + noise.normal(key, (1, 1, size), 1)
    got = (L1(eps).project(x, x0) - x0).flatten().double().numpy()
    origin, wanted = x0.flatten().double().numpy(), (x - x0).flatten().double().numpy()
    solution = minimize(
        lambda z: 0.5 * ((z[:size] - z[size:] - wanted) ** 2).sum(),
        x0=0.0 * wanted.repeat(2),
        jac=lambda z: _signed((z[:size] - z[size:]) - wanted),
        bounds=[(0, 1 - o) for o in origin] + [(0, o) for o in origin],
        constraints={"type": "ineq", "fun": lambda z: eps - z.sum(), "jac": lambda z: 0 * z - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    best = solution.x[:size] - solution.x[size:]
    assert ((got - wanted) ** 2).sum() <= ((best - wanted) ** 2).sum() + 1e-5
    assert abs(got - best).max() < 2e-3


def _signed(gradient):
    return [*gradient, *(-gradient)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.integers(0, 5))
def test_l0_projection_is_the_nearest_point(seed, eps):
    """Against every choice of `eps` features."""
    key = rows(1, seed)
    x0 = noise.uniform(key, (1, 1, 5))
    x = x0 + noise.normal(key, (1, 1, 5), 1)
    got = float((L0(float(eps)).project(x, x0) - x).square().sum())
    clipped = x.clamp(0, 1)
    costs = []
    for keep in itertools.combinations(range(5), eps):
        candidate = x0.clone()
        candidate[..., list(keep)] = clipped[..., list(keep)]
        costs.append(float((candidate - x).square().sum()))
    nearest_in_change = min(costs)
    # The rule keeps the largest changes; the nearest point keeps the largest savings, which are the same
    # wherever clipping cuts nothing off.
    if bool((x == clipped).all()):
        assert got == pytest.approx(nearest_in_change, abs=1e-6)
    assert got >= nearest_in_change - 1e-6


@pytest.mark.parametrize("eps", [0.1, 0.5, 2.0])
def test_l2_projection_where_no_pixel_clips_is_the_nearest(eps):
    x0 = torch.full((6, 1, 3, 3), 0.0)
    x = noise.normal(rows(6), (1, 3, 3))
    limit = L2(eps, (-9.0, 9.0))
    got = limit.project(x, x0)
    for share in torch.linspace(0, 1, 11).tolist():  # the variational inequality of a projection
        other = limit.sample(x0, rows(6, int(share * 10)))
        assert ((x - got) * (other - got)).flatten(1).sum(1).max() <= 1e-5


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_steepest_has_unit_norm_and_beats_random_directions(norm, seed):
    limit, gradient = threat(norm, 1.0), noise.normal(rows(3, seed), (1, 6, 7))
    step = limit.steepest(gradient)
    assert limit.length(step.flatten(1).double()).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    climb = (step * gradient).flatten(1).sum(1)
    other = noise.normal(rows(500, seed + 1), (3, 42)).double()
    other = other / torch.stack([limit.length(other[:, row]) for row in range(3)], 1)[:, :, None]
    assert ((other * gradient.flatten(1)).sum(2).amax(0) <= climb + 1e-5).all()


def test_l1_steps_are_equal_on_the_top_percent():
    gradient = noise.normal(rows(2), (3, 20, 10))
    step = L1(1.0).steepest(gradient).flatten(1)
    top = gradient.flatten(1).abs().topk(6, dim=1)
    assert ((step != 0).sum(1) == 6).all()
    assert torch.equal(step.gather(1, top.indices), gradient.flatten(1).gather(1, top.indices).sign() / 6)


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e30, 1.0])
def test_tiny_and_huge_gradients_keep_their_direction(scale):
    gradient = noise.normal(rows(3), (1, 5, 5))
    for kind in (Linf, L2, L1, L0):
        wanted, got = kind(1.0).steepest(gradient), kind(1.0).steepest(gradient * scale)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_no_gradient_is_no_step():
    for kind in (Linf, L2, L1, L0):
        assert not kind(1.0).steepest(torch.zeros(2, 1, 3, 3)).any()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(["linf", "l2", "l1"]))
def test_quantise_gives_legal_eight_bit_images(seed, levels, norm):
    key = rows(3, seed)
    x0 = (noise.uniform(key, (1, 6, 6)) * 255).round() / 255
    eps = levels / 255 * {"linf": 1, "l2": 6, "l1": 36}[norm]
    limit = threat(norm, eps)
    x = limit.project(x0 + eps * noise.normal(key, (1, 6, 6), 1), x0)
    got = limit.quantise(x, x0)
    assert torch.equal(got, (got * 255).round() / 255)
    assert torch.equal((got * 255).round().to(torch.uint8).float() / 255, got)
    assert limit.contains(got, x0).all()
    assert ((got - x).abs() <= 1.001 / 255).all()


def test_eight_levels_of_255_are_within_8_255ths():
    x0 = (torch.arange(256).view(1, 1, 16, 16) / 255).float()
    limit = Linf(8 / 255)
    for sign in (-1, 1):
        x = limit.project(x0 + sign, x0)
        got = limit.quantise(x, x0)
        wanted = (torch.arange(256) + 8 * sign).clamp(0, 255).view(1, 1, 16, 16) / 255
        assert torch.equal(got, wanted)
        assert limit.contains(got, x0).all()
    nine = ((torch.arange(200).view(1, 1, 10, 20) + 9) / 255).float()
    assert not limit.contains(nine, torch.arange(200).view(1, 1, 10, 20) / 255).any()


@pytest.mark.parametrize("norm", NORMS)
def test_contains_refuses_what_is_no_legal_image(norm):
    limit = threat(norm, 1.0 if norm == "l0" else 0.25)
    x0 = torch.full((1, 1, 2, 2), 0.5)
    for bad in (torch.nan, torch.inf, -torch.inf, 1.0001, -1e-7):
        x = x0.clone()
        x[0, 0, 0, 0] = bad
        assert not limit.contains(x, x0).item(), bad
    assert limit.contains(x0, x0).item()


@pytest.mark.parametrize("eps", [-1.0, -1e-9, math.nan])
def test_a_radius_that_is_none_is_refused(eps):
    for norm in NORMS:
        with pytest.raises(UsageError, match=r"expected eps >= 0, got"):
            threat(norm, eps)


def test_bounds_and_norms_that_are_none_are_refused():
    with pytest.raises(UsageError, match=r"low < high, got \(1.0, 0.0\)"):
        Linf(0.1, (1.0, 0.0))
    with pytest.raises(UsageError, match="did you mean 'linf'"):
        threat("linff", 0.1)
    assert threat("unbounded", 3.0).describe() == "unbounded"
    assert threat("l2", 0.5).describe() == "l2 eps 0.5"


def test_distances_by_hand():
    x0, x = torch.zeros(1, 1, 1, 3), torch.tensor([0.3, 0.0, -0.4]).view(1, 1, 1, 3)
    for norm, wanted in (("linf", 0.4), ("l2", 0.5), ("l1", 0.7), ("l0", 2.0)):
        assert threat(norm, 9.0).distance(x, x0).item() == pytest.approx(wanted, abs=1e-7)
        assert threat(norm, 9.0).distance(x, x0).dtype == torch.float64


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.05, 3), size=st.integers(1, 60), far=st.floats(0.1, 5))
def test_l2_projection_lies_between_the_usual_and_the_nearest(seed, eps, size, far):
    """No farther than scaled and clipped; no nearer than the KKT point clip(x0 + t (x - x0)), t by bisection."""
    key = rows(1, seed)
    x0 = noise.uniform(key, (1, 1, size)).double()
    x = x0 + far * noise.normal(key, (1, 1, size), 1)
    move = x - x0
    low, high = 0.0, 1.0
    for _ in range(60):
        t = (low + high) / 2
        fits = float(((x0 + t * move).clamp(0, 1) - x0).norm()) <= eps
        low, high = (t, high) if fits else (low, t)
    nearest = float(((x0 + high * move).clamp(0, 1) - x).norm())
    usual = float(((x0 + move * min(1.0, eps / float(move.norm()))).clamp(0, 1) - x).norm())
    got = float((L2(eps).project(x.float(), x0.float()) - x).norm())
    assert nearest - 1e-4 <= got <= usual + 1e-4


@pytest.mark.parametrize("value", [0.55, 0.9, 0.1])
def test_l1_rounding_does_not_add_up(value):
    """784 equal changes, each rounded the same way, once summed to 20 times the slack."""
    x0 = torch.full((1, 1, 28, 28), value)
    for eps in (0.11, 0.325, 1.7):
        assert L1(eps).contains(L1(eps).project(x0 + 0.1, x0), x0).all()


@pytest.mark.parametrize("norm", NORMS)
def test_within_gives_every_row_a_ball_of_its_own(norm):
    x0 = noise.uniform(rows(5), (2, 4, 4))
    x = x0 + 2 * noise.normal(rows(5, seed=1), (2, 4, 4))
    radius = torch.tensor([0.0, 0.5, 1.0, 3.0, 40.0])
    got = threat(norm, 1.0).within(x, x0, radius)
    for row, size in enumerate(radius.tolist()):
        alone = threat(norm, size).project(x[row : row + 1], x0[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], alone, rtol=0, atol=2e-6)
        assert float(threat(norm, size).distance(alone, x0[row : row + 1])) <= size + 1e-5
    assert torch.equal(got[0], x0[0])
    assert torch.equal(got[4], x[4].clamp(0, 1)) or norm == "l1"
