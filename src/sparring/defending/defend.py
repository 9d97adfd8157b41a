"""The analysis: every defense trained or put around a net, attacked by who knows it, and weighed against its cost."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparring.auditing import cascade
from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.core.errors import UsageError, unknown
from sparring.core.showing import number_of, percent, table
from sparring.core.threat import Threat
from sparring.data.images import Dataset
from sparring.defending import craft, measure, plan
from sparring.defending.bench import Bench
from sparring.defending.borrowed import borrow
from sparring.defending.cost import inference
from sparring.defending.finding import HOLDS
from sparring.defending.measure import Measured
from sparring.defending.row import order, pictures, row, shown
from sparring.defending.workshop import Subject, Tell, Workshop
from sparring.models.nets import NETS
from sparring.training.fit import Settings

SECTION = "defenses"
PROFILES = ("quick", "standard")
VERSION = 3  # raised whenever what is tried changes


@dataclass(frozen=True)
class Defended:
    """The finished analysis; `figures` are those that `--json` prints."""

    run: Path
    figures: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each defense, by the adaptive figure."""
        return list(self.figures["defenses"])

    def row(self, name: str) -> dict[str, Any]:
        """The line of the defense called `name`."""
        found = {one["defense"]: one for one in self.rows}
        if name not in found:
            raise unknown("defense", name, found)
        return found[name]

    def _repr_html_(self) -> str:
        head = ("defense", "clean", "naive → adaptive", "at least", "training", "inference", "finding", "signs")
        lines = [(*cells(one), len(one["signs"])) for one in self.rows]
        title = f"{len(lines)} defenses, {self.figures['threat']}, {number_of(self.figures['rows'], 'image')}"
        return table(title, head, lines, " ".join(self.figures["warnings"]))


def cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    """A line in words; the naive figure stands beside the adaptive one, never alone."""
    return (
        one["defense"],
        percent(one["clean"], 1),
        f"{percent(one['naive'], 1)} → {percent(one['adaptive'], 1)}",
        percent(one["certified"], 1),
        f"{one['training_cost']:.1f} x",
        f"{one['inference_cost']:.1f} x",
        one["finding"],
    )


def defend(
    data: Dataset,
    threat: Threat,
    *,
    net: str = "conv",
    defenses: Sequence[plan.Given] | None = None,
    steps: int = 2000,
    limit: int | None = None,
    profile: str = "standard",
    seed: int = 0,
    draws: int = 20,
    device: str = "cpu",
    out: Path | str | None = None,
    tell: Tell = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
) -> Defended:
    """Train or wrap each defense, attack it by who ignores and by who knows it, and say what it comes to.

    `defenses` are names of recipes and guards ("madry", "jpeg:quality=50", "smoothing+gaussian"), `file.py:Name`, or
    objects: a guard, or a recipe with a `loss`. The undefended `net` and a control that is known to be broken are
    always there. All nets take `steps` steps on the training images of `data` (less the last sixth, on which
    detectors are fitted), and all meet the same test images (the first `limit`), attacks and seeds. `profile` is the
    audit's, `draws` how many answers of a random guard decide together. The same call with the same `out` goes on
    where a run was cut short; without `out` the run folder lasts as long as the result.
    """
    _check(net, threat, profile, steps, draws)
    images = data.test.take(limit)
    chosen = plan.entries(defenses, threat, images.x.shape[1])
    settings = Settings(net, steps, seed=seed)
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="sparring-defend-")) if out is None else Path(out)
        if out is None:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        asked = {
            "data": data.name,
            "rows": {"train": len(data.train), "test": len(images)},
            "train_digest": data.train.digest(),
            "settings": asdict(settings) | {"profile": asdict(cascade.profile(profile)), "draws": draws}
            | {"defenses": {one.name: one.asked() for one in chosen}, "threat": repr(threat), "version": VERSION},
            "threat": threat.describe(),
            "norm": threat.norm,
            "eps": threat.eps,
            **common(images, seed, device),
        }  # fmt: skip
        run = Run.create(folder, "defend", asked)
        workshop = Workshop(run.path / "nets", data, settings, threat, device, tell, say)
        subjects = [workshop.subject(entry) for entry in chosen]
        crafted = {
            key: craft.craft(run, key, made.net, images, threat, seed, device, tell)
            for key, made in workshop.made.items()
        }
        bench = Bench(run, images, threat, profile, seed, draws, device, crafted, tell)
        found = borrow(bench, [_told(measure.measure(bench, subject), say) for subject in subjects])
        for one in (one for one in found if one.missed()["borrowed"]):
            name, fell = one.subject.entry.name, number_of(one.missed()["borrowed"], "row")
            say(f"{name}: {fell} less, to what broke {', '.join(one.borrowed.lenders if one.borrowed else ())}")
        result = Defended(run.path, _conclude(bench, found, workshop))
        weakref.finalize(result, undo.pop_all().close)  # what is temporary lasts as long as the result
    return result


def _check(net: str, threat: Threat, profile: str, steps: int, draws: int) -> None:
    if net not in NETS:
        raise unknown("net", net, NETS)
    if threat.norm not in ("linf", "l2", "l1"):
        raise UsageError(f"defenses are judged in linf, l2 and l1, not in {threat.norm}; name another norm")
    if threat.bounds != (0.0, 1.0) or not 0 < threat.eps < float("inf"):
        raise UsageError(f"expected an eps above 0 and pixels in [0, 1], got {threat!r}")
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    if min(steps, draws) < 1:
        raise UsageError(f"expected steps and draws of at least 1, got {steps} and {draws}")


def _told(measured: Measured, say: Callable[[str], None]) -> Measured:
    """Say a word on the way: the naive figure only beside the adaptive one."""
    naive, held = (percent(mask.double().mean().item(), 1) for mask in (measured.naive, measured.held))
    say(f"{measured.subject.entry.name}: {naive} hold naively, {held} adaptively")
    return measured


def _conclude(bench: Bench, found: Sequence[Measured], workshop: Workshop) -> dict[str, Any]:
    """The table, the images that are shown, and the files that are derived."""
    base, run = found[0], bench.run
    subjects: list[Subject] = [measured.subject for measured in found]
    x = bench.to(bench.images.x)
    times, _ = bench.once("inference", lambda: (dict(inference(base.subject.net, subjects, x, bench.draws)), {}))
    at = shown(base, bench.images)
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {"x": bench.images.x[at]}
    for measured in found:
        slug = measured.subject.entry.slug
        one = row(measured, base, workshop.cost(measured.subject), times[slug])
        one["details"]["images"], tensors[f"changed--{slug}"] = pictures(measured, bench, at)
        one["details"]["slug"] = slug
        rows.append(one)
    figures = {
        "data": bench.run.plan["data"],
        "net": workshop.settings.net,
        "steps": workshop.settings.steps,
        "threat": bench.threat.describe(),
        "rows": len(bench.images),
        "profile": bench.profile,
        "draws": bench.draws,
        "defenses": order(rows),
        "warnings": _warnings(rows),
    }
    run.record(SECTION, figures, tensors)
    run.write_result()
    return figures | {"run": str(run.path)}


def _warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What makes the whole table unreliable."""
    found = [one for one in rows if one["details"]["role"] == plan.CONTROL and one["finding"] == HOLDS]
    return [
        f"The control {one['defense']}, which is known to be broken, ends as {HOLDS}: the attacks are too weak here."
        for one in found
    ]
