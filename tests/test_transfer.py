"""Images crafted on surrogates and judged on a target: closed forms, exact counts, and the target's secrets."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn

import sparring
from sparring.core.errors import AttackError, DataError, ModelError, UsageError
from sparring.core.model import Access, Prediction
from sparring.core.threat import L2, Linf
from sparring.models.ensemble import Ensemble
from sparring.models.torch import TorchModel
from sparring.testing import Probe
from sparring.transferability import FAMILY

WIDE = (-20.0, 20.0)


def plane(weight: torch.Tensor, bounds: tuple[float, float] = WIDE) -> Probe:
    """Class 0 where weight . x > 0."""
    return Probe(lambda flat: torch.stack([flat @ weight / 2, -flat @ weight / 2], 1), bounds)


@pytest.fixture(scope="module")
def planes() -> tuple[Probe, Probe, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two unit normals at 60 degrees, images 0.1, 0.2, ... from the target's plane, and both normals."""
    one, other = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)).double()
    mine = one / one.norm()
    aside = other - (other @ mine) * mine
    theirs = 0.5 * mine + 0.75**0.5 * aside / aside.norm()
    far = torch.arange(1, 11).double() / 10
    x = (far[:, None] * theirs).float().view(10, 3, 2, 2)
    return plane(mine), plane(theirs), x, mine, theirs


@pytest.mark.parametrize("eps", [0.33, 0.93, 1.57, 2.5])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_on_planes_a_step_travels_by_the_cosine_of_their_angle(planes, norm, eps):
    """In L2 the target's margin falls by eps cos(60 degrees), in Linf by eps sign(w_surrogate) . w_target."""
    surrogate, target, x, mine, theirs = planes
    fall = eps * (0.5 if norm == "l2" else float(mine.sign() @ theirs))
    y = torch.zeros(10, dtype=torch.int64)
    found = sparring.transfer(surrogate, target, x, y, ["fgsm"], (L2 if norm == "l2" else Linf)(eps, WIDE))
    margins = torch.arange(1, 11).double() / 10
    assert torch.equal(found.outcomes[0].found, margins < fall)
    gone = (x.flatten(1).double() @ theirs) - (found.outcomes[0].best.flatten(1).double() @ theirs)
    torch.testing.assert_close(gone, torch.full_like(gone, fall), rtol=0, atol=1e-5)
    on_surrogate = margins * 0.5 < eps * (1.0 if norm == "l2" else float(mine.abs().sum()))
    assert found.entries[0].surrogate == pytest.approx(on_surrogate.double().mean().item(), abs=1e-6)


def net_of(seed: int, classes: int = 10) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)).eval()


@pytest.fixture(scope="module")
def surrogates(digits) -> list[nn.Sequential]:
    """Two networks that read the digits a little."""
    x, y = digits
    nets = [net_of(5), net_of(6)]
    for net in nets:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
            for _ in range(200):
                at = torch.randint(0, 1500, (128,))
                loss = nn.functional.cross_entropy(net(x[at]), y[at])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return nets


@pytest.fixture(scope="module")
def rows(digits):
    return digits[0][1500:1560], digits[1][1500:1560]


class Secretive:
    """A target that shows labels only, and remembers every image and every access it was asked for."""

    access, bounds = Access.DECISION, (0.0, 1.0)

    def __init__(self, net: nn.Module) -> None:
        self.model, self.asked = TorchModel(net), []

    def query(self, x, access) -> Prediction:
        self.asked.append(x.clone())
        return self.model.query(x, Access.DECISION)


def test_the_target_gives_a_label_for_each_row_and_attack_and_nothing_more(net, surrogates, rows):
    x, y = rows
    target = Secretive(net)
    found = sparring.transfer(surrogates, target, x, y, ["fgsm", "mifgsm"], Linf(0.15), width=64)
    checks, untouched, *carried = target.asked[:3], target.asked[3], *target.asked[4:]
    assert sum(len(images) for images in checks) == 20
    assert torch.equal(untouched[:60], x)
    right = net(x).argmax(1) == y
    assert 40 < right.sum() < 60
    assert len(carried) == 2
    for images, outcome, entry in zip(carried, found.outcomes, found.entries, strict=True):
        points = outcome.best[right]
        assert torch.equal(images[: len(points)], points)
        assert torch.equal(images[len(points) :], points[-1:].expand(64 - len(points), -1, -1, -1))  # padding
        assert entry.queries == found.held == len(points) == int(right.sum())
        assert outcome.forward.tolist() == right.long().tolist()
        assert entry.confidence is None


