"""The recipes: what makes each the one it is, its cost in passes, and going on after a kill."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.pgd import PGD
from sparring.core import noise
from sparring.core.defense import Defense, Moment
from sparring.core.errors import UsageError
from sparring.core.threat import L2, Linf
from sparring.data import Dataset, load
from sparring.defenses.awp import AWP
from sparring.defenses.distillation import Distillation, Temperature
from sparring.defenses.fast import Fast
from sparring.defenses.free import Free
from sparring.defenses.gaussian import Gaussian
from sparring.defenses.label_smoothing import LabelSmoothing
from sparring.defenses.madry import Madry
from sparring.defenses.mart import MART, boosted
from sparring.defenses.standard import Standard
from sparring.defenses.trades import TRADES
from sparring.models.checkpoint import Checkpoint
from sparring.training.fit import Settings, fit

ROWS, CLASSES = 12, 4
STEPS = PGD(steps=3)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    """A small net in float64: images (1, 3, 3) to 4 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        middle = [nn.BatchNorm1d(7)] if norm else []
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 7), *middle, nn.Tanh(), nn.Linear(7, CLASSES))
    for weight in net.parameters():
        weight.data *= 3
    return net.double().train()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(ROWS, 1, 3, 3, generator=seeded(1)).double()


@pytest.fixture
def y() -> Tensor:
    return torch.arange(ROWS) % CLASSES


def moment(progress: float = 1.0, rows: int = ROWS) -> Moment:
    return Moment(progress, noise.keys(0, torch.arange(rows), torch.zeros(rows, dtype=torch.int64)))


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def same(net: nn.Module, loss: Tensor, wanted: Tensor) -> None:
    """Values and gradients agree, and there is something to agree on."""
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(gradients(net, loss), gradients(net, wanted), strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs)


