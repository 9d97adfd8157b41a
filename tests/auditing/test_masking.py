"""The checklist: each sign on a small model built to raise it, and on one that must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as imported_early
from torch.nn.functional import cross_entropy

from sparring.auditing.masking import KINDS, Cost, Sign, check
from sparring.core.model import Access, Prediction
from sparring.core.threat import L0, L1, L2, Linf, Threat, Unbounded
from sparring.models.torch import TorchModel

Rows = tuple[Tensor, Tensor]
Net = Callable[[Tensor], Tensor]
IN_BALL = [
    "one_step_beats_iterative",
    "black_box_beats_white_box",
    "success_falls_with_eps",
    "loss_still_climbing",
    "more_steps_still_help",
    "random_noise_finds_errors",
]
NEED_GRADIENTS = ["zero_gradient", "unbounded_attack_fails", *IN_BALL]


class Giving:
    """A model that gives no more than `access`."""

    bounds = (0.0, 1.0)

    def __init__(self, net: Net, access: Access) -> None:
        self.model, self.access = TorchModel(net), access

    def query(self, x: Tensor, access: Access) -> Prediction:
        assert access <= self.access
        return self.model.query(x, access)


def measured(model: object, rows: Rows, threat: Threat, **options: object) -> tuple[dict[str, Sign], Cost]:
    x, y = rows
    options = {"ids": torch.arange(len(x)), "width": 64} | options
    signs, cost = check(model, x, y, threat, **options)
    assert [sign.name for sign in signs] == list(KINDS)
    for sign in signs:
        assert sign.raised == (sign.measure is not None and sign.measure > sign.threshold), sign
        assert (sign.measure is None) == sign.finding.startswith("Not measured: "), sign
        assert sign.finding.endswith(".")
        assert sign.advice
    return {sign.name: sign for sign in signs}, cost


def signs_of(net: Net, rows: Rows, threat: Threat, **options: object) -> dict[str, Sign]:
    return measured(TorchModel(net), rows, threat, **options)[0]


def raised(signs: dict[str, Sign]) -> list[str]:
    return [name for name, sign in signs.items() if sign.raised]


def silent(signs: dict[str, Sign]) -> list[str]:
    return [name for name, sign in signs.items() if sign.measure is None]


def right(net: Net, digits: Rows, count: int = 64) -> Rows:
    x, y = digits[0][1500:], digits[1][1500:]
    at = (net(x).argmax(1) == y).nonzero().squeeze(1)[:count]
    return x[at], y[at]


@pytest.fixture(scope="module")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    return right(net, digits)


@pytest.fixture(scope="module")
def hardened(digits: Rows) -> nn.Sequential:
    """The dense network, trained on FGSM from a random start (Wong, Rice, Kolter 2020) at eps 0.15."""
    x, y = digits
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(400):
            at = torch.randint(0, 1500, (128,))
            near = (x[at] + torch.empty_like(x[at]).uniform_(-0.15, 0.15)).requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(net(near), y[at]), near)
            near = torch.clamp(near + 0.19 * gradient.sign(), x[at] - 0.15, x[at] + 0.15).clamp(0, 1).detach()
            optimiser.zero_grad()
            cross_entropy(net(near), y[at]).backward()
            optimiser.step()
    return net.eval()


def test_the_thresholds():
    """A change here changes verdicts: change it on purpose."""
    assert {name: threshold for name, (threshold, _) in KINDS.items()} == {
        "random_outputs": 1e-4,
        "probabilities": 0.99,
        "zero_gradient": 0.05,
        "one_step_beats_iterative": 0.02,
        "black_box_beats_white_box": 0.02,
        "success_falls_with_eps": 0.02,
        "unbounded_attack_fails": 0.02,
        "loss_still_climbing": 0.05,
        "more_steps_still_help": 0.02,
        "random_noise_finds_errors": 0.01,
        "dynamic_computation": 0.0,
    }


# Healthy models


@pytest.mark.parametrize(
    "threat", [Linf(0.05), Linf(0.15), Linf(0.25), L2(0.5), L2(1.0), L1(2.0)], ids=Threat.describe
)
def test_nothing_is_raised_on_a_plain_net(net, rows, threat):
    signs = signs_of(net, rows, threat)
    assert raised(signs) == []
    assert set(silent(signs)) <= {"loss_still_climbing"} | (
        {"one_step_beats_iterative"} if threat.norm == "l1" else set()
    )


@pytest.mark.parametrize("threat", [Linf(0.1), Linf(0.15), L2(0.5), L1(2.0)], ids=Threat.describe)
def test_nothing_is_raised_on_a_hardened_net(hardened, digits, threat):
    signs, cost = measured(TorchModel(hardened), right(hardened, digits), threat)
    assert raised(signs) == []
    assert signs["loss_still_climbing"].measure is not None
    assert cost.forward / 64 > 50, "rows must have held, or this says nothing"


def test_a_net_that_falls_at_once_costs_little(net, rows):
    _, cost = measured(TorchModel(net), rows, Linf(0.25))
    assert cost.forward <= 60 * 64
    assert cost.backward <= 12 * 64


def test_a_net_that_holds_costs_a_bounded_amount(hardened, digits):
    signs, cost = measured(TorchModel(hardened), right(hardened, digits), Linf(0.002))
    assert "of the 63 rows (of 64)" in signs["black_box_beats_white_box"].finding, "they must have held"
    assert cost.forward <= 350 * 64
    assert cost.backward <= 180 * 64


def test_the_bill_is_what_the_model_was_asked(net, rows):
    """With one row and a width of one nothing is padded, and no width has to be tried out."""
    asked = {"forward": 0, "backward": 0}

    class Counting(Giving):
        def query(self, x: Tensor, access: Access) -> Prediction:
            asked["forward"] += len(x)
            said = self.model.query(x, access)

            def vjp(cotangent: Tensor, *, keep: bool = False) -> Tensor:
                asked["backward"] += len(cotangent)
                return said.vjp(cotangent, keep=keep)

            return Prediction(said.labels, said.logits, said.vjp and vjp)

    for threat in (Linf(0.02), Linf(0.3)):
        asked.update(forward=0, backward=0)
        _, cost = measured(Counting(net, Access.GRADIENT), (rows[0][:1], rows[1][:1]), threat, width=1)
        assert asked == {"forward": cost.forward, "backward": cost.backward}


# One sign after another


def test_random_outputs(net, rows):
    signs = signs_of(lambda x: net(x) + 0.1 * torch.randn(len(x), 10), rows, Linf(0.15))
    assert signs["random_outputs"].raised
    assert 1e-3 < signs["random_outputs"].measure < 1
    assert signs_of(net, rows, Linf(0.15))["random_outputs"].measure == 0


def test_labels_that_change_are_random_outputs_too(net, rows):
    def often(x: Tensor) -> Tensor:
        return net(x) + 20 * torch.randn(len(x), 10)

    signs, _ = measured(Giving(often, Access.DECISION), rows, Linf(0.15))
    assert signs["random_outputs"].measure > 0.5
    signs, _ = measured(Giving(net, Access.DECISION), rows, Linf(0.15))
    assert signs["random_outputs"].measure == 0


def test_a_random_model_is_measured_alike_twice_and_the_global_noise_is_left_alone(net, rows):
    def noisy(x: Tensor) -> Tensor:
        return net(x) + torch.randn(len(x), 10)

    before = torch.get_rng_state()
    first = signs_of(noisy, rows, Linf(0.1))
    torch.rand(3)
    again = signs_of(noisy, rows, Linf(0.1))
    assert first == again
    torch.set_rng_state(before)
    signs_of(noisy, rows, Linf(0.1))
    assert torch.equal(torch.get_rng_state(), before)


def test_probabilities(net, rows):
    assert signs_of(lambda x: net(x).softmax(1), rows, Linf(0.15))["probabilities"].measure == 1
    assert signs_of(net, rows, Linf(0.15))["probabilities"].measure == 0
    # Outputs that sum to 1 are no probabilities if some are negative.
    assert signs_of(lambda x: net(x) - net(x).mean(1, True) + 0.1, rows, Linf(0.15))["probabilities"].measure == 0
    assert signs_of(lambda x: 1.001 * net(x).softmax(1), rows, Linf(0.15))["probabilities"].measure == 0
    named = TorchModel(lambda x: net(x).softmax(1), probabilities=True)
    assert measured(named, rows, Linf(0.15))[0]["probabilities"].measure == 0


def coarse(net: Net) -> Net:
    return lambda x: net((x * 4).round() / 4)


def through_nan(net: Net) -> Net:
    return lambda x: net(x + (x - x.detach()).abs().sqrt())


def under_no_grad(net: Net) -> Net:
    return lambda x: net(x).detach()


def beside_the_graph(net: Net) -> Net:
    """Logits that hang on a parameter, not on the image."""
    zero = nn.Parameter(torch.zeros(10))
    return lambda x: net(x).detach() + zero


@pytest.mark.parametrize("stopped", [coarse, through_nan, under_no_grad, beside_the_graph])
def test_zero_gradient(net, digits, stopped):
    signs = signs_of(stopped(net), right(stopped(net), digits), Linf(0.3))
    assert signs["zero_gradient"].measure == 1


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_a_gradient_in_the_margin_alone_is_one(net, rows, factor):
    """At 1e6 softmax is exactly 0 or 1, and cross-entropy has no gradient; the attacks climb the margin."""
    signs = signs_of(lambda x: factor * net(x), rows, Linf(0.15))
    assert signs["zero_gradient"].measure == 0
    assert raised(signs) == []


def test_rows_without_gradient_are_counted_one_by_one(net, rows):
    dark = rows[0].flatten(1).sum(1) < rows[0].flatten(1).sum(1).median()

    def partly(x: Tensor) -> Tensor:
        return torch.where(
            (x.flatten(1).sum(1) < rows[0].flatten(1).sum(1).median())[:, None], net(x).detach(), net(x)
        )

    measure = signs_of(partly, rows, Linf(0.15))["zero_gradient"].measure
    assert measure == dark.double().mean().item()
    assert 0.4 < measure < 0.6


def lattice(*, rough: bool) -> Net:
    """On the grid of 1/16 the mean of the pixels decides; if `rough`, off the grid the first pixel does.

    Half the grid, where the clean images lie, has the true gradient: FGSM at eps 1/16 follows it to the
    other half. Steps of any other length end off the grid, where the gradient leads away from it.
    """

    def net(x: Tensor) -> Tensor:
        flat = x.flatten(1)
        on = (-100 * (16 * torch.pi * flat).sin().square().mean(1)).exp()
        near = (8 * torch.pi * flat).sin().abs().mean(1) > 0.9
        fragile, robust = 16 * (flat[:, 1:] - 0.5).mean(1), 0.002 * (flat[:, 0] - 0.5)
        shattered = on * torch.where(near, fragile, fragile.detach()) + (1 - on) * robust
        score = shattered if rough else fragile
        return torch.stack([-score, score], 1)

    return net


def test_one_step_beats_iterative():
    y = torch.arange(20) % 2
    away = torch.where(torch.arange(64) % 16 == 0, -1, 1) / 16
    x = 0.5 + (2 * y - 1)[:, None] * away
    x[:, 0] = y.float()
    rows = (x.view(20, 1, 8, 8), y)
    assert signs_of(lattice(rough=True), rows, Linf(1 / 16))["one_step_beats_iterative"].measure > 0.4
    smooth = signs_of(lattice(rough=False), rows, Linf(1 / 16))
    assert smooth["one_step_beats_iterative"].measure == 0
    assert raised(smooth) == []


def test_black_box_beats_white_box(net, digits):
    sign = signs_of(coarse(net), right(coarse(net), digits), Linf(0.2))["black_box_beats_white_box"]
    assert sign.measure > 0.1
    # The same net with its gradient in place, at the same eps.
    assert signs_of(net, right(net, digits), Linf(0.2))["black_box_beats_white_box"].measure == 0


def numb_beyond(net: Net, eps: float) -> Net:
    """A net without gradients as soon as the first column, empty in every digit, is more than eps bright."""

    def answer(x: Tensor) -> Tensor:
        far = x[:, :, :, 0].flatten(1).amax(1) > 1.01 * eps
        logits = net(x)
        return torch.where(far[:, None], logits.detach(), logits)

    return answer


def test_success_falls_with_eps(net, rows):
    empty = rows[0][:, :, :, 0].flatten(1).amax(1) == 0
    rows = (rows[0][empty], rows[1][empty])
    sign = signs_of(numb_beyond(net, 0.15), rows, Linf(0.15))["success_falls_with_eps"]
    assert sign.measure > 0.1
    assert signs_of(numb_beyond(net, 1.0), rows, Linf(0.15))["success_falls_with_eps"].measure == 0


@pytest.mark.parametrize("detached", [False, True])
def test_unbounded_attack_fails(net, rows, detached):
    def constant(x: Tensor) -> Tensor:
        logits = 0 * net(x) + nn.functional.one_hot(torch.tensor(3), 10)
        return logits.detach() if detached else logits

    threes = rows[1] == 3
    assert threes.any()
    signs = signs_of(constant, (rows[0][threes], rows[1][threes]), Linf(0.15))
    assert signs["unbounded_attack_fails"].measure == 1
    assert signs_of(net, rows, Linf(0.15))["unbounded_attack_fails"].measure == 0


def test_noise_does_not_stand_in_for_a_gradient_when_all_is_allowed(net, digits):
    """Any noise far away breaks this net; the attack starts at the image and has no gradient to leave it by."""
    signs = signs_of(coarse(net), right(coarse(net), digits), Linf(0.15))
    assert signs["unbounded_attack_fails"].measure == 1


def test_the_unbounded_attack_runs_in_every_norm(net, rows):
    for threat in (L0(3), Unbounded(), L1(1.0)):
        assert signs_of(net, rows, threat)["unbounded_attack_fails"].measure == 0


def chain(length: int, *, goal: float, timid: bool = False) -> Net:
    """A pixel counts, and has a gradient, only when those before it are at their end: an attack goes one by one.

    Grey is half of the way, 0.1 above it the end. A `timid` one has no gradient if any other pixel is moved.
    """

    def net(x: Tensor) -> Tensor:
        level = ((x.flatten(1)[:, :length] - 0.5) / 0.2 + 0.5).clamp(0, 1)
        done = (level > 0.95).float().cumprod(1)
        opened = torch.cat([torch.ones_like(done[:, :1]), done[:, :-1]], 1)
        way = (opened * level).sum(1) / length
        if timid:
            still = ((x.flatten(1)[:, length:] - 0.5).abs() < 1e-4).all(1)
            way = torch.where(still, way, 0 * way)
        return torch.stack([torch.full_like(way, goal), way], 1)

    return net


def grey(n: int = 12) -> Rows:
    return torch.full((n, 1, 8, 8), 0.5), torch.zeros(n, dtype=torch.int64)


def test_loss_still_climbing():
    sign = signs_of(chain(60, goal=1.1), grey(), Linf(0.1))["loss_still_climbing"]
    assert sign.raised
    assert 0.2 < sign.measure < 0.5  # each pixel takes as long, so that a third of the steps bring a third
    sign = signs_of(chain(1, goal=1.1), grey(), Linf(0.1))["loss_still_climbing"]
    assert sign.measure == pytest.approx(0, abs=1e-6)


def test_a_row_that_falls_in_the_last_steps_was_climbing():
    """Only the run from the image itself breaks this one, and only at its fourth pixel."""
    sign = signs_of(chain(4, goal=0.95, timid=True), grey(), Linf(0.1))["loss_still_climbing"]
    assert "On 12 rows" in sign.finding
    assert sign.measure == pytest.approx((0.95 - 2.95 / 4) / (0.95 - 0.5 / 4), abs=1e-4)


def test_a_margin_that_never_rose_does_not_climb(digits):
    x = digits[0][:10]
    sign = signs_of(pitted(0.0), (x, torch.zeros(10, dtype=torch.int64)), Linf(0.1))["loss_still_climbing"]
    assert sign.measure is None
    assert "no row held on which the margin rose" in sign.finding


def test_more_steps_still_help():
    signs = signs_of(chain(10, goal=0.95), grey(), Linf(0.1))
    assert signs["more_steps_still_help"].measure > 0.5
    assert signs["black_box_beats_white_box"].finding.endswith("gradient attacks had broken all 12.")
    for goal in (0.5, 1.1):  # too easy, and out of reach
        assert signs_of(chain(2, goal=goal), grey(), Linf(0.1))["more_steps_still_help"].measure == 0


def pitted(share: float) -> Net:
    """Right everywhere but in pits, which nothing points to, over a `share` of all images."""
    weights = torch.linspace(1e3, 7e3, 64, dtype=torch.float64)

    def net(x: Tensor) -> Tensor:
        height = (x.flatten(1).double() @ weights).frac()
        wrong = 2.0 * (height < share).float() - 1 + 0 * x.flatten(1).sum(1)
        return torch.stack([-wrong, wrong], 1)

    return net


def test_random_noise_finds_errors(digits):
    x = digits[0][:64]
    for share, expected in ((0.1, True), (0.0, False)):
        held = x[pitted(share)(x).argmax(1) == 0]
        signs = signs_of(pitted(share), (held, torch.zeros(len(held), dtype=torch.int64)), Linf(0.1))
        assert signs["random_noise_finds_errors"].raised == expected
        assert (signs["random_noise_finds_errors"].measure > 0.3) == expected


def polished(net: Net, *, how: str) -> Net:
    """A net that first takes a gradient step of its own."""

    def answer(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            energy = net(leaf).logsumexp(1).sum()
            if how == "backward":
                energy.backward()
                gradient = leaf.grad
            elif how == "func":
                gradient = torch.func.grad(lambda z: net(z).logsumexp(1).sum())(x.detach())
            else:
                (gradient,) = imported_early(energy, leaf)
        return net(x + 0.01 * gradient)

    return answer


@pytest.mark.parametrize("how", ["grad", "backward", "func"])
def test_dynamic_computation(net, rows, how):
    assert signs_of(polished(net, how=how), rows, Linf(0.15))["dynamic_computation"].measure == 1
    assert signs_of(net, rows, Linf(0.15))["dynamic_computation"].measure == 0


def test_autograd_is_put_back_when_the_model_fails(net, rows):
    engine = torch.autograd.Variable._execution_engine
    calls = iter(range(10**9))

    def breaks(x: Tensor) -> Tensor:
        if len(x) <= 4 and next(calls) == 0:  # the query that is watched
            raise KeyboardInterrupt
        return net(x)

    with pytest.raises(KeyboardInterrupt):
        signs_of(breaks, rows, Linf(0.15))
    assert torch.autograd.Variable._execution_engine is engine


# What cannot be measured


def test_no_row_at_all(net, rows):
    signs, cost = measured(TorchModel(net), (rows[0][:0], rows[1][:0]), Linf(0.15))
    assert silent(signs) == list(KINDS)
    assert "no row was given" in signs["zero_gradient"].finding
    assert cost == Cost(0, 0)


@pytest.mark.parametrize("eps", [0.02, 0.3])
def test_one_row(net, rows, eps):
    signs = signs_of(net, (rows[0][:1], rows[1][:1]), Linf(eps))
    assert raised(signs) == []
    assert set(silent(signs)) <= {"loss_still_climbing"}


def test_scores_only(net, rows):
    signs, cost = measured(Giving(net, Access.SCORE), rows, Linf(0.15))
    assert sorted(silent(signs)) == sorted(NEED_GRADIENTS)
    assert "score access only" in signs["zero_gradient"].finding
    assert cost == Cost(5 * 64 + 4, 0)
    softmax = Giving(lambda x: net(x).softmax(1), Access.SCORE)
    assert measured(softmax, rows, Linf(0.15))[0]["probabilities"].raised


def test_labels_only(net, rows):
    signs, _ = measured(Giving(net, Access.DECISION), rows, Linf(0.15))
    assert sorted(silent(signs)) == sorted([*NEED_GRADIENTS, "probabilities"])
    assert signs["dynamic_computation"].measure == 0


@pytest.mark.parametrize("threat", [L0(3), Unbounded()], ids=Threat.describe)
def test_a_norm_that_the_attacks_do_not_know(net, rows, threat):
    signs = signs_of(net, rows, threat)
    assert sorted(silent(signs)) == sorted(IN_BALL)
    assert f"not in {threat.norm}" in signs["more_steps_still_help"].finding


def test_a_model_that_fails_on_one_row(net, rows):
    x = rows[0][:20].clone()
    x[3, 0, 0, 0] = 1.0

    def fails(images: Tensor) -> Tensor:
        if (images[:, 0, 0, 0] > 0.5).any():
            raise ValueError("too bright a corner")
        return net(images)

    signs = signs_of(fails, (x, rows[1][:20]), Linf(0.15))
    assert raised(signs) == []
    assert "of 19 rows" in signs["zero_gradient"].finding
    others = [row for row in range(20) if row != 3]
    alone = signs_of(net, (x[others], rows[1][others]), Linf(0.15), ids=torch.tensor(others))
    assert [sign.measure for sign in signs.values()] == pytest.approx([sign.measure for sign in alone.values()])


def test_a_model_that_always_fails(rows):
    def fails(x: Tensor) -> Tensor:
        raise ValueError("out of order")

    signs = signs_of(fails, rows, Linf(0.15))
    assert silent(signs) == list(KINDS)
    assert "out of order" in signs["random_outputs"].finding


def test_rows_that_are_read_wrong_are_left_out(net, rows):
    x, y = rows
    wrong = (y + (torch.arange(64) < 10)) % 10
    assert "of 54 rows" in signs_of(net, (x, wrong), Linf(0.15))["zero_gradient"].finding
    signs = signs_of(net, (x, (y + 1) % 10), Linf(0.15))
    assert sorted(silent(signs)) == sorted(NEED_GRADIENTS)


@contextmanager
def patience(turns: int) -> Iterator[Callable[[], bool]]:
    """A `stop` that says yes after this many questions."""
    left = iter(range(turns))
    yield lambda: next(left, None) is None


@pytest.mark.parametrize("turns", [0, 1, 6, 8, 20, 60, 150])
def test_out_of_time(hardened, digits, turns):
    rows = right(hardened, digits, 16)
    whole, full = measured(TorchModel(hardened), rows, Linf(0.1))
    with patience(turns) as stop:
        part, cost = measured(TorchModel(hardened), rows, Linf(0.1), stop=stop)
    missing = silent(part)
    assert missing, "the patience should not have sufficed"
    assert all("out of time" in part[name].finding for name in missing)
    assert all(part[name] == whole[name] for name in KINDS if name not in missing)
    assert cost.forward < full.forward
    assert (len(missing) == len(KINDS)) == (turns < 5)


# Determinism


def test_the_order_of_the_rows_does_not_matter(hardened, digits):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    x, y = right(hardened, digits)
    for net, labels, threat in (
        (hardened, y, Linf(0.17)),
        (hardened, y, L2(0.7)),
        (pitted(0.02), torch.zeros_like(y), Linf(0.1)),  # here every draw of noise matters
    ):
        first, cost = measured(TorchModel(net), (x, labels), threat, ids=100 + torch.arange(64))
        again, same = measured(TorchModel(net), (x[order], labels[order]), threat, ids=100 + order)
        assert first == again
        assert cost.forward == pytest.approx(same.forward, rel=0.02), (
            "who sits where decides which start is cancelled"
        )


def test_the_seed_matters_and_repeats(hardened, digits):
    rows = right(hardened, digits)
    one = measured(TorchModel(hardened), rows, Linf(0.17), seed=1)
    assert one == measured(TorchModel(hardened), rows, Linf(0.17), seed=1)
    assert one[1] != measured(TorchModel(hardened), rows, Linf(0.17), seed=2)[1]
