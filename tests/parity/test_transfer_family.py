"""DI-, TI-, SI- and VMI-FGSM against plain float64 loops over one row, written from the papers, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sparring.attacks.difgsm import DIFGSM
from sparring.attacks.mifgsm import MIFGSM
from sparring.attacks.nifgsm import NIFGSM
from sparring.attacks.sifgsm import SIFGSM
from sparring.attacks.tifgsm import TIFGSM
from sparring.attacks.vmifgsm import VMIFGSM
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.core.threat import Linf, threat
from sparring.engine.loop import run
from sparring.engine.unroll import unroll
from sparring.testing import (
    Probe,
    check_access,
    check_legal,
    check_order,
    check_restarts,
    check_subset,
    check_width,
    linear,
    puzzle,
)

EPS, STEPS, ROWS, SHAPE, CLASSES = 0.1, 6, 6, (2, 12, 10), 4
Step = Callable[[Tensor, Tensor], Tensor]


def rows_of(targeted: bool = False, bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[Probe, Batch]:
    """A small curved classifier of (2, 12, 10) images, and rows of its own labels."""
    hidden = noise.normal(torch.tensor([1]), (math.prod(SHAPE), 24)).squeeze(0).double()
    out = noise.normal(torch.tensor([2]), (24, CLASSES)).squeeze(0).double()
    middle = sum(bounds) / 2
    model = Probe(lambda flat: (0.5 * (flat - middle) @ hidden).tanh() @ out, bounds)
    x = bounds[0] + (bounds[1] - bounds[0]) * noise.uniform(torch.arange(ROWS), SHAPE)
    y = model.query(x, Access.DECISION).labels
    target = (y + 1) % CLASSES if targeted else torch.full_like(y, -1)
    ids = torch.arange(ROWS)
    return model, Batch(x, y, target, noise.keys(3, ids, torch.zeros_like(ids)), Linf(EPS, bounds))


def points(attack: Any, model: Probe, batch: Batch) -> Tensor:
    """(queries, n, ...) all that it asks about, whether it has won or not."""
    state, asked = attack.init(batch), []
    while not state.done.any():
        asked.append(state.x)
        seen = Observation(batch, model.query(state.x, Access.GRADIENT), batch.targeted & False, Access.GRADIENT)
        state = attack.step(batch, state, seen)
    assert state.done.all()
    return torch.stack([*asked, state.x])


class Row:
    """One row of a batch in float64, and the steps that all of these papers share."""

    def __init__(self, model: Probe, batch: Batch, row: int, size: float | None) -> None:
        self.model, self.clean, self.key = model, batch.x[row : row + 1].double(), batch.key[row : row + 1]
        aim = int(batch.target[row])
        self.label, self.sign = (aim, -1.0) if aim >= 0 else (int(batch.y[row]), 1.0)
        self.low, self.high = batch.threat.bounds
        self.size = EPS / STEPS if size is None else size
        self.asked: list[Tensor] = []

    def gradient(self, point: Tensor, view: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
        """Of the cross-entropy of view(z) at z = point, uphill for the attacker."""
        leaf = point.clone().requires_grad_()
        seen = view(leaf)
        self.asked.append(seen.detach())
        logits = self.model.net(seen.flatten(1))
        loss = self.sign * functional.cross_entropy(logits, torch.tensor([self.label]))
        return torch.autograd.grad(loss, leaf)[0]

    def moved(self, point: Tensor, g: Tensor) -> Tensor:
        """Clip{x + alpha sign(g)}."""
        point = torch.minimum(torch.maximum(point + self.size * g.sign(), self.clean - EPS), self.clean + EPS)
        return point.clamp(self.low, self.high)

    def draw(self, count: tuple[int, ...], stream: int) -> Tensor:
        return noise.uniform(self.key, count, stream).double()


def same(attack: Any, targeted: bool, reference: Callable[[Row], Tensor], bounds: tuple[float, float] = (0.0, 1.0)):
    """Every query is that of the `reference`, which returns the last point and asks through its row."""
    model, batch = rows_of(targeted, bounds)
    found = points(attack, model, batch).double()
    for index in range(ROWS):
        row = Row(model, batch, index, attack.step_size)
        last = reference(row)
        torch.testing.assert_close(found[:, index], torch.cat([*row.asked, last]), rtol=0, atol=1e-5)
        assert (last - row.clean).abs().amax() > 0.9 * EPS


# DI-FGSM


def diverse(attack: DIFGSM, row: Row, changed: list[bool]) -> Tensor:
    """Xie et al., equations 5 to 7: resize by torch's own bilinear interpolation, pad, differentiate through both."""
    point, g = row.clean, torch.zeros_like(row.clean)
    for k in range(STEPS):
        coin, scale, top, left = row.draw((4,), k)[0].tolist()
        changed.append(coin < attack.probability)

        def view(z: Tensor, k: int = k, scale: float = scale, top: float = top, left: float = left) -> Tensor:
            if not changed[-1]:
                return z
            sizes = [math.ceil(attack.rate * side) for side in SHAPE[1:]]
            height, width = (low + int(scale * (side - low)) for low, side in zip(sizes, SHAPE[1:], strict=True))
            down, across = SHAPE[1] - height, SHAPE[2] - width
            first, start = int(top * (down + 1)), int(left * (across + 1))
            small = functional.interpolate(z, (height, width), mode="bilinear", align_corners=False)
            return functional.pad(small, (start, across - start, first, down - first))

        now = row.gradient(point, view)
        g = attack.momentum * g + now / now.abs().sum()
        point = row.moved(point, g)
    return point


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("rate", "momentum", "size"), [(0.5, 1.0, None), (0.75, 0.6, 0.03), (0.9, 0.0, None)])
def test_every_query_of_di_fgsm_is_the_papers(rate, momentum, size, targeted):
    attack = DIFGSM(steps=STEPS, step_size=size, momentum=momentum, rate=rate, probability=0.6)
    changed: list[bool] = []
    same(attack, targeted, lambda row: diverse(attack, row, changed))
    assert 0.3 < sum(changed) / len(changed) < 0.9


