"""Proofs in the audit and alone: exact where the truth is known, contradicted aloud, resumed and made again."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring.auditing import audit as auditing
from sparring.auditing import proving
from sparring.auditing.audit import Audit, audit
from sparring.auditing.certifying import certify
from sparring.auditing.evidence import Evidence
from sparring.auditing.masking import Cost
from sparring.auditing.proofs import curve
from sparring.auditing.provers import METHODS, Proof, Provable, provable
from sparring.auditing.proving import Effort
from sparring.auditing.rechecking import recheck
from sparring.auditing.run import Run
from sparring.auditing.summary import COLUMNS
from sparring.certificates.bounds import bounds
from sparring.certificates.graph import OutOfTime
from sparring.core.errors import DataError, ModelError, SparringError, UsageError
from sparring.core.model import Access
from sparring.core.threat import L2, Linf, Threat, threat
from sparring.core.verdict import Verdict
from sparring.data.images import Images
from sparring.guards.binarise import Binarise
from sparring.guards.bit_depth import BitDepth
from sparring.models.torch import TorchModel
from sparring.reporting.panels import certified
from sparring.reporting.wording import percent

Rows = tuple[Tensor, Tensor]
LIMIT = Linf(0.05)
SMALL = (Effort("crown", pilot=4, chunk=3), Effort("alpha-crown", 8, 0.0, 3, pilot=4))
N = 20


@pytest.fixture(autouse=True)
def no_checklist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checklist has tests of its own."""
    monkeypatch.setattr("sparring.auditing.masking.check", lambda *args, **options: ([], Cost(0, 0)))


@pytest.fixture(scope="module")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    """20 test digits, two of which the net reads wrong."""
    x, y = digits[0][1500:], digits[1][1500:]
    right = net(x).argmax(1) == y
    at = torch.cat([right.nonzero()[: N - 2], (~right).nonzero()[:2]]).squeeze(1).sort().values
    return x[at], y[at]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows, and a last method of few nodes."""
    efforts = {"quick": SMALL, "standard": SMALL}
    monkeypatch.setattr(auditing, "EFFORTS", efforts)
    monkeypatch.setattr(auditing, "SCREENED", ())
    monkeypatch.setattr(auditing, "LAST", {"quick": (Effort("branch", 8, 0.0, 2, pilot=2, nodes=16),)})


def quick(model: Any, data: Any, out: Path, within: Threat = LIMIT, **options: Any) -> Audit:
    return audit(model, data, within, out=out, **({"profile": "quick", "width": 16} | options))


def lines(run: Path) -> dict[int, dict[str, str]]:
    with (run / "rows.csv").open() as file:
        return {int(line["id"]): line for line in csv.DictReader(file)}


def known(result: Audit) -> dict[int, tuple[str, bytes]]:
    images = result.witnesses()
    return {
        row: (str(verdict), images[row].numpy().tobytes() if row in images else b"")
        for row, verdict in result.verdicts().items()
    }


def plane(norm: str, rows: int = 12, classes: int = 3) -> tuple[TorchModel, Rows, Tensor]:
    """A linear model, images far from the bounds, and the distance of each to the nearest other class, exactly."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(16, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, 16, generator=generator))
        layer.bias.copy_(-layer.weight.sum(1) / 2)
    x = 0.4 + 0.2 * torch.rand(rows, 1, 4, 4, generator=generator)
    weight = layer.weight.detach().double()
    logits = x.double().flatten(1) @ weight.T + layer.bias.detach().double()
    y = logits.argmax(1)
    normal = weight[y].unsqueeze(1) - weight  # (n, classes, 16)
    size = normal.abs().sum(2) if norm == "linf" else normal.square().sum(2).sqrt()
    far = (logits.gather(1, y[:, None]) - logits) / size
    far = far.scatter(1, y[:, None], torch.inf).amin(1)
    return TorchModel(nn.Sequential(nn.Flatten(), layer).eval()), (x, y), far


