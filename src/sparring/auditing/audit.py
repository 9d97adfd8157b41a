"""The audit: a verdict for every image, what it cost, and what is to be thought of it."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.auditing import curve, gallery, masking
from sparring.auditing.cascade import Profile
from sparring.auditing.cascade import profile as named_profile
from sparring.auditing.evidence import Evidence
from sparring.auditing.hunt import Front, Setting
from sparring.auditing.measuring import VERSION, measure
from sparring.auditing.plan import common
from sparring.auditing.proving import EFFORTS, LAST, SCREENED, Prover, planned, spot_check
from sparring.auditing.run import Run
from sparring.auditing.search import Search, Tell
from sparring.auditing.standing import BROKEN, ERROR, WAITING, Standing
from sparring.auditing.summary import row_ids, summarise, write_rows
from sparring.auditing.victim import Victim, meet
from sparring.core.errors import UsageError
from sparring.core.model import Model
from sparring.core.showing import percent, table
from sparring.core.threat import Threat
from sparring.core.verdict import Verdict
from sparring.data.images import Dataset, Images
from sparring.engine import width as widths
from sparring.models.spec import digest_of
from sparring.models.wrap import wrap

CHECKED = 64  # rows that the checklist looks at


@dataclass(frozen=True)
class Audit:
    """A finished audit, or one that its budget ended; `figures` are those that `--json` prints."""

    run: Path
    figures: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Rows of each verdict."""
        return dict(self.figures["counts"])

    @property
    def robust_accuracy(self) -> tuple[float, float]:
        """The interval that holds the robust accuracy on these rows."""
        ends = self.figures["robust_accuracy"]
        return ends["lower"], ends["upper"]

    @property
    def clean_accuracy(self) -> float | None:
        """The share of rows looked at that the model gets right when they are left alone; None if none was."""
        share: float | None = self.figures["clean_accuracy"]
        return share

    @property
    def warnings(self) -> list[str]:
        """What makes these figures unreliable, and what to do next."""
        return list(self.figures["warnings"])

    @property
    def complete(self) -> bool:
        """Was there time for everything?"""
        return bool(self.figures["complete"])

    @property
    def sentence(self) -> str:
        """The interval in words."""
        ends, people = self.figures["robust_accuracy"], self.figures["population"]
        proved, unbroken = percent(ends["lower"]), percent(ends["upper"])
        said = f"robust accuracy between {proved} (proved) and {unbroken} (not broken by what was tried)"
        if people is None:
            return said
        between = f"between {percent(people['lower'])} and {percent(people['upper'])}"
        return f"{said}; for all such images, with {people['level']:.0%} confidence, {between}"

    def _repr_html_(self) -> str:
        rows = self.figures["rows"]
        lines = [(name, count, percent(count / rows)) for name, count in self.counts.items()]
        title = f"{rows} images, clean accuracy {percent(self.clean_accuracy)}"
        warned = "".join(f" Warning: {warning}." for warning in self.warnings)
        return table(title, ("verdict", "rows", "share"), lines, f"{self.sentence}.{warned}")

    def verdicts(self) -> dict[int, Verdict]:
        """The verdict of every row by id."""
        run = Run.open(self.run)
        standing = Standing.of(Evidence(run))
        unseen = dict.fromkeys(row_ids(run), Verdict.UNDECIDED)
        return unseen | dict(zip(standing.ids.tolist(), standing.verdicts, strict=True))

    def witnesses(self) -> dict[int, Tensor]:
        """The adversarial image (c, h, w) of every broken row by id, as stored."""
        evidence = Evidence(Run.open(self.run))
        standing = Standing.of(evidence)
        return standing.images(evidence, (standing.state == BROKEN).nonzero().squeeze(1), nearest=False)

    def distances(self) -> dict[int, float]:
        """The smallest distance found of every row by id: 0 where misclassified, infinite where none was found."""
        run, standing = self._measured()
        found = dict(zip(standing.ids.tolist(), standing.reach.tolist(), strict=True))
        return dict.fromkeys(row_ids(run), math.inf) | found

    def nearest(self) -> dict[int, Tensor]:
        """The image (c, h, w) at that distance of every row by id, as stored; none of rows that are misclassified."""
        run, standing = self._measured()
        return standing.images(Evidence(run), (standing.near >= 0).nonzero().squeeze(1), nearest=True)

    def _measured(self) -> tuple[Run, Standing]:
        run = Run.open(self.run)
        if not run.plan["settings"].get("distances"):
            raise UsageError("this audit looked for no distances; run it with distances=True (--distances)")
        return run, Standing.of(Evidence(run))


