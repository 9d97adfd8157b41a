"""The audit: what its figures add up to, that its images are what it says, and that nothing but the rows decides."""

from __future__ import annotations

import csv
import tempfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparring.attacks.sprint import Sprint
from sparring.auditing.audit import Audit, audit
from sparring.auditing.cascade import Cascade, Stage
from sparring.auditing.hunt import Front, Hunt, Setting
from sparring.auditing.masking import Cost
from sparring.auditing.search import Search
from sparring.auditing.victim import Victim
from sparring.core.errors import AttackError, DataError, UsageError
from sparring.core.model import Access, Model, Prediction, Sampled
from sparring.core.threat import L0, L1, L2, Linf, Threat, threat
from sparring.core.verdict import Verdict
from sparring.data.images import Dataset, Images
from sparring.models.torch import TorchModel
from sparring.testing import Probe, linear

Rows = tuple[Tensor, Tensor]
EPS = {"linf": 0.09, "l2": 0.45, "l1": 1.2}
LIMIT = Linf(EPS["linf"])
N = 24
Known = dict[int, tuple[str, bytes]]  # by id: the verdict, and the bytes of the image

unchecked = pytest.mark.usefixtures("no_checklist")


@pytest.fixture
def no_checklist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checklist has tests of its own, and takes half of the time of an audit as small as these."""
    monkeypatch.setattr("sparring.auditing.masking.check", lambda *args, **options: ([], Cost(0, 0)))


@pytest.fixture(scope="module")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    """24 test digits, two of which the net reads wrong."""
    x, y = digits[0][1500:], digits[1][1500:]
    right = net(x).argmax(1) == y
    at = torch.cat([right.nonzero()[: N - 2], (~right).nonzero()[:2]]).squeeze(1).sort().values
    return x[at], y[at]


@pytest.fixture(scope="module")
def exact(net: nn.Sequential) -> Probe:
    """The net in float64, so that a row's answer has the same bits in any company."""
    return Probe(deepcopy(net).double())


