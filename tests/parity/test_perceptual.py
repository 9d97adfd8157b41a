"""ALMA on SSIM: point for point beside a plain float64 reference, beside SLSQP's optimum, and beside DDN."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize

from sparring.attacks.ddn import DDN
from sparring.attacks.perceptual import Perceptual, scaled_margin
from sparring.core import noise
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import Unbounded, threat
from sparring.engine.loop import run
from sparring.models.torch import TorchModel
from sparring.testing import Probe, Puzzle, puzzle

LIMIT = threat("ssim", 2.0)


def constraint(logits, y, target):
    """> 0 where the row does not fool: the scaled margin of one row, from its definition."""
    order = logits.sort(descending=True).values
    if target < 0:
        return (logits[y] - max(z for i, z in enumerate(logits) if i != y)) / (order[0] - order[2] + 1e-8)
    rival = max(z for i, z in enumerate(logits) if i != target)
    return (rival - logits[target]) / (order[0] - (order[2] + order[3]) / 2 + 1e-8)


def penalty(g, rho, mu):
    return mu * g + mu * rho * g**2 + rho**2 * g**3 / 6 if g >= 0 else mu * g / (1 - rho * g)


def reference(attack, net, x0, y, target):
    """Algorithm 1 for one row, in float64, the penalty differentiated by autograd: yields where to ask."""
    n, x, won = attack.steps, x0.double(), None
    square, momentum, mu, rho, before, rate = torch.ones_like(x), torch.zeros_like(x), 1.0, 1.0, None, None
    for i in range(n):
        yield x
        leaf = x.clone().requires_grad_()
        g = constraint(net(leaf.flatten()[None])[0], y, target) + attack.margin
        value = float(g.detach())
        if i and (i + 1) % attack.check == 0:
            if won is None and value >= attack.tau * before:
                rho *= attack.gamma
            before = value
        before = value if before is None else before
        if i:
            at = torch.tensor(value, dtype=torch.float64, requires_grad=True)
            (new,) = torch.autograd.grad(penalty(at, rho, mu), at)
            mu = min(max(attack.alpha * mu + (1 - attack.alpha) * float(new), 1e-6), 1e12)
        if won is None and value < 0:
            won = i
        loss = penalty(g, rho, mu) + (LIMIT.distance(leaf[None], x0[None]).sum() if i else 0)
        (gradient,) = torch.autograd.grad(loss, leaf)
        if rate is None:
            low, high = 0.0, 1.0
            while far((x0 - high * gradient), x0) <= attack.first:
                low, high = high, 2 * high
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (low, middle) if far(x0 - middle * gradient, x0) > attack.first else (middle, high)
            rate = high
        size = rate * (1 if won is None else attack.shrink ** ((i - won) / (n - won)))
        square = attack.alpha * square + (1 - attack.alpha) * gradient**2
        momentum = attack.alpha * momentum + gradient / (square.sqrt() + 1e-8)
        x = (x - size * momentum).clamp(0, 1)
    yield x


def far(x, x0):
    return float(LIMIT.distance(x.clamp(0, 1)[None], x0[None]))


@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_the_reference(targeted, states):
    case = puzzle("ssim", targeted=targeted)
    case = Puzzle(case.model, LIMIT, case.x, case.y, case.targets)
    won = 0
    for row in range(4):
        attack = Perceptual(steps=60)
        target = -1 if case.targets is None else int(case.targets[row])
        beside = reference(attack, case.model.net, case.x[row], int(case.y[row]), target)
        for state, _ in states(attack, case, row):
            torch.testing.assert_close(state.x[0].double(), next(beside), rtol=0, atol=2e-4)
        won += int(state.won < 60)
    assert won == 4


def test_a_row_that_gets_nowhere_is_pressed_harder(states):
    """With tiny steps rho grows at every check; the points are still those of the reference."""
    case, attack = puzzle("ssim"), Perceptual(steps=25, first=1e-8, tau=0.1, check=3)
    beside = reference(attack, case.model.net, case.x[0], int(case.y[0]), -1)
    for state, _ in states(attack, Puzzle(case.model, LIMIT, case.x, case.y, None), 0):
        torch.testing.assert_close(state.x[0].double() - case.x[0], next(beside) - case.x[0], rtol=0.02, atol=2e-6)
    assert float(state.rho) > attack.gamma


class Told:
    """An observation of one row whose constraint has this value, and a gradient of ones."""

    def __init__(self, g, slope):
        self.g, self.slope = g, slope

    def value_and_grad(self, loss):
        return torch.tensor([1e-4 - self.g]), torch.full((1, 1, 4, 4), self.slope)


def told(attack, values, slope=1.0):
    """The states after each of these values of the constraint."""
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.tensor([0])
    batch, found = Batch(x, y, y - 1, y, LIMIT), []
    state = attack.init(batch)
    for g in values:
        state = attack.step(batch, state, Told(g, slope))
        found.append(state)
    return found


def test_a_check_compares_with_the_check_before():
    """Every third step: 0.5 is less than 0.95 of 1, but not of 0.5, and no longer of 0.4."""
    found = told(Perceptual(steps=20, check=3), [1.0, 0.9, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert [float(state.rho) for state in found[2::3]] == pytest.approx([1.0, 1.2, 1.2, 1.44])


def test_without_a_gradient_it_sets_out_in_a_random_direction():
    (state,) = told(Perceptual(), [1.0], slope=0.0)
    change, way = (state.x - 0.5).flatten(), noise.normal(torch.tensor([0]), (16,)).flatten()
    assert float(torch.nn.functional.cosine_similarity(-change, way, dim=0)) > 0.99


def test_the_multiplier_stays_below_1e12_and_above_1e_6():
    for g, wanted in ((1.0, 1e12), (-1e3, 1e-6)):
        found = told(Perceptual(steps=400, check=1000), [g] * 200)
        assert float(found[-1].mu) == pytest.approx(wanted)
        assert found[-1].x.isfinite().all()


def test_the_scaled_margin_has_the_sign_of_the_goal():
    logits = noise.normal(torch.arange(50), (6,))
    y, target = torch.zeros(50, dtype=torch.int64), torch.arange(50) % 6
    for goal in (y - 1, target):
        batch = Batch(torch.zeros(50, 1, 1, 1), y, goal, y, LIMIT)
        wanted = [-constraint(z, int(a), int(b)) for z, a, b in zip(logits, y, goal, strict=True)]
        torch.testing.assert_close(scaled_margin(logits, batch), torch.stack(wanted))
        hit = logits.argmax(1) != y if goal is not target else logits.argmax(1) == target
        assert torch.equal(scaled_margin(logits, batch) > 0, hit)


def slsqp(x0, weight, edge):
    """The least 1 - SSIM with weight @ x <= edge in the box, the best of some starts."""
    weight = weight.numpy()

    def cost(flat):
        leaf = torch.tensor(flat, requires_grad=True)
        value = LIMIT.distance(leaf.view(1, *x0.shape), x0[None]).sum()
        return value.item(), torch.autograd.grad(value, leaf)[0].numpy()

    line = {"type": "ineq", "fun": lambda z: edge - weight @ z, "jac": lambda z: -weight}
    best, clean = float("inf"), x0.double().flatten().numpy()
    for start in range(4):
        shake = noise.normal(torch.tensor([start]), (clean.size,))[0].double().numpy() * 0.15
        found = minimize(cost, (clean + shake).clip(0, 1), jac=True, method="SLSQP", bounds=[(0, 1)] * clean.size,
                         constraints=[line], options={"maxiter": 300, "ftol": 1e-11})  # fmt: skip
        if found.success and weight @ found.x <= edge + 1e-6:
            best = min(best, found.fun)
    return best


@pytest.mark.parametrize("shape", [(1, 5, 5), (1, 8, 8), (2, 4, 6)])
@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_model_it_finds_the_optimum_of_slsqp(shape, targeted):
    """Within 5 % in 300 steps and 1 % in 1000, and never nearer than is possible."""
    size = shape[0] * shape[1] * shape[2]
    weight = noise.normal(torch.tensor([3]), (size,))[0].double()
    x0 = 0.15 + 0.7 * noise.uniform(torch.tensor([1]), shape)
    edge = float(x0.double().flatten() @ weight) - 0.25 * float(weight.norm())
    model = Probe(lambda flat: torch.stack([flat @ weight - edge, edge - flat @ weight], 1))
    y, least = torch.zeros(1, dtype=torch.int64), slsqp(x0[0], weight, edge)
    targets = torch.ones(1, 1, dtype=torch.int64) if targeted else None
    for steps, within in ((300, 1.05), (1000, 1.01))[: 1 if targeted or shape != (1, 5, 5) else 2]:
        got = run(model, Perceptual(steps=steps), LIMIT, x0, y, targets=targets)
        assert got.found.all()
        assert 0.999 * least - 1e-6 <= float(got.distance) <= within * least
        assert (got.forward.tolist(), got.backward.tolist()) == ([steps + 1], [steps])


def test_a_budget_is_met_and_what_is_out_of_reach_stays_so():
    weight = noise.normal(torch.tensor([3]), (25,))[0].double()
    x0 = 0.15 + 0.7 * noise.uniform(torch.tensor([1]), (1, 5, 5))
    edge = float(x0.double().flatten() @ weight) - 0.25 * float(weight.norm())
    model = Probe(lambda flat: torch.stack([flat @ weight - edge, edge - flat @ weight], 1))
    y, least = torch.zeros(1, dtype=torch.int64), slsqp(x0[0], weight, edge)
    for factor, found in ((0.98, False), (1.05, True)):
        limit = threat("ssim", factor * least)
        got = run(model, Perceptual(), limit, x0, y)
        assert got.found.tolist() == [found]
        assert limit.contains(got.best, x0).all()


def test_the_units_of_the_pixels_do_not_matter():
    case = puzzle("ssim")
    one = run(case.model, Perceptual(steps=40), LIMIT, case.x, case.y)
    wide = Probe(lambda flat: case.model.net(flat / 4 + 0.5), bounds=(-2.0, 2.0))
    two = run(wide, Perceptual(steps=40), threat("ssim", 2.0, wide.bounds), 4 * case.x - 2, case.y)
    torch.testing.assert_close(one.distance, two.distance, rtol=1e-3, atol=1e-5)
    assert torch.equal(one.found, two.found)


def test_on_digits_it_looks_more_alike_than_what_is_nearest_in_l2(net, digits):
    x, y = digits[0][1500:1540], digits[1][1500:1540]
    model = TorchModel(net)
    ours, nearest = run(model, Perceptual(), LIMIT, x, y), run(model, DDN(), Unbounded(), x, y)
    assert ours.found.all()
    assert nearest.found.all()
    held = ~ours.clean
    theirs = LIMIT.distance(nearest.best, x)[held]
    assert float(ours.distance[held].median()) < 0.92 * float(theirs.median())
    assert (ours.distance[held] <= theirs * 1.001).double().mean() > 0.95
    answer = model.query(ours.best, Access.DECISION).labels
    assert (answer != y).all()