# What is proved, and what it says


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("side", [0.999, 1.001])
def test_a_linear_model_is_decided_on_either_side_of_the_closed_form(norm, side, tmp_path):
    model, (x, y), far = plane(norm)
    eps = float(far.median()) * side
    result = quick(model, (x, y), tmp_path, threat(norm, eps))
    wanted = torch.where(far > eps, 1, 0).tolist()
    assert [int(verdict is Verdict.CERTIFIED) for verdict in result.verdicts().values()] == wanted
    assert result.counts["undecided"] == 0
    assert result.robust_accuracy == (sum(wanted) / len(wanted),) * 2
    assert {line["proof"] for line in lines(tmp_path).values()} == {"linear", ""}
    held = [row for row in range(len(y)) if wanted[row]]
    told = torch.tensor([float(lines(tmp_path)[row]["bound"]) for row in held])
    logits = model.query(x, Access.SCORE).logits.double()
    margins = (logits.gather(1, y[:, None]) - logits).scatter(1, y[:, None], torch.inf)
    assert (told < margins.amin(1)[held]).all()


def test_what_is_proved_is_not_attacked_and_what_attacks_break_is_not_proved(net, rows, tmp_path, small):
    alone = quick(net, rows, tmp_path / "alone", certify=False)
    result = quick(net, rows, tmp_path / "with")
    counts, told, figures = result.counts, lines(tmp_path / "with"), result.figures
    assert counts["certified"] > 4
    assert counts["broken"] >= alone.counts["broken"]
    assert counts["misclassified"] == alone.counts["misclassified"] == 2
    assert result.robust_accuracy[0] == counts["certified"] / N
    assert result.robust_accuracy[1] == (counts["certified"] + counts["undecided"]) / N
    before = alone.verdicts()
    methods = {part["method"]: part for part in figures["proofs"]["methods"]}
    for row, verdict in result.verdicts().items():
        line = told[row]
        if verdict is Verdict.CERTIFIED:
            assert before[row] is Verdict.UNDECIDED
            assert line["decided_by"] == f"proof: {line['proof']}"
            assert float(line["bound"]) > 0
            shard = json.loads((tmp_path / "with" / line["proved_in"]).read_text())
            place = shard["ids"].index(row)
            assert shard["state"][place] == "certified"
            assert shard["bound"][place] == float(line["bound"])
            if line["proof"] in ("crown", "alpha-crown"):
                assert line["forward"] == "1"
        else:
            assert line["proof"] == ""
    assert sum(part["certified"] for part in methods.values()) == counts["certified"]
    assert methods["crown"]["rows"] == N - 2
    bought = figures["proofs"]["bought"]
    assert bought["seconds"] == sorted(bought["seconds"])
    assert bought["certified"] == sorted(bought["certified"])
    assert bought["not_broken"] == sorted(bought["not_broken"], reverse=True)
    assert (bought["certified"][0], bought["not_broken"][0]) == (0.0, 1 - 2 / N)  # the clean images come first
    assert (bought["certified"][-1], bought["not_broken"][-1]) == result.robust_accuracy
    page = str(certified.render(Run.open(tmp_path / "with")))
    told = re.findall(r"([\d.]+ %) to ([\d.]+ %) after", page)
    ends = {(percent(a), percent(b)) for a, b in zip(bought["certified"], bought["not_broken"], strict=True)}
    assert any(low != high for low, high in told)
    assert set(told) <= ends
    assert told[-1] == tuple(percent(share) for share in result.robust_accuracy)
    assert figures["proofs"]["spot_checked"] == counts["certified"]
    spot = figures["also_spent"]["spot check"]
    assert 0 < spot["forward"] <= (8 + 1) * figures["proofs"]["spot_checked"] * 2
    for stage in figures["stages"]:
        assert ("certified" in stage) == stage["name"].startswith("proof: ")


def test_where_nothing_is_proved_the_attacks_are_what_they_are_alone(net, rows, tmp_path, small, monkeypatch):
    def nothing(self, method, x, y, *rest):
        none = torch.zeros(len(y), dtype=torch.bool)
        low = -torch.arange(len(y)).double() - 1
        return Proof(none, low, torch.zeros_like(low), none, x)

    monkeypatch.setattr(Provable, "prove", nothing)
    alone = quick(net, rows, tmp_path / "alone", certify=False)
    result = quick(net, rows, tmp_path / "with")
    assert known(result) == known(alone)
    assert result.figures["proofs"]["methods"][0] == {
        "method": "crown", "rows": 4, "certified": 0, "seconds": result.figures["proofs"]["methods"][0]["seconds"]
    }  # fmt: skip
    assert result.figures["forward_passes"] == alone.figures["forward_passes"]


