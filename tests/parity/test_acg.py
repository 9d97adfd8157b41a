"""ACG against a plain float64 loop over one row, written from the paper; its directions against what conjugate means.

The authors' code (and ART's) takes beta with the other sign, so that the new direction is not conjugate to the
last change of the gradient; ours is the formula of Hestenes and Stiefel for an ascent. Like theirs, it cuts
negative values to 0. Rises are counted as APGD counts them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparring.attacks.acg import ACG, conjugate
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access, Prediction
from sparring.core.threat import Linf, threat
from sparring.engine.loop import run
from sparring.engine.unroll import unroll
from sparring.testing import Probe, linear, puzzle

EPS = 0.12


class Exact:
    """The probe's answers in float64: with rounding, a sign here and there turns, and rows go ways of their own."""

    def __init__(self, model: Probe) -> None:
        self.net = model.net

    def query(self, x: Tensor, access: Access) -> Prediction:
        with torch.enable_grad():
            leaf = x.detach().flatten(1).double().requires_grad_()
            logits = self.net(leaf)

        def vjp(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            return torch.autograd.grad(logits, leaf, cotangent, retain_graph=keep)[0].view_as(x)

        return Prediction(logits.detach().argmax(1), logits.detach(), vjp)


def points(attack: ACG, model: Exact | Probe, batch: Batch) -> tuple[Tensor, Tensor]:
    """(steps + 1, n, ...) all that it asks about, won or not, and (n,) its last step sizes."""
    state, asked = attack.init(batch), []
    while not state.done.any():
        asked.append(state.x)
        seen = Observation(batch, model.query(state.x, Access.GRADIENT), batch.targeted & False, Access.GRADIENT)
        state = attack.step(batch, state, seen)
    assert state.done.all()
    return torch.stack([*asked, state.x]), state.size


def margin(model: Probe, x: Tensor, y: int, aim: int) -> tuple[float, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = model.net(leaf.flatten(1))[0]
    label = y if aim < 0 else aim
    rest = torch.cat([logits[:label], logits[label + 1 :]]).max()
    value = rest - logits[label] if aim < 0 else logits[label] - rest
    return float(value.detach()), torch.autograd.grad(value, leaf)[0]


def algorithm_1(model: Probe, clean: Tensor, y: int, aim: int, steps: int) -> tuple[Tensor, float]:
    """One row: all points from the clean image on, and the step size at the end."""
    clean = clean.double()
    size, period, since, rises, halved = 2 * EPS, max(int(0.22 * steps), 1), 0, 0, False
    x = clean
    f, g = margin(model, x, y, aim)
    x_best, f_best, g_best, then = x, f, g, f
    g_old = s_old = g_pre = s_pre = None
    found = [x]
    for k in range(steps):
        if k > 0 and since == period:
            if rises <= 0.75 * period or (not halved and then >= f_best):
                size, halved = size / 2, True
                x, g, g_old, s_old = x_best, g_best, g_pre, s_pre
            else:
                halved = False
            then, rises, since, period = (
                f_best,
                0,
                0,
                max(period - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)),
            )
        s = g
        if s_old is not None:
            y_old = g_old - g
            below = float((s_old * y_old).sum())
            usable = abs(below) > 1e-5 * float(s_old.norm() * y_old.norm())
            s = g + (max(0.0, float((-g * y_old).sum()) / below) if usable else 0.0) * s_old
            s = s if float(s.abs().max()) > 1e-5 * float(g.abs().max()) else g
        g_old, s_old = g, s
        x = torch.minimum(torch.maximum(x + size * s.sign(), clean - EPS), clean + EPS).clamp(0, 1)
        found.append(x)
        before = f
        f, g = margin(model, x, y, aim)
        rises, since = rises + (f > before), since + 1
        if f > f_best:
            x_best, f_best, g_best, g_pre, s_pre = x, f, g, g_old, s_old
    return torch.cat(found), size


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("steps", [20, 50])
def test_every_point_is_that_of_algorithm_1(steps, targeted):
    case = puzzle("linf", targeted=targeted)
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    batch = Batch(case.x.double(), case.y, target, torch.arange(len(case.x)), Linf(EPS))
    attack = ACG(steps=steps, random_start=False)
    for row in range(len(case.x)):
        wanted, size = algorithm_1(case.model, case.x[row : row + 1], int(case.y[row]), int(target[row]), steps)
        alone = batch.take(torch.tensor([row]))  # or a matrix product rounds in another way, and a tie breaks
        found, sizes = points(attack, Exact(case.model), alone)
        torch.testing.assert_close(found[:, 0], wanted, rtol=0, atol=1e-9)
        assert float(sizes) == size < 2 * EPS  # it has been through a checkpoint that halved it


def test_directions_are_conjugate_to_the_last_change_of_the_gradient():
    draw = noise.normal(torch.arange(8), (3, 1, 4, 6))
    g, before, s = draw.unbind(1)
    ahead = -(g * (before - g)).flatten(1).sum(1) / (s * (before - g)).flatten(1).sum(1) > 0
    assert torch.equal(conjugate(g, before, s)[~ahead], g[~ahead])  # beta would be negative
    assert 2 < int(ahead.sum()) < 6
    g, before, s = g[ahead], before[ahead], s[ahead]
    new = conjugate(g, before, s).flatten(1).double()
    y = (before - g).flatten(1).double()
    assert float((new * y).sum(1).abs().max()) < 1e-4
    beta = (new - g.flatten(1)) / s.flatten(1)
    assert float(beta.std(1).max()) < 1e-3 * float(beta.abs().max())  # one number a row
    alone = torch.cat([conjugate(g[i : i + 1], before[i : i + 1], s[i : i + 1]) for i in range(len(g))])
    assert torch.equal(alone, conjugate(g, before, s))


def test_where_beta_is_no_number_or_nothing_is_left_the_gradient_leads():
    g, s = noise.normal(torch.arange(4), (2, 1, 4, 6)).unbind(1)
    assert torch.equal(conjugate(g, g, s), g)  # no change of gradient
    assert torch.equal(conjugate(g, 2 * g, 0 * s), g)  # no direction yet
    assert torch.equal(conjugate(-g, 3 * g, 2 * g), -g)  # all on one line: conjugacy leaves rounding only
    assert torch.equal(conjugate(g, 3 * g, 2 * g), g)
    assert torch.equal(conjugate(0 * g, 0 * g, s), 0 * g)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4), (1, 7, 7)])