class Net(nn.Module):
    """A module from a function of images."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = answer


class Giving:
    """A model that gives no more than `access`, and counts the rows that it is asked about."""

    bounds = (0.0, 1.0)

    def __init__(self, model: Model, access: Access = Access.GRADIENT) -> None:
        self.model, self.access, self.asked = model, access, 0

    def query(self, x: Tensor, access: Access) -> Prediction:
        assert access <= self.access
        self.asked += len(x)
        return self.model.query(x, access)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `quick` makes its folders."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def quick(model: Any, data: Any, within: Threat = LIMIT, out: Path | None = None, **options: Any) -> Audit:
    out = out or Path(tempfile.mkdtemp())
    # What attacks find alone: proofs have tests of their own
    return audit(model, data, within, out=out, **({"profile": "quick", "width": 16, "certify": False} | options))


def images_of(rows: Rows, ids: Tensor) -> Images:
    return Images("digits", rows[0], rows[1], ids, tuple("0123456789"))


def lines(result: Audit) -> dict[int, dict[str, str]]:
    with (result.run / "rows.csv").open() as file:
        return {int(line["id"]): line for line in csv.DictReader(file)}


def stored(result: Audit) -> dict[int, dict[str, Tensor]]:
    """The images of every broken row by id, as `rows.csv` points to them."""
    found = {}
    for row, line in lines(result).items():
        if line["image"]:
            path, _, place = line["image"].partition("#exact[")
            held = load_file(result.run / path)
            at = int(place.rstrip("]"))
            assert int(held["ids"][at]) == row
            found[row] = {"exact": held["exact"][at], "eight_bit": held["eight_bit"][at]}
    return found


def known(result: Audit) -> Known:
    """The verdict and the stored image of every row."""
    images = result.witnesses()
    return {
        row: (str(verdict), images[row].numpy().tobytes() if row in images else b"")
        for row, verdict in result.verdicts().items()
    }


def far(norm: str, x: Tensor, x0: Tensor) -> float:
    """The float64 distance, written plainly."""
    change = (x.double() - x0.double()).abs().flatten()
    return float({"linf": change.max(), "l1": change.sum()}.get(norm, change.square().sum().sqrt()))


# What the figures say


@unchecked
@pytest.mark.parametrize("norm", sorted(EPS))
def test_the_figures_add_up(norm, net, rows, tmp_path):
    x, y = rows
    result = quick(net, rows, threat(norm, EPS[norm]), tmp_path)
    counts, figures = result.counts, result.figures
    assert counts == dict.fromkeys(map(str, Verdict), 0) | Counter(map(str, result.verdicts().values()))
    assert sum(counts.values()) == figures["rows"] == N
    assert counts["misclassified"] == int((net(x).argmax(1) != y).sum()) == 2
    assert counts["broken"] >= 3
    assert counts["undecided"] >= 3
    assert result.complete
    assert result.clean_accuracy == pytest.approx(1 - 2 / N)
    assert result.robust_accuracy == (0.0, counts["undecided"] / N)
    low, high = figures["population"]["lower"], figures["population"]["upper"]
    assert low <= result.robust_accuracy[0] <= result.robust_accuracy[1] < high
    assert sum(stage["broken"] for stage in figures["stages"]) == counts["broken"]
    assert figures["stages"][0]["rows"] == N
    assert figures["stages"][1]["rows"] == N - 2
    for key in ("forward", "backward"):
        spent = sum(int(line[key]) for line in lines(result).values())
        assert spent == figures[f"{key}_passes"] == sum(stage[key] for stage in figures["stages"]) > 0
    assert sum(part["rows"] for part in figures["classes"]) == N
    held = sum(part["upper"] * part["rows"] for part in figures["classes"])
    assert held == pytest.approx(counts["undecided"])
    confusion = torch.tensor(figures["confusion"])
    assert int(confusion.sum()) == counts["broken"]
    assert not confusion.diagonal().any()


@unchecked
@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("norm", sorted(EPS))
def test_every_stored_image_is_legal_and_wrong(norm, eight_bit, net, rows, tmp_path):
    """Judged here and in float64, from what is on disk."""
    x, y = ((rows[0] * 255).round() / 255, rows[1])
    limit = threat(norm, EPS[norm] * 1.2)
    result = quick(net, (x, y), limit, tmp_path, eight_bit=eight_bit)
    told, images = lines(result), stored(result)
    broken = [row for row, verdict in result.verdicts().items() if verdict is Verdict.BROKEN]
    assert sorted(images) == sorted(broken) == sorted(result.witnesses())
    assert len(broken) >= 3
    for row, held in images.items():
        line, exact = told[row], held["exact"]
        assert torch.equal(exact, result.witnesses()[row])
        assert held["eight_bit"].dtype == torch.uint8
        decoded = held["eight_bit"].float() / 255
        label = int(net(exact[None]).argmax())
        assert label == int(line["adversarial_label"]) != int(y[row])
        assert float(line["distance"]) == pytest.approx(far(norm, exact, x[row]), rel=1e-12)
        assert far(norm, exact, x[row]) <= limit.eps + limit.slack
        assert 0 <= exact.min() <= exact.max() <= 1
        survives = far(norm, decoded, x[row]) <= limit.eps + limit.slack
        survives = survives and int(net(decoded[None]).argmax()) != int(y[row])
        assert line["eight_bit"] == str(int(survives))
        if eight_bit:
            assert survives
            assert torch.equal(decoded, exact)
    share = sum(line["eight_bit"] == "1" for line in told.values()) / len(broken)
    assert result.figures["survive_as_8_bit"] == pytest.approx(share)


@unchecked
def test_pixels_may_lie_in_another_range(net, rows, tmp_path):
    x, limit = (rows[0] * 255).round() / 255 * 2 - 1, Linf(0.2, (-1.0, 1.0))
    model = TorchModel(Net(lambda x: net((x + 1) / 2)), bounds=(-1.0, 1.0))
    result = quick(model, (x, rows[1]), limit, tmp_path, eight_bit=True)
    images = stored(result)
    assert len(images) == result.counts["broken"] >= 3
    for row, held in images.items():
        decoded = held["eight_bit"].float() / 255 * 2 - 1
        torch.testing.assert_close(decoded, held["exact"], rtol=0, atol=1e-6)
        assert far("linf", decoded, x[row]) <= limit.eps + limit.slack
        assert int(net((decoded[None] + 1) / 2).argmax()) != int(rows[1][row])


@unchecked
def test_the_table_has_a_line_for_every_row_and_says_what_the_verdicts_say(net, rows, tmp_path):
    x, y = rows
    result = quick(net, rows, out=tmp_path)
    told, verdicts = lines(result), result.verdicts()
    assert sorted(told) == list(range(N))
    clean = net(x).detach().double().softmax(1)
    for row, line in told.items():
        assert line["verdict"] == verdicts[row]
        assert int(line["label"]) == int(y[row])
        assert int(line["clean_label"]) == int(clean[row].argmax())
        assert float(line["clean_confidence"]) == pytest.approx(float(clean[row].max()), rel=1e-5)
        decided = {"misclassified": ["clean images"], "undecided": [""]}.get(line["verdict"])
        assert line["decided_by"] in (decided or [stage["name"] for stage in result.figures["stages"][1:]])
        assert (line["image"] != "") == (line["verdict"] == "broken") == (line["distance"] != "")
        if line["verdict"] == "undecided":
            assert float(line["margin"]) < 0


# Nothing but the rows decides


@unchecked
@pytest.mark.parametrize("norm", sorted(EPS))
def test_the_order_of_the_rows_does_not_matter(norm, exact, rows):
    ids, limit = 50 + 3 * torch.arange(N), threat(norm, EPS[norm])
    wanted = known(quick(exact, images_of(rows, ids), limit))
    assert set(Counter(verdict for verdict, _ in wanted.values())) == {"misclassified", "broken", "undecided"}
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    for order in (torch.arange(N).flip(0), shuffled) if norm == "linf" else (shuffled,):
        assert known(quick(exact, images_of((rows[0][order], rows[1][order]), ids[order]), limit)) == wanted


@unchecked
def test_the_order_does_not_matter_where_all_is_luck(digits):
    """A model whose errors are pits that nothing points to: every draw of noise decides."""
    weights = torch.linspace(1e3, 7e3, 64, dtype=torch.float64)

    def answer(flat: Tensor) -> Tensor:
        wrong = 2.0 * ((flat @ weights).frac() < 0.02).double() - 1 + 0 * flat.sum(1)
        return torch.stack([-wrong, wrong], 1)

    data = Images("pits", digits[0][:30], torch.zeros(30, dtype=torch.int64), torch.arange(30), ("a", "b"))
    wanted = known(quick(Probe(answer), data))
    assert 3 < sum(verdict == "broken" for verdict, _ in wanted.values()) < 28
    for seed in (1, 2):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        assert known(quick(Probe(answer), data.select(order), width=5)) == wanted
    assert known(quick(Probe(answer), data, seed=1)) != wanted


@unchecked
def test_the_width_does_not_matter(exact, rows):
    rows = (rows[0][:16], rows[1][:16])
    wanted = known(quick(exact, rows, width=None))
    for width in (1, 7, 64):
        assert known(quick(exact, rows, width=width)) == wanted


@unchecked
def test_verdicts_of_a_float32_net_stand_at_every_width(net, rows):
    """There the low bits of an answer hang on its company, and the images may, but not what is said of a row."""
    wanted = quick(net, rows, width=None).verdicts()
    for width in (7, 64):
        assert quick(net, rows, width=width).verdicts() == wanted


# Who meets what


@unchecked
def test_a_stage_meets_the_rows_that_came_closest_and_begins_where_they_did(exact, rows, tmp_path, monkeypatch):
    """All meet the first, the 8 nearest another, and the 5 nearest a round."""
    one = Sprint(2, first=0.5, start="clean")
    stages = [
        Stage(1, "all", N - 2, one),
        Stage(2, "some", 8, one),
        Stage(3, "round", 5, digs=1, tries=1),
    ]
    left, met, hunt = iter(stages), [], Stage.hunt

    def watched(self: Stage, setting: Setting, front: Front) -> Hunt:
        met.append((front, hunt(self, setting, front)))
        return met[-1][1]

    monkeypatch.setattr(Stage, "hunt", watched)
    monkeypatch.setattr(Cascade, "next", lambda self, held, fell: next(left, None))
    images = images_of(rows, 50 + 3 * torch.arange(N).flip(0))
    assert quick(exact, images, Linf(0.01), tmp_path, width=64).counts["undecided"] == N - 2
    told, where = [], {}
    for front, done in met:
        gaps = dict(sorted((row, gap) for row, (_, gap) in where.items()))
        told.append((front.ids.tolist(), sorted(gaps, key=lambda row: -gaps[row])))
        for place, row in enumerate(front.ids.tolist()):
            if row in where:
                assert torch.equal(front.best[place], where[row][0])
                assert not torch.equal(front.best[place], front.x[place])
                assert float(front.gap[place]) == where[row][1]
            where[row] = (done.best[place], float(done.gap[place]))
    (every, _), (some, nearest), (last, nearer) = told
    assert every == sorted(where)
    assert len(every) == N - 2
    assert some == sorted(nearest[:8])
    assert last == sorted(nearer[:5])


@unchecked
def test_what_is_found_and_not_confirmed_is_not_broken(net, rows, tmp_path):
    """A model that answers otherwise where it is asked for gradients: nothing found there stands."""
    honest = TorchModel(net)

    class TwoFaced(Giving):
        def query(self, x: Tensor, access: Access) -> Prediction:
            answer = super().query(x, access)
            if access < Access.GRADIENT:
                return answer
            return Prediction((answer.labels + 1) % 10, answer.logits.roll(1, 1), answer.vjp)

    result = quick(TwoFaced(honest), rows, Linf(1e-4), tmp_path)
    assert result.figures["moved"] == N - 2
    assert result.counts["undecided"] == N - 2
    assert result.witnesses() == {}
    held = [line for line in lines(result).values() if line["verdict"] == "undecided"]
    assert not any(line["image"] for line in held)
    assert {float(line["margin"]) for line in held} == {-1e-30}  # as close as can be


class Draws(Sampled):
    """The net as it is; what decides puts a bias on the labels' logits."""

    access, bounds, passes = Access.GRADIENT, (0.0, 1.0), 2

    def __init__(self, net: nn.Module, biased: Model | None = None) -> None:
        self.net, self.biased = TorchModel(net), biased

    def fresh(self) -> Model:
        return self.biased or self

    def query(self, x: Tensor, access: Access) -> Prediction:
        return self.net.query(x, access)


