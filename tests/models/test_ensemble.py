"""Several models as one: against sums written out, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.attacks.bim import BIM
from sparring.attacks.fgsm import FGSM
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access, Prediction
from sparring.core.threat import Linf
from sparring.engine.loop import run
from sparring.models.ensemble import Ensemble
from sparring.models.eot import EOT
from sparring.models.torch import TorchModel
from sparring.testing import Probe


def dense(seed: int, classes: int = 10) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, classes)).eval()


NETS = [dense(1), dense(2), dense(3)]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
def test_logits_and_gradients_are_the_weighted_sums(digits, agree, weights):
    share = [1 / 3] * 3 if weights is None else [1 / 8, 2 / 8, 5 / 8]
    agree(
        Ensemble(NETS, weights),
        TorchModel(lambda x: sum(w * n(x) for w, n in zip(share, NETS, strict=True))),
        digits[0][:20],
    )


def test_one_member_answers_as_it_does_alone(digits):
    one, alone = Ensemble(NETS[:1]), TorchModel(NETS[0])
    said, wanted = (model.query(digits[0][:20], Access.GRADIENT) for model in (one, alone))
    assert torch.equal(said.logits, wanted.logits)
    assert torch.equal(said.vjp(wanted.logits), wanted.vjp(wanted.logits))


def test_each_access_shows_no_more_than_it_says(digits, shows_no_more):
    shows_no_more(Ensemble(NETS), digits[0][:20])


class Counted:
    """A model that notes how it was asked."""

    bounds = (0.0, 1.0)

    def __init__(self, net: nn.Module, access: Access = Access.GRADIENT) -> None:
        self.model, self.access, self.asked = TorchModel(net), access, []

    def query(self, x, access) -> Prediction:
        self.asked.append((len(x), access))
        return self.model.query(x, access)


def test_a_query_is_one_question_to_each_member_with_no_more_access_than_it_takes(digits):
    members = [Counted(net) for net in NETS]
    ensemble = Ensemble(members)
    for access in Access:
        ensemble.query(digits[0][:7], access)
    wanted = [(7, Access.SCORE), (7, Access.SCORE), (7, Access.GRADIENT)]
    assert [member.asked for member in members] == [wanted] * 3


def test_a_row_is_charged_for_every_member(digits):
    x = digits[0][:9]
    ensemble = Ensemble([NETS[0], Ensemble(NETS[1:]), EOT(NETS[2], 4)])
    assert ensemble.passes == 1 + 2 + 4
    y = ensemble.query(x, Access.DECISION).labels
    got = run(ensemble, BIM(steps=3), Linf(1e-6), x, y)
    assert not got.found.any()
    assert got.forward.tolist() == [4 * 7] * 9
    assert got.backward.tolist() == [3 * 7] * 9


class Dithered(nn.Module):
    """Adds the same noise to all rows of a call."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x + self.scale * torch.randn(x.shape[1:])


def test_random_members_stay_random(digits):
    """The fresh ensemble has other draws and the same weights; votes are the least share for the common label."""
    x = digits[0][:40]
    one, two = (EOT(nn.Sequential(Dithered(s), net).eval(), 8) for s, net in zip((0.3, 0.6), NETS, strict=False))
    ensemble = Ensemble([one, NETS[2], two], [1.0, 1.0, 2.0])
    again = ensemble.fresh()
    assert again.weights == ensemble.weights
    wanted = Ensemble([one.fresh(), NETS[2], two.fresh()], [1.0, 1.0, 2.0]).query(x, Access.SCORE).logits
    assert torch.equal(again.query(x, Access.SCORE).logits, wanted)
    said = ensemble.query(x, Access.SCORE)
    assert not torch.equal(wanted, said.logits)
    each = [model.query(x, Access.SCORE) for model in (one, two)]
    for row, label in enumerate(said.labels.tolist()):
        shares = [float(a.votes[row]) if int(a.labels[row]) == label else 0.0 for a in each]
        assert float(said.votes[row]) == min(shares)
    assert 0 < said.votes.float().mean() < 1
    assert Ensemble(NETS).query(x, Access.SCORE).votes is None


def test_its_access_is_the_least_of_its_members(digits):
    mixed = Ensemble([NETS[0], Counted(NETS[1], Access.SCORE)])
    assert mixed.access == Access.SCORE
    assert Ensemble(NETS).access == Access.GRADIENT
    said = mixed.query(digits[0][:5], Access.SCORE).logits
    torch.testing.assert_close(said, (NETS[0](digits[0][:5]) + NETS[1](digits[0][:5])).detach() / 2)


def test_a_row_that_one_member_cannot_answer_for_fails_and_the_others_do_not(digits):
    x = digits[0][:6].clone()
    x[2] = 1.0
    spotty = Probe(lambda flat: flat[:, :10].masked_fill(flat.mean(1, keepdim=True) > 0.95, torch.nan))
    y = Ensemble([NETS[0], spotty]).query(x, Access.DECISION).labels
    got = run(Ensemble([NETS[0], spotty]), FGSM(), Linf(0.01), x, y)
    assert got.failed.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Ensemble([]), UsageError, "at least one model"),
        (lambda: Ensemble(NETS, [1.0]), UsageError, "3 positive weights, one for each model, got \\[1.0\\]"),
        (lambda: Ensemble(NETS, [1.0, 0.0, 1.0]), UsageError, "positive weights"),
        (lambda: Ensemble(NETS, [1.0, float("nan"), 1.0]), UsageError, "positive weights"),
        (lambda: Ensemble([NETS[0], 3]), ModelError, "got int"),
        (
            lambda: Ensemble([NETS[0], TorchModel(NETS[1], bounds=(-1.0, 1.0))]),
            ModelError,
            r"same bounds, got \(0.0, 1.0\) and \(-1.0, 1.0\); give all of them raw pixels",
        ),
        (lambda: Ensemble([NETS[0], Counted(NETS[1], Access.DECISION)]), ModelError, "labels only; leave it out"),
        (
            lambda: Ensemble([NETS[0], dense(4, classes=4)]).query(torch.zeros(1, 1, 8, 8), Access.SCORE),
            ModelError,
            r"same classes from all members, got \[4, 10\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make()