def test_on_a_linear_model_the_budget_decides_and_is_used_up(shape, rows):
    case = linear("linf", shape, rows)
    for factor, wanted in ((0.999, False), (1.001, True)):
        limit = threat("linf", 0.5 * factor, case.model.bounds)
        got = run(case.model, ACG(steps=20), limit, case.x, case.y)
        assert got.found.tolist() == [wanted] * rows
        batch = Batch(case.x, case.y, case.y - 1, case.y, limit)
        last = unroll(case.model, ACG(steps=20, random_start=False, loss="cross_entropy"), batch)
        far = limit.distance(last, case.x)
        torch.testing.assert_close(far, torch.full_like(far, limit.eps), rtol=0, atol=1e-5)
        crossed = case.model.query(last, Access.DECISION).labels != case.y
        assert crossed.tolist() == [wanted] * rows


def test_a_row_that_holds_costs_a_query_a_step_and_one_for_the_last_point():
    case = puzzle("linf")
    got = run(case.model, ACG(steps=9), threat("linf", 1e-6), case.x, case.y)
    assert got.forward.tolist() == [10] * len(case.x)
    assert got.backward.tolist() == [9] * len(case.x)


def test_no_gradient_no_move():
    case = puzzle("linf")
    batch = Batch(case.x, case.y, case.y * 0 - 1, case.y, Linf(EPS))
    found, _ = points(ACG(steps=10, random_start=False), Probe(lambda flat: flat[:, :4] * 0.0), batch)
    assert torch.equal(found[-1], case.x)
