"""Certified accuracy alone: what one method proves of every row, and the gap to what a quick attack leaves."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.attacks.sprint import Sprint
from sparring.auditing import proofs
from sparring.auditing.audit import images_of
from sparring.auditing.cascade import profile
from sparring.auditing.distances import steps
from sparring.auditing.evidence import Evidence, as_json
from sparring.auditing.hunt import Front, Hunt, Setting
from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.plan import common
from sparring.auditing.provers import METHODS
from sparring.auditing.proving import VERSION, Effort, Prover, contradict
from sparring.auditing.radii import widen
from sparring.auditing.run import Run
from sparring.auditing.search import Search, Tell
from sparring.auditing.standing import CERTIFIED, HELD, MISCLASSIFIED, Standing
from sparring.auditing.summary import LEVEL, row_ids
from sparring.auditing.victim import meet
from sparring.core.errors import ModelError, UsageError, unknown
from sparring.core.showing import percent
from sparring.core.threat import Threat
from sparring.data.images import Dataset, Images
from sparring.engine import width as widths
from sparring.models.spec import digest_of
from sparring.models.wrap import wrap

GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)  # of the eps asked for, at which rows are attacked
COLUMNS = ("id", "label", "clean_label", "verdict", "method", "bound", "guard", "radius", "attacked_at")
_SALT = 60_000_000


@dataclass(frozen=True)
class Certification:
    """What was proved; `figures` are those that `--json` prints."""

    run: Path
    figures: dict[str, Any]

    @property
    def certified_accuracy(self) -> float:
        """The share of rows that are right and proved robust."""
        share: float = self.figures["certified_accuracy"]
        return share

    @property
    def complete(self) -> bool:
        """Was there time for everything?"""
        return bool(self.figures["complete"])

    @property
    def sentence(self) -> str:
        """The figures in words."""
        far, figures = self.figures["empirical"], self.figures
        said = f"certified accuracy {percent(self.certified_accuracy)} ({figures['method']})"
        if far is None:
            return said
        gap = percent(max(0.0, far["robust_accuracy"] - self.certified_accuracy))
        return f"{said}; a quick attack leaves {percent(far['robust_accuracy'])}, and the {gap} between are unknown"

    def radii(self) -> dict[int, float]:
        """The largest radius at which each row is known to be robust, by id; -1 where it is read wrong."""
        run = Run.open(self.run)
        standing = Standing.of(Evidence(run))
        known = proofs.proved_at(standing, run.plan["eps"])
        return dict.fromkeys(row_ids(run), 0.0) | dict(zip(standing.ids.tolist(), known.tolist(), strict=True))


def certify(
    model: object,
    data: Images | Dataset | tuple[Tensor, Tensor],
    threat: Threat,
    out: Path | str,
    *,
    method: str = "alpha-crown",
    radius: bool = False,
    limit: int | None = None,
    budget: float | None = None,
    width: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    name: str | None = None,
    tell: Tell = lambda *_: None,
) -> Certification:
    """What `method` proves of every test image of `data` in `threat` (linf or l2), in the run folder `out`.

    With `radius` also the largest eps at which each image is proved. A quick attack at several eps says how far the
    truth can lie above. The same call with the same `out` goes on where `budget` (seconds) or a crash ended it.
    """
    if budget is not None and not budget > 0:
        raise UsageError(f"expected a budget above 0 seconds, got {budget}")
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if not threat.eps > 0:
        raise UsageError(f"expected an eps above 0 to prove something at, got {threat.eps}")
    if threat.norm not in ("linf", "l2"):
        raise UsageError(f"expected a threat model in linf or l2 for a proof, got {threat.norm}")
    deadline = None if budget is None else time.monotonic() + budget
    queried, images = wrap(model), images_of(data).take(limit)
    victim = meet(queried, images, threat, device)
    late = (lambda: False) if deadline is None else (lambda: time.monotonic() > deadline)
    wide = width or widths.automatic(images.x[0])
    setting = Setting(victim, threat, wide, seed, device=device, stop=late)
    asked = {"version": VERSION, "method": method, "radius": radius}
    plan = {
        "model": name or type(queried).__name__,
        "model_digest": digest_of(queried),
        "data": images.name,
        "rows": {"test": len(images)},
        "settings": {"threat": repr(threat), "certify": asked, "access": victim.access.name},
        "threat": threat.describe(),
        "norm": threat.norm,
        "eps": threat.eps,
        **common(images, seed, device),
        "ids": None if torch.equal(images.ids, torch.arange(len(images))) else images.ids.tolist(),
    }
    run = Run.create(Path(out), "certify", plan)
    search = Search(setting, profile("quick"), images, run, tell)
    if _work(search, Prover(search, queried), method, radius) and not run.figures("finished"):
        run.record("finished", {"access": victim.access.name})
    return Certification(run.path, conclude(run))


def _work(search: Search, prover: Prover, method: str, radius: bool) -> bool:
    """The clean images, the proofs, the radii, the attack; returns whether there was time for all of them."""
    effort = Effort(method, paying=0.0, chunk=4 if method == "branch" else 32, pilot=64)
    if not search.look() or not prover.work((effort,)):
        return False
    told = search.run.figures("proofs") or {}
    if told.get("why"):
        raise ModelError(told["why"])
    best = "linear" if told.get("linear") else method
    return (not radius or widen(prover, best)) and _attack(search)


def _attack(search: Search) -> bool:
    """Attack every row that is right at one eps after the other; False when time ran out."""
    standing, run, setting = search.standing, search.run, search.setting
    if run.figures("empirical"):
        return True
    began, forward, backward = time.monotonic(), 0, 0
    right = ((standing.state == HELD) | (standing.state == CERTIFIED)).nonzero().squeeze(1)
    fallen = torch.full((len(standing.ids),), torch.inf, dtype=torch.float64)
    fallen[standing.state == MISCLASSIFIED] = 0.0
    known = proofs.proved_at(standing, setting.threat.eps)
    for place, factor in enumerate(GRID):
        at = right[fallen[right] == torch.inf]
        search.tell("attack", place, len(GRID))
        for part in search.chunks(at, 1) if len(at) else ():
            if setting.stop():
                return False
            x, y = search.images.x[part], search.images.y[part]
            front = Front(x, y, search.images.ids[part], x, torch.full((len(part),), -torch.inf))
            wider = replace(setting, threat=replace(setting.threat, eps=setting.threat.eps * factor))
            hunt = Hunt(wider, front.to(search.device))
            hunt.play(Sprint(12, loss="log_odds"), _SALT + place)
            if hunt.stopped:
                return False
            forward, backward = forward + int(hunt.forward.sum()), backward + int(hunt.backward.sum())
            won = hunt.found.cpu()
            fallen[part[won]] = setting.threat.distance(hunt.best.cpu(), x)[won]
            for row in (won & (fallen[part] <= known[part])).nonzero().squeeze(1).tolist():
                contradict(search, int(part[row]), hunt.best[row])
    spent = {"forward": forward, "backward": backward, "seconds": time.monotonic() - began}
    run.record("empirical", {"eps": [setting.threat.eps * factor for factor in GRID], **spent}, {
        "ids": standing.ids, "fallen": fallen, "radius": known,
    })  # fmt: skip
    return True


def conclude(run: Run) -> dict[str, Any]:
    """Rebuild what is derived from the shards: the section `certify`, `rows.csv` and `result.json`."""
    standing, plan = Standing.of(Evidence(run)), run.plan
    rows, eps = plan["rows"]["test"], plan["eps"]
    certified = int((standing.state == CERTIFIED).sum())
    low, high = clopper_pearson(certified, rows, LEVEL)
    figures = {
        "rows": rows,
        "method": plan["settings"]["certify"]["method"],
        "clean_accuracy": (standing.clean_label == standing.y).double().mean().item() if len(standing.y) else None,
        "certified_accuracy": certified / rows,
        "population": {"lower": low, "upper": high, "level": LEVEL},
        "counts": standing.counts,
        "seconds": round(sum(standing.seconds.values()), 3),
        "complete": (run.path / "evidence" / "finished.json").is_file(),
        "proofs": proofs.figures(run, standing),
        "radius": _radius(standing),
        "empirical": _empirical(run, rows, eps),
    }
    run.record("certify", figures)
    _write_rows(run, standing)
    run.write_result()
    return figures | {"run": str(run.path)}


def _radius(standing: Standing) -> dict[str, Any] | None:
    """How the radii lie, of the rows that are right; None where none was looked for."""
    known = standing.radius[~standing.radius.isnan()].sort().values
    if not len(known):
        return None
    return {"rows": len(known), "median": known[(len(known) - 1) // 2].item(), "mean": known.mean().item(),
            "largest": known[-1].item()}  # fmt: skip


def _empirical(run: Run, rows: int, eps: float) -> dict[str, Any] | None:
    """What the quick attack left, at `eps` and over the others; None where there was no time for it."""
    told = run.figures("empirical")
    if told is None:
        return None
    fallen = run.tensors("empirical")["fallen"].sort().values
    found = fallen[fallen < torch.inf]
    left = (rows - int((found <= eps).sum())) / rows
    return {"robust_accuracy": left, "curve": steps(found, rows, eps), "furthest": max(told["eps"])}


def _write_rows(run: Run, standing: Standing) -> None:
    fallen = run.tensors("empirical")
    told = dict(zip(fallen["ids"].tolist(), fallen["fallen"].tolist(), strict=True)) if fallen else {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, verdict in enumerate(standing.verdicts):
        row, radius = int(standing.ids[place]), as_json(standing.radius[place])
        far = told.get(row, torch.inf)
        writer.writerow(
            [
                row, int(standing.y[place]), int(standing.clean_label[place]), str(verdict),
                *proofs.cells(standing, place)[:3],
                "" if radius is None else radius,
                far if far < torch.inf else "",
            ]
        )  # fmt: skip
    for unseen in sorted(set(row_ids(run)) - set(standing.ids.tolist())):
        writer.writerow([unseen] + [""] * (len(COLUMNS) - 1))
    run.write("rows.csv", text.getvalue().encode())
