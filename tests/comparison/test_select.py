"""Which attacks a group takes, and what is said of the others."""

from __future__ import annotations

import pytest
import torch

from sparring import catalog
from sparring.comparison.select import norm_of, select, widest
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.core.threat import L1, L2, Linf, Unbounded

NEAREST = {name for name, kind in catalog.attacks().items() if kind().minimizes}


def test_a_group_takes_all_that_fit():
    chosen = select(["all"], L2(1.0), Access.GRADIENT, bounded=True, targeted=False)
    assert set(chosen.attacks) == {name for name, kind in catalog.attacks().items() if "l2" in kind.norms}
    assert set(chosen.left_out) == set(catalog.attacks()) - set(chosen.attacks)
    assert chosen.left_out["rays"] == "works in linf"


def test_without_a_radius_only_those_that_look_for_the_nearest():
    chosen = select(["l1"], L1(784.0), Access.GRADIENT, bounded=False, targeted=False)
    assert set(chosen.attacks) == {n for n in NEAREST if "l1" in catalog.attacks()[n].norms}
    assert "--eps" in chosen.left_out["pgd"]


def test_what_a_model_does_not_give():
    chosen = select(["linf"], Linf(0.1), Access.SCORE, bounded=True, targeted=False)
    assert "square" in chosen.attacks
    assert "pgd" not in chosen.attacks
    assert chosen.left_out["pgd"] == "needs gradient access"
    labels = select(["label"], Linf(0.1), Access.DECISION, bounded=True, targeted=False)
    assert {catalog.attacks()[name].needs for name in labels.attacks} == {Access.DECISION}


def test_a_target_is_asked_for_where_it_is_needed():
    assert "fooling" in select(["all"], Unbounded(), Access.GRADIENT, bounded=True, targeted=True).attacks
    without = select(["all"], Unbounded(), Access.GRADIENT, bounded=True, targeted=False)
    assert without.left_out["fooling"] == "needs a target"


def test_names_stay_as_they_are_written():
    chosen = select(
        ["ddn,cw", "pgd:steps=3,step_size=0.1", "ddn"], L2(1.0), Access.GRADIENT, bounded=True, targeted=False
    )
    assert chosen.attacks == ("ddn", "cw", "pgd:steps=3,step_size=0.1")
    assert chosen.left_out == {}


@pytest.mark.parametrize(
    ("words", "said"), [(["l3"], "l2"), (["dnn"], "ddn"), (["pgd:step=3"], "steps"), ([" "], "sparring ls")]
)
def test_what_is_no_attack(words, said):
    with pytest.raises(UsageError, match=said):
        select(words, L2(1.0), Access.GRADIENT, bounded=True, targeted=False)


def test_one_norm_at_a_time():
    assert norm_of(["l2,ddn"]) == "l2"
    assert norm_of(["all"]) is None
    with pytest.raises(UsageError, match="one norm"):
        norm_of(["l2", "linf"])


@pytest.mark.parametrize(("norm", "eps"), [("linf", 2.0), ("l2", 4.0), ("l1", 8.0), ("l0", 4.0)])
def test_the_widest_reaches_every_corner(norm, eps):
    x = torch.full((1, 1, 2, 2), -1.0)
    limits = widest(norm, x, (-1.0, 1.0))
    assert limits.eps == pytest.approx(eps)
    assert bool(limits.contains(-x, x))