@unchecked
@pytest.mark.parametrize("bias", [-3.0, 3.0])
def test_of_a_random_model_the_closest_points_are_judged_by_what_decides(bias, net, rows, tmp_path, monkeypatch):
    x, y = rows
    x, y = x[net(x).argmax(1) == y], y[net(x).argmax(1) == y]

    def favoured(images: Tensor) -> Tensor:  # by the class of the nearest row
        own = y[torch.cdist(images.flatten(1), x.flatten(1)).argmin(1)]
        return net(images).scatter_add(1, own[:, None], torch.full_like(images[:, 0, 0, :1], bias))

    decides = TorchModel(Net(favoured))
    result = quick(Draws(net, decides), (x, y), Linf(0.03), tmp_path / "a")
    asked, confirm = [], Search.confirm
    monkeypatch.setattr(Search, "confirm", lambda self, *given: asked.append(len(given[1])) or confirm(self, *given))
    alone = quick(TorchModel(net), (x, y), Linf(0.03), tmp_path / "b")
    witnesses, broken = result.witnesses(), alone.counts["broken"]
    assert 0 < broken < len(x)
    assert sum(asked) == broken  # nothing else where nothing is random
    assert (result.counts["broken"] > broken) == (bias < 0)
    assert result.figures["moved"] <= broken
    points = torch.stack([witnesses[row] for row in sorted(witnesses)]) if witnesses else x[:0]
    assert (decides.query(points, Access.DECISION).labels != y[sorted(witnesses)]).all()
    assert all(Linf(0.03).contains(points, x[sorted(witnesses)]))


