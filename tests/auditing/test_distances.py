"""The smallest perturbations: closed forms, their agreement with the verdicts, and runs that are cut short."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.fab import FAB
from sparring.auditing import measuring
from sparring.auditing.audit import Audit, audit, conclude
from sparring.auditing.cascade import PROFILES, Cascade, Profile
from sparring.auditing.closer import Closer, Onward, Shrink
from sparring.auditing.distances import STEPS, share_at, spread
from sparring.auditing.evidence import Evidence, Shard
from sparring.auditing.masking import Cost
from sparring.auditing.measuring import Measure
from sparring.auditing.run import Run
from sparring.auditing.standing import Standing
from sparring.auditing.summary import COLUMNS
from sparring.core import noise
from sparring.core.errors import UsageError
from sparring.core.model import Access, Model, Prediction
from sparring.core.threat import Linf, threat
from sparring.core.verdict import Verdict
from sparring.data.images import Images
from sparring.engine.loop import run
from sparring.models.torch import TorchModel
from sparring.reporting import write_report
from sparring.testing import DUALS, Probe, linear

Rows = tuple[Tensor, Tensor]
NORMS = ("linf", "l2", "l1")
EPS = {"linf": 0.09, "l2": 0.45, "l1": 1.2}
N = 14


@pytest.fixture(autouse=True)
def no_checklist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checklist has tests of its own."""
    monkeypatch.setattr("sparring.auditing.masking.check", lambda *args, **options: ([], Cost(0, 0)))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little of everything as there can be, and 24 steps of the attacks that minimise."""
    monkeypatch.setitem(PROFILES, "quick", Profile("quick", opening=3, work=0.6, deepest=1))


@pytest.fixture(scope="module")
def exact(net: nn.Sequential) -> Probe:
    """The net in float64, so that a row's answer has the same bits in any company."""
    return Probe(deepcopy(net).double())


@pytest.fixture(scope="module")
def rows(digits: Rows, net: nn.Sequential) -> Rows:
    """14 test digits on 256 levels, two of which the net reads wrong."""
    x, y = (digits[0][1500:] * 255).round() / 255, digits[1][1500:]
    right = net(x).argmax(1) == y
    at = torch.cat([right.nonzero()[: N - 2], (~right).nonzero()[:2]]).squeeze(1).sort().values
    return x[at], y[at]


def measured(model: Any, data: Any, norm: str, out: Path, *, eps: float | None = None, **options: Any) -> Audit:
    """A quick audit with distances."""
    options = {"profile": "quick", "width": 16, "distances": True, "certify": False} | options
    return audit(
        model, data, threat(norm, EPS[norm] if eps is None else eps, model_bounds(model)), out=out, **options
    )


def model_bounds(model: Any) -> tuple[float, float]:
    return model.bounds if isinstance(model, Probe | Giving) else (0.0, 1.0)


def lines(result: Audit) -> dict[int, dict[str, str]]:
    with (result.run / "rows.csv").open() as file:
        return {int(line["id"]): line for line in csv.DictReader(file)}


def known(result: Audit) -> dict[int, tuple[str, float, bytes]]:
    """The verdict, the distance, and the bytes of its image, of every row."""
    images, distances = result.nearest(), result.distances()
    return {
        row: (str(verdict), distances[row], images[row].numpy().tobytes() if row in images else b"")
        for row, verdict in result.verdicts().items()
    }


def far(norm: str, x: Tensor, x0: Tensor) -> float:
    """The float64 distance, written plainly."""
    change = (x.double() - x0.double()).abs().flatten()
    return float({"linf": change.max(), "l1": change.sum()}.get(norm, change.square().sum().sqrt()))


