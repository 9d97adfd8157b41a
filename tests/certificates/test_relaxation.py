"""The lines around an activation: never crossed, and as near as they can be."""

from __future__ import annotations

import pytest
import torch

from sparring.certificates.operators import Activation
from sparring.certificates.relaxation import flat, relax

KINDS = ["relu", "sigmoid", "tanh"]


def intervals():
    """Ends (n,) of intervals of every width on either side of zero and across it."""
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(6000, generator=generator, dtype=torch.float64) * 3
    width = 10 ** (torch.rand(6000, generator=generator, dtype=torch.float64) * 7 - 6)
    low, high = middle - width, middle + width
    edge = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [-40.0, 30.0], [-30.0, 0.01], [-0.01, 30.0]])
    return torch.cat([low, edge[:, 0].double()]), torch.cat([high, edge[:, 1].double()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_is_outside_the_lines(kind, dtype):
    low, high = (end.to(dtype) for end in intervals())
    op = Activation(kind)
    z = low.double() + (high - low).double() * torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    for lines in (relax(op, (low, high)), flat(op, (low, high))):
        slopes = [torch.zeros_like(low) if s is None else s for s in (lines.low_slope, lines.high_slope)]
        shift = torch.zeros_like(low) if lines.low_shift is None else lines.low_shift
        spare = 0 if dtype == torch.float64 else 1e-6 * (1 + high.abs().double())
        exact = op.forward(z)
        assert (slopes[0].double() * z + shift.double() <= exact + spare + 1e-12).all()
        assert (slopes[1].double() * z + lines.high_shift.double() >= exact - spare - 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_lines_touch_the_function(kind):
    low, high = intervals()
    keep = high - low > 1e-3
    low, high = low[keep], high[keep]
    lines = relax(Activation(kind), (low, high))
    z = low + (high - low) * torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]
    exact = Activation(kind).forward(z)
    above = (lines.high_slope * z + lines.high_shift - exact).amin(0)
    below = (exact - lines.low_slope * z - (0 if lines.low_shift is None else lines.low_shift)).amin(0)
    assert (above <= 1e-5).all()
    assert (below <= 1e-5).all()


@pytest.mark.parametrize("kind", ["sigmoid", "tanh"])
def test_both_lines_of_an_interval_across_zero_pass_through_its_ends(kind):
    op, low, high = Activation(kind), torch.tensor([-2.0, -3.0]).double(), torch.tensor([3.0, 2.0]).double()
    lines = relax(op, (low, high))
    torch.testing.assert_close(lines.high_slope * low + lines.high_shift, op.forward(low), rtol=0, atol=1e-5)
    torch.testing.assert_close(lines.low_slope * high + lines.low_shift, op.forward(high), rtol=0, atol=1e-5)


def test_the_lower_slope_of_a_relu_leaves_the_least_area():
    lines = relax(Activation("relu"), (torch.tensor([-1.0, -2.0, 0.5, -2.0]), torch.tensor([2.0, 1.0, 1.0, -1.0])))
    assert lines.low_slope.tolist() == [1, 0, 1, 0]
    torch.testing.assert_close(lines.high_slope, torch.tensor([2 / 3, 1 / 3, 1, 0]))
    torch.testing.assert_close(lines.high_shift, torch.tensor([2 / 3, 2 / 3, 0, 0]))