def test_all_sizes_and_places_come_up_and_no_others():
    """Of 12 and 10 pixels at 0.7: 9 to 11 and 7 to 9, each of the same aspect, anywhere they fit."""
    ids = torch.arange(400)
    white = torch.ones(400, 1, 12, 10)
    batch = Batch(white, ids * 0, ids * 0 - 1, noise.keys(0, ids, ids), Linf(0.1))
    view = DIFGSM(rate=0.7, probability=0.75).init(batch).x
    seen = set()
    for image in view[:, 0]:
        down, across = image.sum(1).nonzero().squeeze(1), image.sum(0).nonzero().squeeze(1)
        seen.add((len(down), len(across), int(down[0]), int(across[0])))
        assert torch.allclose(image[down][:, across], torch.tensor(1.0))
    wanted = {(h, w, a, b) for h, w in ((9, 7), (10, 8), (11, 9)) for a in range(13 - h) for b in range(11 - w)}
    assert seen == wanted | {(12, 10, 0, 0)}
    untouched = (view == 1).flatten(1).all(1).float().mean()
    assert abs(float(untouched) - 0.25) < 0.07
    assert torch.equal(DIFGSM(probability=0.0).init(batch).x, white)


def test_black_is_what_is_nearest_to_zero():
    batch = Batch(
        torch.full((9, 1, 12, 10), 0.9), *torch.tensor([[0], [-1]]).expand(2, 9), torch.arange(9), Linf(0.1)
    )
    attack = DIFGSM(rate=0.5, probability=1.0)
    for bounds, dark in (((0.0, 1.0), 0.0), ((-1.0, 1.0), 0.0), ((0.25, 1.0), 0.25)):
        view = attack.init(Batch(batch.x, batch.y, batch.target, batch.key, Linf(0.1, bounds))).x
        assert float(view.amin()) == pytest.approx(dark, abs=1e-6)
        assert float(view.amax()) == pytest.approx(0.9, abs=1e-6)


# TI-FGSM


