"""EOT: the mean over draws in closed form, what it costs, which draws, and what the engine makes of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import sparring
from sparring.attacks.ddn import DDN
from sparring.attacks.hopskipjump import HopSkipJump
from sparring.attacks.pgd import PGD
from sparring.core.errors import ModelError, UsageError
from sparring.core.judge import Judge
from sparring.core.model import Access, Prediction, fresh, passes
from sparring.core.threat import L2, Linf
from sparring.engine.asking import ask
from sparring.engine.loop import run
from sparring.engine.preflight import check_model
from sparring.models.eot import EOT
from sparring.models.spec import open_model
from sparring.models.torch import TorchModel

D, SHAPE = 16, (1, 4, 4)


def made(seed=0):
    return torch.Generator().manual_seed(seed)


def images(rows=6):
    return torch.rand(rows, *SHAPE, generator=made()) * 0.8 + 0.1


def constant(rows):
    return torch.zeros(rows, dtype=torch.int64)


class Noisy(nn.Module):
    """W (x + sigma z) + b, with z drawn for every pixel of every row; it remembers what it drew and was asked."""

    def __init__(self, sigma=0.3, classes=3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, D, generator=made(1)))
        self.bias = nn.Parameter(torch.randn(classes, generator=made(2)))
        self.sigma, self.drawn, self.rows, self.pulled = sigma, [], 0, 0

    def forward(self, x):
        flat = x.flatten(1)
        z = torch.randn_like(flat)
        self.drawn.append(z.clone())
        self.rows += len(x)
        logits = (flat + self.sigma * z) @ self.weight.T + self.bias
        if logits.requires_grad:
            logits.register_hook(self._pull)
        return logits

    def _pull(self, gradient):
        self.pulled += len(gradient)


class Two(nn.Module):
    """Logits (0, w x - t) of inputs under additive noise: on average the classes meet at w x = t, by symmetry."""

    def __init__(self, weight, border, sigma=0.0):
        super().__init__()
        self.weight, self.border, self.sigma = weight, border, sigma

    def forward(self, x):
        flat = x.flatten(1)
        margin = (flat + self.sigma * torch.randn_like(flat)) @ self.weight - self.border
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Gated(nn.Module):
    """A coin for the whole call decides which half of the pixels is looked at: logits (0, w_half x_half - t)."""

    weight = torch.tensor([1.0, -2.0, 3.0, -1.5, 0.5, 2.0, -1.0, 1.0]).repeat(2)

    def forward(self, x):
        half = torch.arange(D) < 8 if torch.rand(()) < 0.5 else torch.arange(D) >= 8
        margin = x.flatten(1) @ (self.weight * half) - 2.0
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Resized(nn.Module):
    """A random size and a random place, drawn once a call, as in Xie et al. 2018; then a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3).requires_grad_(False)
        self.linear.weight.data = torch.randn(3, 64, generator=made(3))

    def forward(self, x):
        size = int(torch.randint(5, 9, ()))
        x = nn.functional.interpolate(x, size=(size, size), mode="bilinear")
        left, top = (int(torch.randint(0, 9 - size, ())) for _ in range(2))
        return self.linear(nn.functional.pad(x, (left, 8 - size - left, top, 8 - size - top)).flatten(1))


def test_the_mean_and_its_gradient_in_closed_form():
    net, x = Noisy(), images()
    v = torch.randn(6, 3, generator=made(4))
    answer = EOT(net, 7).query(x, Access.GRADIENT)
    weight, z = net.weight.detach().double(), torch.stack(net.drawn).double()
    assert z.shape == (7, 6, D)
    assert len({float(draw[0, 0]) for draw in z}) == 7
    p = ((x.flatten(1).double() + 0.3 * z) @ weight.T + net.bias.detach().double()).softmax(2)
    mean = p.mean(0)
    torch.testing.assert_close(answer.logits.double(), mean.log(), rtol=1e-5, atol=1e-5)
    assert torch.equal(answer.labels, mean.argmax(1))
    # d log P_k / d x = 1 / (n P_k) sum_i p_ik (W_k - sum_j p_ij W_j)
    each = weight[None, None] - (p @ weight)[:, :, None]
    wanted = (v.double()[..., None] * (p[..., None] * each).mean(0) / mean[..., None]).sum(1)
    got = answer.vjp(v, keep=True)
    torch.testing.assert_close(got.flatten(1).double(), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(answer.vjp(v), got)
    assert torch.equal(answer.votes, (p.argmax(2) == mean.argmax(1)).float().mean(0))


def test_one_draw_that_is_sure_does_not_decide_alone():
    said = [torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 900.0]])]

    def answered(access):
        draws = iter(said)
        return EOT(TorchModel(lambda x: next(draws)), 3).query(images(1), access)

    q = 1 / (1 + np.exp(-1))
    answer = answered(Access.SCORE)
    assert answer.logits.exp().tolist()[0] == pytest.approx([2 * q / 3, (2 * (1 - q) + 1) / 3], rel=1e-6)
    assert answer.votes.item() == pytest.approx(1 / 3)
    assert answered(Access.DECISION).labels.item() == answer.labels.item() == 1  # not the label of most draws