def test_without_proofs_a_run_says_nothing_of_them(net, rows, tmp_path):
    result = quick(net, rows, tmp_path, certify=False)
    assert "proofs" not in result.figures
    assert "certify" not in Run(tmp_path).plan["settings"]
    assert tuple(lines(tmp_path)[0]) == COLUMNS
    for path in (tmp_path / "evidence" / "rows").glob("*.json"):
        assert not {"bound", "guard", "radius"} & json.loads(path.read_text()).keys()
    assert not (tmp_path / "evidence" / "proofs.json").exists()
    assert not any("certified" in stage for stage in result.figures["stages"])


@pytest.mark.parametrize("guard", [Binarise(), BitDepth(2)], ids=lambda guard: guard.name)
def test_a_guard_that_rounds_the_image_is_proved_and_its_proofs_are_true(guard, net, rows, tmp_path, small):
    """What a pixel can become is asked of the guard itself, and all combinations of a row are put to the net."""
    within = Linf(0.03)
    result = quick(guard.adaptive(net), rows, tmp_path, within)
    assert result.figures["proofs"]["why_not"] is None
    assert result.complete
    verdicts, enumerated = result.verdicts(), 0
    for row, (x, y) in enumerate(zip(*rows, strict=True)):
        ends = [guard.transform((x + step).clamp(0, 1)) for step in (-0.03, -0.015, 0.0, 0.015, 0.03)]
        pixels = [sorted(set(values)) for values in torch.stack(ends).flatten(1).T.tolist()]
        if math.prod(len(values) for values in pixels) <= 2**12:
            every = torch.tensor(list(itertools.product(*pixels))).view(-1, *x.shape)
            truth = bool((net(every).argmax(1) == y).all())
            assert truth or verdicts[row] is not Verdict.CERTIFIED
            assert not truth or verdicts[row] in (Verdict.CERTIFIED, Verdict.UNDECIDED)
            enumerated += verdicts[row] is Verdict.CERTIFIED
    assert enumerated > 0


@pytest.mark.parametrize(
    ("change", "within", "told"),
    [
        (lambda net: net, threat("l1", 0.5), "bounds are known for linf and l2, not for l1"),
        (lambda net: nn.Sequential(net, nn.Softmax(1)), LIMIT, "softmax"),
    ],
)
def test_a_model_that_nothing_can_be_proved_of_is_audited_all_the_same(change, within, told, net, rows, tmp_path):
    result = quick(change(net), rows, tmp_path, within)
    assert told in result.figures["proofs"]["why_not"]
    assert "\n" not in result.figures["proofs"]["why_not"]
    assert result.complete
    assert result.counts["certified"] == 0
    again = quick(change(net), rows, tmp_path, within)
    assert again.figures["proofs"] == result.figures["proofs"]


def test_with_eps_zero_nothing_is_left_to_prove(net, rows, tmp_path):
    result = quick(net, rows, tmp_path, Linf(0.0))
    assert result.counts["certified"] == N - 2
    assert [stage["name"] for stage in result.figures["stages"]] == ["clean images"]