def audit(
    model: object,
    data: Images | Dataset | tuple[Tensor, Tensor],
    threat: Threat,
    *,
    profile: str = "standard",
    seed: int = 0,
    limit: int | None = None,
    budget: float | None = None,
    eight_bit: bool = False,
    distances: bool = False,
    certify: bool = True,
    width: int | None = None,
    device: str = "cpu",
    out: Path | str | None = None,
    name: str | None = None,
    tell: Tell = lambda *_: None,
) -> Audit:
    """A verdict for every test image of `data`: misclassified, broken, certified, undecided or error.

    `model` is anything that `sparring.wrap` takes; `data` may be images (n, c, h, w) in the model's pixel range
    with labels (n,). The same call with the same `out` goes on where a run was cut short; without `out` the run
    folder lasts as long as the result. `budget` is in seconds. With `eight_bit` only images that survive as
    8-bit files count. With `distances` every row that is right when untouched also gets the smallest perturbation
    that could be found, and the figures the whole curve of robust accuracy over eps. With `certify` (linf and l2,
    models that torch computes) bounds prove what they can before anything is attacked. `tell` is told what is going
    on, rows done, and of how many.
    """
    if budget is not None and not budget > 0:
        raise UsageError(f"expected a budget above 0 seconds, got {budget}")
    if width is not None and width < 1:
        raise UsageError(f"expected a width of at least 1, got {width}")
    deadline = None if budget is None else time.monotonic() + budget
    queried = wrap(model)
    images, plan = images_of(data).take(limit), named_profile(profile)
    victim = meet(queried, images, threat, device)
    with ExitStack() as undo:
        folder = Path(tempfile.mkdtemp(prefix="sparring-audit-")) if out is None else Path(out)
        if out is None:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        setting = Setting(
            victim,
            threat,
            width or widths.automatic(images.x[0]),
            seed,
            eight_bit,
            device,
            (lambda: False) if deadline is None else (lambda: time.monotonic() > deadline),
        )
        about = {"model": name or type(queried).__name__, "model_digest": digest_of(queried)}
        run = Run.create(folder, "audit", about | _asked(setting, victim, plan, images, distances, certify))
        search = Search(setting, plan, images, run, tell)
        prover = Prover(search, queried) if certify and threat.eps else None
        finished = _work(search, prover) and (not distances or measure(search))
        _afterwards(search, queried, victim, finished)
        audit = Audit(run.path, conclude(run))
        weakref.finalize(audit, undo.pop_all().close)  # what is temporary lasts as long as the result
    return audit


def _work(search: Search, prover: Prover | None) -> bool:
    """The clean images, proofs, attacks; returns whether there was time for all of them."""
    if prover is None:
        return search.work()
    profile = search.plan.name
    if not search.look() or not prover.work(EFFORTS[profile], screened=profile in SCREENED):
        return False
    if not spot_check(search, "spot_check") or not search.attack(prover.number):
        return False
    if (search.run.figures("proofs") or {}).get("linear"):  # nothing is open
        return True
    prover.number = max(search.standing.stages)
    return prover.work(LAST[profile]) and spot_check(search, "last_spot_check")


def conclude(run: Run) -> dict[str, Any]:
    """Rebuild what is derived from an audit's shards: the section `audit`, `rows.csv` and `result.json`."""
    figures = summarise(run) | {"run": str(run.path)}
    run.record("audit", {key: value for key, value in figures.items() if key != "run"})
    write_rows(run)
    run.write_result()
    return figures


def _asked(
    setting: Setting, victim: Victim, plan: Profile, images: Images, distances: bool, certify: bool
) -> dict[str, Any]:
    """What is asked for: all that must be the same when the run is taken up."""
    threat = setting.threat
    settings = {"threat": repr(threat), "profile": asdict(plan), "profile_version": plan.version}
    settings |= {"distances": {"version": VERSION}} if distances else {}
    settings |= {"certify": planned(plan.name)} if certify else {}
    return {
        "data": images.name,
        "rows": {"test": len(images)},
        "settings": settings | {"eight_bit": setting.eight_bit, "access": victim.access.name},
        "threat": threat.describe(),
        "norm": threat.norm,
        "eps": threat.eps,
        "profile": plan.name,
        **common(images, setting.seed, setting.device),
        "classes": [*images.classes, *map(str, range(len(images.classes), victim.classes))],
        "ids": None if torch.equal(images.ids, torch.arange(len(images))) else images.ids.tolist(),
    }


def images_of(data: Images | Dataset | tuple[Tensor, Tensor]) -> Images:
    """The test images of `data`."""
    if isinstance(data, Dataset):
        return data.test
    if isinstance(data, Images):
        return data
    x, y = data
    classes = tuple(str(label) for label in range(max(2, int(y.max()) + 1 if len(y) else 2)))
    return Images("images", x.detach(), y, torch.arange(len(x)), classes)


def _afterwards(search: Search, model: Model, victim: Victim, finished: bool) -> None:
    """The checklist and the curve, once, and as far as there is time; then the mark that all is done."""
    run, standing, images = search.run, search.standing, search.images
    stop: Callable[[], bool] = search.setting.stop
    right = (standing.clean_label == standing.y) & (standing.state != WAITING) & (standing.state != ERROR)
    places = right.nonzero().squeeze(1)
    places = places[torch.linspace(0, len(places) - 1, min(CHECKED, len(places))).long()] if len(places) else places
    x, y, ids = search.to(images.x[places]), search.to(images.y[places]), search.to(images.ids[places])
    setting = search.setting
    if not run.figures("checklist") and not stop():
        began = time.monotonic()
        search.tell("checklist", 0, 1)
        signs, cost = masking.check(
            model, x, y, setting.threat, ids=ids, seed=setting.seed, width=setting.width, stop=stop
        )
        told = {"signs": [asdict(sign) for sign in signs], "rows": len(x), "seconds": time.monotonic() - began}
        if not stop():
            run.record("checklist", {**told, **asdict(cost)})
    drawn_anyway = search.plan.name == "quick" or run.plan["settings"].get("distances")
    if not run.figures("curve") and not stop() and not drawn_anyway and setting.threat.eps:
        began = time.monotonic()
        search.tell("curve", 0, 1)
        front = Front(x, y, ids, x, torch.full((len(x),), -torch.inf, device=x.device))
        front = front.take(torch.arange(0, len(x), max(1, -(-len(x) // curve.ROWS)), device=x.device))
        clean = float((standing.clean_label == standing.y).double().mean())
        drawn = curve.measure(setting, front, clean, stop)
        if drawn is not None:
            run.record("curve", {**drawn, "seconds": time.monotonic() - began})
    gallery.hang(run, standing, images)
    if finished and not stop() and not run.figures("finished"):
        run.record("finished", {"access": victim.access.name, "probabilities": victim.probabilities})
