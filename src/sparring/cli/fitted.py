"""What the commands share that fit one thing for many images: their options, their plan, their figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sparring.auditing.plan import common
from sparring.auditing.run import Run
from sparring.cli.show import Show
from sparring.core.showing import percent, rounded
from sparring.core.threat import L2
from sparring.data import Dataset, Images
from sparring.data.images import to_bytes
from sparring.fitted.fooling import Fooling
from sparring.models.spec import Named
from sparring.reporting import write_report
from sparring.reporting.prints import poster

Target = Annotated[int | None, typer.Option("--target", min=0, help="The class to reach [default: any wrong one].")]
FitRows = Annotated[int, typer.Option("--fit-rows", min=1, help="Training images to fit on, spread over the split.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Batches to fit on.")]
BatchSize = Annotated[int, typer.Option("--batch", min=1, help="Images a batch.")]
Victim = Annotated[str, typer.Argument(help="A checkpoint, a .keras file, or file.py:function: with gradients.")]
SHOWN = 20  # of more classes, the first that many
RULE = "of each class the first test image that it fooled"


@dataclass(frozen=True)
class Subject:
    """A model with the images to fit on and those to judge on, all on one device."""

    victim: Named
    name: str  # of the data set
    train: Images
    test: Images
    device: str

    @classmethod
    def of(cls, victim: Named, data: Dataset, fit_rows: int, limit: int | None, device: str) -> Subject:
        """`fit_rows` images spread over the training split, and the first `limit` test images."""
        spread = torch.linspace(0, len(data.train) - 1, min(fit_rows, len(data.train))).long()
        return cls(
            victim, data.name, _to(data.train.select(spread), device), _to(data.test.take(limit), device), device
        )

    def plan(self, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """What the run writes down before it starts."""
        return {
            "model": self.victim.name,
            "model_digest": self.victim.digest,
            "data": self.name,
            "rows": {"train": len(self.train), "test": len(self.test)},
            "train_digest": self.train.digest(),
            "settings": settings,
            **common(self.test, seed, self.device),
        }


@dataclass(frozen=True)
class Found:
    """What was fitted, as judged on its training images and on the test images, and the controls on the latter."""

    what: str  # perturbation or patch
    threat: str
    target: int | None
    passes: tuple[int, int]  # forward and backward, of fitting
    train: Fooling
    test: Fooling
    controls: dict[str, Fooling]


def figures(subject: Subject, found: Found) -> dict[str, Any]:
    """What both commands say of what they found."""
    test, classes = found.test, len(subject.test.classes)
    best = max(found.controls, key=lambda name: found.controls[name].rate)
    pairs = zip(test.by_class(classes), found.controls[best].by_class(classes), strict=True)
    return {
        "what": found.what,
        "model": subject.victim.name,
        "data": subject.name,
        "threat": found.threat,
        "target": found.target,
        "rows": len(subject.test),
        "held": int(test.held.sum()),
        "draws": test.fooled.shape[1],
        "clean_accuracy": rounded((test.clean_label == subject.test.y).double().mean().item()),
        "rates": {"fitted": test.rate} | {name: fooling.rate for name, fooling in found.controls.items()},
        "control": best,
        "fit": {
            "rows": int(found.train.held.sum()),
            "success": found.train.rate,
            "forward": found.passes[0],
            "backward": found.passes[1],
        },
        "classes": [
            {"label": label, "rows": rows, "success": rounded(rate), "control": rounded(other)}
            for label, ((rows, rate), (_, other)) in enumerate(pairs)
        ],
        "named": test.named(classes).tolist(),
        "illegal": test.illegal,
        "failed": int(test.failed.sum()),
        "forward": test.forward,
    }


def gallery(subject: Subject, found: Found, points: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Of each class the first test image that fell, and what was said of it; attacked they are `points`."""
    test, images = found.test, subject.test
    fell = test.fooled[:, 0] & test.held
    first = [int((fell & (images.y == label)).nonzero()[0]) for label in sorted(set(images.y[fell].tolist()))][:SHOWN]
    far = L2(1.0).distance(points, images.x)
    shown = [
        {
            "id": int(images.ids[i]),
            "label": int(images.y[i]),
            "prediction": int(test.clean_label[i]),
            "confidence": rounded(float(test.clean_confidence[i])),
            "adversarial_prediction": int(test.label[i, 0]),
            "adversarial_confidence": rounded(float(test.confidence[i, 0])),
            "distance": rounded(float(far[i])),
        }
        for i in first
    ]
    tensors = {"x": to_bytes(images.x[first]), "adversarial": to_bytes(points[first])}
    tensors |= {"fooled": test.fooled, "held": test.held, "label": test.label, "sample": test.sample}
    return {"rule": RULE, "shown": shown}, tensors


def finish(
    show: Show, run: Run, section: str, told: dict[str, Any], tensors: dict[str, Tensor], drawn: Tensor
) -> None:
    """Store what was found with its picture `drawn` (c, h, w) uint8, and tell it."""
    run.record(section, told, tensors)
    large = run.write(f"{section}.png", poster(drawn))
    run.write_result()
    report = write_report(run)
    rates = told["rates"]
    lines = [[name if name == "fitted" else f"control: {name}", percent(rate)] for name, rate in rates.items()]
    show.table(
        f"{told['model']}, {told['threat']}: fooled among the {told['held']} of {told['rows']} rows of "
        f"{told['data']} that it gets right"
        + (" and that are of another class" if told["target"] is not None else ""),
        ["", "success"],
        [*lines, [f"fitted, on its {told['fit']['rows']} training images", percent(told["fit"]["success"])]],
    )
    show.say(f"to print: {large}")
    show.say(f"report: {report}")
    show.result(told | {"report": str(report), "run": str(run.path), "png": str(large)})


def _to(images: Images, device: str) -> Images:
    return replace(images, x=images.x.to(device), y=images.y.to(device), ids=images.ids.to(device))
