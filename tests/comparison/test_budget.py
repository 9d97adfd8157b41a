"""The same passes for each attack: what they cost is what the model sees, and no row costs more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

import sparring
from sparring import catalog
from sparring.comparison.budget import fitted, passes
from sparring.comparison.trial import chosen
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.core.threat import L2, Linf
from sparring.engine.loop import run
from sparring.testing import puzzle

GRADIENT = [name for name, kind in catalog.attacks().items() if kind.needs == Access.GRADIENT]
QUERIES = ["square", "nes", "hopskipjump", "boundary"]


@dataclass
class Counter:
    """A model that counts what it is asked, row by row, at width 1."""

    inner: object
    forward: int = 0
    backward: int = 0
    access: Access = Access.GRADIENT
    bounds: tuple[float, float] = field(default=(0.0, 1.0))

    def query(self, x, access):
        self.forward += len(x)
        said = self.inner.query(x, access)
        if said.vjp is None:
            return said

        def counted(cotangent, *, keep=False):
            self.backward += len(x)
            return said.vjp(cotangent, keep=keep)

        return replace(said, vjp=counted)


def costs(attack, norm, budget):
    """Passes of each row of a puzzle."""
    case = puzzle(norm, targeted=attack.needs_target)
    outcome = run(case.model, attack, case.limit, case.x, case.y, targets=case.targets, budget=budget)
    return (outcome.forward + outcome.backward).tolist()


@pytest.mark.parametrize("name", [*GRADIENT, *QUERIES])
def test_no_row_costs_more_than_the_budget(name):
    attack = fitted(catalog.attack(name), catalog.attacks()[name].norms[0], 40)
    dear = {"deepfool", "superdeepfool", "fab", "sifgsm", "vmifgsm", "jsma", "acg"}  # several gradients a step
    room = 12 if name in dear else 0
    assert max(costs(attack, attack.norms[0], 40)) <= 40 + room


@pytest.mark.parametrize("name", ["ddn", "fmn", "apgd", "pgd", "cw", "pdgd"])
def test_a_budget_is_used_up(name):
    """Steps are chosen so that what a row may spend is spent, and not three quarters of it."""
    attack = fitted(catalog.attack(name), catalog.attacks()[name].norms[0], 200)
    spent = max(costs(attack, attack.norms[0], None))
    assert 200 - 36 <= spent <= 202


def test_the_budget_is_counted_by_the_model():
    case = puzzle("l2")
    counter = Counter(case.model)
    before = counter.forward
    outcome = run(counter, catalog.attack("ddn"), case.limit, case.x[:1], case.y[:1], width=1, budget=21)
    checks = 8 + 8 + 4 - 3 * 3  # asked of one row and its mirror image, twice, and alone
    assert int(outcome.backward) == counter.backward == 10
    assert int(outcome.forward) == 11
    assert counter.forward - before - int(outcome.forward) <= checks + 2


def test_what_a_pass_is():
    assert passes(catalog.attack("pgd:steps=40"), "linf") == 81
    assert passes(catalog.attack("fgsm")) == 3
    assert passes(catalog.attack("square:steps=700")) == 700
    assert fitted(catalog.attack("square"), "linf", 333).steps == 333
    assert fitted(catalog.attack("fgsm"), "linf", 100) == catalog.attack("fgsm")


def test_steps_that_somebody_chose_stay():
    assert chosen("pgd:steps=7", Linf(0.1), 100)[1].steps == 7
    assert chosen("pgd:step_size=0.02", Linf(0.1), 101)[1] == catalog.attack("pgd:steps=50,step_size=0.02")
    given = catalog.attack("ddn")
    assert chosen(given, L2(1.0), 10) == ("ddn", given)
    with pytest.raises(UsageError, match="at least 2 passes"):
        sparring.compare(puzzle("l2").model, *puzzle_rows(), ["ddn"], L2(1.0), budget=1)


def puzzle_rows():
    case = puzzle("l2")
    return case.x, case.y


def test_with_a_budget_wide_enough_nothing_changes():
    case = puzzle("linf")
    free = run(case.model, catalog.attack("pgd:steps=5"), case.limit, case.x, case.y)
    held = run(case.model, catalog.attack("pgd:steps=5"), case.limit, case.x, case.y, budget=11)
    assert torch.equal(free.best, held.best)
    assert torch.equal(free.forward + free.backward, held.forward + held.backward)
    short = run(case.model, catalog.attack("pgd:steps=5"), case.limit, case.x, case.y, budget=10)
    assert int((short.forward + short.backward).max()) == 9