# Extremes


@pytest.mark.parametrize("kind", [Linf, L2, L1])
def test_with_eps_zero_what_is_read_right_is_certified(kind, net, rows):
    result = quick(net, rows, kind(0.0))
    assert result.counts == dict.fromkeys(map(str, Verdict), 0) | {"misclassified": 2, "certified": N - 2}
    assert result.robust_accuracy == (result.clean_accuracy,) * 2
    assert [stage["name"] for stage in result.figures["stages"]] == ["clean images"]
    assert (result.figures["forward_passes"], result.figures["backward_passes"]) == (N, 0)


def test_all_rows_misclassified(net, rows):
    result = quick(net, (rows[0], (net(rows[0]).argmax(1) + 1) % 10))
    assert result.counts["misclassified"] == N
    assert result.robust_accuracy == (0.0, 0.0)
    assert result.clean_accuracy == 0
    assert result.figures["forward_passes"] == N
    assert result.complete
    assert result.witnesses() == {}


@pytest.mark.parametrize(("eps", "verdict"), [(1e-4, "undecided"), (0.5, "broken")])
def test_one_row(eps, verdict, net, rows):
    result = quick(net, (rows[0][:1], rows[1][:1]), Linf(eps))
    assert result.counts[verdict] == 1
    assert len(result.witnesses()) == (verdict == "broken")


