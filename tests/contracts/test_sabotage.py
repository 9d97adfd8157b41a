"""The checks notice sabotage: each breaks one law, and the check for that law must say so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from sparring.attacks.apgd import APGD
from sparring.attacks.pgd import PGD
from sparring.core import noise
from sparring.core.attack import Observation
from sparring.core.batch import Batch
from sparring.core.judge import Judge
from sparring.core.model import Access
from sparring.core.threat import L1, L2, Linf, Threat
from sparring.testing import (
    ContractError,
    check_access,
    check_attack,
    check_declaration,
    check_judge,
    check_legal,
    check_optimum,
    check_order,
    check_restarts,
    check_subset,
    check_width,
    puzzle,
)

STEPS = 10


def test_honest_work_passes():
    check_attack(PGD, steps=20)
    check_judge(Judge())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_gradient_with_its_sign_flipped(norm, monkeypatch):
    honest = Observation.value_and_grad

    def flipped(self, loss, *, keep=False):
        value, gradient = honest(self, loss, keep=keep)
        return value, -gradient

    monkeypatch.setattr(Observation, "value_and_grad", flipped)
    with pytest.raises(ContractError, match="expected all rows broken"):
        check_optimum(PGD(), norm)


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_a_projection_that_is_skipped(kind, monkeypatch):
    monkeypatch.setattr(kind, "project", lambda self, x, x0: self.clip(x))
    monkeypatch.setattr(Batch, "project", lambda self, x: self.threat.clip(x))
    with pytest.raises(ContractError, match=r"lies .* away in .*; project it"):
        check_legal(PGD(steps=STEPS, step_size=0.3), puzzle(kind.norm))


def test_a_projection_without_the_bounds(monkeypatch):
    def boundless(self, x):
        return x.clamp(self.x - self.threat.eps, self.x + self.threat.eps)

    monkeypatch.setattr(Batch, "project", boundless)
    with pytest.raises(ContractError, match="asks about a pixel outside"):
        check_legal(PGD(steps=STEPS), puzzle("linf"))


def test_a_judge_that_accepts_points_outside_the_ball(monkeypatch):
    monkeypatch.setattr(Threat, "contains", lambda self, x, x0: torch.ones(len(x), dtype=torch.bool))
    with pytest.raises(ContractError, match="for a point outside the ball"):
        check_judge(Judge())


def test_a_judge_that_does_not_look_where_the_point_lies():
    class Blind(Judge):
        def adversarial(self, batch, x, prediction):
            return self.fooled(batch, prediction)

    with pytest.raises(ContractError, match="for a point outside the ball"):
        check_judge(Blind())


def test_a_judge_that_calls_right_answers_wrong(monkeypatch):
    monkeypatch.setattr(Judge, "fooled", lambda self, batch, seen: torch.ones_like(seen.labels, dtype=torch.bool))
    with pytest.raises(ContractError, match="that the model calls 0"):
        check_judge(Judge())


@dataclass(frozen=True)
class Peeking(PGD):
    """Says that it needs labels only, and reads logits."""

    needs: ClassVar[Access] = Access.DECISION

    def step(self, batch, state, seen):
        return replace(state, x=state.x + 0.0 * seen.logits.sum(), k=state.k + 1, done=state.k >= self.steps)


@dataclass(frozen=True)
class Modest(PGD):
    """Says that it needs gradients, and uses none."""

    def step(self, batch, state, seen):
        x = batch.threat.sample(batch.x, batch.key, 1)
        return replace(state, x=x, k=state.k + 1, done=state.k >= self.steps)


def test_an_attack_that_reads_what_it_may_not():
    with pytest.raises(ContractError, match="fails with the access that it declares: this attack uses SCORE"):
        check_access(Peeking(steps=STEPS))


def test_an_attack_that_asks_for_more_than_it_uses():
    with pytest.raises(ContractError, match=r"declares Access\.GRADIENT but runs with SCORE"):
        check_access(Modest(steps=STEPS))


def test_noise_that_depends_on_the_place_in_the_batch(monkeypatch):
    honest = noise.uniform

    def placed(key, shape, stream=0):
        return honest(key + torch.arange(len(key)), shape, stream)

    monkeypatch.setattr(noise, "uniform", placed)
    attack, case = PGD(steps=STEPS), puzzle("linf")
    usual = case.play(attack)
    with pytest.raises(ContractError, match="rows in another order"):
        check_order(attack, case, usual)
    with pytest.raises(ContractError, match="some rows alone"):
        check_subset(attack, case, usual)
    with pytest.raises(ContractError, match="starts elsewhere when it is alone"):
        check_width(attack, case, usual)


@dataclass(frozen=True)
class Global(PGD):
    """Draws from the global generator."""

    def init(self, batch):
        state = super().init(batch)
        return replace(state, x=batch.threat.project(state.x + 0.05 * torch.randn_like(state.x), batch.x))


def test_global_randomness():
    attack, case = Global(steps=STEPS), puzzle("linf")
    usual = case.play(attack)
    with pytest.raises(ContractError, match="rows in another order"):
        check_order(attack, case, usual)
    with pytest.raises(ContractError, match="starts elsewhere"):
        check_width(attack, case, usual)
    with pytest.raises(ContractError, match="lost or worse after three"):
        check_restarts(attack, case, usual)


@dataclass(frozen=True)
class Ranking(PGD):
    """Moves the better half of the batch only: rows are ranked against each other."""

    def step(self, batch, state, seen):
        value, _ = seen.value_and_grad(lambda z, b: z.amax(1), keep=True)
        after = super().step(batch, state, seen)
        worse = (value < value.median()).view(-1, 1, 1, 1)
        return replace(after, x=torch.where(worse, state.x, after.x))


def test_rows_that_are_ranked_against_each_other():
    attack, case = Ranking(steps=STEPS), puzzle("linf")
    with pytest.raises(ContractError, match="differ"):
        check_order(attack, case, case.play(attack))


@dataclass(frozen=True)
class Careless(PGD):
    """Changes its state in place."""

    def step(self, batch, state, seen):
        after = super().step(batch, state, seen)
        state.x.add_(0.0).clamp_(0.1, 0.9)
        return after


@dataclass(frozen=True)
class Vandal(APGD):
    """Changes the batch in place."""

    victim: str = "target"

    def step(self, batch, state, seen):
        after = super().step(batch, state, seen)
        getattr(batch, self.victim).sub_(1)
        return after


def test_a_state_changed_in_place():
    with pytest.raises(ContractError, match=r"step changed PGDState.x in place; make a new tensor"):
        check_legal(Careless(steps=STEPS), puzzle("linf"))


@pytest.mark.parametrize("victim", ["x", "y", "target", "key", "label", "sign"])
def test_a_batch_changed_in_place(victim):
    with pytest.raises(ContractError, match=f"step changed Batch.{victim} in place"):
        check_legal(Vandal(steps=STEPS, victim=victim), puzzle("linf"))


@dataclass(frozen=True)
class Widening(APGD):
    """Turns a float32 field into float64 on the way."""

    def step(self, batch, state, seen):
        after = super().step(batch, state, seen)
        return replace(after, size=after.size.double())


def test_a_state_that_changes_its_type():
    with pytest.raises(ContractError, match=r"step turned state\.size from torch\.float32"):
        check_legal(Widening(steps=STEPS), puzzle("linf"))


class Loose:
    """No dataclass at all."""

    name, version, paper, norms, needs = "loose", 1, "nobody", ("linf",), Access.GRADIENT


def _declared(**attributes):
    return dataclass(frozen=True)(type("Odd", (PGD,), {"__annotations__": {}, **attributes}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Loose, "expected a frozen dataclass"),
        (_declared(name=""), "expected name"),
        (_declared(version="1"), "expected version"),
        (_declared(paper=None), "expected paper"),
        (_declared(norms=("l3",)), "expected norms among"),
        (_declared(norms=()), "expected norms among"),
    ],
)
def test_a_declaration_with_a_gap(kind, message):
    with pytest.raises(ContractError, match=message):
        check_declaration(kind)


def test_an_option_that_is_not_stored_as_given():
    @dataclass(frozen=True)
    class Rounding(PGD):
        def __post_init__(self):
            object.__setattr__(self, "steps", 2 * self.steps)

    with pytest.raises(ContractError, match="expected option steps stored as given, got 10"):
        check_declaration(Rounding, steps=5)
