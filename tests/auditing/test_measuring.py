"""What is tried for the smallest distances, on which rows, and what these add up to: by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.attacks.ddn import DDN
from sparring.attacks.fab import FAB
from sparring.attacks.fmn import FMN
from sparring.attacks.hopskipjump import HopSkipJump
from sparring.attacks.square import Square
from sparring.auditing import measuring
from sparring.auditing.closer import Closer, Onward, Shrink
from sparring.auditing.distances import STEPS, share_at, spread, steps
from sparring.auditing.hunt import Setting
from sparring.auditing.measuring import Measure, measure, measures
from sparring.auditing.standing import STATES, Standing
from sparring.core import noise
from sparring.core.model import Access
from sparring.core.threat import threat
from sparring.testing import Probe

MOST = torch.finfo(torch.float64).max


def setting(norm: str, eps: float, access: Access = Access.GRADIENT, low: float = 0.0) -> Setting:
    model = Probe(lambda flat: flat[:, :2], (low, 1.0), access)
    return Setting(model, threat(norm, eps, model.bounds), 8)


# What is tried


@pytest.mark.parametrize(("norm", "wide"), [("linf", 1.0), ("l2", 8.0), ("l1", 24.0)])
def test_with_gradients_forty_steps_a_dig_go_to_three_attacks(norm, wide):
    for low, span in ((0.0, 1.0), (-1.0, 2.0)):
        opening = Measure("nearest: fmn", FMN(6, step_size=span))
        if norm == "l2":
            opening = Measure("nearest: ddn", DDN(6, step_size=span, radius=0.1))
        onward = Measure("nearest: fab", Onward(FAB(6)))
        closer = Measure("nearest: closer", Closer(28, 0.1, wide=wide))
        assert measures(setting(norm, 0.1, low=low), 1.0, 10.0) == [opening, onward, closer]
    short = measures(setting(norm, 0.0), 0.1, 8.0)  # no fewer than 24 steps; without a radius the box's has to do
    assert short[1:] == [
        Measure("nearest: fab", Onward(FAB(4))),
        Measure("nearest: closer", Closer(16, 0.25, wide=wide)),
    ]
    assert norm != "l2" or short[0].attack == DDN(4, step_size=1.0, radius=0.25)


@pytest.mark.parametrize(("norm", "turns"), [("linf", 40), ("l2", 40), ("l1", 160)])
def test_without_gradients_square_goes_down_a_ladder_of_radii(norm, turns):
    found = measures(setting(norm, 0.5, Access.SCORE), 2.0, 10.0)
    above = torch.inf
    for rung, said in zip((4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.0625), found, strict=False):
        assert said == Measure(
            f"nearest: square at {rung:.3g}", Square(turns, p=0.3, mixed=True), rung, said.below, rung
        )
        assert said.below == pytest.approx(above, rel=1e-4)
        assert said.below > above or above == torch.inf  # whoever fell by a hair, within the judge's slack, comes too
        above = rung
    last = [Measure("nearest: shrink", Shrink(), below=MOST)]
    if norm != "l1":
        last.append(Measure("nearest: hopskipjump", HopSkipJump(1200)))
    assert found[7:] == last


def test_a_measure_meets_the_rows_that_were_right_and_lie_in_its_range(monkeypatch):
    standing = Standing(torch.arange(8), torch.zeros(8).long())
    words = ("held", "broken", "certified", "misclassified", "waiting", "error", "held", "held")
    standing.state = torch.tensor([STATES.index(word) for word in words])
    standing.reach[:] = torch.tensor([0.3, 0.2, torch.inf, 0.0, 0.3, 0.3, 0.5, 0.7]).double().round(decimals=3)
    ladder = [Measure("a", Shrink()), Measure("b", Shrink(), 0.3, 0.5), Measure("c", Shrink(), below=MOST)]
    monkeypatch.setattr(measuring, "measures", lambda *_: ladder)
    met: list[tuple[str, int, list[int]]] = []

    def approach(work: Any, step: Measure, number: int, at: Tensor, most: float) -> None:
        met.append((step.name, number, at.tolist()))
        standing.measured[at] = number
        assert most == 1.0

    monkeypatch.setattr(measuring, "_approach", approach)
    standing.stages = {0: "clean images", 4: "sprint"}
    work: Any = SimpleNamespace(
        standing=standing, setting=setting("linf", 0.1), plan=SimpleNamespace(work=1.0), take_up=lambda _: None,
        images=SimpleNamespace(x=torch.zeros(8, 1, 2, 2)), tell=lambda *_: None, chunks=lambda left, _: left.split(3),
    )  # fmt: skip
    assert measure(work)
    assert met == [("a", 5, [0, 1, 2]), ("a", 5, [6, 7]), ("b", 6, [6]), ("c", 7, [0, 1, 6]), ("c", 7, [7])]


def test_a_row_that_time_cut_short_has_its_word_later(monkeypatch):
    """The first of four rows comes nearer, into the ball; the second is unsettled; the others gain nothing."""
    standing = Standing(torch.arange(4) + 10, torch.zeros(4).long())
    standing.state[:] = STATES.index("held")
    standing.reach[3] = 0.1
    x, best = torch.full((4, 1, 2, 2), 0.5), torch.full((4, 1, 2, 2), 0.55)
    reached = torch.tensor([0.05, 0.05, torch.inf, 0.3], dtype=torch.float64)
    spent = {"forward": torch.full((4,), 7), "backward": torch.full((4,), 6)}
    ledger = SimpleNamespace(distance=reached, best=best, unsettled={1}, **spent)
    monkeypatch.setattr(measuring, "_play", lambda *_: ledger)
    shards: list[tuple[Any, ...]] = []

    def confirm(name: str, ids: Tensor, *_: Any) -> tuple[Tensor, dict[str, Any]]:
        assert ids.tolist() == [10]
        return torch.ones(1, dtype=torch.bool), {
            "label": [1],
            "confidence": [0.9],
            "distance": [0.05],
            "eight_bit": [True],
        }

    work: Any = SimpleNamespace(
        standing=standing, setting=setting("linf", 0.1), to=lambda tensor: tensor, confirm=confirm,
        images=SimpleNamespace(x=x, y=torch.zeros(4).long(), ids=standing.ids),
        commit=lambda *each: shards.append(each), evidence=SimpleNamespace(fresh=lambda number: f"{number}-000"),
    )  # fmt: skip
    measuring._approach(work, Measure("nearest: one", Shrink()), 5, torch.arange(4), 1.0)
    (whole, name), (rest,) = shards
    assert (name, whole.complete, rest.complete) == ("5-000", True, False)
    assert (whole.ids, whole.nearer, whole.state) == ([10, 12, 13], [10], ["broken", "held", "held"])
    assert (whole.forward, whole.backward) == (
        [9, 7, 7],
        [6, 6, 6],
    )  # two more to judge what was found, from the disk
    assert (rest.ids, rest.forward, rest.backward) == ([11], [7], [6])


# What they add up to


def eight_of_ten() -> Standing:
    """Two of ten rows have not been looked at; a broken row's distance lies a hair beyond the audited 0.31."""
    standing = Standing(torch.arange(8), torch.zeros(8).long())
    words = ("misclassified", "broken", "broken", "held", "held", "certified", "waiting", "held")
    standing.state = torch.tensor([STATES.index(word) for word in words])
    reach = [0.0, 0.31000001, 0.11, 0.52, torch.inf, 0.8, torch.inf, 0.52]
    standing.reach = torch.tensor(reach, dtype=torch.float64)
    standing.near = torch.tensor([-1, 0, 1, 1, -1, 2, -1, 0])
    standing.names, standing.stages = ["3-000", "4-000", "4-001"], {3: "nearest: fmn", 4: "nearest: fab"}
    return standing