def smoothed(attack: TIFGSM, row: Row, width: int, sigma: float) -> Tensor:
    """Dong et al., equation 7 with momentum: W * grad by torch's own convolution, normalised after it."""
    places = torch.arange(width).double() - width // 2
    squares = places[:, None].square() + places.square()
    kernel = torch.exp(-squares / (2 * sigma**2)) / (2 * math.pi * sigma**2)
    kernel = (kernel / kernel.sum()).expand(SHAPE[0], 1, width, width)
    point, g = row.clean, torch.zeros_like(row.clean)
    for _ in range(STEPS):
        now = functional.conv2d(row.gradient(point), kernel, padding=width // 2, groups=SHAPE[0])
        g = attack.momentum * g + now / now.abs().sum()
        point = row.moved(point, g)
    return torch.cat([point])


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("kernel", "sigma", "momentum", "size", "meant"),
    [
        (5, None, 1.0, None, (5, 2 / math.sqrt(3))),
        (7, 1.0, 0.5, 0.03, (7, 1.0)),
        (None, None, 0.0, None, (1, 1.0)),  # a quarter of 10 pixels is no room for 3
        (15, 7 / 3, 1.0, None, (15, 7 / 3)),
    ],
)
def test_every_query_of_ti_fgsm_is_the_papers(kernel, sigma, momentum, size, meant, targeted):
    attack = TIFGSM(steps=STEPS, step_size=size, momentum=momentum, kernel=kernel, sigma=sigma)
    same(attack, targeted, lambda row: smoothed(attack, row, *meant))


@pytest.mark.parametrize(("side", "width"), [(8, 1), (11, 1), (12, 3), (28, 7), (32, 7), (60, 15), (224, 15)])
def test_the_kernel_left_out_is_fifteen_or_a_quarter_of_a_small_image(side, width):
    spot = torch.zeros(1, 1, side, side + 4)
    spot[..., side // 2, side // 2] = 1.0
    spread = TIFGSM()._smooth(spot)
    assert int((spread > 0).sum()) == width * width
    assert float(spread.sum()) == pytest.approx(1.0, abs=1e-6)


def test_on_a_linear_model_ti_fgsm_ends_at_the_sign_of_the_smoothed_weights():
    case = linear("linf", (1, 7, 7), 3)
    batch = Batch(case.x, case.y, case.y - 1, case.y, threat("linf", 0.5, case.model.bounds))
    last = unroll(case.model, TIFGSM(kernel=3), batch)
    (weight,) = torch.autograd.grad(case.model.net(leaf := torch.zeros(1, 49).double().requires_grad_())[0, 1], leaf)
    sigma = 1 / math.sqrt(3)
    line = torch.tensor([math.exp(-0.5 / sigma**2), 1.0, math.exp(-0.5 / sigma**2)]).double()
    kernel = torch.outer(line, line)[None, None]
    wanted = functional.conv2d(weight.view(1, 1, 7, 7), kernel, padding=1).sign()
    torch.testing.assert_close((last - case.x).double(), 0.5 * wanted.expand(3, 1, 7, 7), rtol=0, atol=1e-5)


# SI-NI-FGSM


def scaled(attack: SIFGSM, row: Row) -> Tensor:
    """Lin et al., algorithm 1, with the mean for the L1 norm as in their code."""
    point, g = row.clean, torch.zeros_like(row.clean)
    for _ in range(STEPS):
        ahead = (point + attack.momentum * row.size * g).clamp(row.low, row.high) if attack.nesterov else point
        total = torch.zeros_like(g)
        for i in range(attack.copies):
            total += row.gradient(ahead, lambda z, i=i: z / 2**i)
        mean = total / attack.copies
        g = attack.momentum * g + mean / mean.abs().mean()
        point = row.moved(point, g)
    return point


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("copies", "nesterov", "momentum", "size"), [(5, True, 1.0, None), (3, True, 0.7, 0.03), (2, False, 1.0, None)]
)
def test_every_query_of_si_ni_fgsm_is_the_papers(copies, nesterov, momentum, size, targeted):
    attack = SIFGSM(steps=STEPS, step_size=size, momentum=momentum, copies=copies, nesterov=nesterov)
    same(attack, targeted, lambda row: scaled(attack, row))
    same(attack, targeted, lambda row: scaled(attack, row), bounds=(-1.0, 1.0))


def test_one_copy_is_plain():
    model, batch = rows_of()
    for nesterov, kind in ((True, NIFGSM), (False, MIFGSM)):
        one = points(SIFGSM(steps=STEPS, copies=1, nesterov=nesterov), model, batch)
        assert torch.equal(one, points(kind(steps=STEPS), model, batch))


# VMI-FGSM