def test_the_label_is_that_of_the_mean_probability_not_of_the_mean_logit():
    said = iter([torch.tensor([[6.0, 0.0]]), torch.tensor([[6.0, 0.0]]), torch.tensor([[0.0, 900.0]])])
    answer = EOT(TorchModel(lambda x: next(said)), 3).query(images(1), Access.SCORE)
    assert answer.labels.item() == answer.logits.argmax().item() == 0
    assert EOT(Noisy()).n == 20


def test_access_shows_no_more_than_it_says(shows_no_more):
    shows_no_more(EOT(Noisy(), 3), images())


@pytest.mark.parametrize("n", [1, 5])
def test_passes_are_what_the_module_saw(n):
    """All rows hold and the batch is as wide as the table: what a step costs is what the module was asked for."""
    spent, saw, pulled = [], [], []
    for steps in (2, 5):
        net = Noisy()
        net.bias.data = torch.tensor([60.0, 0.0, 0.0])
        out = run(EOT(net, n), PGD(steps=steps, random_start=False), Linf(0.01), images(), constant(6), width=6)
        assert not out.found.any()
        assert out.forward.tolist() == [(steps + 1) * n] * 6
        assert out.backward.tolist() == [steps * n] * 6
        spent.append((int(out.forward.sum()), int(out.backward.sum())))
        saw.append(net.rows)
        pulled.append(net.pulled)
    assert spent[1][0] - spent[0][0] == saw[1] - saw[0] == 3 * n * 6
    assert spent[1][1] - spent[0][1] == pulled[1] - pulled[0] == 3 * n * 6
    assert passes(EOT(net, n)) == n
    assert passes(TorchModel(net)) == 1


def test_a_budget_is_in_passes():
    net = Noisy()
    net.bias.data = torch.tensor([60.0, 0.0, 0.0])
    out = run(EOT(net, 4), PGD(steps=50), Linf(0.01), images(), constant(6), budget=99)
    assert (out.forward + out.backward).tolist() == [11 * 8 + 4] * 6  # one step more would be 100


def test_a_gated_defense_falls_at_its_closed_form_radius_and_plain_pgd_is_refused():
    """Both halves must be pushed at once: at x + eps sign(w) each coin's margin is w x - t + eps |w|_1."""
    x, half = torch.full((4, *SHAPE), 0.5), Gated.weight[:8]
    radius = (2.0 - float(half.sum()) * 0.5) / float(half.abs().sum())
    assert 0 < radius < 0.1
    torch.manual_seed(1)  # the first two coins differ
    with pytest.raises(ModelError, match=r"expected the same answer twice.*EOT\(net, n\)"):
        run(TorchModel(Gated()), PGD(steps=2), Linf(radius), images(), constant(6))
    for factor, falls in ((0.98, False), (1.02, True)):
        threat = Linf(factor * radius)
        out = run(EOT(Gated(), 12), PGD(steps=10), threat, x, constant(4))
        assert out.found.tolist() == [falls] * 4
        assert not out.moved.any()
        if falls:
            margin = factor * radius * half.abs().sum() + half.sum() * 0.5 - 2.0
            assert float(out.confidence.max()) <= float(margin.sigmoid()) + 1e-6
        else:
            torch.testing.assert_close(out.best[0].flatten(), 0.5 + threat.eps * Gated.weight.sign())