@unchecked
@pytest.mark.parametrize("norm", sorted(EPS))
def test_two_classes_fall_just_where_the_ball_reaches_the_boundary(norm):
    case = linear(norm, (1, 3, 4), 6, distance=0.5)
    for eps, verdict in ((0.499, "undecided"), (0.503, "broken")):
        result = quick(case.model, (case.x, case.y), threat(norm, eps, case.model.bounds))
        assert result.counts[verdict] == 6


@pytest.fixture
def eleven(net: nn.Sequential) -> Net:
    """The net with an eleventh class, a grey eleventh of what each pixel says for the others."""
    weight = torch.linspace(-1, 1, 64)

    def answer(x: Tensor) -> Tensor:
        return torch.cat([net(x), (x.flatten(1) @ weight)[:, None] + 5], 1)

    return Net(answer)


@unchecked
def test_eleven_classes(eleven, rows):
    result = quick(eleven, rows, Linf(0.2))
    labels = [int(line["adversarial_label"]) for line in lines(result).values() if line["image"]]
    assert max(labels) == 10
    assert sum(result.counts.values()) == N


@unchecked
def test_the_confusion_has_all_classes_of_the_model(eleven, rows):
    result = quick(eleven, rows, Linf(0.2))
    told = Counter(
        (int(line["label"]), int(line["adversarial_label"])) for line in lines(result).values() if line["image"]
    )
    table = result.figures["confusion"]
    assert {(y, z): table[y][z] for y in range(len(table)) for z in range(len(table)) if table[y][z]} == told


# Models that give less, or misbehave


@unchecked
def test_scores_are_enough(net, rows):
    limit = Linf(0.12)
    result = quick(Giving(TorchModel(net), Access.SCORE), rows, limit)
    assert result.counts["broken"] >= 3
    assert result.figures["backward_passes"] == 0
    assert result.figures["stages"][1]["name"] == "square"
    for row, image in result.witnesses().items():
        assert int(net(image[None]).argmax()) != int(rows[1][row])
    assert quick(net, rows, limit).counts["broken"] >= result.counts["broken"]


def test_labels_alone_are_an_error(net, rows):
    with pytest.raises(AttackError, match="an audit needs at least scores, and the model gives labels only"):
        quick(Giving(TorchModel(net), Access.DECISION), rows)


def test_a_constant_model_without_gradients_is_audited_by_scores_and_flagged(rows):
    constant = Net(lambda x: torch.arange(10.0).flip(0).expand(len(x), 10))
    result = quick(constant, (rows[0], torch.zeros_like(rows[1])))
    assert result.counts["undecided"] == N
    assert result.figures["backward_passes"] == 0
    assert {"zero_gradient", "unbounded_attack_fails"} <= {told.split(":")[0] for told in result.warnings}