def shares(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(1, keepdim=True)


# Gaussian noise, smoothed labels


def test_gaussian_noise_is_added_by_key_and_not_clipped(x, y):
    net, sigma = tiny(), 0.7
    noisy = x + sigma * noise.normal(moment().key, (1, 3, 3))
    assert noisy.min() < 0
    assert noisy.max() > 1
    wanted = -shares(net(noisy))[torch.arange(ROWS), y].log().mean()
    same(net, Gaussian(sigma).loss(net, x, y, moment()), wanted)
    other = Moment(1.0, moment().key + 1)
    assert Gaussian(sigma).loss(net, x, y, other) != Gaussian(sigma).loss(net, x, y, moment())


def test_gaussian_noise_has_the_deviation_that_is_asked_for():
    class Listener(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.heard = x
            return torch.zeros(len(x), 2)

    listener, rows = Listener(), 400
    Gaussian(0.25).loss(listener, torch.full((rows, 1, 10, 10), 0.5), torch.zeros(rows).long(), moment(rows=rows))
    drawn = listener.heard - 0.5
    assert drawn.std().item() == pytest.approx(0.25, rel=0.02)  # 40,000 draws: 0.35 % is one deviation
    assert drawn.mean().item() == pytest.approx(0, abs=0.005)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_labels_leave_a_share_to_every_class(smoothing, x, y):
    net = tiny()
    target = torch.full((ROWS, CLASSES), smoothing / CLASSES).double()
    target[torch.arange(ROWS), y] += 1 - smoothing
    wanted = -(target * shares(net(x)).log()).sum(1).mean()
    same(net, LabelSmoothing(smoothing).loss(net, x, y, moment()), wanted)


# MART


def plainly(net: nn.Module, x: Tensor, y: Tensor, points: Tensor, beta: float) -> Tensor:
    """Boosted cross-entropy and weighted divergence, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in enumerate(y.tolist()):
        p, q = shares(net(x[row : row + 1]))[0], shares(net(points[row : row + 1]))[0]
        rival = max(q[k] for k in range(CLASSES) if k != label)
        divergence = sum(p[k] * (p[k] / q[k]).log() for k in range(CLASSES))
        total = total - q[label].log() - (1 - rival).log() + beta * divergence * (1 - p[label])
    return total / len(x)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_mart_is_its_formula_at_the_points_of_its_attack(beta, x, y):
    net = tiny()
    points = Madry(STEPS, Linf(0.2)).points(net, x, y, moment())
    assert (points - x).abs().max() == pytest.approx(0.2)
    assert not points.requires_grad
    same(net, MART(STEPS, Linf(0.2), beta).loss(net, x, y, moment()), plainly(net, x, y, points, beta))


def test_the_boosted_cross_entropy_stays_finite_where_a_rival_is_certain():
    logits = torch.tensor([[0.0, 200.0, 1.0]], requires_grad=True)
    loss = boosted(logits, torch.tensor([0]))
    # -log p_0 = 200, and 1 - p_1 = (e^0 + e^1) e^-200 up to what vanishes
    assert loss.item() == pytest.approx(200 + 200 - torch.tensor([0.0, 1.0]).logsumexp(0).item())
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.tensor([[-1.2689414, 2.0, -0.7310586]]))


# Fast


@pytest.mark.parametrize(("progress", "eps"), [(0.15, 0.1), (0.3, 0.2), (1.0, 0.2)])
def test_fast_takes_one_step_of_five_quarters_from_a_uniform_start(progress, eps, x, y):
    net, limit = tiny(), Linf(0.2)
    start = x + (2 * noise.uniform(moment().key, (1, 3, 3)) - 1) * eps
    assert ((start < 0) | (start > 1)).any()  # a start is not cut off at the range of the pixels
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-shares(net(leaf))[torch.arange(ROWS), y].log().sum(), leaf)
    points = (start + 1.25 * eps * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    assert 0 < ((points - x).abs() < 0.99 * eps).double().mean() < 0.9  # the start still shows in some
    defense = Fast(STEPS, limit, watch=0)
    torch.testing.assert_close(defense.points(net, x, y, moment(progress)), points)
    wanted = -shares(net(points))[torch.arange(ROWS), y].log().mean()
    same(net, defense.loss(net, x, y, moment(progress)), wanted)


class Peak(nn.Module):
    """A net whose loss peaks at 0.17 from its centre in every pixel: long steps jump over it, short ones stay.

    `lift` (n,) makes a row fall wherever it is asked about, or nowhere.
    """

    def __init__(self, centre: Tensor, lift: Tensor) -> None:
        super().__init__()
        self.centre, self.lift = centre, lift

    def forward(self, x: Tensor) -> Tensor:
        far = (x - self.centre[: len(x)]).abs()
        height = torch.where(far < 0.17, far - 0.15, 0.02 - 4 * (far - 0.17)).mean((1, 2, 3))
        height = height + self.lift[: len(x)]
        return torch.stack([-height, height], 1)


def test_the_guard_fires_where_only_more_steps_break_the_net_and_nowhere_else():
    x, y = torch.full((ROWS, 1, 3, 3), 0.5).double(), torch.zeros(ROWS, dtype=torch.int64)
    net, attack = Peak(x, torch.zeros(ROWS)), PGD(steps=30, step_size=0.01)
    one, many = Fast(attack, Linf(0.2), watch=0), Madry(attack, Linf(0.2))
    jumped, worst = one.points(net, x, y, moment()), many.points(net, x, y, moment())
    held = [int((net(points).argmax(1) == y).sum()) for points in (jumped, worst)]
    assert held == [ROWS, 0]
    for watch, tolerance, wanted in [(16, 0.5, worst), (1, 0.99, worst), (16, 1.0, jumped), (0, 0.0, jumped)]:
        assert torch.equal(
            Fast(attack, Linf(0.2), watch=watch, tolerance=tolerance).points(net, x, y, moment()), wanted
        )


def test_the_guard_counts_among_the_watched_images_that_withstand_one_step():
    x, y = torch.full((ROWS, 1, 3, 3), 0.5).double(), torch.zeros(ROWS, dtype=torch.int64)
    lift = torch.tensor([0.0, 0, 0, -1, -1, -1, 1, 1, -1, -1, -1, -1])  # of 8 watched, 6 withstand, of which 3 fall
    net, attack = Peak(x, lift), PGD(steps=30, step_size=0.01)
    jumped, worst = Fast(attack, Linf(0.2), watch=0), Madry(attack, Linf(0.2))
    for tolerance, wanted in [(0.49, worst), (0.51, jumped)]:
        found = Fast(attack, Linf(0.2), watch=8, tolerance=tolerance).points(net, x, y, moment())
        assert torch.equal(found, wanted.points(net, x, y, moment()))


# AWP


class Linear(nn.Module):
    """Logits W x + b, whose gradients have a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, 9, generator=seeded(3)).double())
        self.bias = nn.Parameter(torch.randn(CLASSES, generator=seeded(4)).double())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def test_awp_moves_a_linear_net_as_the_closed_form_says_and_descends_there(x, y):
    net, gamma = Linear(), 0.3
    inner = Madry(STEPS, Linf(0.2))
    points = inner.points(net, x, y, moment())
    flat, onehot = points.flatten(1), torch.eye(CLASSES)[y].double()
    residual = (shares(flat @ net.weight.T + net.bias) - onehot).detach()  # d CE / d logits
    up = residual.T @ flat / ROWS
    moved = net.weight.detach() + gamma * net.weight.detach().norm() * up / up.norm()
    assert (moved - net.weight).norm().item() == pytest.approx(gamma * net.weight.norm().item())
    residual = shares(flat @ moved.T + net.bias.detach()) - onehot
    loss = AWP(inner, gamma).loss(net, x, y, moment())
    torch.testing.assert_close(loss, -shares(flat @ moved.T + net.bias)[torch.arange(ROWS), y].log().mean())
    assert loss > inner.loss(net, x, y, moment())
    weight, bias = gradients(net, loss)
    torch.testing.assert_close(weight, residual.T @ flat / ROWS)  # the bias has not moved, the gradient is at w + v
    torch.testing.assert_close(bias, residual.mean(0))