def test_what_fools_only_the_draws_that_were_attacked_is_not_counted():
    """Logits (2, r dx / 15 eps), r one of 2^64 sign vectors a call: the attack knows its own, the judge another."""
    x, eps = torch.full((5, 1, 8, 8), 0.5), 0.1

    def net(images):
        r = torch.randint(0, 2, (64,)) * 2.0 - 1
        margin = (images - 0.5).flatten(1) @ r / (15 * eps)
        return torch.stack([torch.full_like(margin, 2.0), margin], 1)

    model = EOT(TorchModel(net), 1)
    out = run(model, PGD(steps=5), Linf(eps), x, constant(5))
    assert out.moved.all()
    assert not out.found.any()
    hit = model.query(out.best, Access.DECISION).labels
    assert (hit == 1).all()
    assert (fresh(model).query(out.best, Access.DECISION).labels == 0).all()


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("attack", [PGD(steps=20, step_size=0.005), PGD(steps=4)])
def test_a_search_goes_on_to_where_other_draws_agree(attack, n):
    """A mean over few draws errs at the border by sigma |w| / sqrt(n); the ball has room for many times that."""
    weight = torch.ones(D) / D
    x = torch.full((32, *SHAPE), 0.5)
    sigma = 0.04
    deviation = sigma / D**0.5  # of w z
    net = Two(weight * 100, 100 * (0.5 + 2.5 * deviation), sigma)
    out = run(EOT(net, n), attack, Linf(8 * deviation), x, constant(32))
    assert not out.clean.any()
    assert out.found.all()
    assert not out.moved.any()


@pytest.mark.parametrize("attack", [DDN(steps=60), HopSkipJump(steps=200)])
def test_the_nearest_image_is_one_that_other_draws_confirm(attack):
    weight, sigma = torch.ones(D) / D, 0.04
    deviation = sigma / D**0.5
    net = Two(weight * 100, 100 * (0.5 + 4 * deviation), sigma)
    out = run(EOT(net, 20), attack, L2(1.0), torch.full((32, *SHAPE), 0.5), constant(32))
    assert out.found.all()
    border = 4 * deviation * D**0.5  # the distance at which the classes meet on average
    assert (out.distance > border).all()
    assert out.distance.median() < border * 2  # where all 20 draws agree: 1.9 / 4 farther on average


def test_a_confidence_is_confirmed_under_other_draws():
    net = Two(torch.ones(D) / D * 100, 50 + 1.0, 0.02)
    out = run(EOT(net, 8), PGD(steps=10), Linf(0.15), torch.full((16, *SHAPE), 0.5), constant(16), judge=Judge(0.95))
    assert out.found.all()
    assert (out.confidence >= 0.95).all()


def test_of_several_tries_the_first_that_breaks_a_row_counts_in_any_width():
    net = Two(torch.ones(D), 8.0 + 0.3, 0.0)
    ids = torch.arange(5)
    x = images(5) * 0.05 + 0.475
    whole, narrow = (
        run(EOT(net, 2), PGD(steps=4), Linf(0.05), x, constant(5), sample=ids, restarts=3, width=width)
        for width in (16, 4)
    )
    assert whole.found.any()
    assert torch.equal(whole.found, narrow.found)
    torch.testing.assert_close(whole.best, narrow.best)


def states():
    return torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def test_the_world_keeps_its_random_numbers_and_does_not_matter():
    model, x = EOT(Noisy(), 3), images()
    before = states()
    first = model.query(x, Access.GRADIENT)
    gradient = first.vjp(torch.ones(6, 3))
    after = states()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        again = EOT(Noisy(), 3).query(x, Access.GRADIENT)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(gradient, again.vjp(torch.ones(6, 3)))
    for other in (EOT(Noisy(), 3, seed=1), model.fresh(), model.fresh().fresh()):
        assert not torch.equal(first.logits, other.query(x, Access.SCORE).logits)
    second, third = model.fresh(), model.fresh().fresh()
    assert torch.equal(second.query(x, Access.SCORE).logits, model.fresh().query(x, Access.SCORE).logits)
    assert not torch.equal(second.query(x, Access.SCORE).logits, third.query(x, Access.SCORE).logits)
    assert torch.equal(first.logits, model.query(x, Access.SCORE).logits)
    plain = TorchModel(Noisy())
    assert fresh(plain) is plain


