"""Free adversarial training: algorithm 1 written out, its cost, and going on after a kill."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.core import noise
from sparring.core.defense import Moment, Replaying
from sparring.core.threat import L2, Linf
from sparring.data import Dataset, load
from sparring.defenses.free import Free
from sparring.defenses.standard import Standard
from sparring.models.nets import build
from sparring.training import fit as module
from sparring.training.fit import Settings, fit

EPS = 0.15


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def written_out(data: Dataset, settings: Settings, replays: int) -> nn.Module:
    """Algorithm 1 for linf with Adam, x + d cut to the pixels' range before the net sees it."""
    net = build(settings.net, data.train.x.shape[1:], 10, settings.seed)
    adam = torch.optim.Adam(net.parameters())
    d = torch.zeros(settings.batch_size, *data.train.x.shape[1:])
    step, epoch = 0, 0
    while True:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(settings.batch_size):
            if len(part) < settings.batch_size:
                continue
            x, y = data.train.x[part], data.train.y[part]
            for _ in range(replays):
                if step == settings.steps:
                    return net
                up, down = (step + 1) / (settings.steps / 5), (1 - step / settings.steps) / 0.8
                adam.param_groups[0]["lr"] = settings.rate * (min(1.0, up) if step < settings.steps / 5 else down)
                point = (x + d).clamp(0, 1).requires_grad_()
                adam.zero_grad()
                cross_entropy(net(point), y).backward()
                adam.step()
                d = (d + EPS * point.grad.sign()).clamp(-EPS, EPS)
                step += 1
        epoch += 1


@pytest.mark.parametrize("replays", [1, 3])
def test_the_weights_are_those_of_the_algorithm_written_out(digits, tmp_path, replays):
    settings = Settings("dense", 20, batch_size=500)  # two minibatches an epoch, the rest is left out
    done = fit(settings, digits, Free(Linf(EPS), replays=replays, warmup=0), tmp_path / "a")
    wanted = written_out(digits, settings, replays)
    untrained = build("dense", (1, 8, 8), 10, 0)
    for ours, theirs, first in zip(done.net.parameters(), wanted.parameters(), untrained.parameters(), strict=True):
        assert (theirs - first).abs().max() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_every_step_is_one_forward_and_one_backward_pass(digits, tmp_path, monkeypatch):
    rows = {"forward": 0, "backward": 0}

    def back(cotangent: Tensor) -> None:
        rows["backward"] += len(cotangent)

    def seen(_net: nn.Module, _inputs: object, logits: Tensor) -> None:
        if logits.requires_grad:
            rows["forward"] += len(logits)
            logits.register_hook(back)

    def counted(*words: object) -> nn.Sequential:
        net = build(*words)
        net.register_forward_hook(seen)
        return net

    monkeypatch.setattr(module, "build", counted)
    monkeypatch.setattr(module, "timed", lambda step, steps: False)  # a plain step beside it costs passes too
    fit(Settings("dense", 13, batch_size=50), digits, Free(Linf(EPS), replays=4), tmp_path / "a")
    assert rows == {"forward": 13 * 50, "backward": 13 * 50}


def test_a_minibatch_is_shown_so_often_and_moved_the_same_way_each_time(tmp_path):
    seen: list[Tensor] = []

    class Spy(Free):
        def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
            seen.append(x.detach().clone())
            return super().loss(net, x, y, moment)

    small = load("digits")
    train = small.train.select(torch.arange(100))
    wide = Dataset(
        "wide",
        *(type(s)(s.name, s.x.repeat(1, 1, 2, 2), s.y, s.ids, s.classes) for s in (train, train)),
    )
    fit(Settings("dense", 9, batch_size=50), wide, Spy(Linf(EPS), replays=3), tmp_path / "a")  # 16 pixels: moved
    groups = [seen[0:3], seen[3:6], seen[6:9]]
    assert all(torch.equal(one, group[0]) for group in groups for one in group)
    assert not torch.equal(groups[0][0], groups[1][0])
    assert not torch.equal(groups[0][0], wide.train.x[:50])


def moment(progress: float, carried: Tensor | None = None) -> Moment:
    return Moment(progress, noise.keys(0, torch.arange(4), torch.zeros(4, dtype=torch.int64)), carried)


def test_in_l2_the_step_has_the_length_eps_and_ends_in_the_ball():
    seed = torch.Generator().manual_seed(0)
    x, gradient, d = torch.rand(4, 1, 3, 3, generator=seed), *torch.randn(2, 4, 1, 3, 3, generator=seed)
    d = 0.5 * d / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = Free(L2(0.5), warmup=0).hand_on(x, gradient, moment(0.0, d))
    for row in range(4):
        moved = d[row] + 0.5 * gradient[row] / gradient[row].norm()
        wanted = moved * min(1.0, 0.5 / float(moved.norm()))
        torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)


def test_eps_grows_over_the_warm_up_and_the_points_are_legal():
    x, free = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), Free(Linf(0.4), warmup=0.5)
    d = free.hand_on(x, torch.ones_like(x), moment(0.25))
    assert torch.equal(d, torch.full_like(x, 0.2))
    assert torch.equal(free.points(x, moment(1.0, d)), (x + d).clamp(0, 1))
    assert torch.equal(free.points(x, moment(0.125, d)), (x + 0.1).clamp(0, 1))
    assert torch.equal(free.points(x, moment(1.0)), x)


def test_only_free_replays():
    assert isinstance(Free(Linf(0.1)), Replaying)
    assert not isinstance(Standard(), Replaying)
