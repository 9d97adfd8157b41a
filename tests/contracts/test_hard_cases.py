"""Rows, images and models that are easily forgotten: every attack of the catalogue ends sensibly on each.

`Watched` looks at every step: points are finite and inside the bounds, last points are legal, nothing is written to.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring import catalog
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.engine.outcome import Outcome
from sparring.testing import RADII, Probe, Watched

ATTACKS = catalog.attacks()
CHEAP = {
    "steps": 10, "rounds": 2, "searches": 2, "members": 4, "copies": 2, "neighbours": 2, "samples": 2, "initial": 3,
    "tries": 4, "kernel": 3,
}  # fmt: skip
CASES = [(name, norm) for name in sorted(ATTACKS) for norm in ATTACKS[name].norms]
# What a row costs that nothing breaks, where that is not a pass for each of the 10 steps and one for the last point.
COSTS = {
    "boundary": (5, 0), "hopskipjump": (5, 0), "surfree": (5, 0),  # four tries to start, and a legal last point
    "cw": (21, 20), "ead": (21, 20), "sifgsm": (21, 20),  # two rounds; two copies
    "deepfool": (11, 20), "superdeepfool": (11, 20),  # a backward pass for each rival, but for a target one
    "fgsm": (2, 1), "jsma": (2, 2), "vmifgsm": (29, 28),  # 9 (1 + 2) + 1 + 1
}  # fmt: skip
for plain in (
    "brendel_bethge",
    "acg", "apgd", "bim", "ddn", "difgsm", "fab", "fmn", "fooling", "mifgsm", "nearest", "nes", "nifgsm", "one_pixel",
    "pdgd", "pdpgd", "pgd", "pgd0", "pointwise", "rays", "sigma_zero", "simba", "spsa", "sprint", "square", "tifgsm",
):  # fmt: skip
    COSTS[plain] = (11, 10 if ATTACKS[plain].needs == Access.GRADIENT else 0)
IN_PIXEL_UNITS = {  # options, and to which power of the range they go
    "ddn": {"step_size": 1, "radius": 1}, "fmn": {"step_size": 1}, "fooling": {"step_size": 1}, "nes": {"sigma": 1},
    "ead": {"beta": 1, "weight": 2}, "simba": {"size": 1}, "spsa": {"delta": 1},
}  # fmt: skip
OF_UNIT_RANGE = ("pdgd", "pdpgd")  # which weigh a distance against a loss: no one option grows with the range
PLANES = noise.normal(torch.tensor([3]), (12, 3)).squeeze(0).double()

every_attack = pytest.mark.parametrize(("name", "norm"), CASES)


def cheap(name: str) -> Any:
    kind: Any = ATTACKS[name]
    return kind(**{field.name: CHEAP[field.name] for field in fields(kind) if field.name in CHEAP})


def images(rows: int, *shape: int) -> Tensor:
    return 0.2 + 0.6 * noise.uniform(torch.arange(rows), shape or (1, 3, 4))


def three_classes(scale: float = 10.0) -> Probe:
    """Linear, with the middle of the range on every boundary."""
    return Probe(lambda flat: scale * (flat - 0.5) @ PLANES)


def play(name: str, norm: str, model: Probe, x: Tensor, y: Tensor, *, moved: bool = False, **more: Any) -> Outcome:
    """Run the attack; what it leaves behind must be finite and legal, and confirmed unless it may have `moved`."""
    attack, limit = Watched(cheap(name)), threat(norm, RADII.get(norm, 1.0))
    if attack.needs_target and "targets" not in more:
        more["targets"] = ((model.query(x, Access.DECISION).labels + 1) % 2)[:, None]
    got = run(model, attack, limit, x, y, width=4, **more)
    attack.legal(limit, got.best, x, "what it leaves behind")
    assert got.best.isfinite().all()
    assert got.distance.isfinite().all()
    assert moved or not got.moved.any()
    return got


def same(one: Outcome, two: Outcome) -> None:
    for field in ("clean", "found", "failed", "best", "distance", "label", "forward", "backward"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field


def said(model: Probe, x: Tensor) -> Tensor:
    return model.query(x, Access.DECISION).labels


@every_attack
def test_rows_that_fool_from_the_start_cost_nothing_and_disturb_nobody(name, norm):
    """Misclassified ones, and with a target those that are there already: a target equal to the label too."""
    model, x, ids = three_classes(), images(5), torch.arange(5)
    label = said(model, x)
    fools = torch.tensor([True, False, True, False, False])
    if ATTACKS[name].needs_target:
        more = [{"targets": torch.where(fools, label, (label + 1) % 3)[:, None]}]
    else:
        more = [{}, {"targets": torch.where(fools, label, (label + 1) % 3)[:, None]}]
    for aim in more:
        y = label if aim else torch.where(fools, (label + 1) % 3, label)
        got = play(name, norm, model, x, y, sample=ids, **aim)
        assert got.clean.tolist() == fools.tolist()
        assert got.found[fools].all()
        assert torch.equal(got.best[fools], x[fools])
        assert got.forward[fools].tolist() == got.backward[fools].tolist() == [0, 0]
        assert (got.forward[~fools] > 0).all()
        some = {key: value[~fools] for key, value in aim.items()}
        alone = play(name, norm, model, x[~fools], y[~fools], sample=ids[~fools], **some)
        same(got.take(torch.tensor([1, 3, 4])), alone)


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_all_rows_fool_from_the_start(name):
    model, x = three_classes(), images(3)
    label = said(model, x)
    got = play(name, ATTACKS[name].norms[0], model, x, label, targets=label[:, None])
    assert got.clean.all()
    assert got.forward.tolist() == [0] * 3


@every_attack
def test_identical_images_of_one_sample_get_identical_results(name, norm):
    model, x = three_classes(), images(1).expand(6, -1, -1, -1).contiguous()
    got = play(name, norm, model, x, said(model, x), sample=torch.tensor([5, 5, 7, 5, 7, 7]))
    for ids in ((1, 3), (2, 4), (2, 5)):
        one, two = (got.take(torch.tensor([row])) for row in ids)
        same(one, two)


@every_attack
@pytest.mark.parametrize("targeted", [False, True])
def test_a_constant_model_is_never_fooled(name, norm, targeted):
    model, x = Probe(lambda flat: 0.0 * flat[:, :3] + torch.tensor([1.0, 0.5, 0.0])), images(3)
    y = torch.zeros(3, dtype=torch.int64)
    aim = {"targets": y[:, None] + 1} if targeted or ATTACKS[name].needs_target else {}
    got = play(name, norm, model, x, y, **aim)
    assert not got.found.any()
    assert not got.failed.any()
    assert (got.forward > 0).all()
    if name in COSTS:
        forward, backward = COSTS[name]
        backward = 10 if targeted and name in ("deepfool", "superdeepfool") else backward
        assert (got.forward.tolist(), got.backward.tolist()) == ([forward] * 3, [backward] * 3)


@pytest.mark.parametrize(
    ("name", "norm"), [case for case in CASES if case[0] in COSTS and case[0] not in OF_UNIT_RANGE]
)
def test_pixels_from_0_to_256_are_attacked_as_those_from_0_to_1(name, norm):
    """Bit for bit, as a power of two rounds nothing, if the options in units of the input grow with it."""
    small, model, x, factor = cheap(name), three_classes(), images(6), 256.0
    y = said(model, x)
    powers = IN_PIXEL_UNITS.get(name, {})
    large = replace(small, **{option: getattr(small, option) * factor**power for option, power in powers.items()})
    wide = Probe(lambda flat: model.net(flat / factor), bounds=(0.0, factor))
    more = {"targets": ((y + 1) % 3)[:, None]} if ATTACKS[name].needs_target else {}
    eps = RADII.get(norm, 1.0)
    one = run(model, small, threat(norm, eps), x, y, width=4, **more)
    limit = threat(norm, eps if norm == "l0" else eps * factor, wide.bounds)
    two = run(wide, large, limit, x * factor, y, width=4, **more)
    torch.testing.assert_close(two.best / factor, one.best, rtol=0, atol=3e-8 if name == "spsa" else 0)
    for field in ("found", "forward", "backward"):
        assert torch.equal(getattr(one, field), getattr(two, field)), field


@every_attack
def test_two_classes(name, norm):
    """To leave one class is to reach the other."""
    model, x = Probe(lambda flat: 10.0 * (flat - 0.5) @ PLANES[:, :2]), images(6)
    y = said(model, x)
    assert 0 < y.sum() < 6
    aimed = play(name, norm, model, x, y, targets=1 - y[:, None])
    assert not aimed.failed.any()
    if not ATTACKS[name].needs_target:
        free = play(name, norm, model, x, y)
        assert torch.equal(free.found, aimed.found)
        assert torch.equal(free.forward, aimed.forward)


@every_attack
def test_gradients_that_are_zero_everywhere(name, norm):
    """The labels change, the logits in between say nothing."""

    def steps(flat: Tensor) -> Tensor:
        return (flat - 0.5) @ PLANES * 0 + ((flat.detach() - 0.5) @ PLANES).sign()

    model, x = Probe(steps), images(4)
    got = play(name, norm, model, x, said(model, x))
    assert not got.failed.any()


@every_attack
def test_rows_on_which_the_model_fails(name, norm):
    """NaN logits on some images, and on some of those that an attack comes by: these rows fail, the others do not.

    Who asks for labels only is told one there too; what it finds with that is not confirmed.
    """

    def cracked(flat: Tensor) -> Tensor:
        return (10.0 * (flat - 0.5) @ PLANES).masked_fill(flat[:, :1] > 0.9, torch.nan)

    model, x, ids = Probe(cracked), images(5), torch.arange(5)
    x[[0, 3], 0, 0, 0] = 0.95
    x[4, 0, 0, 0] = 0.895
    y = said(three_classes(), x)
    more = {"targets": ((y + 1) % 3)[:, None]} if ATTACKS[name].needs_target else {}
    deaf = ATTACKS[name].needs == Access.DECISION
    got = play(name, norm, model, x, y, moved=deaf, sample=ids, **more)
    assert got.failed[[0, 3]].all()
    assert not (got.found & (got.failed | got.moved)).any()
    assert got.forward[[0, 3]].tolist() == [0, 0]
    fine = torch.tensor([1, 2, 4])
    some = {key: value[fine] for key, value in more.items()}
    same(got.take(fine), play(name, norm, model, x[fine], y[fine], moved=deaf, sample=ids[fine], **some))


@every_attack
@pytest.mark.parametrize("targeted", [False, True])
def test_an_attack_that_is_told_nan_keeps_its_points_finite_and_its_rows_apart(name, norm, targeted):
    """The engine takes such rows out; the attack itself must not hang on that."""
    attack, limit, x = Watched(cheap(name)), threat(norm, RADII.get(norm, 1.0)), images(3)
    model = three_classes()
    y = said(model, x)
    target = (y + 1) % 3 if targeted or ATTACKS[name].needs_target else torch.full_like(y, -1)
    bad = torch.tensor([False, True, False])

    def walk(rows: Tensor, bad: Tensor) -> Tensor:
        batch = Batch(x[rows], y[rows], target[rows], noise.keys(0, rows, 0 * rows), limit)
        state, points = attack.init(batch), []
        broken = Probe(lambda flat: (10.0 * (flat - 0.5) @ PLANES).masked_fill(bad[:, None], torch.nan))
        for _ in range(8):
            points.append(state.x)
            answer = broken.query(state.x, attack.needs)
            hit = ~bad & ((answer.labels == batch.label) == batch.targeted)
            state = attack.step(batch, state, Observation(batch, answer, hit, attack.needs))
        return torch.stack(points)

    together, alone = walk(torch.arange(3), bad), walk(torch.tensor([0, 2]), bad[[0, 2]])
    assert together.isfinite().all()
    torch.testing.assert_close(together[:, [0, 2]], alone, rtol=0, atol=0)


@every_attack
def test_an_image_of_one_pixel(name, norm):
    model = Probe(lambda flat: torch.cat([flat, 1.0 - flat, 0 * flat - 1], 1) * 10)
    x = torch.tensor([0.42, 0.47, 0.53, 0.9]).view(4, 1, 1, 1)
    got = play(name, norm, model, x, said(model, x))
    assert not got.failed.any()
    if norm in ("linf", "l2"):  # the boundary, at a half, is 0.4 from the last one
        assert not got.found[3]


@every_attack
def test_an_image_on_a_corner_of_the_box(name, norm):
    x = (images(4) > 0.5).float()
    x[0], x[1] = 0.0, 1.0
    model = three_classes()
    got = play(name, norm, model, x, said(model, x))
    assert not got.failed.any()
