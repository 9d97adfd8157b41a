"""Detection: the threshold, the flag among the logits, and what the judge and an attack make of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparring
from sparring.attacks.pgd import PGD
from sparring.core import losses
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.judge import Judge, weighed
from sparring.core.model import Access, Prediction
from sparring.core.threat import Linf
from sparring.engine.asking import ask
from sparring.engine.loop import Task, run, search
from sparring.engine.outcome import Ledger
from sparring.engine.replay import replay
from sparring.guards.bit_depth import BitDepth
from sparring.guards.energy import Energy
from sparring.guards.feature_squeezing import FeatureSqueezing
from sparring.guards.guard import Guarded
from sparring.guards.median import Median


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("kind", [Energy, FeatureSqueezing])
def test_the_rate_of_false_positives_is_the_declared_one(net, digits, kind, rate):
    x = digits[0][1500:1700]
    guard = kind().fitted(net, x, rate)
    said = guard.judged(net).query(x, Access.SCORE)
    count = round(rate * 200)
    assert int(said.flagged.sum()) == count
    scores = (
        guard.score(x, net(x), lambda squeezer: net(squeezer.transform(x))).detach().double().sort().values.flip(0)
    )
    between = scores[count - 1 : count + 1] if count else scores[:1]
    assert guard.threshold == pytest.approx(float(between.mean()), abs=1e-6)  # far from either, whatever the width


def test_equal_scores_are_flagged_together_or_not_at_all(linear):
    x = torch.linspace(0, 1, 10).view(10, 1, 1, 1).expand(-1, 3, 9, 11).clone()
    x[3:8] = x[3]

    def net(x):
        return x.mean((1, 2, 3))[:, None] * torch.tensor([[1.0, -1.0]])

    for rate, wanted in ((0.2, 2), (0.3, 3), (0.5, 3), (0.8, 8)):
        guard = Energy().fitted(net, x, rate)
        assert int(guard.judged(net).query(x, Access.DECISION).flagged.sum()) == wanted


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(rate, linear, images):
    with pytest.raises(UsageError, match="expected a false-positive rate"):
        Energy().fitted(linear, images, rate)
    with pytest.raises(UsageError, match="and 0 images"):
        Energy().fitted(linear, images[:0])


def test_a_detector_without_a_threshold_says_what_to_do(linear, images):
    with pytest.raises(UsageError, match=r"set it on clean images: guard.fitted\(net, x\)"):
        Guarded(Energy(), linear)(images)


def test_the_scores_by_loops(linear, images):
    p = linear(images).softmax(1)
    for row, score in enumerate(
        FeatureSqueezing(None).score(images, linear(images), lambda s: linear(s.transform(images)))
    ):
        distances = []
        for squeezed in (images[row : row + 1].round(), Median(2).transform(images[row : row + 1])):
            q = linear(squeezed).softmax(1)[0]
            distances.append(sum(abs(float(a - b)) for a, b in zip(p[row], q, strict=True)))
        assert float(score) == pytest.approx(max(distances), abs=1e-5)
    wanted = [-float(torch.tensor(sum(z.exp().item() for z in row)).log()) for row in linear(images)]
    assert Energy().score(images, linear(images), None).tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_the_flag_leads_exactly_where_the_score_is_above_the_threshold(images, linear, shift):
    """(d + 1) max z of Carlini and Wagner where the least logit is 0; whatever is added to all of them, the same."""
    z = linear(images)
    score = FeatureSqueezing().score(images, z, lambda s: linear(s.transform(images)))
    guard = FeatureSqueezing(threshold=float(score.median()) + 1e-4)
    d = score - guard.threshold
    assert {True, False} == set((d > 0).tolist())
    out = Guarded(guard, lambda x: linear(x) + shift)(images)
    torch.testing.assert_close(out[:, :4], z + shift)
    base = z - z.amin(1, keepdim=True)
    torch.testing.assert_close(out[:, 4] - (z + shift).amin(1), (d + 1) * base.amax(1), rtol=1e-3, atol=1e-4)
    assert torch.equal(out.argmax(1) == 4, d > 0)


class Whisper(Energy):
    """A detector whose score is tiny."""

    def score(self, x, logits, again):
        return torch.tensor([1e-6, -1e-6])


def test_a_flag_that_rounding_would_hide_still_leads():
    logits = torch.tensor([[4096.0, 4095.0]]).expand(2, 2)
    assert Guarded(Whisper(0.0), lambda x: logits)(torch.zeros(2, 1, 1, 1)).argmax(1).tolist() == [2, 0]


def rows(x, y, target=-1):
    return Batch(x, y, torch.full_like(y, target), y, Linf(0.3))


def says(labels, flagged, classes=4):
    logits = torch.nn.functional.one_hot(torch.tensor(labels), classes).float() * 5
    return Prediction(torch.tensor(labels), logits, flagged=torch.tensor(flagged))


def test_the_judge_a_flagged_wrong_image_breaks_nothing_and_a_flagged_clean_one_is_lost():
    x = torch.full((5, 1, 2, 2), 0.5)
    moved = x + 0.1
    y = torch.tensor([0, 0, 0, 0, 0])
    said = says([0, 1, 3, 3, 1], [False, False, True, True, False])
    assert Judge().adversarial(rows(x, y), moved, said).tolist() == [False, True, False, False, True]
    assert Judge().adversarial(rows(x, y), x, said).tolist() == [False, True, True, True, True]
    assert Judge().adversarial(rows(x, y, 1), x, said).tolist() == [False, True, False, False, True]
    assert Judge(any_wrong=True).adversarial(rows(x, y, 1), x, said).tolist() == [False, True, True, True, True]
    assert Judge().adversarial(rows(x, y), x + 0.4, said).tolist() == [False] * 5
    without = Prediction(said.labels, said.logits)
    assert Judge().adversarial(rows(x, y), moved, without).tolist() == [False, True, True, True, True]


def test_an_attack_sees_the_flag_as_the_true_class():
    logits = torch.tensor([[1.0, 4.0, 2.0, 6.0], [3.0, 4.0, 2.0, 1.0]])
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 0])
    pulled = []

    def pull(cotangent, *, keep=False):
        pulled.append(cotangent)
        return torch.zeros_like(x)

    said = Prediction(logits.argmax(1), logits, pull, flagged=torch.tensor([True, False]))
    seen = Observation(rows(x, y), said, torch.zeros(2, dtype=torch.bool), Access.GRADIENT)
    assert seen.logits.tolist() == [[6.0, 4.0, 2.0], [3.0, 4.0, 2.0]]
    values, _ = seen.value_and_grad(losses.margin)
    assert values.tolist() == [-2.0, 1.0]
    assert pulled[0].tolist() == [[0.0, 1.0, 0.0, -1.0], [-1.0, 1.0, 0.0, 0.0]]
    assert torch.equal(weighed(rows(x, y), said), seen.logits)
    targeted = Observation(rows(x, y, 2), said, torch.zeros(2, dtype=torch.bool), Access.GRADIENT)
    assert targeted.value_and_grad(losses.margin)[0].tolist() == [-4.0, -2.0]


def test_rows_that_fail_beside_flagged_ones(linear, images):
    guard = Energy().fitted(linear, images, 0.5)
    model = guard.judged(linear)

    class Picky:
        access, bounds = model.access, model.bounds

        def query(self, x, access):
            if bool((x == images[2]).flatten(1).all(1).any()):
                raise sparring.core.errors.ModelError("not this one")
            return model.query(x, access)

    for access in (Access.DECISION, Access.SCORE):
        answer = ask(Picky(), images, access)
        wanted = model.query(images, Access.DECISION).flagged.clone()
        wanted[2] = False
        assert list(answer.failed) == [2]
        assert torch.equal(answer.prediction.flagged, wanted)


class Line(nn.Module):
    """Two classes that meet where the mean of the upper half is 0.5, and a third that never leads."""

    def forward(self, x):
        upper = x[:, :, :2].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(upper), 20 * (upper - 0.5), torch.full_like(upper, -10)], 1)


class Contrast(Energy):
    """Flags images whose upper half is brighter than the lower one."""

    def score(self, x, logits, again):
        return x[:, :, :2].mean((1, 2, 3)) - x[:, :, 2:].mean((1, 2, 3))


@pytest.mark.parametrize(("eps", "falls"), [(0.09, False), (0.11, True)])
def test_an_attack_that_knows_the_detector_passes_it(eps, falls):
    """The class changes 0.1 above 0.4 in the upper half; the lower one must follow, though the net ignores it."""
    x, y = torch.full((3, 1, 4, 4), 0.4), torch.zeros(3, dtype=torch.int64)
    guard, pgd = Contrast(0.05), PGD(steps=40, step_size=0.01, random_start=False)
    assert run(guard.naive(Line()), pgd, Linf(eps), x, y).found.tolist() == [falls] * 3
    unaware = sparring.transfer(guard.naive(Line()), guard.judged(Line()), x, y, [pgd], Linf(eps))
    assert unaware.found.tolist() == [False] * 3
    out = run(guard.adaptive(Line()), pgd, Linf(eps), x, y)
    assert out.found.tolist() == [falls] * 3
    upper, lower = (out.best[:, :, rows].mean((1, 2, 3)) for rows in (slice(0, 2), slice(2, 4)))
    assert ((upper > 0.5) == falls).all()
    assert (upper - lower <= 0.05).all() or not falls


def test_a_flag_is_no_closer_to_success_than_the_true_class():
    """Of rows that hold the closest point is kept: those that are flagged have a negative margin."""
    x, y = torch.full((2, 1, 4, 4), 0.45), torch.zeros(2, dtype=torch.int64)
    batch, ids = rows(x, y), torch.arange(2)
    model = Contrast(-2.0).adaptive(Line())  # flags whatever comes
    brighter = x.clone()
    brighter[:, :, :2] += 0.2
    judged = replay(model, Judge(), batch, brighter, 2)
    assert not judged.hit.any()
    assert judged.logits.shape == (2, 3)
    assert (losses.margin(judged.logits, batch) < 0).all()
    ledger = Ledger(batch.threat, x, y, torch.zeros(2, dtype=torch.float64))
    task = Task(batch, ids, batch.target[:, None], ids, closest=True)
    search(model, PGD(steps=3), Judge(), task, ledger, 2)
    assert not ledger.found.any()
    assert (ledger.gap < 0).all()


def test_clean_rows_that_are_flagged_are_lost_and_not_attacked():
    x = torch.tensor([0.4, 0.55, 0.45]).view(3, 1, 1, 1).expand(-1, 1, 4, 4).clone()
    x[1, :, 2:] = 0.3
    y = torch.tensor([0, 1, 0])
    out = run(Contrast(0.05).adaptive(Line()), PGD(steps=5), Linf(0.01), x, y)
    assert out.clean.tolist() == out.found.tolist() == [False, True, False]
    assert out.clean_label.tolist() == [0, 3, 0]
    assert out.forward[1] == 0
    assert out.robust_accuracy == pytest.approx(2 / 3)
    assert BitDepth().judged(Line()).query(x, Access.DECISION).flagged is None
