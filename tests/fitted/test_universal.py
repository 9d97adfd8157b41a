"""A universal perturbation: the known optimum of a linear model, a reference, exact counts, and plain refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sparring
from sparring.core.errors import AttackError, DataError, UsageError
from sparring.core.model import Access
from sparring.core.threat import L0, L1, L2, Linf, Unbounded
from sparring.data.images import Images
from sparring.fitted.ascent import Ascent
from sparring.fitted.universal import Universal, fit_universal
from sparring.models.eot import EOT

EPS = {"linf": 0.1, "l2": 0.5, "l1": 1.0}
KINDS = {"linf": Linf, "l2": L2, "l1": L1}
DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}


def best(weight, norm):
    """The unit step that lowers `weight` . x most."""
    if norm == "linf":
        return -weight.sign()
    if norm == "l2":
        return -weight / weight.norm()
    return torch.where(weight.abs() == weight.abs().max(), -weight.sign(), torch.zeros_like(weight))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("target", [None, 1])
def test_the_optimum_of_a_linear_model(plane, norm, target):
    reach = EPS[norm] * float(plane(1.0).weight.flatten().norm(DUAL[norm]))
    case = plane(reach)
    threat = KINDS[norm](EPS[norm], case.model.bounds)
    fit = fit_universal(case.model, (case.x, case.y), threat, target=target, steps=60, batch=7)
    optimum = EPS[norm] * best(case.weight, norm)
    cosine = torch.nn.functional.cosine_similarity(fit.delta.double().flatten(), optimum.flatten(), dim=0)
    assert cosine > 0.99999
    torch.testing.assert_close(fit.delta.double(), optimum, rtol=0, atol=2e-6)
    judged = fit.judge(case.model, (case.x, case.y))
    closed = case.margin(case.x) < reach
    assert 0.4 < closed.double().mean() < 0.6
    assert torch.equal(judged.fooled.squeeze(1), closed)
    assert judged.rate == closed.double().mean()
    assert judged.illegal == 0


@pytest.mark.parametrize("target", [None, 3])
def test_step_for_step_as_a_reference_has_it(net, rows, target):
    x, y = rows
    threat, steps, rate, cap = L2(1.0), 6, 0.25, 2.0
    fit = fit_universal(net, rows, threat, target=target, steps=steps, batch=1000, rate=rate, cap=cap)
    keep = y != -1 if target is None else y != target
    x, y = x[keep].double(), y[keep]
    twin = torch.nn.Sequential(*(type(m)(m.in_features, m.out_features) if hasattr(m, "bias") else m for m in net))
    twin.load_state_dict(net.state_dict())
    twin.double()
    delta = torch.zeros_like(x[0])
    for step in range(steps):
        total = torch.zeros_like(delta)
        for image, label in zip(x, y, strict=True):
            point = (image + delta).clamp(0, 1).requires_grad_()
            z = twin(point[None])[0]
            goal = label if target is None else target
            rest = torch.cat([z[:goal], z[goal + 1 :]]).max()
            gain = rest - z[goal] if target is None else z[goal] - rest
            if gain < cap:
                (slope,) = torch.autograd.grad(gain, point)
                shoved = image + delta
                outwards = ((shoved >= 1) & (slope > 0)) | ((shoved <= 0) & (slope < 0))
                total += torch.where(outwards, 0.0, slope)
        delta = delta + rate * (1 - step / steps) * total / total.norm()
        delta = delta / max(1.0, float(delta.norm()))
    torch.testing.assert_close(fit.delta.double(), delta, rtol=0, atol=1e-5)


def test_the_loss_is_a_margin_that_stops_at_its_cap(plane):
    case = plane(1.0)
    threat = Linf(0.4, case.model.bounds)  # all rows fall far below the cap
    tight = fit_universal(case.model, (case.x, case.y), threat, steps=40, cap=1e-3)
    assert tight.judge(case.model, (case.x, case.y)).rate == 1.0
    assert tight.delta.abs().max() < 0.3  # nobody is left to gain from


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_budgets_are_met_by_what_is_added_and_by_every_image(net, rows, others, norm, eps):
    threat = KINDS[norm](eps * (10 if norm == "l1" else 1))
    fit = fit_universal(net, rows, threat, steps=40, batch=8)
    for fitted in (fit, fit.control(3)):
        delta = fitted.delta.double().flatten()
        length = {"linf": delta.abs().max(), "l2": delta.norm(), "l1": delta.abs().sum()}[norm]
        assert length <= threat.eps * (1 + 1e-6)
        assert eps == 0 or length >= 0.9 * threat.eps
        if norm == "linf" and fitted is not fit:
            torch.testing.assert_close(delta.abs(), torch.full_like(delta, eps))  # random signs, not a direction
        points = fitted.apply(others[0])
        assert torch.equal(points, (others[0] + fitted.delta).clamp(0, 1))
        assert threat.contains(points, others[0]).all()
    judged = fit.judge(net, others)
    assert judged.illegal == 0
    assert (judged.rate == 0) == (eps == 0)


def test_what_is_judged_is_what_the_net_says(net, rows, others):
    fit = fit_universal(net, rows, Linf(0.2), steps=30, batch=10)
    judged, (x, y) = fit.judge(net, others), others
    clean, after = net(x), net((x + fit.delta).clamp(0, 1))
    right = clean.argmax(1) == y
    assert not right.all()
    fell = right & (after.argmax(1) != y)
    assert torch.equal(judged.held, right)
    assert torch.equal(judged.fooled.squeeze(1), fell)
    assert judged.rate == pytest.approx(fell.sum().item() / right.sum().item())
    assert torch.equal(judged.label.squeeze(1)[right], after.argmax(1)[right])
    assert (judged.label.squeeze(1)[~right] == -1).all()
    assert torch.equal(judged.named(10), torch.bincount(after.argmax(1)[fell], minlength=10))
    for label, (count, share) in enumerate(judged.by_class(10)):
        mine = right & (y == label)
        assert count == mine.sum()
        assert share == pytest.approx((fell & mine).sum().item() / count)
    sure = after.softmax(1).amax(1) >= 0.8
    bold = fit.judge(net, others, confidence=0.8)
    assert torch.equal(bold.fooled.squeeze(1), fell & sure)
    assert 0 < bold.rate < judged.rate


def test_with_a_target_only_that_class_counts(net, rows, others):
    fit = fit_universal(net, rows, Linf(0.3), target=8, steps=30, batch=10)
    judged, (x, y) = fit.judge(net, others), others
    right = (net(x).argmax(1) == y) & (y != 8)
    said = net((x + fit.delta).clamp(0, 1)).argmax(1)
    assert torch.equal(judged.held, right)
    assert torch.equal(judged.fooled.squeeze(1), right & (said == 8))
    assert judged.rate > 5 * fit.control().judge(net, others).rate
    assert judged.by_class(10)[8][0] == 0


def test_an_image_out_of_the_threat_model_counts_as_not_fooled(net, others):
    huge = Universal(torch.full((1, 8, 8), 0.5), Linf(0.1))
    judged = huge.judge(net, others)
    assert judged.rate == 0
    assert judged.illegal == judged.held.sum()


def test_passes_are_those_that_the_model_saw(counting, rows):
    fit = fit_universal(counting, rows, Linf(0.1), steps=7, batch=16, width=20)
    assert (fit.forward, fit.backward) == (40 + 7 * 16, 7 * 16)
    assert (counting.asked, counting.pulled) == (fit.forward + 20, fit.backward)
    counting.asked = 0
    judged = fit.judge(counting, rows, width=20)
    assert judged.forward == 80
    assert (counting.asked, counting.pulled) == (80 + 20, fit.backward)


def test_a_batch_is_no_larger_than_the_rows_and_a_draw_is_a_pass(net, rows):
    fit = fit_universal(net, rows, Linf(0.1), steps=3, batch=1000)
    assert (fit.forward, fit.backward) == (40 + 3 * 40, 3 * 40)
    mean = fit_universal(EOT(net, 4), rows, Linf(0.1), steps=3, batch=10)
    assert (mean.forward, mean.backward) == (4 * (40 + 3 * 10), 4 * 3 * 10)


def test_only_rows_that_hold_are_fitted_on(net, rows):
    x, ids = rows[0], torch.arange(40) + 7
    held = ids % 3 > 0
    y = torch.where(held, rows[1], (rows[1] + 1) % 10)
    names = tuple("0123456789")
    every = fit_universal(net, Images("all", x, y, ids, names), Linf(0.2), steps=5)
    some = fit_universal(net, Images("held", x[held], y[held], ids[held], names), Linf(0.2), steps=5)
    torch.testing.assert_close(every.delta, some.delta)
    assert every.backward == some.backward == 5 * int(held.sum())


def test_an_epoch_takes_every_row_once_in_an_order_of_its_own():
    sample = torch.tensor([5, 3, 11, 2, 8, 9, 40])
    taken = list(Ascent(steps=6, batch=3, seed=1).batches(sample))
    assert all(len(places) == 3 for places in taken)
    epochs = [torch.cat(taken[i : i + 2]) for i in (0, 2, 4)]
    assert all(len(set(epoch.tolist())) == 6 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    turned = list(Ascent(steps=6, batch=3, seed=1).batches(sample.flip(0)))
    for there, here in zip(taken, turned, strict=True):  # who comes hangs on the ids, not on where they stand
        assert torch.equal(sample[there], sample.flip(0)[here])


def test_the_seed_decides_and_nothing_else(net, rows):
    before = torch.random.get_rng_state()
    fits = [fit_universal(net, rows, Linf(0.2), steps=10, batch=8, seed=seed) for seed in (4, 4, 5)]
    torch.manual_seed(99)
    again = fit_universal(net, rows, Linf(0.2), steps=10, batch=8, seed=4)
    images = Images("named", *rows, torch.arange(40), tuple("0123456789"))
    named = fit_universal(net, images, Linf(0.2), steps=10, batch=8, seed=4)
    torch.random.set_rng_state(before)
    for other in (fits[1], again, named):
        assert torch.equal(fits[0].delta, other.delta)
    assert not torch.equal(fits[0].delta, fits[2].delta)
    assert not torch.equal(fits[0].control(0).delta, fits[0].control(1).delta)
    fits[0].control(0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_it_never_writes_to_what_it_was_given(net, rows):
    net.zero_grad(set_to_none=True)
    x, weights = rows[0].clone(), {name: value.clone() for name, value in net.state_dict().items()}
    fit_universal(net, rows, Linf(0.2), steps=3).judge(net, rows)
    assert torch.equal(x, rows[0])
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert [parameter.grad for parameter in net.parameters()] == [None] * 4


class Labels:
    """A model that gives labels only."""

    access, bounds = Access.DECISION, (0.0, 1.0)

    def __init__(self, net):
        self.inner = sparring.wrap(net)

    def query(self, x, access):
        return replace(self.inner.query(x, Access.DECISION), logits=None)


def test_labels_are_enough_to_judge_but_not_to_fit(net, rows, others):
    fit = sparring.fit_universal(net, rows, Linf(0.2), steps=5)
    assert torch.equal(fit.judge(Labels(net), others).fooled, fit.judge(net, others).fooled)
    with pytest.raises(AttackError, match="fitting needs GRADIENT access"):
        sparring.fit_universal(Labels(net), rows, Linf(0.2))


@pytest.mark.parametrize(
    ("threat", "options", "kind", "said"),
    [
        (L0(3), {}, UsageError, "linf, l2, l1, not in l0"),
        (Unbounded(), {}, UsageError, "not in unbounded"),
        (Linf(0.1, (-1.0, 1.0)), {}, UsageError, "give it bounds=(0.0, 1.0)"),
        (Linf(0.1), {"target": 10}, UsageError, "expected a target from 0 to 9, got 10"),
        (Linf(0.1), {"target": -1}, UsageError, "expected a target from 0"),
        (Linf(0.1), {"steps": 0}, UsageError, "steps and batch of at least 1, got 0"),
        (Linf(0.1), {"batch": 0}, UsageError, "steps and batch of at least 1"),
        (Linf(0.1), {"rate": 0.0}, UsageError, "a rate and a cap above 0"),
        (Linf(0.1), {"cap": float("nan")}, UsageError, "a rate and a cap above 0"),
        (Linf(0.1), {"width": 0}, UsageError, "a width of at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(net, rows, threat, options, kind, said):
    with pytest.raises(kind) as refusal:
        fit_universal(net, rows, threat, **options)
    assert said in str(refusal.value)


def test_rows_with_nothing_to_fool_are_refused(net, rows):
    x, y = rows
    with pytest.raises(DataError, match="gets right, got none among 40"):
        fit_universal(net, (x, (y + 1) % 10), Linf(0.1))
    threes = y == 3
    with pytest.raises(DataError, match="that are not of class 3"):
        fit_universal(net, (x[threes], y[threes]), Linf(0.1), target=3)
    fit = fit_universal(net, rows, Linf(0.1), steps=1)
    with pytest.raises(DataError, match="got none among 40"):
        fit.judge(net, (x, (y + 1) % 10))
    with pytest.raises(DataError, match="a maximum of"):
        fit_universal(net, (x * 255, y), Linf(0.1))


def test_images_of_another_size_are_refused(net, rows):
    wide = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), net).eval()
    fit = fit_universal(net, rows, Linf(0.1), steps=1)
    big = torch.nn.functional.interpolate(rows[0], scale_factor=2)
    with pytest.raises(UsageError, match=r"expected images \(1, 8, 8\), got \(1, 16, 16\)"):
        fit.judge(wide, (big, rows[1]))
