"""MI-FGSM and NI-FGSM against plain float64 loops over one row, written from the papers, and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparring.attacks.mifgsm import MIFGSM, normalised
from sparring.attacks.nifgsm import NIFGSM
from sparring.core.batch import Batch
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.engine.unroll import unroll
from sparring.testing import Probe, linear, puzzle

EPS = {"linf": 0.12, "l2": 0.4}
STEPS = 12


def rows_of(norm: str, targeted: bool) -> tuple[Probe, Batch]:
    case = puzzle(norm, targeted=targeted)
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    return case.model, Batch(case.x, case.y, target, torch.arange(len(case.x)), threat(norm, EPS[norm]))


def gradient(model: Probe, point: Tensor, batch: Batch, row: int) -> Tensor:
    """Of the cross-entropy at one float64 image, uphill for the attacker."""
    leaf = point.clone().requires_grad_()
    aim = int(batch.target[row])
    label, sign = (aim, -1.0) if aim >= 0 else (int(batch.y[row]), 1.0)
    loss = sign * torch.nn.functional.cross_entropy(model.net(leaf.flatten(1)), torch.tensor([label]))
    return torch.autograd.grad(loss, leaf)[0]


def cube(point: Tensor, clean: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(point, clean - EPS["linf"]), clean + EPS["linf"]).clamp(0, 1)


def momentum_iterative(model: Probe, batch: Batch, row: int, norm: str, mu: float, size: float) -> Tensor:
    """Dong et al., algorithm 1: g_{t+1} = mu g_t + grad / ||grad||_1; x_{t+1} = x_t + alpha sign(g_{t+1})."""
    clean = batch.x[row : row + 1].double()
    point, g, found = clean, torch.zeros_like(clean), [clean]
    for _ in range(STEPS):
        now = gradient(model, point, batch, row)
        g = mu * g + now / now.abs().sum()
        if norm == "linf":
            point = cube(point + size * g.sign(), clean)
        else:
            delta = point + size * g / g.norm() - clean
            point = clean + delta * min(1.0, EPS["l2"] / float(delta.norm()))
            point = point.clamp(0, 1)
        found.append(point)
    return torch.cat(found)


@pytest.mark.usefixtures("scaled_then_clipped")
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("mu", "size"), [(1.0, None), (0.7, 0.04), (0.0, 0.04)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_point_of_mi_fgsm_is_the_papers(norm, mu, size, targeted, points):
    model, batch = rows_of(norm, targeted)
    found = points(MIFGSM(steps=STEPS, step_size=size, momentum=mu), model, batch)
    for row in range(len(batch.x)):
        wanted = momentum_iterative(model, batch, row, norm, mu, EPS[norm] / STEPS if size is None else size)
        torch.testing.assert_close(found[:, row].double(), wanted, rtol=0, atol=2e-6)


def nesterov_iterative(model: Probe, batch: Batch, row: int, mu: float, size: float) -> tuple[Tensor, Tensor]:
    """Lin et al., equations 6 to 8, with the mean for the L1 norm as in their code: points ahead, and x_T."""
    clean = batch.x[row : row + 1].double()
    point, g, found = clean, torch.zeros_like(clean), []
    for _ in range(STEPS):
        ahead = (point + size * mu * g).clamp(0, 1)
        found.append(ahead)
        now = gradient(model, ahead, batch, row)
        g = mu * g + now / now.abs().mean()
        point = cube(point + size * g.sign(), clean)
    return torch.cat(found), point


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("mu", "size"), [(1.0, None), (0.7, 0.02)])
def test_every_point_of_ni_fgsm_is_the_papers(mu, size, targeted, points):
    model, batch = rows_of("linf", targeted)
    found = points(NIFGSM(steps=STEPS, step_size=size, momentum=mu), model, batch)
    beyond = 0
    for row in range(len(batch.x)):
        ahead, last = nesterov_iterative(model, batch, row, mu, EPS["linf"] / STEPS if size is None else size)
        torch.testing.assert_close(found[:-1, row].double(), ahead, rtol=0, atol=5e-6)
        torch.testing.assert_close(found[-1:, row].double(), last, rtol=0, atol=2e-6)
        beyond += bool((ahead - batch.x[row].double()).abs().amax() > EPS["linf"] + 1e-3)
    assert beyond > 6  # it does look out of the ball, and comes back


def test_without_momentum_there_is_nothing_ahead(points):
    model, batch = rows_of("linf", False)
    ni, mi = (points(kind(steps=STEPS, momentum=0.0), model, batch) for kind in (NIFGSM, MIFGSM))
    assert torch.equal(ni, mi)


FAMILY = [(MIFGSM(), "linf"), (MIFGSM(), "l2"), (NIFGSM(), "linf"), (NIFGSM(steps=1), "linf")]


@pytest.mark.parametrize(("attack", "norm"), FAMILY, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4)])
def test_on_a_linear_model_the_budget_decides_and_is_used_up(shape, rows, attack, norm):
    """eps / steps times the steps is eps, no less and no more."""
    case = linear(norm, shape, rows)
    for factor, wanted in ((0.999, False), (1.001, True)):
        limit = threat(norm, 0.5 * factor, case.model.bounds)
        assert run(case.model, attack, limit, case.x, case.y).found.tolist() == [wanted] * rows
        last = unroll(case.model, attack, Batch(case.x, case.y, case.y - 1, case.y, limit))
        far = limit.distance(last, case.x)
        torch.testing.assert_close(far, torch.full_like(far, limit.eps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("attack", [MIFGSM(steps=7), NIFGSM(steps=7)], ids=lambda attack: attack.name)
def test_a_row_that_holds_costs_a_query_a_step_and_one_for_the_last_point(attack):
    case = puzzle("linf")
    got = run(case.model, attack, threat("linf", 1e-6), case.x, case.y)
    assert not got.found.any()
    assert got.forward.tolist() == [8] * len(case.x)
    assert got.backward.tolist() == [7] * len(case.x)


def test_a_gradient_is_normalised_whatever_its_size_and_nothing_stays_nothing():
    draw = torch.tensor([[[[1.0, -2.0, 0.0, 5.0]]]])
    for scale in (1.0, 1e-30, 1e30, 1e-37):
        torch.testing.assert_close(normalised(scale * draw), draw / 2.0)
    assert torch.equal(normalised(0 * draw), 0 * draw)