def test_figures_of_ten_rows_by_hand():
    figures = spread(eight_of_ten(), 10, 0.31)
    assert figures["found"] == 5
    assert figures["none_found"] == 4
    assert figures["median"] == 0.52
    assert figures["mean"] == pytest.approx((0 + 0.11 + 0.31 + 0.52 + 0.52 + 0.8) / 6, rel=1e-12)
    assert figures["quantiles"] == {"0.05": 0.0, "0.25": 0.31, "0.75": None, "0.95": None}
    assert figures["curve"] == {
        "eps": [0.0, 0.11, 0.31, 0.52, 0.8],
        "robust_accuracy": [0.9, 0.8, 0.7, 0.5, 0.4],
    }
    assert figures["found_by"] == {"nearest: fmn": 2, "nearest: fab": 3}
    edges, counts = figures["histogram"]["edges"], figures["histogram"]["rows"]
    assert edges == pytest.approx([0.8 * place / 24 for place in range(25)])
    assert {place: count for place, count in enumerate(counts) if count} == {3: 1, 9: 1, 15: 2, 23: 1}
    for eps, share in ((0.0, 0.9), (0.109, 0.9), (0.11, 0.8), (0.5, 0.7), (9.0, 0.4)):
        assert share_at(figures["curve"], eps) == share


def test_a_thinned_curve_keeps_the_audited_eps_and_the_median():
    found = noise.uniform(torch.tensor([1]), (1400,)).squeeze(0).double().sort().values
    found[0] = 0.0
    for eps in (0.05, 0.31, 0.77, 0.9):
        for rows in (1400, 2000, 2500):
            curve = steps(found, rows, eps)
            assert len(curve["eps"]) <= STEPS < 1400
            assert share_at(curve, eps) == (rows - int((found <= eps).sum())) / rows
            half = next(at for at, share in zip(*curve.values(), strict=True) if share <= 0.5)
            assert half == float(found[(rows + 1) // 2 - 1])
