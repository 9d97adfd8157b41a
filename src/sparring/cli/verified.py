"""Properties of ONNX networks one by one, or a benchmark's list of them: what is read, and what is written."""

from __future__ import annotations

import csv
import io
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparring.certificates.properties import SAT, TIMEOUT, UNKNOWN, UNSAT, Answer, verify
from sparring.certificates.vnnlib import read_property
from sparring.cli.show import Show
from sparring.core.errors import IncompleteError, ModelError, UsageError
from sparring.core.files import unzipped, write_atomic
from sparring.models.onnx_function import open_function

ERROR = "error"
HEAD = ("onnx", "vnnlib", "verdict", "seconds")


@dataclass(frozen=True)
class Instance:
    """One line of a list, with its paths as they stand there."""

    onnx: str
    vnnlib: str
    timeout: float


@dataclass(frozen=True)
class Row:
    """One line of the results."""

    onnx: str
    vnnlib: str
    verdict: str
    seconds: float

    @property
    def key(self) -> tuple[str, str]:
        """What was asked."""
        return self.onnx, self.vnnlib


def decide(onnx: Path, vnnlib: Path, timeout: float) -> Answer:
    """The answer for the files at `onnx` and `vnnlib`, read within the `timeout` in seconds as well."""
    start = time.monotonic()
    prop, network = read_property(vnnlib), open_function(onnx)
    answer = verify(network, prop, timeout=max(0.0, start + timeout - time.monotonic()))
    return replace(answer, seconds=time.monotonic() - start)


def told(answer: Answer) -> str:
    """The answer as the verification competition writes it: the verdict, then a counterexample's numbers."""
    if answer.point is None or answer.outputs is None:
        return f"{answer.verdict}\n"
    named = (("X", answer.point.tolist()), ("Y", answer.outputs.tolist()))
    pairs = [f"({letter}_{at} {value!r})" for letter, values in named for at, value in enumerate(values)]
    return f"{answer.verdict}\n({chr(10).join(pairs)})\n"


def as_json(answer: Answer) -> dict[str, Any]:
    """The answer for --json."""
    found = {"verdict": answer.verdict, "seconds": round(answer.seconds, 3), "by": answer.by, "nodes": answer.nodes}
    if answer.point is not None and answer.outputs is not None:
        found["counterexample"] = {"x": answer.point.tolist(), "y": answer.outputs.tolist()}
    return found


def read_instances(path: Path, timeout: float | None) -> list[Instance]:
    """The lines onnx,vnnlib,seconds of the list at `path`; `timeout` caps them, and stands in for a missing one."""
    found = []
    for number, line in enumerate(csv.reader(io.StringIO(unzipped(path).decode())), start=1):
        words = [word.strip() for word in line]
        if not any(words):
            continue
        try:
            seconds = float(words[2]) if len(words) == 3 else timeout
        except ValueError:
            seconds = None
        if len(words) not in (2, 3) or seconds is None or not seconds > 0:
            raise UsageError(f"{path}, line {number}: expected onnx,vnnlib,seconds, got {','.join(line)!r}")
        found.append(Instance(words[0], words[1], seconds if timeout is None else min(seconds, timeout)))
    if not found:
        raise UsageError(f"expected lines onnx,vnnlib,seconds in {path}, found none")
    return found


def read_results(path: Path) -> list[Row]:
    """The results at `path`; none if there is no file."""
    if not path.exists():
        return []
    lines = list(csv.reader(io.StringIO(path.read_text())))
    try:
        if tuple(lines[0]) != HEAD:
            raise ValueError
        return [Row(onnx, vnnlib, verdict, float(seconds)) for onnx, vnnlib, verdict, seconds in lines[1:]]
    except (ValueError, IndexError):
        raise UsageError(
            f"expected results with the columns {','.join(HEAD)} in {path}, got something else; give another --out"
        ) from None


def write_results(path: Path, rows: list[Row]) -> None:
    """Put `rows` at `path`, whole or not at all."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(HEAD)
    lines.writerows((row.onnx, row.vnnlib, row.verdict, f"{row.seconds:.3f}") for row in rows)
    write_atomic(path, text.getvalue().encode())


def run_list(show: Show, path: Path, out: Path, timeout: float | None) -> None:
    """Every instance of the list at `path` whose result is not yet at `out`, which is written after each.

    The counterexamples lie in a folder beside it.
    """
    instances, rows = read_instances(path, timeout), read_results(out)
    have, answers = Counter(row.key for row in rows), []
    for number, instance in enumerate(instances, start=1):
        if have[instance.onnx, instance.vnnlib]:
            have[instance.onnx, instance.vnnlib] -= 1
            continue
        answer, reason = _one(path.parent, instance)
        rows = [*rows, Row(instance.onnx, instance.vnnlib, answer.verdict, answer.seconds)]
        _keep(answer, out, number, instance)
        write_results(out, rows)
        answers.append({"onnx": instance.onnx, "vnnlib": instance.vnnlib, **as_json(answer)})
        what = f"{instance.onnx} {instance.vnnlib}{reason}"
        show.say(f"{number}/{len(instances)} {answer.verdict} {answer.seconds:.1f} s {what}")
    _conclude(show, rows, answers, out)


def _keep(answer: Answer, out: Path, number: int, instance: Instance) -> None:
    """Put a counterexample beside the results: results.counterexamples/<line>-<net>-<property>.txt."""
    if answer.point is not None:
        folder = out.with_suffix(".counterexamples")
        folder.mkdir(parents=True, exist_ok=True)
        stems = "-".join(Path(path).name.split(".")[0] for path in (instance.onnx, instance.vnnlib))
        write_atomic(folder / f"{number}-{stems}.txt", told(answer).encode())


def _one(folder: Path, instance: Instance) -> tuple[Answer, str]:
    """The answer for one line; what fails is an answer too, with its reason."""
    start = time.monotonic()
    try:
        return decide(_found(folder / instance.onnx), _found(folder / instance.vnnlib), instance.timeout), ""
    except Exception as error:  # the others of the list are still to be answered
        return Answer(ERROR, "", time.monotonic() - start), f": {error}"


def _found(path: Path) -> Path:
    """`path`, or the packed file beside it: lists often name what they were packed from."""
    packed = path.with_name(path.name + ".gz")
    return packed if packed.is_file() and not path.is_file() else path


def _conclude(show: Show, rows: list[Row], answers: list[dict[str, Any]], out: Path) -> None:
    count = Counter(row.verdict for row in rows)
    show.table("", list(HEAD), [[row.onnx, row.vnnlib, row.verdict, f"{row.seconds:.1f}"] for row in rows])
    order = (SAT, UNSAT, UNKNOWN, TIMEOUT, ERROR)
    show.say(", ".join(f"{count[verdict]} {verdict}" for verdict in order if count[verdict]) + f"; results: {out}")
    results = [{name: getattr(row, name) for name in HEAD} for row in rows]
    show.result({"out": str(out), "counts": dict(count), "results": results, "answers": answers})
    if count[ERROR]:
        raise ModelError(f"{count[ERROR]} of {len(rows)} instances failed; their lines above say why")
    if count[UNKNOWN] + count[TIMEOUT]:
        raise IncompleteError(f"{count[UNKNOWN] + count[TIMEOUT]} of {len(rows)} instances are undecided")