def test_a_short_profile_spends_nothing_where_a_first_attack_breaks_half_of_a_sample(
    net, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(proving, "provable", lambda *_: pytest.fail("the model was traced"))
    result = quick(net, rows, tmp_path, Linf(0.3))
    assert result.figures["stages"][1]["name"] == "sprint on a sample"
    assert result.figures["proofs"]["methods"] == []
    assert result.counts["broken"] > N / 2


def test_rounds_end_when_they_no_longer_pay(net, rows, tmp_path, monkeypatch):
    met: list[int] = []

    def three(self, method, x, y, *rest):
        met.append(len(y))
        certified = torch.arange(len(y)) < (3 if len(met) == 1 else 0)
        low = torch.where(certified, 1.0, -1.0).double()
        return Proof(certified, low, torch.zeros_like(low), torch.zeros_like(certified), x)

    monkeypatch.setattr(Provable, "prove", three)
    monkeypatch.setattr(proving, "contradict", lambda *_: None)
    for name, value in (("SCREENED", ()), ("EFFORTS", {"quick": (Effort("crown", pilot=3, paying=0.5),)})):
        monkeypatch.setattr(auditing, name, value)
    quick(net, rows, tmp_path)
    assert met == [3, 12]


# Proofs and attacks against each other


def claims_all(self: Provable, method: str, x: Tensor, y: Tensor, *rest: Any) -> Proof:
    """A bound engine that is broken: it proves everything."""
    all_ = torch.ones(len(y), dtype=torch.bool)
    return Proof(all_, torch.ones(len(y)).double(), torch.zeros(len(y)).double(), ~all_, x)


def test_a_bound_that_claims_too_much_fails_the_run(net, rows, tmp_path, small, monkeypatch):
    monkeypatch.setattr(Provable, "prove", claims_all)
    for _ in range(2):  # and again, however often it is run
        with pytest.raises(SparringError, match=r"row \d+ was proved robust \(proof: crown") as caught:
            quick(net, rows, tmp_path, Linf(0.15))
        assert caught.value.exit_code == 4
        assert "evidence/contradiction.safetensors" in str(caught.value)
        told = Run(tmp_path).figures("contradiction")
        assert (tmp_path / told["shard"]).is_file()
        assert told["shard"] in str(caught.value)
        held = Run(tmp_path).tensors("contradiction")
        assert int(net(held["adversarial"][None]).argmax()) != int(rows[1][told["id"]])
        assert Linf(0.15).contains(held["adversarial"][None], rows[0][told["id"]][None]).all()
    assert not (tmp_path / "result.json").exists()


def test_a_small_distance_inside_a_proved_ball_fails_the_run(net, rows, tmp_path, small, monkeypatch):
    monkeypatch.setattr(Provable, "prove", claims_all)
    monkeypatch.setattr(auditing, "spot_check", lambda *_: True)
    with pytest.raises(SparringError, match="was proved robust"):
        quick(net, rows, tmp_path, Linf(0.15), distances=True)


def test_an_image_that_a_proof_search_finds_is_judged_before_it_counts(net, rows, tmp_path, small, monkeypatch):
    x = rows[0]
    broken = quick(net, rows, tmp_path / "alone", certify=False)
    row, image = next(iter(broken.witnesses().items()))

    def finds(self, method, some, labels, *rest):
        says = torch.ones(len(labels), dtype=torch.bool)
        worst = some.clone()
        worst[(some == x[row]).flatten(1).all(1)] = image
        low = -torch.ones(len(labels)).double()
        return Proof(~says, low, torch.zeros_like(low), says, worst)

    monkeypatch.setattr(Provable, "prove", finds)
    monkeypatch.setattr(auditing, "EFFORTS", {"quick": (Effort("branch", paying=0.0),)})
    result = quick(net, rows, tmp_path / "with")
    assert lines(tmp_path / "with")[row]["decided_by"] == "proof: branch"
    assert torch.equal(result.witnesses()[row], image)
    assert sum(line["decided_by"] == "proof: branch" for line in lines(tmp_path / "with").values()) == 1
    assert result.verdicts() == broken.verdicts()


# Going on


def test_a_run_that_is_cut_short_anywhere_ends_the_same(net, rows, tmp_path, small, monkeypatch):
    whole = quick(net, rows, tmp_path / "whole")
    assert whole.counts["certified"] > 4
    wanted = (tmp_path / "whole" / "rows.csv").read_text()
    commit, done = Evidence.commit, [0]

    def dies_at(last: int) -> Callable[..., None]:
        def one(self, name, shard):
            done[0] += 1
            if done[0] == last:
                raise KeyboardInterrupt
            commit(self, name, shard)

        return one

    cuts = 0
    while True:
        done[0] = 0
        monkeypatch.setattr(Evidence, "commit", dies_at(cuts % 3 + 2))  # each time a few shards further
        try:
            last = quick(net, rows, tmp_path / "cut")
            break
        except KeyboardInterrupt:
            cuts += 1
    assert cuts >= 5
    assert (tmp_path / "cut" / "rows.csv").read_text() == wanted
    assert known(last) == known(whole)
    for part in last.figures["proofs"]["methods"] + whole.figures["proofs"]["methods"]:
        part.pop("seconds")
    for told in (last, whole):
        bought = told.figures["proofs"].pop("bought")
        assert (bought["certified"][-1], bought["not_broken"][-1]) == told.robust_accuracy
    assert last.figures["proofs"] == whole.figures["proofs"]


def test_neither_the_order_nor_the_width_changes_what_is_proved(net, rows, tmp_path, small):
    ids = 50 + 3 * torch.arange(N)
    classes = tuple("0123456789")
    wanted = quick(net, Images("digits", *rows, ids, classes), tmp_path / "a")
    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    data = Images("digits", rows[0][order], rows[1][order], ids[order], classes)
    other = quick(net, data, tmp_path / "b", width=5)
    assert other.verdicts() == wanted.verdicts()
    told = [{row: line["bound"] for row, line in lines(tmp_path / part).items()} for part in "ab"]
    assert told[0] == told[1]


def test_time_that_ends_among_the_proofs_leaves_the_rest_for_the_next_time(net, rows, tmp_path, small, monkeypatch):
    late = [False]
    prove = Provable.prove

    def slow(self, *args):
        late[0] = True
        return prove(self, *args)

    monkeypatch.setattr(Provable, "prove", slow)
    setting = auditing.Setting
    monkeypatch.setattr(auditing, "Setting", lambda *parts: replace(setting(*parts), stop=lambda: late[0]))
    first = quick(net, rows, tmp_path)
    assert not first.complete
    assert first.counts["undecided"] + first.counts["certified"] == N - 2
    assert first.figures["proofs"]["spot_checked"] == 0
    late[0] = False
    monkeypatch.setattr(Provable, "prove", prove)
    assert quick(net, rows, tmp_path).complete
    quick(net, rows, tmp_path / "whole")
    assert (tmp_path / "rows.csv").read_text() == (tmp_path / "whole" / "rows.csv").read_text()


# Made again


@pytest.fixture(scope="module")
def proved(net, rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("proved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparring.auditing.masking.check", lambda *args, **options: ([], Cost(0, 0)))
        patch.setattr(auditing, "EFFORTS", {"quick": SMALL})
        patch.setattr(auditing, "SCREENED", ())
        quick(net, rows, folder, distances=True)
    return folder


def forged(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Run:
    """A copy of a run with its shards of CROWN changed."""
    shutil.copytree(source, target)
    for path in sorted((target / "evidence" / "rows").glob("*.json")):
        shard = json.loads(path.read_text())
        if shard["name"].startswith("proof: "):
            change(shard)
            path.write_text(json.dumps(shard))
    return Run(target)


def images(rows: Rows) -> Images:
    return Images("images", *rows, torch.arange(N), tuple("0123456789"))


def test_every_proof_of_a_run_is_made_again(net, rows, proved):
    again = recheck(Run(proved), TorchModel(net), images(rows))
    assert again.proofs > 4
    assert again.proofs == sum(line["proof"] != "" for line in lines(proved).values())
    assert again.failed == ()


@pytest.mark.parametrize("method", ["crown", "alpha-crown"])
def test_a_forged_verdict_is_found(method, net, rows, proved, tmp_path):
    changed: list[int] = []

    def forge(shard):
        for place, state in enumerate(shard["state"]):
            if state == "held" and not changed and shard["name"] == f"proof: {method}":
                shard["state"][place], shard["bound"][place] = "certified", 0.25
                changed.append(shard["ids"][place])

    again = recheck(forged(proved, tmp_path / "f", forge), TorchModel(net), images(rows))
    assert [claim.id for claim in again.failed] == changed != []
    assert again.figures["hold"] == again.proofs - 1


def test_a_forged_bound_is_found(net, rows, proved, tmp_path):
    changed: list[int] = []

    def forge(shard):
        for place, state in enumerate(shard["state"]):
            if state == "certified" and not changed:
                shard["bound"][place] *= 1.01
                changed.append(shard["ids"][place])

    again = recheck(forged(proved, tmp_path / "f", forge), TorchModel(net), images(rows))
    assert [claim.id for claim in again.failed] == changed


def test_a_proof_that_names_no_method_is_refused(net, rows, proved, tmp_path):
    run = forged(proved, tmp_path / "f", lambda shard: shard.update(name="sprint", bound=None, guard=None))
    with pytest.raises(DataError, match="names no proof: 'sprint'"):
        recheck(run, TorchModel(net), images(rows))


def test_another_model_or_other_images_are_refused(net, rows, proved):
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ModelError, match="another model"):
        recheck(Run(proved), TorchModel(other), images(rows))
    with pytest.raises(DataError, match="other images"):
        recheck(Run(proved), TorchModel(net), images((rows[0] / 2, rows[1])))


# Certified accuracy alone


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radii_come_within_a_step_of_the_closed_form_from_below(norm, tmp_path):
    model, data, far = plane(norm)
    eps = float(far.median())
    found = certify(model, data, threat(norm, eps), tmp_path, method="crown", radius=True)
    radii = torch.tensor(list(found.radii().values()), dtype=torch.float64)
    assert (radii <= far).all()
    assert (radii >= far - torch.maximum(far, torch.tensor(eps)) / 16).all()
    assert found.certified_accuracy == (far > eps * 1.0001).double().mean()
    told = found.figures["proofs"]["curve"]
    for at, share in zip(told["eps"], told["certified"], strict=True):
        assert share == (radii >= at).double().mean()
    fallen = torch.tensor([float(line["attacked_at"] or "inf") for line in lines(tmp_path).values()])
    assert (fallen >= far * (1 - 1e-6)).all()
    assert (fallen[far < 2 * eps] <= 4 * eps).all()
    assert found.complete
    again = recheck(Run(tmp_path), model, Images("i", *data, torch.arange(12), ("0", "1", "2")))
    assert again.proofs == int((radii > 0).sum()) + int((far > eps * 1.0001).sum())
    assert not again.failed


def test_a_wrong_row_is_never_certified_and_the_sentence_says_what_is_unknown(net, rows, tmp_path):
    found = certify(net, rows, LIMIT, tmp_path, method="crown")
    radii = found.radii()
    wrong = (net(rows[0]).argmax(1) != rows[1]).nonzero().squeeze(1).tolist()
    assert all(radii[row] == -1 for row in wrong)
    assert {radius for row, radius in radii.items() if row not in wrong} == {0.0, 0.05}
    left = found.figures["empirical"]["robust_accuracy"]
    assert found.certified_accuracy <= left <= 1 - len(wrong) / N
    assert "are unknown" in found.sentence
    assert certify(net, rows, LIMIT, tmp_path, method="crown").figures == found.figures


def test_an_attack_within_a_proved_radius_fails_the_run(net, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Provable, "prove", claims_all)
    with pytest.raises(SparringError, match="was proved robust"):
        certify(net, rows, Linf(0.15), tmp_path, method="crown")


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"method": "crwon"}, UsageError, "did you mean 'crown'"),
        ({"budget": 0}, UsageError, "above 0 seconds"),
        ({"threat": Linf(0.0)}, UsageError, "an eps above 0"),
        ({"threat": threat("l1", 1.0)}, UsageError, "linf or l2 for a proof, got l1"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, error, told, net, rows, tmp_path):
    options = {"threat": LIMIT, "out": tmp_path} | change
    with pytest.raises(error, match=told):
        certify(net, rows, **options)


