"""`sparring patch`: fit an adversarial patch on training images, and judge it on test images."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from sparring.auditing.run import Run
from sparring.cli import fitted, options
from sparring.cli.show import Show
from sparring.data import load
from sparring.fitted.ascent import Ascent
from sparring.fitted.paste import Paste
from sparring.fitted.patch import CONTROLS, AdversarialPatch, fit_patch
from sparring.reporting.shared import patch as drawn

_PLAIN = {"noise": "noise", "low": "plain black", "grey": "plain grey", "high": "plain white"}


def command(
    model: fitted.Victim,
    size: Annotated[int, typer.Option("--size", min=1, help="Pixels a side, or across.")],
    data: options.Data = None,
    shape: Annotated[str, typer.Option("--shape", help="square or circle.")] = Paste.shape,
    rotation: Annotated[float, typer.Option("--rotation", help="Degrees it may turn, either way.")] = Paste.rotation,
    scale: Annotated[tuple[float, float], typer.Option("--scale", help="Least and largest factor.")] = Paste.scale,
    target: fitted.Target = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Places that each test image is judged at.")] = 4,
    fit_rows: fitted.FitRows = 2000,
    steps: fitted.Steps = Ascent.steps,
    batch: fitted.BatchSize = Ascent.batch,
    width: options.Width = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.DeviceName = "auto",
    out: options.Out = None,
    json: options.Json = False,
) -> None:
    """Fit a patch that fools MODEL wherever it lies on an image, and judge it on images it never saw."""
    show, where = Show(json), options.device(device)
    how, ascent = Paste(size, shape, rotation, scale), Ascent(steps, batch, seed=seed)
    victim = options.victim(model, where, None)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say)
    subject = fitted.Subject.of(victim, images, fit_rows, limit, where)
    settings = {"patch": repr(how), "target": target, "draws": draws, "ascent": repr(ascent), "width": width}
    run = Run.create(out, "patch", subject.plan(settings, seed))
    with show.progress():
        fit = fit_patch(
            victim.model,
            subject.train,
            how,
            target=target,
            width=width,
            on_progress=partial(show.tick, "fitting"),
            steps=steps,
            batch=batch,
            seed=seed,
        )
    judged = partial(AdversarialPatch.judge, model=victim.model, draws=draws, seed=seed, width=width)
    found = fitted.Found(
        what="patch",
        threat=f"{shape} patch of {size} pixels",
        target=target,
        passes=(fit.forward, fit.backward),
        train=judged(fit, test=subject.train),
        test=judged(fit, test=subject.test),
        controls={_PLAIN[k]: judged(fit.control(k, seed), test=subject.test) for k in CONTROLS},
    )
    points, _ = fit.apply(subject.test.x, subject.test.ids, seed=seed)
    shown, tensors = fitted.gallery(subject, found, points)
    told = fitted.figures(subject, found) | shown | {"size": size, "shape": shape}
    patch, mask = fit.patch.cpu(), fit.mask.cpu()
    fitted.finish(show, run, "patch", told, tensors | {"patch": patch, "mask": mask}, drawn(patch, mask, fit.bounds))