def test_every_figure_is_what_the_points_say(net, surrogates, rows):
    x, y = rows
    found = sparring.transfer(surrogates[0], net, x, y, ["fgsm", "mifgsm:steps=4", "vmifgsm:steps=3"], Linf(0.15))
    right = net(x).argmax(1) == y
    assert [entry.name for entry in found.entries] == ["fgsm", "mifgsm:steps=4", "vmifgsm:steps=3"]
    for entry, outcome, passes in zip(found.entries, found.outcomes, (3, 9, 2 * (1 + 2 * 21) + 1), strict=True):
        points = outcome.best[right]
        logits = net(points)
        fell = logits.argmax(1) != y[right]
        assert entry.target == pytest.approx(fell.double().mean().item(), abs=1e-6)
        assert entry.target == pytest.approx(outcome.success_rate, abs=1e-6)
        mine = surrogates[0](points).argmax(1) != y[right]
        assert entry.surrogate == pytest.approx(mine.double().mean().item(), abs=1e-6)
        assert 0.1 < min(entry.target, entry.surrogate) <= max(entry.target, entry.surrogate) < 1
        assert entry.mean_linf == pytest.approx(0.15, abs=1e-6)
        moved = (points - x[right])[fell].flatten(1).norm(dim=1).mean().item()
        assert entry.mean_l2 == pytest.approx(moved, abs=1e-5)
        assert entry.confidence == pytest.approx(logits.softmax(1).amax(1)[fell].mean().item(), abs=1e-5)
        assert entry.forward + entry.backward == passes * right.sum()
        assert torch.equal(outcome.clean, ~right)
        assert torch.equal(outcome.best[~right], x[~right])
        assert torch.equal(outcome.found[right], fell)
        assert torch.equal(outcome.label[right], logits.argmax(1))
    worst = torch.stack([outcome.found for outcome in found.outcomes]).any(0)
    assert found.robust_accuracy == pytest.approx(1 - worst.double().mean().item())
    assert found.figures() == [asdict(entry) for entry in found.entries]


def test_a_row_goes_on_after_its_first_success_on_the_surrogate(net, surrogates, rows):
    x, y = rows
    attack, threat = "bim:steps=10", Linf(0.2)
    first = sparring.attack(surrogates[0], x, y, attack, threat)
    found = sparring.transfer(surrogates[0], net, x, y, [attack], threat).outcomes[0]
    early = first.found & ~first.clean & ~found.clean
    assert early.sum() > 30
    nearer = threat.distance(first.best, x) < threat.distance(found.best, x) - 0.01
    assert nearer[early].float().mean() > 0.8
    fell = sparring.wrap(net).query(first.best, Access.DECISION).labels != y
    assert found.found.sum() > fell.sum()


def test_the_nearest_point_of_a_minimum_norm_attack_is_carried(net, surrogates, rows):
    x, y = rows
    alone = sparring.attack(surrogates[0], x, y, "ddn:steps=20", L2(3.0))
    found = sparring.transfer(surrogates[0], net, x, y, ["ddn:steps=20"], L2(3.0))
    entry, outcome = found.entries[0], found.outcomes[0]
    held = ~outcome.clean
    torch.testing.assert_close(outcome.best[held], alone.best[held], rtol=0, atol=1e-4)
    assert entry.surrogate == pytest.approx(alone.found[held].double().mean().item(), abs=1e-6)


def test_a_class_to_reach_must_be_named_by_the_target(net, surrogates, rows):
    x, y = rows
    goal = (y + 1) % 10
    found = sparring.transfer(surrogates, net, x, y, ["mifgsm"], Linf(0.3), goal=goal).outcomes[0]
    untouched = net(x).argmax(1) == goal
    assert torch.equal(found.clean, untouched)
    assert torch.equal(found.found, untouched | (net(found.best).argmax(1) == goal))
    assert 5 < (found.found & ~untouched).sum() < 60


def curved(seed: int) -> Probe:
    """A small classifier in float64, whose rows do not hang on each other's bits."""
    generator = torch.Generator().manual_seed(seed)
    into, out = (torch.randn(*shape, generator=generator).double() for shape in ((20, 16), (16, 4)))
    common = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).double()
    return Probe(lambda flat: (2 * (flat - 0.5) @ into).tanh() @ out + 3 * (flat - 0.5) @ common)


def test_order_subset_and_width_change_no_point(net):
    x = torch.rand(24, 1, 4, 5, generator=torch.Generator().manual_seed(1))
    target = curved(3)
    y = target.query(x, Access.DECISION).labels
    members, attacks, ids = [curved(1), curved(2)], ["pgd:steps=3", "vmifgsm:steps=3,neighbours=2"], torch.arange(24)

    def play(order, width):
        how = {"sample": order, "seed": 4, "width": width}
        return sparring.transfer(members, target, x[order], y[order], attacks, Linf(0.1), **how)

    usual = play(ids, 8)
    assert 0.1 < usual.entries[0].target < 0.9
    for order, width in ((ids.flip(0), 8), (torch.tensor([20, 3, 5]), 8), (ids, 3), (ids, 64)):
        for one, other in zip(usual.outcomes, play(order, width).outcomes, strict=True):
            assert torch.equal(one.best[order], other.best)
            assert torch.equal(one.found[order], other.found)


