"""What is concluded from what was measured, on five rows made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparring.core.verdict import Verdict
from sparring.defending.cost import inference
from sparring.defending.deployed import Deployed
from sparring.defending.measure import Measured
from sparring.defending.plan import Entry
from sparring.defending.row import row, signs, tried
from sparring.defending.smoothed import Claim
from sparring.defending.workshop import Subject
from sparring.guards.feature_squeezing import FeatureSqueezing
from sparring.guards.smoothing import Smoothing

BROKEN, HELD, PROVED, WRONG, ERROR = (
    Verdict.BROKEN, Verdict.UNDECIDED, Verdict.CERTIFIED, Verdict.MISCLASSIFIED, Verdict.ERROR,
)  # fmt: skip


def mask(*rows):
    """(6,) bool: these rows."""
    return torch.tensor([place in rows for place in range(6)])


def made(**changes):
    """Six rows: 0 is wrong untouched, 1 falls to the naive attack, 2 to the adaptive one, 3 to a carried point, 4 to
    labels alone, 5 is proved."""
    seen = Deployed(
        claims=(),
        silent=0.0,
        right=mask(1, 2, 3, 4, 5),
        said=torch.zeros(6, dtype=torch.int64),
        fell={"naive: pgd": mask(0, 1), "transfer: mifgsm on madry": mask(0, 1, 3)},
    )
    figures = {
        "warnings": ["zero_gradient: seen; do something"],
        "stages": [
            {"name": "clean images", "rows": 6, "broken": 0},
            {"name": "sprint", "rows": 5, "broken": 1},
        ],
        "proofs": {"methods": [{"method": "crown"}]},
        **dict.fromkeys(("robust_accuracy", "population", "counts", "moved", "complete"), 0),
    }
    audit = SimpleNamespace(warnings=figures["warnings"], figures=figures)
    subject = Subject(Entry("mine"), "standard", nn.Identity(), None, ())
    values = {
        "subject": subject,
        "deployed": seen,
        "audit": audit,
        "verdicts": (WRONG, HELD, BROKEN, HELD, HELD, PROVED),
        "labels": {"attack": "rays", "rows": 2, "broke": 1, "why_not": None},
        "named": mask(4),
        "points": torch.zeros(6, 1, 2, 2),
        "curve": {},
    }
    return Measured(**values | changes)


def test_what_anything_broke_is_broken():
    found = made()
    assert torch.equal(found.naive, mask(2, 3, 4, 5))
    assert torch.equal(found.held, mask(5))
    assert torch.equal(found.certified, mask(5))
    assert found.missed() == {"naive": 1, "transfer": 2, "label-only": 1}


def test_a_row_that_the_adaptive_attack_broke_too_was_not_missed():
    found = made(verdicts=(WRONG, BROKEN, BROKEN, BROKEN, BROKEN, PROVED))
    assert found.missed() == {"naive": 0, "transfer": 0, "label-only": 0}
    assert not any("beats_adaptive" in sign for sign in signs(found))


def test_a_row_that_only_the_attackers_draws_misread_is_not_right():
    found = made(verdicts=(WRONG, HELD, BROKEN, HELD, WRONG, PROVED), named=mask())
    assert torch.equal(found.right, mask(1, 2, 3, 5))
    assert torch.equal(found.naive, mask(2, 3, 5))
    line = row(found, made(), 1.0, 1.0)
    illusion = line["details"]["intervals"]["illusion"][0]
    assert illusion == pytest.approx(2 / 6, abs=1e-6)  # rows 2 and 3: they fell to attacks
    assert [stage["rows"] for stage in line["details"]["tried"] if stage["stage"].startswith("naive")] == [4]


def test_a_row_without_an_answer_is_held_but_not_gained():
    failed = made(verdicts=(WRONG, HELD, ERROR, HELD, ERROR, PROVED))
    assert torch.equal(failed.held, mask(2, 5))
    assert torch.equal(failed.unanswered, mask(2))  # labels alone broke the other
    bare = made(verdicts=(WRONG, BROKEN, BROKEN, BROKEN, BROKEN, BROKEN))
    line = row(failed, bare, 1.0, 1.0)
    assert line["adaptive"] == pytest.approx(2 / 6, abs=1e-6)  # it is an upper end
    assert line["details"]["intervals"]["gain"][0] == pytest.approx(1 / 6, abs=1e-6)
    assert any(sign.startswith("no_answer: the adaptive attack got no answer for 1 row") for sign in line["signs"])
    assert not any(sign.startswith("no_answer") for sign in signs(made()))


def test_each_sentinel_that_found_more_is_a_sign():
    said = [sign.partition(": ")[0] for sign in signs(made())]
    assert said == [
        "zero_gradient",
        "naive_beats_adaptive",
        "transfer_beats_adaptive",
        "label_only_beats_adaptive",
    ]
    said = [sign.partition(": ")[2].partition(", counted as broken")[0] for sign in signs(made())[1:]]
    assert said == [
        "the naive attack broke 1 row that the adaptive one left",
        "the transfer attack broke 2 rows that the adaptive one left",
        "the label-only attack broke 1 row that the adaptive one left",
    ]


def test_the_other_signs():
    seen = made().deployed
    loud = replace(seen, claims=("false_claim: it lies",), silent=0.5)
    lies, silence = signs(made(deployed=loud))[:2]
    assert lies == "false_claim: it lies"
    assert silence.startswith("no_gradient: as deployed, 50.0 % of the rows have no gradient of the cross-entropy")
    contradicted = made(named=mask(4, 5))
    assert any(
        sign.startswith("proof_contradicted: the image of 1 row contradicts a proof") for sign in signs(contradicted)
    )
    assert not contradicted.certified.any()
    unasked = made(labels={"attack": "rays", "rows": 0, "broke": 0, "why_not": "it is random"})
    assert "labels_not_tried: it is random" in signs(unasked)


def test_a_line_of_the_table():
    base = made(verdicts=(HELD, BROKEN, BROKEN, BROKEN, BROKEN, BROKEN))
    line = row(made(), base, 2.5, 1.25)
    shares = {key: line[key] for key in ("clean", "naive", "adaptive", "lower", "upper", "certified")}
    sixth = pytest.approx(1 / 6, abs=1e-6)
    assert shares == {
        "clean": pytest.approx(5 / 6, abs=1e-6),
        "naive": pytest.approx(4 / 6, abs=1e-6),
        "adaptive": sixth,
        "lower": sixth,
        "upper": sixth,
        "certified": sixth,
    }
    assert (line["training_cost"], line["inference_cost"]) == (2.5, 1.25)
    assert line["details"]["intervals"]["gain"][0] == sixth
    unproved = made()
    unproved.audit.figures["proofs"] = {"why_not": "no bounds", "methods": []}
    assert row(unproved, base, 1.0, 1.0)["certified"] is None
    assert row(unproved, base, 1.0, 1.0)["lower"] == 0.0


def test_a_claim_of_smoothing_is_no_proof():
    figures = {"sigma": 0.25, "alpha": 0.001, "n": 1000, "radius": 0.5, "rows": 6, "certified_accuracy": 0.5}
    unproved = made(claim=Claim(figures, mask(2, 3, 5)))
    unproved.audit.figures["proofs"] = {"why_not": "it is random", "methods": []}
    line = row(unproved, made(), 1.0, 1.0)
    assert (line["certified"], line["lower"], line["details"]["smoothed"]["fell"]) == (None, 0.0, 2)
    assert line["details"]["intervals"] == row(made(), made(), 1.0, 1.0)["details"]["intervals"]
    assert row(made(), made(), 1.0, 1.0)["details"]["smoothed"] is None


def test_what_was_tried_in_turn():
    assert tried(made()) == [
        {"stage": "naive: pgd", "rows": 5, "broke": 1},
        {"stage": "adaptive: sprint", "rows": 5, "broke": 1},
        {"stage": "transfer: mifgsm on madry", "rows": 5, "broke": 2},
        {"stage": "labels only: rays", "rows": 2, "broke": 1},
    ]


def test_gain_counts_rows_on_which_the_two_differ():
    alike = row(made(), made(), 1.0, 1.0)["details"]["intervals"]
    assert [alike[name][0] for name in ("gain", "price")] == [0.0, 0.0]
    poorer = replace(made().deployed, right=mask(5))
    dear = row(made(deployed=poorer), made(), 1.0, 1.0)["details"]["intervals"]
    assert dear["price"][0] == pytest.approx(4 / 6, abs=1e-6)
    assert dear["illusion"][0] == 0.0


class Clock(nn.Module):
    """A net that takes a second for a row, by the clock that it moves."""

    def __init__(self):
        super().__init__()
        self.now, self.net = 0.0, nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x):
        self.now += len(x)
        return self.net(x)


def test_an_answer_costs_what_it_asks_of_the_net_and_a_random_guard_pays_for_all_its_draws(monkeypatch):
    net = Clock()
    monkeypatch.setattr("time.perf_counter", lambda: net.now)
    guards = {"plain": None, "noisy": Smoothing(0.1), "squeezed": FeatureSqueezing(threshold=1.0)}
    subjects = [Subject(Entry(name), "standard", net, guard, ()) for name, guard in guards.items()]
    state = torch.get_rng_state()
    times = inference(net, subjects, torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 7)
    assert times == {"plain": 1.0, "noisy": 7.0, "squeezed": 3.0}
    assert torch.equal(torch.get_rng_state(), state)
