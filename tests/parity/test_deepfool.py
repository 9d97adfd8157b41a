"""DeepFool against a plain float64 loop over one row, written from algorithm 2, and against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparring.attacks.deepfool import DeepFool
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.testing import Probe, linear

SHAPES = [(1, 2, 3), (3, 4, 4), (1, 7, 7)]
CLASSES, SIZE = 6, 20


def draw(name: int, *shape: int) -> Tensor:
    return noise.normal(torch.tensor([name]), shape).squeeze(0).double()


def curved(rows: int = 10, bounds: tuple[float, float] = (-30.0, 30.0)) -> tuple[Probe, Tensor, Tensor]:
    """A smooth network of six classes, images and its own labels; with these bounds nothing is ever clipped."""
    hidden, out = draw(1, SIZE, 16), draw(2, 16, CLASSES)
    model = Probe(lambda flat: (0.7 * flat @ hidden).tanh() @ out, bounds=bounds)
    x = noise.uniform(torch.arange(rows), (1, 4, 5))
    return model, x, model.query(x, Access.DECISION).labels


def flat_classes(rows: int = 12) -> tuple[Probe, Tensor, Tensor, Tensor]:
    """Six linear classes; and the distances (rows, 6) to the boundary with each: [0] in L2, [1] in Linf."""
    weight, bias = draw(5, SIZE, CLASSES), draw(6, CLASSES)
    model = Probe(lambda flat: flat @ weight + bias, bounds=(-30.0, 30.0))
    x = noise.uniform(torch.arange(rows), (1, 4, 5))
    z = x.flatten(1).double() @ weight + bias
    y = z.argmax(1)
    gap = z.gather(1, y[:, None]) - z
    slopes = torch.stack([(weight[:, y].T[:, :, None] - weight).norm(p, dim=1) for p in (2, 1)])
    return model, x, y, (gap / slopes).masked_fill(torch.nn.functional.one_hot(y, CLASSES).bool(), torch.inf)


def batch_of(model: Probe, norm: str, x: Tensor, y: Tensor, target: Tensor | None = None, eps: float = 500) -> Batch:
    return Batch(x, y, torch.full_like(y, -1) if target is None else target, y, threat(norm, eps, model.bounds))


def look(model: Probe, batch: Batch, x: Tensor) -> Observation:
    hit = torch.zeros_like(batch.targeted)
    return Observation(batch, model.query(x, Access.GRADIENT), hit, Access.GRADIENT)


def play(attack: DeepFool, model: Probe, batch: Batch) -> list[list[Tensor]]:
    """The points (d,) that each row asks about, to its last."""
    state = attack.init(batch)
    points: list[list[Tensor]] = [[] for _ in batch.y]
    over = torch.zeros_like(batch.targeted)
    while not over.all():
        for row in (~over).nonzero().squeeze(1).tolist():
            points[row].append(state.x[row].flatten())
        over = over | state.done
        state = attack.step(batch, state, look(model, batch, state.x))
    return points


def algorithm_2(model: Probe, x0: Tensor, y: int, norm: str, attack: DeepFool, target: int = -1) -> list[Tensor]:
    """One row (d,) in float64: every point that is asked about."""
    far = 1 + attack.overshoot
    r = torch.zeros_like(x0)
    points = [x0]
    for _ in range(attack.steps):
        x = points[-1]
        z = model.net(x[None])[0]
        fooled = int(z.argmax()) == target if target >= 0 else int(z.argmax()) != y
        if fooled:
            points.append(x0 + (1 + 0.1 * attack.overshoot) * r)
            break
        jacobian = torch.autograd.functional.jacobian(lambda v: model.net(v[None])[0], x)
        order = [int(k) for k in z.argsort(descending=True)]
        if target >= 0:
            pairs = [(next(k for k in order if k != target), target)]
        else:
            pairs = [(y, k) for k in order if k != y][: attack.classes - 1]
        steps = []
        for leave, reach in pairs:
            w, f = jacobian[reach] - jacobian[leave], float(z[reach] - z[leave])
            if norm == "l2":
                steps.append((abs(f) / float(w.norm()), abs(f) / float(w.norm()) ** 2 * w))
            else:
                steps.append((abs(f) / float(w.abs().sum()), abs(f) / float(w.abs().sum()) * w.sign()))
        distance, move = min(steps, key=lambda pair: pair[0])
        r = r + move * max(1.0, 6e-3 / distance)  # no step is shorter than 1e-4 of the range, which is 60 here
        points.append(x0 + far * r)
    return points


@pytest.mark.parametrize("classes", [3, 10])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_point_is_that_of_algorithm_2(norm, targeted, classes):
    model, x, y = curved()
    target = (y + 2) % CLASSES if targeted else None
    attack = DeepFool(steps=30, classes=classes)
    found = play(attack, model, batch_of(model, norm, x, y, target))
    lengths = set()
    for row, points in enumerate(found):
        goal = int(target[row]) if target is not None else -1
        wanted = algorithm_2(model, x[row].flatten().double(), int(y[row]), norm, attack, goal)
        assert len(points) == len(wanted)
        lengths.add(len(wanted))
        torch.testing.assert_close(torch.stack(points).double(), torch.stack(wanted), rtol=1e-3, atol=1e-4)
    assert max(lengths) > 3  # or one step would do, as on a linear model


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l2", "linf", "unbounded"])
def test_one_step_and_a_last_look_reach_the_boundary_of_a_linear_model(norm, shape, rows, targeted):
    case = linear(norm, shape, rows)
    targets = torch.ones(rows, 1, dtype=torch.int64) if targeted else None
    got = run(case.model, DeepFool(), case.limit, case.x, case.y, targets=targets)
    assert got.found.all()
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.0021
    assert got.forward.tolist() == [3] * rows
    assert got.backward.tolist() == [2] * rows


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_of_many_linear_classes_it_goes_to_the_nearest(norm):
    model, x, y, far = flat_classes()
    far = far[0 if norm == "l2" else 1]
    limit = threat(norm, 50.0, model.bounds)
    got = run(model, DeepFool(), limit, x, y)
    torch.testing.assert_close(got.distance, 1.002 * far.amin(1), rtol=1e-4, atol=1e-5)
    assert got.label.tolist() == far.argmin(1).tolist()
    assert got.backward.tolist() == [2 * (CLASSES - 1)] * len(x)
    second = model.query(x, Access.SCORE).logits.topk(2).indices[:, 1]
    assert (second != far.argmin(1)).any()  # or the next test would show nothing
    got = run(model, DeepFool(classes=2), limit, x, y)  # only the class with the second logit is tried
    torch.testing.assert_close(got.distance, 1.002 * far.gather(1, second[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    assert got.backward.tolist() == [2] * len(x)


def test_targets_and_none_in_one_batch_do_not_disturb_each_other():
    model, x, y = curved()
    target = (y + 2) % CLASSES
    aimed, free = (play(DeepFool(), model, batch_of(model, "l2", x, y, t)) for t in (target, None))
    some = torch.arange(len(y)) % 2 == 0
    mixed = play(DeepFool(), model, batch_of(model, "l2", x, y, torch.where(some, target, -1)))
    for row, points in enumerate(mixed):
        for one, two in zip(points, (aimed if some[row] else free)[row], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_it_stays_in_the_bounds_and_ends_in_the_ball(norm):
    model, x, y = curved(bounds=(0.0, 1.0))
    batch = batch_of(model, norm, x, y, eps=0.02)
    for row, points in enumerate(play(DeepFool(), model, batch)):
        assert all(float(point.min()) >= 0 and float(point.max()) <= 1 for point in points)
        last = points[-1].view(1, 1, 4, 5)
        assert batch.threat.contains(last, x[row : row + 1]).all()


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_what_gives_no_direction_does_no_harm(norm):
    """A constant model, one that says NaN, one with a tie, and a row that is wrong from the start."""
    x = torch.full((2, 1, 1, 3), 0.5)
    y = torch.tensor([0, 1])
    models = {
        "constant": lambda flat: 0.0 * flat + torch.tensor([1.0, 0.0, -1.0]),
        "nan": lambda flat: flat * torch.nan,
        "nan with a slope": lambda flat: flat + torch.tensor([0.0, torch.nan, 0.0]),
        "tie": lambda flat: flat,
        "faint": lambda flat: 1e-30 * flat,
    }
    for net in models.values():
        model = Probe(net)
        for points in play(DeepFool(steps=5), model, batch_of(model, norm, x, y)):
            assert torch.stack(points).isfinite().all()
    tied = play(DeepFool(), Probe(models["tie"]), batch_of(Probe(models["tie"]), norm, x, y))
    assert not torch.equal(tied[0][0], tied[0][1])  # a tie is left
    wrong = tied[1]  # class 0 leads in a tie, so a row of class 1 is wrong: it stays where it is
    assert len(wrong) == 2
    assert torch.equal(wrong[0], wrong[1])


def test_it_takes_so_many_steps_and_no_more():
    model = Probe(lambda flat: torch.cat([2.0 + 0 * flat[:, :1], flat[:, :1], -flat[:, 1:2]], 1))
    x, y = torch.full((2, 1, 1, 3), 0.5), torch.zeros(2, dtype=torch.int64)
    got = run(model, DeepFool(steps=6), threat("l2", 9.0), x, y)
    assert not got.found.any()
    assert got.forward.tolist() == [7, 7]


def test_it_wants_two_classes():
    with pytest.raises(UsageError, match="at least 2 classes"):
        DeepFool(classes=1)