def test_two_surrogates_are_their_ensemble(net, surrogates, rows):
    attacks = ["mifgsm:steps=3"]
    both = sparring.transfer(surrogates, net, *rows, attacks, Linf(0.15))
    fused = sparring.transfer(Ensemble(surrogates), net, *rows, attacks, Linf(0.15))
    assert torch.equal(both.outcomes[0].best, fused.outcomes[0].best)
    alone = sparring.transfer(surrogates[0], net, *rows, attacks, Linf(0.15))
    assert not torch.equal(both.outcomes[0].best, alone.outcomes[0].best)
    assert both.entries[0].forward == 2 * alone.entries[0].forward == 2 * 4 * both.held
    assert both.entries[0].backward == 2 * alone.entries[0].backward == 2 * 3 * both.held


def test_images_may_be_those_that_files_hold(net, surrogates, rows):
    found = sparring.transfer(surrogates, net, *rows, ["mifgsm"], Linf(0.15), eight_bit=True).outcomes[0]
    levels = found.best[~found.clean] * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", ["surrogate", "target"])
def test_rows_without_an_answer_are_neither(net, surrogates, rows, side):
    x, y = rows[0].clone(), rows[1]
    logits = TorchModel(net).query(x, Access.SCORE).logits
    at = int((logits.argmax(1) == y).nonzero()[9])

    spoilt = spotty(surrogates[0] if side == "surrogate" else net, x[at])
    one, two = (spoilt, net) if side == "surrogate" else (surrogates[0], spoilt)
    found = sparring.transfer(one, two, x, y, ["fgsm"], Linf(0.1))
    assert found.outcomes[0].failed.nonzero().squeeze(1).tolist() == [at]
    assert found.entries[0].failed == 1
    others = torch.arange(60) != at
    fell = found.outcomes[0].found & ~found.outcomes[0].clean & others
    share = fell.sum().item() / (found.held - 1)
    assert found.entries[0].target == pytest.approx(share, abs=1e-6)
    wrong = surrogates[0](found.outcomes[0].best).argmax(1) != y
    on_surrogate = (wrong & others & ~found.outcomes[0].clean).sum().item() / (found.held - 1)
    assert found.entries[0].surrogate == pytest.approx(on_surrogate, abs=1e-6)
    assert not found.outcomes[0].found[at]


def spotty(net: nn.Module, image: torch.Tensor) -> TorchModel:
    """No answer for what lies near an image without being it."""

    def call(z: torch.Tensor) -> torch.Tensor:
        far = (z - image).abs().amax((1, 2, 3))
        return net(z).masked_fill(((far < 0.11) & (far > 0.01))[:, None], torch.nan)

    return TorchModel(call)


def test_what_is_said_while_it_runs_and_shown_after(net, surrogates, rows):
    heard = []
    attacks = ["fgsm", "bim:steps=2"]
    found = sparring.transfer(surrogates, net, *rows, attacks, Linf(0.1), tell=lambda *s: heard.append(s))
    assert [said for said in heard if said[1] == found.held] == [(name, found.held, found.held) for name in attacks]
    page = found._repr_html_()
    assert page.count("<tr>") == 3
    for entry in found.entries:
        assert f"{int(1e4 * entry.target + 1e-4) / 100:.2f} %" in page
    assert f"among the {found.held} of 60 images" in page


def test_the_family_is_in_the_catalogue_and_within_a_budget():
    for name in FAMILY:
        attack = sparring.catalog.attack(name)
        assert not attack.minimizes
        assert "linf" in attack.norms


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda net: {"surrogates": []}, UsageError, "at least one model"),
        (lambda net: {"surrogates": net_of(1, 4)}, ModelError, "surrogates with the 10 classes of the target, got 4"),
        (lambda net: {"surrogates": TorchModel(net, bounds=(-1.0, 1.0))}, ModelError, "the same bounds"),
        (lambda net: {"surrogates": Secretive(net)}, AttackError, "fgsm needs GRADIENT access"),
        (lambda net: {"surrogates": [net, Secretive(net)]}, ModelError, "labels only"),
        (lambda net: {"y": (net.y + 1) % 10}, DataError, "hold on the target untouched, got none of 60"),
        (lambda net: {"attacks": ["fsgm"]}, UsageError, "did you mean 'fgsm'"),
        (lambda net: {"threat": sparring.L1(1.0)}, AttackError, "fgsm works in"),
        (lambda net: {"x": net.x * 255}, DataError, "divide by 255"),
        (lambda net: {"goal": net.y[:5]}, DataError, "expected 60 int64 goals"),
    ],
)
def test_what_does_not_fit_is_refused(net, rows, make, error, said):
    net.x, net.y = rows[0], net(rows[0]).argmax(1)
    usual = {"surrogates": net, "target": net, "x": net.x, "y": net.y, "attacks": ["fgsm"], "threat": Linf(0.1)}
    with pytest.raises(error, match=said):
        sparring.transfer(**(usual | make(net)))