class Detached(nn.Module):
    """No gradient reaches the image, but the logits hang on weights that have some: as after a JPEG of one's own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.detach())
        return logits


def test_a_model_that_detaches_its_input_is_audited_by_scores_and_flagged(net, rows):
    result = quick(Detached(net), rows, Linf(0.2))
    assert result.counts["broken"] > 0
    assert "zero_gradient" in {told.split(":")[0] for told in result.warnings}


@unchecked
def test_a_model_that_writes_to_its_input_is_audited_as_one_that_does_not(net, rows):
    """What it writes to is the point that is judged: moved out of the ball, none would be adversarial."""
    writing, reading = Net(lambda x: net(x.clamp_(0.2, 0.8))), Net(lambda x: net(x.clamp(0.2, 0.8)))
    x, wanted = rows[0].clone(), quick(reading, rows, Linf(0.15))
    got = quick(writing, (x, rows[1]), Linf(0.15))
    assert torch.equal(x, rows[0])
    assert wanted.counts["broken"] > 0
    assert got.verdicts() == wanted.verdicts()


def raises(x: Tensor, net: nn.Module) -> Tensor:
    if (x[:, 0, 0, 0] > 0.5).any():
        raise ValueError("too bright a corner")
    return net(x)


def turns_nan(x: Tensor, net: nn.Module) -> Tensor:
    logits = net(x).clone()
    logits[x[:, 0, 0, 0] > 0.5] = torch.nan
    return logits


def spoilt(rows: Rows, at: list[int]) -> Rows:
    """The same, with a corner so bright that no attack makes it dark."""
    x = rows[0].clone()
    x[at, 0, 0, 0] = 1.0
    return x, rows[1]


@pytest.mark.parametrize(("fails", "why"), [(raises, "too bright a corner"), (turns_nan, "expected finite logits")])
def test_rows_that_the_model_fails_on_are_errors_and_the_others_are_what_they_are(fails, why, net, rows):
    at = [3, 4, 11]
    x, y = spoilt(rows, at)
    result = quick(Net(lambda x: fails(x, net)), (x, y))
    verdicts, told = result.verdicts(), lines(result)
    assert [row for row, verdict in verdicts.items() if verdict is Verdict.ERROR] == at
    assert all(why in told[row]["reason"] for row in at)
    assert sorted(result.figures["errors"]) == sorted(map(str, at))
    others = torch.tensor([row for row in range(N) if row not in at])
    alone = quick(net, images_of((x[others], y[others]), others)).verdicts()
    assert {row: verdicts[row] for row in others.tolist()} == alone
    low, high = result.robust_accuracy
    assert (low, high) == (0.0, (result.counts["undecided"] + 3) / N)


@unchecked
@pytest.mark.parametrize("fails", [raises, turns_nan])
def test_a_row_in_error_is_not_read_right(fails, net, rows):
    x, y = rows[0], torch.where(torch.arange(N) < 3, 0, rows[1])
    result = quick(Net(lambda x: fails(x, net)), spoilt((x, y), [0, 1, 2]), Linf(1e-4))
    assert result.counts["error"] == 3
    assert result.clean_accuracy == pytest.approx((N - 3 - result.counts["misclassified"]) / N)


@unchecked
def test_clean_accuracy_is_that_of_the_classes(net, rows):
    result = quick(Net(lambda x: raises(x, net)), spoilt(rows, [3, 4, 11]))
    right = sum(part["clean"] * part["rows"] for part in result.figures["classes"])
    assert right / N == pytest.approx(result.clean_accuracy)


def test_probabilities_are_taken_by_their_logarithm_and_flagged(net, rows):
    result = quick(nn.Sequential(net, nn.Softmax(1)), rows)
    assert result.verdicts() == quick(net, rows).verdicts()
    assert [told.split(":")[0] for told in result.warnings] == ["probabilities"]


def test_the_logarithm_of_probabilities_has_a_gradient_of_its_own(net, rows):
    softmax, logs = (TorchModel(nn.Sequential(net, last)) for last in (nn.Softmax(1), nn.LogSoftmax(1)))
    cotangent = torch.randn(N, 10, generator=torch.Generator().manual_seed(1))
    got = Victim(softmax, Access.GRADIENT, 10, probabilities=True).query(rows[0], Access.GRADIENT)
    wanted = logs.query(rows[0], Access.GRADIENT)
    assert torch.equal(got.labels, wanted.labels)
    torch.testing.assert_close(got.logits, wanted.logits)
    torch.testing.assert_close(got.vjp(cotangent, keep=True), wanted.vjp(cotangent), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_model_that_draws_its_answers_is_flagged(share, net, rows):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = quick(Net(lambda x: share * net(x) + torch.randn(len(x), 10)), rows)
    assert sum(result.counts.values()) == N
    assert "random_outputs" in {told.split(":")[0] for told in result.warnings}
    assert len(result.witnesses()) == result.counts["broken"]


@unchecked
def test_a_float64_net_is_audited(net, rows):
    wide = deepcopy(net).double()
    assert quick(Net(lambda x: wide(x.double())), rows).counts == quick(net, rows).counts


@unchecked
def test_a_bfloat16_net_is_audited(net, rows):
    narrow = nn.Sequential(Net(lambda x: x.bfloat16()), deepcopy(net).bfloat16())
    assert quick(narrow, rows).counts["broken"] > 0


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"within": Linf(8.0, (0.0, 255.0))}, UsageError, r"within the bounds of the model, \(0.0, 1.0\)"),
        ({"within": L0(3.0)}, UsageError, "works in linf, l2 and l1, not in l0"),
        ({"profile": "quik"}, UsageError, "unknown profile 'quik'; did you mean 'quick'"),
        ({"budget": 0.0}, UsageError, "expected a budget above 0 seconds, got 0"),
    ],
    ids=["bounds", "l0", "profile", "budget"],
)
def test_what_cannot_be_meant_is_refused(change, error, told, net, rows, tmp_path):
    with pytest.raises(error, match=told):
        quick(net, rows, **({"within": LIMIT, "out": tmp_path / "r"} | change))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda x, y: (x * 16, y), r"expected images in \[0, 1\], got a maximum of 16"),
        (lambda x, y: (x.double(), y), "expected float32 images"),
        (lambda x, y: (x[:0], y[:0]), "expected images"),
        (lambda x, y: (x, y.int()), "expected 24 int64 labels"),
        (lambda x, y: (x, torch.where(y == y[0], 10, y)), "expected labels from 0 to 9, got .* to 10"),
        (lambda x, y: (torch.where(x == x.max(), torch.nan, x), y), "expected finite pixels"),
    ],
    ids=["outside", "float64", "none", "int32", "class 10", "nan"],
)
def test_data_that_do_not_fit_are_refused(change, told, net, rows):
    with pytest.raises(DataError, match=told):
        quick(net, change(*rows))


@pytest.mark.parametrize("cut", [(20, N), (N, 20)], ids=str)
def test_as_many_labels_as_images_are_needed(cut, net, rows):
    with pytest.raises(DataError, match="label"):
        quick(net, (rows[0][: cut[0]], rows[1][: cut[1]]))


def test_an_infinite_ball_is_refused(net, rows):
    with pytest.raises(UsageError, match="eps"):
        quick(net, rows, Linf(float("inf")))


def test_a_width_below_one_is_refused(net, rows):
    with pytest.raises(UsageError, match="width"):
        quick(net, rows, width=-3)


class Endless(Exception):
    """It would have gone on for ever."""


def test_rows_with_one_id_are_refused(net, rows):
    def tell(*told: object) -> None:
        if next(turns, None) is None:
            raise Endless

    turns = iter(range(100))
    with pytest.raises(DataError, match="id of its own"):
        quick(net, images_of(rows, torch.arange(N) // 2), tell=tell)


@unchecked
def test_images_that_require_gradients_are_taken_as_they_are(net, rows):
    assert quick(net, (rows[0].clone().requires_grad_(), rows[1])).verdicts() == quick(net, rows).verdicts()


@unchecked
def test_a_data_set_is_audited_on_its_test_images(net, rows):
    images = images_of(rows, torch.arange(N))
    assert quick(net, Dataset("d", images.take(1), images)).verdicts() == quick(net, rows).verdicts()
    assert quick(net, rows, limit=5).figures["rows"] == 5


# Taking a run up again


class Clock:
    """Time that passes by one second a question; `stop` asks once each turn."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sparring.auditing.audit.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


