"""The verdict on every image, and the interval that holds the robust accuracy."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.core.verdict import Verdict
from sparring.reporting.audited import AXIS, MEANING, Figures
from sparring.reporting.markup import block, details, heading, join, paragraph, table
from sparring.reporting.wording import count, percent, span, threat_name

ORDER = 80
TITLE = "The verdict"

TITLE_OF_PROOFS = "what is proved"

_LEAD = (
    "Every test image gets one verdict. Robust accuracy lies between the share that is proved robust and the "
    "share that is not broken: the interval is as wide as what nobody could decide."
)


def render(run: Run) -> str | None:
    """The bar of verdicts with the interval on it, and what may be concluded."""
    figures = run.figures("audit")
    if not figures:
        return None
    said = Markup("<ul>{}</ul>").format(join(Markup("<li>{}</li>").format(line) for line in _reading(run, figures)))
    why = block("why", heading("What it says, and what not"), said, _errors(figures))
    return join([paragraph(_LEAD, "lead"), _card(run, figures), why])


def _ends(figures: Figures, key: str) -> tuple[float | None, float | None]:
    ends = figures.get(key) or {}
    return ends.get("lower"), ends.get("upper")


def _card(run: Run, figures: Figures) -> Markup:
    """The interval in large figures, the bar, its legend and its table."""
    rows, counts = figures.get("rows") or 0, figures.get("counts") or {}
    interval = span(*_ends(figures, "robust_accuracy"))
    shares = {verdict: counts.get(verdict, 0) / rows if rows else 0.0 for verdict in AXIS}
    told = [f"{verdict} {count(counts.get(verdict, 0))} ({percent(shares[verdict])})" for verdict in AXIS]
    alt = f"The verdicts on {count(rows)} images: {', '.join(told)}. Robust accuracy: {interval}."
    keys = [
        Markup('<li><i class="swatch {}"></i>{}</li>').format(verdict, words)
        for verdict, words in zip(AXIS, told, strict=True)
    ]
    lines = [(verdict, count(counts.get(verdict, 0)), percent(shares[verdict]), MEANING[verdict]) for verdict in AXIS]
    return block(
        "verdict",
        Markup(
            '<p class="interval"><strong>{}</strong> <span>robust accuracy on these {} images, {}</span></p>'
        ).format(interval, count(rows), threat_name(run.plan)),
        Markup('<figure role="img" aria-label="{}">{}</figure>').format(alt, _bar(figures, shares, counts)),
        Markup('<ul class="legend">{}</ul>').format(join(keys)),
        details("The figures", table("The verdicts", ("verdict", "images", "share", "meaning"), lines)),
    )


def _bar(figures: Figures, shares: Mapping[Verdict, float], counts: Figures) -> Markup:
    """The verdicts as one bar on the axis of accuracy, with the intervals above and below it."""
    parts = [
        Markup('<span class="{}" style="width:{:.4f}%">{}</span>').format(
            verdict, 100 * shares[verdict], count(counts[verdict]) if shares[verdict] >= 0.07 else ""
        )
        for verdict in AXIS
        if shares[verdict]
    ]
    ticks = Markup("").join(Markup("<span>{} %</span>").format(tick) for tick in (0, 25, 50, 75, 100))
    level = (figures.get("population") or {}).get("level")
    people = _ends(figures, "population")
    clean = figures.get("clean_accuracy")
    here, all_images = span(*_ends(figures, "robust_accuracy")), span(*people)
    return join(
        [
            _range(f"Robust accuracy on these images: {here}", *_ends(figures, "robust_accuracy")),
            Markup('<div class="stack">{}</div><div class="ticks">{}</div>').format(join(parts), ticks),
            _range(f"On all images like these, with {percent(level, 0)} confidence: {all_images}", *people, "people"),
            _range(f"Clean accuracy on these images: {percent(clean)}", clean, clean, "point"),
        ]
    )


def _range(words: str, low: float | None, high: float | None, style: str = "") -> Markup:
    """A bracket from `low` to `high` on the axis, with its words above; nothing where an end is missing."""
    if low is None or high is None:
        return Markup()
    return Markup(
        '<div class="range {}"><p>{}</p><div class="track"><b style="left:{:.4f}%;width:{:.4f}%"></b></div></div>'
    ).format(style, words, 100 * low, 100 * (high - low))


def _reading(run: Run, figures: Figures) -> list[str | Markup]:
    """What may be concluded, a sentence or two each."""
    counts = figures.get("counts") or {}
    broken, undecided = counts.get(Verdict.BROKEN, 0), counts.get(Verdict.UNDECIDED, 0)
    told: list[str | Markup] = [
        f"Undecided ({_images(undecided)}) means: nothing tried here broke the image, and nothing proved that it "
        "cannot be broken. It is not called robust."
        if undecided
        else "No image is undecided."
    ]
    told.append(_proved(run, figures, counts.get(Verdict.CERTIFIED, 0)))
    if failed := counts.get(Verdict.ERROR, 0):
        told.append(f"On {_images(failed)} the model failed; they may be either, and count towards the upper end.")
    told.append(
        "The interval for all images like these is that of Clopper and Pearson: it adds the error of a "
        "sample, and takes the images for an independent one."
    )
    if moved := figures.get("moved"):
        told.append(
            f"{_images(moved).capitalize()} looked broken once, and held when the same point was judged again: "
            "rounding, or other draws of a random model, decide there."
        )
    else:
        told.append("No image looked broken once and held when it was judged again: rounding alone decided nowhere.")
    told += _as_files(run, figures, broken)
    return told + _completeness(run, figures)


def _proved(run: Run, figures: Figures, certified: int) -> str | Markup:
    """What stands behind the lower end of the interval."""
    proofs = figures.get("proofs")
    if proofs is None:
        if certified:
            return f"Certified ({_images(certified)}) means: the ball holds the image alone, which is read right."
        return "No proof of robustness has been attempted, so the lower end of the interval is 0."
    link = Markup('<a href="#certified">{}</a>').format(TITLE_OF_PROOFS)
    if certified:
        said = (
            f"Certified ({_images(certified)}) means: proved that no image within eps is read as anything else; see "
        )
        return Markup("{}{}.").format(said, link)
    if proofs.get("why_not"):
        return f"The lower end of the interval is 0: {proofs['why_not']}."
    return Markup("No image could be proved robust, so the lower end of the interval is 0: see {}.").format(link)


def _images(number: int) -> str:
    return f"{count(number)} image{'s' * (number != 1)}"


def _as_files(run: Run, figures: Figures, broken: int) -> list[str | Markup]:
    """How many of the adversarial images are still adversarial as 8-bit files."""
    if (run.plan.get("settings") or {}).get("eight_bit"):
        return ["Only an image that is still adversarial as an 8-bit file counts as broken in this run."]
    survive = figures.get("survive_as_8_bit")
    if survive is None:
        return ["No image was broken, so there is none to store as an 8-bit file."]
    kept = f"{count(round(survive * broken))} of the {count(broken)}"
    return [f"Stored as 8-bit files, {kept} adversarial images still are ({percent(survive)}); exact, all are."]


def _completeness(run: Run, figures: Figures) -> list[str | Markup]:
    """What was done, and what was left out."""
    told: list[str | Markup] = []
    if figures.get("complete"):
        told.append(
            f"The search is complete: the profile “{run.plan.get('profile', 'not recorded')}” was played out."
        )
    else:
        told.append(
            "The search is not complete: it ended before its last stage, and images stand undecided that it "
            "would have tried again. The same command goes on from there."
        )
    looked = next((stage.get("rows") for stage in figures.get("stages") or []), 0) or 0
    if unseen := max(0, (figures.get("rows") or 0) - looked):
        told.append(f"{_images(unseen).capitalize()} had not even been looked at; they count as undecided.")
    signs = (run.figures("checklist") or {}).get("signs")
    raised = sum(bool(sign.get("raised")) for sign in signs or [])
    if signs is None:
        told.append("The checklist was not measured: nothing here says whether the attacks worked as they should.")
    elif raised:
        link = Markup('<a href="#checklist">{}</a>').format("the checklist")
        signals = "1 warning sign is" if raised == 1 else f"{raised} warning signs are"
        told.append(Markup("{} raised, so the upper end may be too high: see {}.").format(signals, link))
    if not run.figures("curve") and not figures.get("distances"):
        told.append("Robust accuracy at other eps was not measured.")
    return told


def _errors(figures: Figures) -> Markup | str:
    """The first failures of the model, to unfold."""
    errors = figures.get("errors") or {}
    return details("The first errors", table("Errors", ("image", "what happened"), errors.items())) if errors else ""