@pytest.mark.parametrize("inner", [Madry(STEPS, Linf(0.2)), MART(STEPS, L2(0.5)), TRADES(Linf(0.2), 6.0, 3)])
def test_awp_is_inners_cost_at_a_net_that_was_really_moved(inner, x, y):
    net = tiny()
    points, other = inner.points(net, x, y, moment()), deepcopy(net)
    climb = dict(zip(dict(other.named_parameters()), gradients(net, inner.cost(net, x, y, points)), strict=True))
    for name, weight in other.named_parameters():
        if name.endswith("weight"):
            weight.data += 0.05 * weight.data.norm() * climb[name] / climb[name].norm()
    loss, wanted = AWP(inner, 0.05).loss(net, x, y, moment()), inner.cost(other, x, y, points)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(net, loss), gradients(other, wanted))
    assert torch.equal(AWP(inner, 0.0).loss(net, x, y, moment()), inner.loss(net, x, y, moment()))


@pytest.mark.parametrize("norm", [False, True])
def test_awp_leaves_weights_gradients_and_modes_bit_for_bit(norm, x, y):
    net = tiny(norm=norm)
    marks = [torch.full_like(weight, 7.0) for weight in net.parameters()]
    for weight, mark in zip(net.parameters(), marks, strict=True):
        weight.grad = mark.clone()
    before, places = deepcopy(net.state_dict()), [weight.data_ptr() for weight in net.parameters()]
    loss = AWP(Madry(STEPS, Linf(0.2)), 0.1).loss(net, x, y, moment())
    counted = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert counted <= {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    if norm:
        assert int(net[2].num_batches_tracked) == 1  # once a step, as without it
    assert net.training
    assert all(torch.equal(weight.grad, mark) for weight, mark in zip(net.parameters(), marks, strict=True))
    loss.backward()
    assert places == [weight.data_ptr() for weight in net.parameters()]
    assert all(torch.equal(weight, before[name]) for name, weight in net.named_parameters())


def test_awp_keeps_the_direction_of_a_gradient_that_is_nearly_zero_and_does_not_move_without_one():
    x, y = torch.ones(1, 1, 3, 3), torch.zeros(1, dtype=torch.int64)

    class Faint(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.ones(2, 9)), scale

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight.T * self.scale

    for scale, length in [(1.0, 0.1 * 18**0.5), (1e-30, 0.1 * 18**0.5), (0.0, 0.0)]:
        shift = AWP(Madry(STEPS, Linf(0.2))).shift(Faint(scale), x, y, x)["weight"] * 10
        assert shift.norm().item() == pytest.approx(length)


def test_awp_goes_around_what_has_points():
    for inner in (Standard(), Gaussian(), AWP(Madry(STEPS, Linf(0.2)))):
        with pytest.raises(UsageError, match="expected a recipe that trains on points"):
            AWP(inner)


# Distillation


def taught(net: nn.Module, temperature: float) -> Checkpoint:
    card = {"plan": {"recipe": {"options": repr(Temperature(temperature))}}, "weights_sha256": "abc"}
    return Checkpoint(None, net.eval(), card)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_distillation_learns_the_teachers_soft_answers(temperature, x, y):
    net, teacher = tiny(), tiny(1).float()
    with torch.no_grad():
        soft = shares(teacher(x.float()).double() / temperature)
    assert (soft.argmax(1) != y).any()  # the labels would tell another tale
    defense = Distillation(taught(teacher, temperature), temperature)
    torch.testing.assert_close(defense.answers(x.float()).double(), soft)
    student = tiny().float()
    loss = defense.loss(student, x.float(), y, moment())
    wanted = -(soft * shares(net(x) / temperature).log()).sum(1).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(student, loss), gradients(net, wanted), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    assert all(weight.grad is None for weight in teacher.parameters())


def test_the_teacher_is_trained_at_the_temperature(x, y):
    net = tiny()
    wanted = -shares(net(x) / 20)[torch.arange(ROWS), y].log().mean()
    same(net, Temperature(20.0).loss(net, x, y, moment()), wanted)


def test_a_teacher_of_another_temperature_is_refused_and_the_plan_names_its_weights():
    with pytest.raises(UsageError, match=r"trained with Temperature\(temperature=20.0\), got .*40.0"):
        Distillation(taught(tiny(), 40.0), 20.0)
    assert repr(Distillation(taught(tiny(), 20.0), 20.0)) == "Distillation(teacher='abc', temperature=20.0)"


# All of them


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Gaussian(-1.0), "expected sigma >= 0"),
        (lambda: LabelSmoothing(1.5), "expected smoothing from 0 to 1"),
        (lambda: Temperature(0.0), "expected a temperature above 0"),
        (lambda: Temperature(float("nan")), "expected a temperature above 0"),
        (lambda: Fast(STEPS, Linf(0.1), step=0.0), "expected step > 0"),
        (lambda: Fast(STEPS, Linf(0.1), watch=-1), "watch >= 0"),
        (lambda: Fast(STEPS, Linf(0.1), tolerance=2.0), "a tolerance from 0 to 1"),
        (lambda: AWP(Madry(STEPS, Linf(0.1)), -1.0), "expected gamma >= 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(build, said):
    with pytest.raises(UsageError, match=said):
        build()


@dataclass
class Count:
    """Rows that went forward and back through a net."""

    forward: int = 0
    backward: int = 0

    def watch(self, net: nn.Module) -> None:
        def seen(_module: nn.Module, _inputs: object, logits: Tensor) -> None:
            self.forward += len(logits)
            if logits.requires_grad:
                logits.register_hook(self.back)

        net.register_forward_hook(seen)

    def back(self, cotangent: Tensor) -> None:
        self.backward += len(cotangent)


K, PART = STEPS.steps, 4  # PART of ROWS are watched
COSTS = [
    (Standard(), 1, 1),
    (Gaussian(), 1, 1),
    (LabelSmoothing(), 1, 1),
    (Temperature(), 1, 1),
    (Distillation(taught(tiny(1), 40.0)), 1, 1),  # and one forward pass of the teacher
    (Madry(STEPS, Linf(0.1)), K + 1, K + 1),
    (Fast(STEPS, Linf(0.1), watch=0), 2, 2),
    (Fast(STEPS, Linf(0.1), watch=PART, tolerance=1.0), 2 + (K + 2) * PART / ROWS, 2 + K * PART / ROWS),
    (Free(Linf(0.1)), 1, 1),
    (MART(STEPS, Linf(0.1)), K + 2, K + 2),
    (TRADES(Linf(0.1), steps=K), K + 3, K + 2),  # the clean answer is asked for twice
    (AWP(Madry(STEPS, Linf(0.1))), K + 2, K + 2),
    (AWP(MART(STEPS, Linf(0.1))), K + 4, K + 4),
]


@pytest.mark.parametrize(("defense", "forward", "backward"), COSTS, ids=lambda value: getattr(value, "name", None))
def test_a_step_costs_so_many_plain_passes(defense, forward, backward, x, y):
    net, count = tiny(), Count()
    count.watch(net)
    defense.loss(net, x, y, moment()).backward()
    assert (count.forward, count.backward) == (forward * ROWS, backward * ROWS)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory) -> Checkpoint:
    return fit(Settings("dense", 20), digits, Temperature(40.0), tmp_path_factory.mktemp("teacher") / "t")