@unchecked
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_audit_cut_short_goes_on_to_the_same_verdicts_and_images(norm, exact, rows, tmp_path, clock):
    limit = threat(norm, EPS[norm])
    whole = quick(exact, rows, limit, tmp_path / "whole")
    before = 0
    for budget in (1, 40, 110):
        out = tmp_path / str(budget)
        cut = quick(exact, rows, limit, out, budget=budget)
        assert not cut.complete
        assert sum(cut.counts.values()) == N
        assert cut.counts["broken"] + cut.counts["misclassified"] >= before
        before = cut.counts["broken"] + cut.counts["misclassified"]
        assert all(known(whole)[row][0] == "broken" for row in cut.witnesses())
        resumed = quick(exact, rows, limit, out)
        assert resumed.complete
        assert known(resumed) == known(whole)
        assert resumed.figures["forward_passes"] >= whole.figures["forward_passes"]
    assert before > 2


@unchecked
def test_many_short_budgets_come_to_the_end(exact, rows, tmp_path, clock):
    whole = known(quick(exact, rows, out=tmp_path / "whole"))
    complete: list[bool] = []
    while not any(complete) and len(complete) < 12:
        last = quick(exact, rows, out=tmp_path / "cut", budget=150)
        complete.append(last.complete)
    assert len(complete) > 1
    assert complete[-1]
    assert known(last) == whole


