"""JSMA beside the loops of algorithms 2 and 3 over one row, and its search for a pair beside all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparring.attacks.jsma import JSMA, best_pair
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import L0
from sparring.engine.loop import run
from sparring.testing import Probe, puzzle


@pytest.mark.parametrize("lean", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize("size", [2, 3, 20, 90])
def test_the_best_pair_is_the_best_of_all_pairs(size, lean):
    draw = noise.normal(torch.arange(40), (2, size)).double()
    gain, relief = draw[:, 0].clone(), draw[:, 1] + lean
    relief[::3] = gain[::3]  # where one feature is best in both, and two classes make it so
    gain[1::4] = (2 * gain[1::4]).round()  # ties
    relief[2::4] = relief[2::4].round()
    out = noise.uniform(torch.arange(40), (size,), 5) < 0.2
    gain, relief = gain.masked_fill(out, -torch.inf), relief.masked_fill(out, -torch.inf)
    pair, saliency = best_pair(gain, relief)
    for row in range(40):
        best = 0.0
        for p in range(size):
            for q in range(p):
                alpha, beta = float(gain[row, p] + gain[row, q]), float(relief[row, p] + relief[row, q])
                if alpha > 0 and beta > 0:
                    best = max(best, alpha * beta)
        assert float(saliency[row]) == pytest.approx(best, rel=1e-12, abs=0)
        if best > 0:
            p, q = pair[row].tolist()
            assert p != q
            assert float((gain[row, p] + gain[row, q]) * (relief[row, p] + relief[row, q])) == pytest.approx(best)
        alone, worth = best_pair(gain[row : row + 1], relief[row : row + 1])
        assert float(worth) == float(saliency[row])
        assert best == 0 or alone.tolist() == pair[row : row + 1].tolist()


def algorithm_2(attack: JSMA, model: Probe, x0: Tensor, target: int, most: float) -> list[Tensor]:
    """Every point of one image (d,), in float64, until the class is reached or nothing is left to do."""
    x, points, size = x0.clone(), [x0], len(x0)
    while True:
        jacobian = torch.autograd.functional.jacobian(lambda z: model.net(z[None])[0], x)
        if int(model.net(x[None])[0].argmax()) == target:
            return points
        changed = int((x != x0).sum())
        up = attack.theta > 0
        open_ = [
            i for i in range(size)
            if (x[i] < 1 if up else x[i] > 0) and (changed < most or x[i] != x0[i])
        ]  # fmt: skip
        room = torch.ones(size) if attack.strict else ((x + attack.theta).clamp(0, 1) - x) / attack.theta
        jacobian, best, pair = jacobian * room, 0.0, None
        for p in open_:
            for q in open_:
                if p >= q:
                    continue
                alpha = float(jacobian[target, p] + jacobian[target, q])
                beta = float(jacobian[:, [p, q]].sum()) - alpha
                right = alpha > 0 > beta if up else alpha < 0 < beta
                if right and -alpha * beta > best:
                    best, pair = -alpha * beta, (p, q)
        if pair is None:
            first = sorted(open_, key=lambda i: -float(jacobian[target, i]) * attack.theta)[:2]
            if attack.strict or len(first) < 2:
                return points
            pair = (first[0], first[1])
        x = x.clone()
        for i in pair:
            x[i] = (x[i] + attack.theta).clamp(0, 1)
        points.append(x)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("theta", [1.0, 0.3, -1.0])
@pytest.mark.parametrize("targeted", [False, True])
def test_every_point_is_that_of_algorithms_2_and_3(targeted, theta, strict):
    case = puzzle("l0", targeted=targeted)
    logits = case.model.query(case.x, Access.SCORE).logits
    assert logits is not None
    second = logits.scatter(1, case.y[:, None], -torch.inf).argmax(1)
    target = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    aim = second if case.targets is None else target
    batch = Batch(case.x, case.y, target, torch.zeros_like(case.y), L0(20.0))
    attack = JSMA(theta=theta, strict=strict)
    state, points = attack.init(batch), [case.x]
    while not state.done.all():
        answer = case.model.query(state.x, Access.GRADIENT)
        nothing = torch.zeros_like(batch.targeted)
        state = attack.step(batch, state, Observation(batch, answer, nothing, Access.GRADIENT))
        points.append(state.x)
    moved = 0
    for row in range(len(case.x)):
        wanted = algorithm_2(attack, case.model, case.x[row].flatten().double(), int(aim[row]), 20)
        for k, point in enumerate(wanted):
            torch.testing.assert_close(points[k][row].flatten().double(), point, rtol=0, atol=1e-6)
        moved += len(wanted) - 1
    assert moved > 10


@pytest.mark.parametrize(("eps", "gamma"), [(4.0, 1.0), (20.0, 0.2)])
def test_where_the_budget_is_used_up_what_has_changed_may_change_further(eps, gamma):
    """4 of 20 features, by either option; at 0.3 of the range a push they can take three more."""
    case = puzzle("l0", targeted=True)
    assert case.targets is not None
    got = run(case.model, JSMA(theta=0.3, gamma=gamma), L0(eps), case.x, case.y, targets=case.targets)
    further = 0
    for row in range(len(case.x)):
        clean = case.x[row].flatten().double()
        wanted = algorithm_2(JSMA(theta=0.3), case.model, clean, int(case.targets[row]), 4)
        if int((wanted[-1] != clean).sum()) > 4:
            continue  # a pair of which one feature was changed before leaves room for half a pair
        torch.testing.assert_close(got.best[row].flatten().double(), wanted[-1], rtol=0, atol=1e-6)
        further += len(wanted) > 3
    assert further


@pytest.mark.parametrize("eps", [2.0, 3.0, 6.0])
def test_no_more_features_change_than_eps(eps):
    """And the same with `gamma`, whichever is less."""
    case = puzzle("l0", targeted=True)
    free = run(case.model, JSMA(), L0(20.0), case.x, case.y, targets=case.targets)
    got = run(case.model, JSMA(), L0(eps), case.x, case.y, targets=case.targets)
    share = run(case.model, JSMA(gamma=eps / 20), L0(20.0), case.x, case.y, targets=case.targets)
    assert float(got.distance.max()) == eps
    even = free.distance <= eps - eps % 2
    assert torch.equal(got.found | (free.distance == eps), (free.found & even) | (free.distance == eps) | got.found)
    assert (got.found >= (free.found & even)).all()
    assert (share.distance[share.found] <= eps + 1).all()


def test_one_query_and_two_gradients_a_pair():
    case = puzzle("l0", targeted=True)
    got = run(case.model, JSMA(), L0(20.0), case.x, case.y, targets=case.targets)
    pairs = (got.distance / 2).ceil()
    done = got.found
    assert done.sum() >= 4
    assert (got.backward[done] >= 2 * pairs[done]).all()


@pytest.mark.parametrize(("theta", "start", "wanted"), [(1.0, 0.4, True), (-1.0, 0.4, False), (-1.0, 0.6, True)])
def test_an_image_of_one_feature_has_no_pair_and_is_pushed_alone(theta, start, wanted):
    model = Probe(lambda flat: 10.0 * torch.cat([flat, 1.0 - flat], 1))
    x = torch.full((1, 1, 1, 1), start)
    got = run(model, JSMA(theta=theta), L0(1.0), x, model.query(x, Access.DECISION).labels)
    assert got.found.tolist() == [wanted]


def test_where_no_pair_helps_it_ends():
    """A constant model: no gradient, no move, no NaN."""
    model = Probe(lambda flat: 0.0 * flat[:, :3] + torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    x, y = torch.full((2, 1, 2, 3), 0.5), torch.zeros(2, dtype=torch.int64)
    got = run(model, JSMA(), L0(6.0), x, y)
    assert not got.found.any()
    assert torch.equal(got.best, x)
