"""The least value of a linear function over box and ball, against a general solver."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize

from sparring.certificates.region import Region, region
from sparring.core.errors import UsageError
from sparring.core.threat import L1, L2, Linf, Unbounded


@pytest.mark.parametrize("radius", [0.05, 0.3, 0.9, 3.0])
def test_box_and_ball_against_scipy(radius):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6, 1, 2, 4, generator=generator).round(decimals=1)
    where = region(L2(radius), x)
    a = torch.randn(6, 3, 1, 2, 4, generator=generator, dtype=torch.float64)
    a[:, 2, :, :, :2] = 0.0
    value, point = where.lowest(a, rounds=20)
    assert where.radius == radius + L2(radius).slack
    for i in range(6):
        x0 = x[i].flatten().double().numpy()
        box = [end[i].flatten().numpy() for end in (where.low, where.high)]
        for j in range(3):
            c = a[i, j].flatten().numpy()
            exact = _exact(c, x0, *box, where.radius)
            assert value[i, j] <= exact + 1e-9
            assert value[i, j] >= exact - 1e-6
            solved = minimize(
                lambda v, c=c: c @ v, x0, jac=lambda v, c=c: c, bounds=list(zip(*box, strict=True)), method="SLSQP",
                constraints={"type": "ineq", "fun": lambda v, x0=x0: where.radius**2 - (v - x0) @ (v - x0)},
            )  # fmt: skip
            assert value[i, j] == pytest.approx(solved.fun, abs=1e-4)
            there = point[i, j].flatten().numpy()
            assert np.linalg.norm(there - x0) <= where.radius + 1e-12
            assert c @ there == pytest.approx(exact, abs=1e-6)


def _exact(c, x0, low, high, radius):
    """c . x at the multiplier whose point lies on the sphere, found to the last bit."""

    def at(t):
        return np.clip(x0 - t * c, low, high)

    if np.linalg.norm(at(1e9) - x0) <= radius:
        return c @ at(1e9)
    t = brentq(lambda t: np.linalg.norm(at(t) - x0) - radius, 0, 1e9, xtol=1e-14)
    return c @ at(t)


def test_any_number_of_rounds_is_sound_and_more_are_better():
    generator = torch.Generator().manual_seed(1)
    where = region(L2(1.5), torch.rand(20, 1, 5, 5, generator=generator))
    a = torch.randn(20, 4, 1, 5, 5, generator=generator, dtype=torch.float64)
    found = [where.lowest(a, rounds=rounds)[0] for rounds in (0, 1, 3, 30)]
    for worse, better in pairwise(found):
        assert (worse <= better + 1e-9).all()


def test_the_box_is_exact_and_holds_the_slack():
    x = torch.tensor([0.0, 0.5, 0.9, 1.0]).view(1, 1, 2, 2)
    where = region(Linf(0.2), x)
    torch.testing.assert_close(where.low.flatten(), torch.tensor([0, 0.299999, 0.699999, 0.799999]).double())
    torch.testing.assert_close(where.high.flatten(), torch.tensor([0.200001, 0.700001, 1, 1]).double())
    a = torch.tensor([1.0, -2.0, 3.0, 0.0]).double().view(1, 1, 1, 2, 2)
    value, point = where.lowest(a)
    assert value.item() == pytest.approx(0 - 2 * 0.700001 + 3 * 0.699999)
    assert (a * point).sum().item() == pytest.approx(value.item())
    assert region(Unbounded(), x).low.unique().tolist() == [0.0]
    with pytest.raises(UsageError, match="linf or l2"):
        region(L1(1.0), x)


def test_a_coarser_type_only_widens_the_box():
    where = region(Linf(0.1), torch.rand(50, 1, 3, 3, generator=torch.Generator().manual_seed(2)))
    coarse = where.to(torch.float32)
    assert (coarse.low.double() <= where.low).all()
    assert (coarse.high.double() >= where.high).all()
    assert (coarse.low.double() >= where.low - 1e-6).all()
    assert isinstance(coarse, Region)