def test_with_no_time_at_all_nothing_is_known(net, rows, tmp_path):
    result = quick(net, rows, out=tmp_path, budget=1e-9)
    assert not result.complete
    assert result.counts["undecided"] == N
    assert result.robust_accuracy == (0.0, 1.0)
    assert result.figures["forward_passes"] == 0


def test_with_no_time_at_all_the_clean_accuracy_is_unknown(net, rows, tmp_path):
    result = quick(net, rows, out=tmp_path, budget=1e-9)
    assert result.clean_accuracy is None


def test_with_no_time_at_all_every_row_has_a_verdict_and_a_line(net, rows, tmp_path):
    result = quick(net, rows, out=tmp_path, budget=1e-9)
    assert result.verdicts() == dict.fromkeys(range(N), Verdict.UNDECIDED)
    assert sorted(lines(result)) == list(range(N))


def test_an_audit_whose_time_ends_in_the_checklist_is_not_complete(net, rows, tmp_path, clock, monkeypatch):
    def slow(*args: object, **options: object) -> tuple[list[object], Cost]:
        clock.now += 1e6
        return [], Cost(0, 0)

    monkeypatch.setattr("sparring.auditing.masking.check", slow)
    assert not quick(net, rows, out=tmp_path, budget=1e5).complete


@unchecked
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, r"another seed \(seed: 0, now 1\)"),
        ({"profile": "standard"}, "another profile"),
        ({"within": Linf(0.1)}, "another eps"),
        ({"within": L2(EPS["linf"])}, "another .*norm"),
        ({"eight_bit": True}, "another settings"),
    ],
    ids=["seed", "profile", "eps", "norm", "eight bits"],
)
def test_another_plan_in_the_same_folder_is_refused(change, told, net, rows, tmp_path):
    data = (rows[0][:4], rows[1][:4])
    quick(net, data, out=tmp_path)
    with pytest.raises(UsageError, match=told + ".*choose another --out"):
        quick(net, data, **({"within": LIMIT, "out": tmp_path} | change))


@unchecked
def test_another_model_or_other_data_in_the_same_folder_are_refused(net, rows, tmp_path):
    data = (rows[0][:4], rows[1][:4])
    quick(net, data, out=tmp_path)
    other = deepcopy(net)
    with torch.no_grad():
        other[1].bias += 1e-3
    with pytest.raises(UsageError, match="another model_digest"):
        quick(other, data, out=tmp_path)
    with pytest.raises(UsageError, match="another data_digest"):
        quick(net, (data[0], data[1].flip(0)), out=tmp_path)
    with pytest.raises(UsageError, match=r"another data_digest, .*rows"):
        quick(net, data, out=tmp_path, limit=3)


def test_a_finished_run_is_not_worked_on_again(net, rows, tmp_path):
    model = Giving(TorchModel(net))
    first = quick(model, rows, out=tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "evidence" / "rows").iterdir()}
    model.asked = 0
    again = quick(model, rows, out=tmp_path)
    assert model.asked <= 2 * N  # a look at what kind of answers come
    assert again.figures == first.figures
    assert known(again) == known(first)
    assert {path: path.read_bytes() for path in (tmp_path / "evidence" / "rows").iterdir()} == files
    assert not (tmp_path / "work").exists()


def test_what_is_told_counts_up(net, rows):
    heard: list[tuple[str, int, int]] = []
    quick(net, rows, tell=lambda *told: heard.append(told))
    assert heard[0][0] == "clean images"
    assert {"sprint", "round of 1", "checklist"} <= {name for name, _, _ in heard}
    assert all(0 <= done <= of for _, done, of in heard)


@unchecked
def test_without_a_folder_the_images_last_as_long_as_the_result(net, rows, recwarn):
    result = audit(net, rows, LIMIT, profile="quick", width=16)
    path = result.run
    assert result.witnesses()
    del result
    assert not path.exists()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]