def tuned(attack: VMIFGSM, row: Row) -> Tensor:
    """Wang and He, algorithm 1; what the last step's neighbours would say, nobody uses."""
    point, g, v = row.clean, torch.zeros_like(row.clean), torch.zeros_like(row.clean)
    for k in range(STEPS):
        now = row.gradient(point)
        g = attack.momentum * g + (now + v) / (now + v).abs().sum()
        if k + 1 < STEPS:
            around = torch.zeros_like(g)
            for i in range(1, attack.neighbours + 1):
                r = (2 * row.draw(SHAPE, k * attack.neighbours + i) - 1) * attack.beta * EPS
                around += row.gradient((point + r).clamp(row.low, row.high))
            v = around / attack.neighbours - now
        point = row.moved(point, g)
    return point


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("neighbours", "beta", "momentum", "size"), [(5, 1.5, 1.0, None), (3, 4.0, 0.6, 0.03)])
def test_every_query_of_vmi_fgsm_is_the_papers(neighbours, beta, momentum, size, targeted):
    attack = VMIFGSM(steps=STEPS, step_size=size, momentum=momentum, neighbours=neighbours, beta=beta)
    same(attack, targeted, lambda row: tuned(attack, row))


def test_no_two_neighbours_are_the_same_and_they_fill_their_cube():
    model, batch = rows_of(bounds=(-9.0, 9.0))
    attack = VMIFGSM(steps=3, neighbours=4, beta=2.0)
    asked = points(attack, model, batch)
    around = torch.stack([asked[i + 1 : i + 5] - asked[i] for i in (0, 5)]).flatten(0, 1)
    assert 0.95 * 2 * EPS < float(around.abs().amax()) <= 2 * EPS + 1e-5
    assert float(around.std()) == pytest.approx(2 * EPS / math.sqrt(3), rel=0.03)
    assert len(torch.unique(around.flatten(2), dim=0)) == 8


# All of them

FAMILY = [
    DIFGSM(rate=0.4, steps=8),
    TIFGSM(kernel=3, steps=8),
    SIFGSM(steps=8, copies=3),
    VMIFGSM(steps=8, neighbours=4),
]
each = pytest.mark.parametrize("attack", FAMILY, ids=lambda attack: attack.name)


@each
def test_it_keeps_the_contract_where_it_does_transform(attack):
    """As they come, DI and TI leave the contract's (4, 5) images alone; here they do not."""
    moved = 0
    for case in (puzzle("linf"), puzzle("linf", targeted=True)):
        usual = check_legal(attack, case)
        check_order(attack, case, usual)
        check_subset(attack, case, usual)
        check_restarts(attack, case, usual)
        moved += check_width(attack, case, usual)
    check_access(attack)
    assert moved <= 1


@pytest.mark.parametrize(
    ("attack", "queries"),
    [
        (DIFGSM(steps=7), 7),
        (TIFGSM(steps=7), 7),
        (SIFGSM(steps=7, copies=3), 21),
        (VMIFGSM(steps=7, neighbours=4), 31),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_queries_are_what_the_paper_needs_and_one_for_the_last_point(attack, queries):
    case = puzzle("linf")
    got = run(case.model, attack, threat("linf", 1e-6), case.x, case.y)
    assert not got.found.any()
    assert got.forward.tolist() == [queries + 1] * len(case.x)
    assert got.backward.tolist() == [queries] * len(case.x)


@pytest.mark.parametrize("attack", [DIFGSM(), TIFGSM(), SIFGSM(), VMIFGSM()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 4, 4)])
def test_on_a_linear_model_the_budget_decides_and_is_used_up(shape, rows, attack):
    case = linear("linf", shape, rows)
    for factor, wanted in ((0.999, False), (1.001, True)):
        limit = threat("linf", 0.5 * factor, case.model.bounds)
        assert run(case.model, attack, limit, case.x, case.y).found.tolist() == [wanted] * rows
        last = unroll(case.model, attack, Batch(case.x, case.y, case.y - 1, case.y, limit))
        far = limit.distance(last, case.x)
        torch.testing.assert_close(far, torch.full_like(far, limit.eps), rtol=0, atol=1e-5)


@each
def test_no_gradient_no_move(attack):
    model, batch = Probe(lambda flat: flat[:, :4] * 0.0), rows_of()[1]
    last = unroll(model, attack, batch)
    assert torch.equal(last, batch.x)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SIFGSM(copies=0),
        lambda: VMIFGSM(neighbours=0),
        lambda: TIFGSM(kernel=4),
        lambda: TIFGSM(sigma=0.0),
    ],
)
def test_what_would_mean_nothing_is_an_error(wrong):
    with pytest.raises(UsageError, match="expected"):
        wrong()
