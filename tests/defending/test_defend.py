"""The whole analysis on a few digits, cut short: relations that hold by construction, and a run that is killed."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import sparring
from sparring.auditing.run import Run
from sparring.core.errors import UsageError
from sparring.core.model import Access
from sparring.core.showing import percent
from sparring.core.threat import L0, Linf
from sparring.core.verdict import Verdict
from sparring.defending.row import KEYS
from sparring.guards.bit_depth import BitDepth
from sparring.guards.detector import Detector
from sparring.guards.guard import Transform
from sparring.models.checkpoint import open_checkpoint

LIMIT = Linf(0.15)
HOW = {"profile": "quick", "net": "dense", "steps": 120, "limit": 30, "draws": 2}


@dataclass(frozen=True)
class Same(Transform):
    """Changes nothing."""

    name: ClassVar[str] = "same"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def transform(self, x):
        return x


@dataclass(frozen=True)
class Liar(BitDepth):
    """Claims a gradient that it does not have."""

    name: ClassVar[str] = "liar"
    differentiable: ClassVar[bool] = True


@dataclass(frozen=True)
class Sees(Detector):
    """Flags what is no image of sixteenths: nearly all that an attack does, and no image as it was stored."""

    threshold: float | None = 0.5

    name: ClassVar[str] = "sees"
    differentiable: ClassVar[bool] = True
    randomised: ClassVar[bool] = False

    def score(self, x, logits, again):
        return ((x * 16).round() != x * 16).flatten(1).any(1).to(x.dtype)


@dataclass(frozen=True)
class Wary(Sees):
    """Flags every image with a light pixel in one place, whoever put it there."""

    name: ClassVar[str] = "wary"

    def score(self, x, logits, again):
        return (x[:, 0, 0, 2] > 0).to(x.dtype)


@dataclass(frozen=True)
class Blind(Sees):
    """Flags nothing."""

    name: ClassVar[str] = "blind"

    def score(self, x, logits, again):
        return torch.zeros_like(x[:, 0, 0, 0])


OWN = (Same(), Liar(), Sees(), Wary(), Blind())


@pytest.fixture(scope="module")
def part(digits_set):
    """Rows whose ids are not their places."""
    return replace(digits_set, test=digits_set.test.select(torch.arange(30, 60)))


@pytest.fixture(scope="module")
def found(part, tmp_path_factory):
    out = tmp_path_factory.mktemp("defend") / "run"
    return sparring.defend(part, LIMIT, defenses=["madry", *OWN], out=out, **HOW)


def figures(row):
    return {key: row[key] for key in ("clean", "naive", "adaptive", "lower", "upper")}


def test_rows_have_these_keys_and_this_order(found):
    names = {"undefended", "bit_depth", "madry", "same", "liar", "sees", "wary", "blind"}
    assert {row["defense"] for row in found.rows} == names
    assert all(tuple(row) == KEYS for row in found.rows)
    head = "defense clean naive adaptive lower upper certified training_cost inference_cost finding signs details"
    assert list(KEYS) == head.split()
    ranks = [row["adaptive"] for row in found.rows]
    assert ranks == sorted(ranks, reverse=True)
    for row in found.rows:
        assert 0 <= row["lower"] <= row["adaptive"] == row["upper"] <= row["naive"] <= row["clean"] <= 1
        assert row["certified"] in (None, row["lower"])
        assert all(sign.partition(": ")[1] for sign in row["signs"])
    stored = json.loads((found.run / "result.json").read_text())["defenses"]["defenses"]
    assert stored == found.rows


def test_what_changes_nothing_is_the_undefended_net(found):
    same, bare, blind = found.row("same"), found.row("undefended"), found.row("blind")
    assert figures(same) == figures(bare) == figures(blind)
    assert same["naive"] < same["clean"]
    assert same["finding"] == "breaks"
    assert bare["finding"] == "reference"
    assert (same["training_cost"], bare["training_cost"], bare["inference_cost"]) == (1.0, 1.0, 1.0)
    assert found.row("madry")["training_cost"] > 1.0


def net_of(found, recipe="standard"):
    return open_checkpoint(found.run / "nets" / f"{recipe}.safetensors").net


def test_naive_is_made_on_the_bare_net_and_judged_on_the_deployed_one(found, part):
    rows, net = part.test, net_of(found)
    for guard in (Liar(), Sees(), Wary()):
        carried = sparring.transfer(
            guard.naive(net), guard.judged(net), rows.x, rows.y, ["fgsm", "pgd"], LIMIT, sample=rows.ids
        )
        assert found.row(guard.name)["naive"] == pytest.approx(carried.robust_accuracy, abs=1e-6)
        crafted, at = Run.open(found.run).tensors("crafted--standard"), ~carried.outcomes[0].clean
        for name, outcome in zip(("fgsm", "pgd"), carried.outcomes, strict=True):  # each ran to its last step
            assert torch.allclose(crafted[name][at], outcome.best[at], atol=1e-6)


def test_detection_counts(found, part):
    rows, net = part.test, net_of(found)
    bare, sees, wary = (found.row(name) for name in ("undefended", "sees", "wary"))
    assert sees["clean"] == bare["clean"]
    assert sees["naive"] == sees["clean"]  # wrong and flagged: no harm
    assert sees["adaptive"] > sees["clean"] - 0.1 > bare["adaptive"] + 0.3  # who digs finds a way between sixteenths
    assert sees["finding"] == "holds"
    flagged = rows.x[:, 0, 0, 2] > 0
    right = (net(rows.x).argmax(1) == rows.y) & ~flagged
    assert 0 < flagged.sum() < 30
    assert wary["clean"] == pytest.approx(right.double().mean().item(), abs=1e-6)  # untouched and flagged: lost


def test_a_wrong_claim_is_a_sign_and_no_crash(found):
    liar, honest = found.row("liar"), found.row("bit_depth")
    assert any(sign.startswith("false_claim: liar claims differentiable = True") for sign in liar["signs"])
    assert any(sign.startswith("zero_gradient") for sign in liar["signs"])
    assert any(sign.startswith("black_box_beats_white_box") for sign in liar["signs"])
    assert not any(sign.startswith("false_claim") for row in found.rows for sign in row["signs"] if row != liar)
    assert liar["naive"] == honest["naive"]
    assert honest["details"]["without_gradient"] == liar["details"]["without_gradient"] == 1.0
    assert any(sign.startswith("no_gradient") for sign in honest["signs"])
    assert not any(sign.startswith("zero_gradient") for sign in honest["signs"])  # the attack goes straight through


def test_every_stage_is_told(found):
    for row in found.rows:
        stages = [one["stage"] for one in row["details"]["tried"]]
        assert {"naive: fgsm", "naive: pgd"} <= set(stages)
        assert "adaptive: sprint" in stages
        assert ("transfer: mifgsm on madry" in stages) == (row["defense"] != "madry")
        assert ("transfer: mifgsm on standard" in stages) == (row["defense"] != "undefended")
        assert stages[-2:] == ["labels only: rays", "borrowed: images of others"]
        assert row["details"]["curve"]["eps"][0] == 0.0


def test_the_same_images_under_every_defense(found, digits_set):
    tensors = Run.open(found.run).tensors("defenses")
    shown = [[one["id"] for one in row["details"]["images"]] for row in found.rows]
    assert all(ids == shown[0] for ids in shown)
    assert len(shown[0]) == 10
    x, y = digits_set.test.x[shown[0]], digits_set.test.y[shown[0]]
    assert torch.equal(tensors["x"], x)
    net = net_of(found)
    assert torch.equal(net(x).argmax(1), y)
    for row in found.rows:
        changed = tensors[f"changed--{row['details']['slug']}"]
        far = LIMIT.distance(changed, x)
        assert LIMIT.contains(changed, x).all()
        assert torch.allclose(
            far, torch.tensor([o["distance"] for o in row["details"]["images"]]).double(), atol=1e-6
        )
        if row["defense"] == "wary":
            flagged = (x[:, 0, 0, 2] > 0).tolist()
            assert [one["outcome"] == "misclassified" for one in row["details"]["images"]] == flagged
            assert [one["prediction"] is None for one in row["details"]["images"]] == flagged
            assert 0 < sum(flagged) < 10
        if row["defense"] not in ("undefended", "same", "bit_depth", "liar"):
            continue
        guard = BitDepth() if row["defense"] in ("bit_depth", "liar") else Same()
        labels = guard.judged(net).query(changed, Access.DECISION).labels
        assert labels.tolist() == [one["adversarial_prediction"] for one in row["details"]["images"]]
        fooled = labels != y
        told = torch.tensor([one["outcome"] in ("broken", "misclassified") for one in row["details"]["images"]])
        assert torch.equal(fooled, told)


def test_what_broke_an_image_is_the_stage_that_its_audit_has_for_it(found):
    for row in found.rows:
        folder = found.run / row["details"]["audit"]["run"]
        decided = {int(one["id"]): one for one in csv.DictReader((folder / "rows.csv").read_text().splitlines())}
        broke = {one["stage"] for one in row["details"]["tried"] if one["broke"]}
        for one in row["details"]["images"]:
            audited = decided[one["id"]]
            if one["outcome"] != "broken":
                assert one["by"] is None
            elif audited["verdict"] == "broken":
                assert one["by"] == f"adaptive: {audited['decided_by']}"
            assert one["by"] is None or one["by"] in broke or one["by"].startswith("borrowed: ")


def test_the_adaptive_attack_is_the_audit(found, part):
    rows, net = part.test, net_of(found, "madry")
    audit = sparring.audit(net, rows, LIMIT, profile="quick")
    row = found.row("madry")
    assert row["details"]["audit"]["robust_accuracy"]["upper"] == audit.robust_accuracy[1] >= row["adaptive"]
    assert list(audit.verdicts().values()).count(Verdict.BROKEN) == row["details"]["audit"]["counts"]["broken"]


def test_shown_in_a_notebook_naive_stands_beside_adaptive(found):
    text = found._repr_html_()
    for row in found.rows:
        assert f"{percent(row['naive'], 1)} → {percent(row['adaptive'], 1)}" in text
    assert text.count(" → ") == len(found.rows) + 1
    with pytest.raises(UsageError, match="did you mean 'madry'"):
        found.row("madri")


def test_another_plan_is_refused(found, part):
    with pytest.raises(UsageError, match="was made with another settings"):
        sparring.defend(part, LIMIT, defenses=["madry"], out=found.run, **HOW)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"net": "cnv"}, "did you mean 'conv'"),
        ({"profile": "quik"}, "did you mean 'quick'"),
        ({"steps": 0}, "steps and draws of at least 1"),
        ({"draws": 0}, "steps and draws of at least 1"),
        ({"threat": L0(3)}, "linf, l2 and l1, not in l0"),
        ({"threat": Linf(0.0)}, "expected an eps above 0"),
        ({"threat": Linf(0.1, (0.0, 255.0))}, "pixels in"),
    ],
)
def test_what_cannot_be_meant(how, why, digits_set):
    with pytest.raises(UsageError, match=why):
        sparring.defend(digits_set, **{"threat": LIMIT} | how)


def test_a_net_that_gets_nothing_right(digits_set):
    test = digits_set.test.take(12)
    flipped = replace(digits_set, test=replace(test, y=(test.y + 1) % 10))
    result = sparring.defend(flipped, LIMIT, defenses=["jpeg"], **HOW | {"steps": 300})
    for row in result.rows:
        assert row["adaptive"] <= row["naive"] <= row["clean"] < 0.3