def test_a_model_that_cannot_be_traced_is_refused(net, rows, tmp_path):
    with pytest.raises(ModelError, match="softmax"):
        certify(nn.Sequential(net, nn.Softmax(1)), rows, LIMIT, tmp_path)


def test_every_method_has_its_name(net, rows):
    found = provable(TorchModel(net), L2(0.1), (1, 8, 8), "cpu")
    assert isinstance(found, Provable)
    for method in set(METHODS) - {"linear"}:
        proof = found.prove(method, *rows, L2(0.1), 4)
        assert proof.certified.shape == proof.bound.shape == (N,)
        assert (proof.bound[proof.certified] > 0).all()
    front = bounds(TorchModel(net), *rows, L2(0.1), "crown")
    assert torch.allclose(found.prove("crown", *rows, L2(0.1)).bound, (front.lower - front.guard).amin(1))
    assert (front.guard > 1e-6).all()  # so that the bound shows whether it was taken off
    with pytest.raises(UsageError, match="did you mean 'ibp'"):
        found.prove("ipb", *rows, LIMIT)


@pytest.mark.parametrize(("method", "least"), [("crown", 1), ("alpha-crown", 20), ("branch", 2)])
def test_a_proof_ends_in_the_middle_when_its_time_is_over(method, least, net, rows):
    found = provable(TorchModel(net), LIMIT, (1, 8, 8), "cpu")
    assert isinstance(found, Provable)
    asked = [0]

    def late(at: int) -> bool:
        asked[0] += 1
        return asked[0] == at

    found.prove(method, *rows, Linf(0.15), 4, lambda: late(-1))
    assert asked[0] >= least
    for at in (1, (asked[0] + 1) // 2, asked[0]):
        asked[0] = 0
        with pytest.raises(OutOfTime):
            found.prove(method, *rows, Linf(0.15), 4, lambda at=at: late(at))
        assert asked[0] == at


def test_a_thinned_curve_stays_below():
    radii = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told = curve(radii, 6000)
    assert len(told["eps"]) <= 256
    for at in torch.linspace(0, 1, 101).tolist():
        place = next((place for place, eps in enumerate(told["eps"]) if eps >= at), None)
        share = 0.0 if place is None else told["certified"][place]
        truth = float((radii >= at).sum()) / 6000
        assert truth - 0.01 <= share <= truth