RESUMED = {
    "fast": lambda _: Fast(STEPS, Linf(0.1), watch=32, tolerance=0.01),
    "free": lambda _: Free(Linf(0.1), replays=3),  # the tenth step, which is stored, stands amid the replays
    "awp": lambda _: AWP(MART(STEPS, Linf(0.1))),
    "gaussian": lambda _: Gaussian(),
    "distillation": lambda teacher: Distillation(teacher),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_training_goes_on_to_the_same_weights(name, digits, teacher, tmp_path):
    settings, defense = Settings("dense", 20, every=5), RESUMED[name](teacher)
    assert defense.name == name

    def stop(step: int) -> None:
        if step == 13:
            raise Killed

    with pytest.raises(Killed):
        fit(settings, digits, defense, tmp_path / "a", on_step=stop)
    steps: list[int] = []
    resumed = fit(settings, digits, defense, tmp_path / "a", on_step=steps.append)
    whole = fit(settings, digits, defense, tmp_path / "b")
    assert steps[0] == 11
    assert resumed.card["weights_sha256"] == whole.card["weights_sha256"]


def test_distillation_from_other_weights_is_another_plan(digits, teacher, tmp_path):
    other = fit(Settings("dense", 20, seed=1), digits, Temperature(40.0), tmp_path / "t")
    fit(Settings("dense", 5), digits, Distillation(teacher), tmp_path / "a")
    with pytest.raises(UsageError, match="recipe"):
        fit(Settings("dense", 5), digits, Distillation(other), tmp_path / "a")


def every() -> list[Defense]:
    return [kind for kind, *_ in COSTS if kind.name not in ("standard", "madry", "trades")]


@pytest.mark.parametrize("defense", every(), ids=lambda d: d.name)
def test_points_are_sought_in_eval_mode_and_the_mode_is_put_back(defense, x, y):
    weighed = 2 if "MART" in repr(defense) else 1  # passes of the loss itself, at clean images and points
    for training in (True, False):
        net = tiny(norm=True).train(training)
        defense.loss(net, x, y, moment())
        assert [module.training for module in net.modules()] == [training] * len(list(net.modules()))
        assert int(net[2].num_batches_tracked) == weighed * training