class Giving:
    """A model that gives no more than `access`, and counts the rows that go through it each way."""

    bounds = (0.0, 1.0)

    def __init__(self, model: Model, access: Access = Access.GRADIENT) -> None:
        self.model, self.access, self.forward, self.backward = model, access, 0, 0
        self.bounds = model.bounds

    def query(self, x: Tensor, access: Access) -> Prediction:
        assert access <= self.access
        self.forward += len(x)
        said = self.model.query(x, access)

        def pull(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            self.backward += len(x)
            assert said.vjp is not None
            return said.vjp(cotangent, keep=keep)

        return Prediction(said.labels, said.logits, None if said.vjp is None else pull)


# Closed forms


def staggered(norm: str, rows: int = 9, shape: tuple[int, ...] = (1, 4, 5)) -> tuple[Probe, Rows, Tensor]:
    """A hyperplane, and rows at 0.1, 0.2, ... from it in `norm`: the bounds do not matter."""
    weight = noise.normal(torch.tensor([3]), shape).flatten().double()
    wanted = 0.1 * torch.arange(1, rows + 1).double()
    x = noise.uniform(torch.arange(rows), shape).double().flatten(1) - 0.5
    away = wanted * weight.norm(DUALS[norm]) - x @ weight
    x = x + away[:, None] * weight / weight.square().sum()

    def logits(flat: Tensor) -> Tensor:
        half = flat @ weight / 2
        return torch.stack([half, -half], 1)

    return Probe(logits, (-20.0, 20.0)), (x.float().view(rows, *shape), torch.zeros(rows).long()), wanted


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_on_a_linear_model_the_distance_and_the_curve_are_those_of_the_closed_form(norm, gradients, tmp_path):
    model, data, wanted = staggered(norm)
    # Without gradients random search is what there is, and in L1 no attack by labels follows it.
    within = 1.02 if gradients else {"linf": 1.2, "l2": 1.5, "l1": 8.0}[norm]
    victim = model if gradients else Giving(model, Access.SCORE)
    result = measured(victim, data, norm, tmp_path, eps=0.42)
    found = torch.tensor([result.distances()[row] for row in range(9)], dtype=torch.float64)
    assert float((found / wanted).min()) > 1 - 1e-5
    assert float((found / wanted).max()) <= within
    curve = result.figures["distances"]["curve"]
    assert curve["eps"][0] == 0
    assert curve["robust_accuracy"][0] == result.clean_accuracy == 1
    for eps in torch.linspace(0.01, 1.0, 60).tolist():
        true, late = ((wanted > eps).double().mean().item(), (wanted > eps / within).double().mean().item())
        assert true - 1e-12 <= share_at(curve, eps) <= late + 1e-12
    assert share_at(curve, 0.42) == result.robust_accuracy[1]
    if gradients:
        assert result.counts["broken"] == 4
        assert result.figures["distances"]["median"] == pytest.approx(0.5, rel=0.02)
        assert result.figures["distances"]["mean"] == pytest.approx(0.5, rel=0.02)
        assert result.figures["distances"]["quantiles"]["0.25"] == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("norm", NORMS)
def test_closer_finds_the_least_eps_from_nothing_and_from_afar(norm):
    case = linear(norm, (1, 4, 5), 4)
    got = run(case.model, Closer(160, first=0.01), case.limit, case.x, case.y)
    assert float(got.distance.min()) >= 0.5 * (1 - 1e-5)
    assert float(got.distance.max()) <= 0.5 * 1.01
    assert got.forward.tolist() == [161] * 4  # the steps and the last point
    assert got.backward.tolist() == [160] * 4


def test_shrink_halves_the_way():
    case = linear("l2", (1, 4, 5), 3)
    batch_like = SimpleNamespace(x=case.x, threat=case.limit, y=case.y, targeted=case.y > 9, begin=-3 * case.x)
    state, shrink = Shrink(10).init(batch_like), Shrink(10)
    asked = []
    while True:
        asked.append(state.x)
        hit = case.model.query(state.x, Access.DECISION).labels != case.y
        if bool(state.done.all()):
            break
        state = shrink.step(batch_like, state, SimpleNamespace(adversarial=hit))
    assert len(asked) == 10
    assert float((state.high - state.low).max()) == 2.0**-9


# The verdicts


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_distances_agree_with_verdicts_and_with_what_is_stored(norm, eight_bit, net, rows, tmp_path):
    x, y = rows
    eps = 1.4 * EPS[norm]
    result = measured(net, rows, norm, tmp_path, eps=eps, eight_bit=eight_bit)
    verdicts, distances, told = result.verdicts(), result.distances(), lines(result)
    images, limit = result.nearest(), threat(norm, eps)
    assert result.complete
    assert {"broken", "undecided", "misclassified"} <= set(map(str, verdicts.values()))
    for row, verdict in verdicts.items():
        distance, line = distances[row], told[row]
        assert float(line["distance"]) == distance < torch.inf
        if verdict is Verdict.MISCLASSIFIED:
            assert distance == 0
            assert row not in images
            assert line["nearest"] == ""
            continue
        assert (distance <= eps + limit.slack) == (verdict is Verdict.BROKEN)
        assert distance == pytest.approx(far(norm, images[row], x[row]), rel=1e-12)
        assert 0 <= images[row].min() <= images[row].max() <= 1
        assert int(net(images[row][None]).argmax()) != int(y[row])
        path, _, place = line["nearest"].partition("#exact[")
        name = Path(path).stem
        assert torch.equal(Evidence(Run(result.run)).images(name)["exact"][int(place.rstrip("]"))], images[row])
        if eight_bit:
            assert torch.equal((images[row] * 255).round() / 255, images[row])
    witnesses = result.witnesses()
    assert sorted(witnesses) == [row for row, verdict in verdicts.items() if verdict is Verdict.BROKEN]
    assert all(far(norm, witnesses[row], x[row]) <= eps + limit.slack for row in witnesses)
    assert all(far(norm, witnesses[row], x[row]) >= distances[row] for row in witnesses)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("norm", NORMS)
def test_the_curve_at_the_audited_eps_is_the_upper_end(norm, net, rows, tmp_path):
    for factor in (0.3, 1.0, 2.0):
        result = measured(net, rows, norm, tmp_path / str(factor), eps=factor * EPS[norm])
        curve = result.figures["distances"]["curve"]
        assert share_at(curve, factor * EPS[norm]) == result.robust_accuracy[1]
        assert share_at(curve, 0.0) == pytest.approx(result.clean_accuracy)
        assert sum(stage["broken"] for stage in result.figures["stages"]) == result.counts["broken"]
        spent = sum(int(line["forward"]) for line in lines(result).values())
        assert spent == result.figures["forward_passes"] == sum(s["forward"] for s in result.figures["stages"])


def idle(*_: Any) -> None:
    """A cascade that tries nothing."""


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_that_held_and_has_a_point_within_eps_is_broken_by_it(norm, net, rows, tmp_path, monkeypatch):
    whole = measured(net, rows, norm, tmp_path / "whole", eps=2 * EPS[norm])
    monkeypatch.setattr(Cascade, "next", idle)
    result = measured(net, rows, norm, tmp_path / "idle", eps=2 * EPS[norm])
    assert abs(result.counts["broken"] - whole.counts["broken"]) <= 1  # another search, from another start
    assert result.counts["broken"] >= 5
    told = lines(result)
    for row, image in result.witnesses().items():
        assert told[row]["decided_by"].startswith("nearest: ")
        assert far(norm, image, rows[0][row]) <= 2 * EPS[norm] * (1 + 1e-5)
        label = int(net(image[None]).argmax())
        assert label == int(told[row]["adversarial_label"]) != int(rows[1][row])
        assert float(told[row]["margin"]) == 0
    assert int(torch.tensor(result.figures["confusion"]).sum()) == result.counts["broken"]


def test_a_later_measure_that_comes_no_nearer_changes_nothing(tmp_path, monkeypatch):
    """FAB with a stride of three ends three times as far away, and in the same place if it comes again."""
    model, data, wanted = staggered("l2")
    near, wild = Closer(60, 0.42), Onward(FAB(3, eta=3.0))
    monkeypatch.setattr(Cascade, "next", idle)
    for place, ladder in enumerate(([near, wild], [wild, wild])):
        ladder = [Measure(f"nearest: {turn}", attack) for turn, attack in zip(("one", "two"), ladder, strict=True)]
        monkeypatch.setattr("sparring.auditing.measuring.measures", lambda *_, ladder=ladder: ladder)
        result = measured(model, data, "l2", tmp_path / str(place), eps=0.42)
        assert result.figures["distances"]["found_by"] == {"nearest: one": 9}
        ratio = torch.tensor([result.distances()[row] for row in range(9)], dtype=torch.float64) / wanted
        assert bool((ratio < 1.05).all()) is (place == 0)


@pytest.mark.usefixtures("brief")
def test_square_looks_inside_the_ball_of_its_rung_and_the_others_anywhere(tmp_path, monkeypatch):
    model, data, _ = staggered("linf")
    play, looked = measuring._play, []

    def watched(setting: Any, attack: Any, ball: Any, rows: Any) -> Any:
        looked.append((attack.name, round(ball.eps / 0.42, 9)))
        return play(setting, attack, ball, rows)

    monkeypatch.setattr(Cascade, "next", idle)
    monkeypatch.setattr(measuring, "_play", watched)
    measured(Giving(model, Access.SCORE), data, "linf", tmp_path, eps=0.42)
    ladder = [eps for name, eps in looked if name == "square"]
    assert len(ladder) > 3
    assert ladder == [8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125][: len(ladder)]
    assert {eps for name, eps in looked if name != "square"} == {round(40 / 0.42, 9)}


def test_the_seed_decides_where_distances_are_looked_for(tmp_path, monkeypatch):
    model, data, _ = staggered("linf")
    monkeypatch.setattr(Cascade, "next", idle)
    monkeypatch.setattr("sparring.auditing.measuring.measures", lambda *_: [Measure("nearest: one", Closer(6, 0.9))])
    one, two, other = (
        known(measured(model, data, "linf", tmp_path / name, eps=0.42, seed=seed))
        for name, seed in zip("abc", (0, 0, 1), strict=True)
    )
    assert one == two
    assert one != other


def test_what_is_not_confirmed_from_the_disk_does_not_count(net, rows, tmp_path):
    """A model that answers otherwise where it is asked for gradients."""

    class TwoFaced(Giving):
        def query(self, x: Tensor, access: Access) -> Prediction:
            answer = super().query(x, access)
            if access < Access.GRADIENT:
                return answer
            return Prediction((answer.labels + 1) % 10, answer.logits.roll(1, 1), answer.vjp)

    result = measured(TwoFaced(TorchModel(net)), rows, "linf", tmp_path, eps=1e-4)
    assert result.counts["broken"] == 0
    assert [line["nearest"] for line in lines(result).values() if line["verdict"] == "undecided"]
    for row, image in result.nearest().items():
        assert int(net(image[None]).argmax()) != int(rows[1][row])


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("access", [Access.SCORE, Access.GRADIENT])
def test_counts_are_what_the_model_saw(access, exact, rows, tmp_path):
    """One row at a time, so that nothing is padded; the audit without distances is the same up to there."""
    few = (rows[0][:2], rows[1][:2])
    plain, more = Giving(exact, access), Giving(exact, access)
    without = measured(plain, few, "linf", tmp_path / "a", width=1, distances=False)
    result = measured(more, few, "linf", tmp_path / "b", width=1)
    counted = {key: result.figures[key] - without.figures[key] for key in ("forward_passes", "backward_passes")}
    assert counted["forward_passes"] == more.forward - plain.forward > 0
    assert counted["backward_passes"] == more.backward - plain.backward
    assert (more.backward > plain.backward) == (access is Access.GRADIENT)


# Rows, and rows alone


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("norm", NORMS)
def test_neither_width_nor_order_matters(norm, exact, rows, tmp_path):
    x, y = rows
    whole = known(measured(exact, rows, norm, tmp_path / "whole"))
    images = Images("digits", x.flip(0), y.flip(0), torch.arange(N - 1, -1, -1), tuple("0123456789"))
    assert known(measured(exact, images, norm, tmp_path / "flip", width=5)) == whole


def dying(at: Callable[[str, Shard], bool], *, committed: bool) -> Any:
    """A commit that dies at a shard: before it counts, or after."""
    commit = Evidence.commit

    def die(self: Evidence, name: str, shard: Shard) -> None:
        if committed or not at(name, shard):
            commit(self, name, shard)
        if at(name, shard):
            raise KeyboardInterrupt

    return die


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_killed_at_any_shard_and_resumed_it_ends_as_one_that_was_not(norm, exact, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sparring.auditing.search._PIXELS", 64 * 3)  # three rows a shard
    rows = (rows[0][:6], rows[1][:6])
    whole = measured(exact, rows, norm, tmp_path / "whole", width=3)
    table = (tmp_path / "whole/rows.csv").read_bytes()
    names = [name for name, shard in Evidence(Run(whole.run)).shards() if shard.nearer is not None]
    assert len(names) == 3 * 2
    for name, committed in itertools.product(names[::2], (False, True)):
        out = tmp_path / f"{name}{committed}"
        with monkeypatch.context() as patch:
            patch.setattr(Evidence, "commit", dying(lambda n, _, name=name: n == name, committed=committed))
            with pytest.raises(KeyboardInterrupt):
                measured(exact, rows, norm, out, width=3)
        resumed = measured(exact, rows, norm, out, width=3)
        assert known(resumed) == known(whole)
        assert (out / "rows.csv").read_bytes() == table
        assert resumed.figures["distances"] == whole.figures["distances"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second goes by at every look at the clock."""
    ticks: Iterator[int] = itertools.count()
    monkeypatch.setattr("sparring.auditing.audit.time.monotonic", lambda: float(next(ticks)))


@pytest.mark.usefixtures("brief")
def test_a_short_budget_leaves_a_valid_run_that_goes_on(exact, rows, tmp_path, clock):
    few = (rows[0][:6], rows[1][:6])
    whole = measured(exact, few, "linf", tmp_path / "whole")
    partly = 0
    for budget in (65, 75, 85, 95, 105):
        cut = measured(exact, few, "linf", tmp_path / str(budget), budget=budget)
        upper, curve = cut.robust_accuracy[1], cut.figures["distances"]["curve"]
        assert share_at(curve, EPS["linf"]) == upper >= whole.robust_accuracy[1]
        assert all(cut.distances()[row] >= whole.distances()[row] for row in range(6))
        begun = any(stage["name"].startswith("nearest") for stage in cut.figures["stages"])
        partly += begun and not cut.complete
        last = measured(exact, few, "linf", tmp_path / str(budget))
        assert last.complete
        assert known(last) == known(whole)
    assert partly


# Files and figures


def test_without_the_flag_nothing_changes(exact, rows, tmp_path):
    plain = measured(exact, rows, "linf", tmp_path / "plain", distances=False)
    more = measured(exact, rows, "linf", tmp_path / "more")
    assert "distances" not in plain.figures
    assert "distances" not in Run(plain.run).plan["settings"]
    assert tuple(next(iter(lines(plain).values()))) == COLUMNS
    with pytest.raises(UsageError, match="looked for no distances; run it with distances=True"):
        plain.distances()
    folder = plain.run / "evidence/rows"
    for path in folder.iterdir():
        other = more.run / "evidence/rows" / path.name
        if path.suffix == ".json":
            one, two = (json.loads(file.read_text()) | {"seconds": 0} for file in (path, other))
            assert one == two
            assert "nearer" not in one
        else:
            assert path.read_bytes() == other.read_bytes()
    with pytest.raises(UsageError, match="made with another settings"):
        measured(exact, rows, "linf", plain.run)
    with pytest.raises(UsageError, match="made with another settings"):
        measured(exact, rows, "linf", more.run, distances=False)


def test_the_report_is_rebuilt_from_the_shards(net, rows, tmp_path):
    result = measured(net, rows, "l2", tmp_path, profile="quick")
    files = [tmp_path / name for name in ("rows.csv", "result.json")]
    before = [file.read_bytes() for file in files]
    for file in [*files, tmp_path / "evidence/audit.json"]:
        file.unlink()
    assert conclude(Run.open(tmp_path)) == result.figures
    assert [file.read_bytes() for file in files] == before
    page = write_report(Run.open(tmp_path)).read_text()
    assert "smallest found by any attack here" in page
    assert "Every point of the curve is an upper bound on the truth" in page
    assert "Half of all images have fallen at l2" in page
    assert "Stages called nearest come last" in page
    assert "audited: eps 0.45" in page
    assert "Robust accuracy at other eps was not measured" not in page


def test_a_ball_of_radius_zero_has_distances_too(net, rows, tmp_path):
    result = measured(net, rows, "linf", tmp_path, eps=0.0)
    assert result.counts["certified"] == N - 2
    assert all(0 < distance < 0.5 for distance in result.distances().values() if distance)
    assert share_at(result.figures["distances"]["curve"], 0.0) == result.robust_accuracy[1]


def test_a_model_that_fails_far_away_keeps_its_verdicts(net, rows, tmp_path):
    """It answers NaN to images that differ from all clean ones by more than 0.3 somewhere."""
    x, _ = rows

    class Narrow(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            away = (points[:, None] - x[None]).abs().flatten(2).amax(2).amin(1)
            return torch.where((away > 0.3)[:, None], torch.nan, net(points))

    result = measured(Narrow().eval(), rows, "linf", tmp_path, eps=0.02)
    assert result.counts["error"] == 0
    assert all(distance <= 0.3 + 1e-6 for distance in result.distances().values() if distance < torch.inf)
    assert share_at(result.figures["distances"]["curve"], 0.02) == result.robust_accuracy[1]


def test_a_long_curve_is_thinned_and_stays_above_itself():
    n, eps = 3000, 0.37
    reach = noise.uniform(torch.tensor([1]), (n,)).squeeze(0).double()
    reach[:40], reach[40:90] = 0.0, torch.inf
    standing = Standing(torch.arange(n), torch.zeros(n).long())
    standing.reach = reach
    figures = spread(standing, n, eps)
    curve = figures["curve"]
    assert len(curve["eps"]) <= STEPS
    for at in [*torch.linspace(0, 1.2, 400).tolist(), eps]:
        true = float((reach > at).double().mean())
        assert true <= share_at(curve, at) <= true + 2 / STEPS
    assert share_at(curve, eps) == float((reach > eps).double().mean())
    assert figures["none_found"] == 50
    assert figures["median"] == float(reach.sort().values[n // 2 - 1])
    assert sum(figures["histogram"]["rows"]) == figures["found"] == n - 50


def test_where_most_hold_there_is_no_median():
    standing = Standing(torch.arange(4), torch.zeros(4).long())
    standing.reach[0] = 0.25
    figures = spread(standing, 4, Linf(0.1).eps)
    assert figures["median"] is None
    assert figures["quantiles"]["0.25"] == 0.25
    assert figures["curve"] == {"eps": [0.0, 0.25], "robust_accuracy": [1.0, 0.75]}