class Stirred(torch.autograd.Function):
    """x, whose gradient is told with noise."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.randn_like(gradient)


def test_what_a_backward_pass_draws_is_repeated_too():
    weight, x, found = torch.randn(3, D, generator=made(1)), images(), []
    for seed in (5, 6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = EOT(TorchModel(lambda z: Stirred.apply(z.flatten(1)) @ weight.T), 2)
            pull = model.query(x, Access.GRADIENT).vjp
            torch.randn(seed)
            found.append(pull(torch.zeros(6, 3)))
    assert torch.equal(*found)
    noise = [torch.randn(6, D, generator=made(number)) for number in model._seeds]
    torch.testing.assert_close(found[0].flatten(1), sum(noise))


def test_state_is_restored_when_the_model_fails():
    def fails(x):
        torch.rand(3)
        raise ValueError("no")

    before = states()
    with pytest.raises(ModelError, match="no"):
        EOT(fails, 2).query(images(), Access.SCORE)
    assert torch.equal(before[0], states()[0])
    assert before[1:] == states()[1:]


@pytest.mark.parametrize("draw", [np.random.normal, random.random], ids=["numpy", "python"])
def test_draws_of_numpy_and_python_are_repeated_too(draw):
    def net(x):
        margin = x.flatten(1).sum(1) + draw()
        return torch.stack([torch.zeros_like(margin), margin], 1)

    model, x = EOT(net, 4), images()
    first = model.query(x, Access.SCORE).logits
    draw()  # the world goes on
    assert torch.equal(first, model.query(x, Access.SCORE).logits)
    assert not torch.equal(first, model.fresh().query(x, Access.SCORE).logits)


def test_draws_for_the_whole_call_leave_each_row_by_itself():
    net, x = Resized(), images()
    model, order = EOT(net, 5), torch.tensor([3, 1, 5, 0, 4, 2])
    whole, mixed, alone = (model.query(z, Access.SCORE).logits for z in (x, x[order], x[2:3]))
    torch.testing.assert_close(mixed, whole[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-5)
    y, ids = whole.argmax(1), torch.arange(6)
    attack, threat = PGD(steps=8), Linf(0.3)
    first = run(model, attack, threat, x, y, sample=ids, width=8)
    second = run(model, attack, threat, x[order], y[order], sample=ids[order], width=4)
    assert first.found.any()
    assert torch.equal(first.found[order], second.found)
    torch.testing.assert_close(first.best[order], second.best)


def test_draws_row_by_row_leave_each_row_by_itself_in_width_one():
    model, x = EOT(Noisy(), 4), images()
    y = torch.stack([model.query(x[row : row + 1], Access.SCORE).labels[0] for row in range(6)])
    order, ids = torch.tensor([3, 1, 5, 0, 4, 2]), torch.arange(6)
    first = run(model, PGD(steps=6), Linf(0.1), x, y, sample=ids, width=1)
    second = run(model, PGD(steps=6), Linf(0.1), x[order][:4], y[order][:4], sample=ids[order][:4], width=1)
    assert first.found.any()
    for name in ("found", "best", "forward", "label", "confidence"):
        assert torch.equal(getattr(first, name)[order][:4], getattr(second, name)), name


def test_what_the_check_accepts_and_refuses():
    x = images()
    assert check_model(EOT(Noisy(), 4), x, Access.GRADIENT) == 3
    assert check_model(EOT(Resized(), 4), x, Access.GRADIENT) == 3

    class Mixing(Noisy):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(ModelError, match="expected each row to be answered by itself"):
        check_model(EOT(Mixing(), 4), x)
    own = made(7)
    assert check_model(EOT(lambda z: z.flatten(1)[:, :3] + torch.randn(3, generator=own), 4), x) == 3


def test_dropout_may_be_left_on_and_batch_norm_may_not():
    net = nn.Sequential(nn.Flatten(), nn.Linear(D, 3), nn.Dropout(0.5)).train()
    with pytest.raises(ModelError, match=r"call net.eval\(\), or EOT\(net, n\) if a defense leaves it on"):
        TorchModel(net)
    model = EOT(net, 200)
    answer = model.query(images(), Access.SCORE)
    clean = (net[1](images().flatten(1)) * 2).detach()  # each logit is doubled or gone
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    wanted = torch.stack([(clean * mask).softmax(1) for mask in masks]).mean(0)
    assert (answer.logits.exp() - wanted).abs().max() < 0.1  # 200 of bounded draws: over 4 deviations
    assert net.training
    with pytest.raises(ModelError, match="got BatchNorm1d '2' in train mode"):
        EOT(nn.Sequential(nn.Flatten(), nn.Linear(D, 3), nn.BatchNorm1d(3)).train())


def test_labels_alone_are_put_to_the_vote():
    class Labels:
        access, bounds = Access.DECISION, (0.0, 1.0)

        def query(self, x, access):
            said.append(torch.randint(0, 3, (len(x),)))
            return Prediction(said[-1])

    said = []
    answer = EOT(Labels(), 9).query(images(), Access.DECISION)
    votes = torch.nn.functional.one_hot(torch.stack(said), 3).sum(0)
    assert torch.equal(votes.gather(1, answer.labels[:, None]).squeeze(1), votes.amax(1))
    assert torch.equal(answer.votes, votes.amax(1) / 9)
    assert answer.logits is None


@pytest.mark.parametrize("raises", [False, True])
def test_a_row_without_an_answer_fails_alone(raises):
    def net(x):
        bright = x[:, 0, 0, :1] > 0.95
        if raises and bright.any():
            raise ValueError("too bright")
        return torch.where(bright, torch.nan, x.flatten(1)[:, :3] + 0.1 * torch.randn(len(x), 3))

    x = images()
    x[2, 0, 0, 0] = 1.0
    y = x.flatten(1)[:, :3].argmax(1)
    out = run(EOT(net, 5), PGD(steps=3), Linf(0.01), x, y)
    assert out.failed.tolist() == [row == 2 for row in range(6)]
    votes = ask(EOT(net, 5), x, Access.SCORE).prediction.votes
    assert [bool(share > 0) for share in votes[[0, 1, 3, 4, 5]]] == [True] * 5


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3"])
def test_a_number_of_draws_that_is_none(n):
    with pytest.raises(UsageError, match="expected a number n of draws of at least 1"):
        EOT(Noisy(), n)


def test_what_cannot_be_meant():
    with pytest.raises(UsageError, match=r"got EOT\(TorchModel, n=2, seed=0\), which averages already"):
        EOT(EOT(Noisy(), 2), 2)
    soft = nn.Sequential(Noisy(), nn.Softmax(1))
    with pytest.raises(ModelError, match=r"EOT\(net, n, probabilities=True\)"):
        EOT(soft, 2).query(images(), Access.SCORE)
    torch.testing.assert_close(
        EOT(soft, 2, probabilities=True).query(images(), Access.SCORE).logits,
        EOT(Noisy(), 2).query(images(), Access.SCORE).logits,
        rtol=1e-4,
        atol=1e-4,
    )
    assert EOT(Noisy(), 2, bounds=(-1.0, 1.0)).bounds == (-1.0, 1.0)


FILE = """
import sparring, torch
from torch import nn

class Defended(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.net[1].weight.data = torch.load({weights!r})
        self.net[1].bias.data.zero_()

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))

def build():
    return sparring.EOT(Defended(), n={n})
"""


def test_a_file_may_return_one_and_an_audit_counts_its_passes(tmp_path, digits):
    x, y = digits[0][:40], digits[1][:40]
    torch.save(torch.stack([digits[0][digits[1] == k].mean(0).flatten() for k in range(10)]) * 4, tmp_path / "w.pt")
    found = []
    for n in (3, 4):
        (tmp_path / f"net{n}.py").write_text(FILE.format(weights=str(tmp_path / "w.pt"), n=n))
        found.append(open_model(f"{tmp_path / f'net{n}.py'}:build"))
    assert found[0].digest != found[1].digest
    audit = sparring.audit(found[0].model, (x, y), Linf(0.05), profile="quick")
    assert audit.counts["broken"] > 0
    assert audit.counts["error"] == 0
    stages = audit.figures["stages"]
    assert stages[0]["forward"] == 3 * 40
    assert all(stage["forward"] % 3 == 0 and stage["backward"] % 3 == 0 for stage in stages)
    assert not [warning for warning in audit.warnings if "EOT" in warning]
