"""`sparring universal`: fit one perturbation on training images, and judge it on test images."""

from __future__ import annotations

from functools import partial

from sparring.auditing.run import Run
from sparring.cli import fitted, options
from sparring.cli.show import Show
from sparring.core.showing import rounded
from sparring.core.threat import threat
from sparring.data import load
from sparring.fitted.ascent import Ascent
from sparring.fitted.universal import fit_universal
from sparring.reporting.shared import perturbation


def command(
    model: fitted.Victim,
    data: options.Data = None,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    target: fitted.Target = None,
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
    """Fit one perturbation that fools MODEL on as many images as it can, and judge it on images it never saw."""
    show, where = Show(json), options.device(device)
    limits, how = threat(norm, options.radius(norm, eps)), Ascent(steps, batch, seed=seed)
    victim = options.victim(model, where, None)
    images = load(options.dataset(data, victim), data_dir, on_status=show.say)
    subject = fitted.Subject.of(victim, images, fit_rows, limit, where)
    settings = {"threat": repr(limits), "target": target, "ascent": repr(how), "width": width}
    run = Run.create(out, "universal", subject.plan(settings, seed))
    with show.progress():
        fit = fit_universal(
            victim.model,
            subject.train,
            limits,
            target=target,
            width=width,
            on_progress=partial(show.tick, "fitting"),
            steps=steps,
            batch=batch,
            seed=seed,
        )
    found = fitted.Found(
        what="perturbation",
        threat=limits.describe(),
        target=target,
        passes=(fit.forward, fit.backward),
        train=fit.judge(victim.model, subject.train, width=width),
        test=fit.judge(victim.model, subject.test, width=width),
        controls={"random noise": fit.control(seed).judge(victim.model, subject.test, width=width)},
    )
    shown, tensors = fitted.gallery(subject, found, fit.apply(subject.test.x))
    length = rounded(float(limits.length(fit.delta.double().flatten()[None])))
    told = fitted.figures(subject, found) | shown | {"norm": norm, "eps": eps, "length": length}
    fitted.finish(show, run, "universal", told, tensors | {"delta": fit.delta}, perturbation(fit.delta.cpu())[0])
