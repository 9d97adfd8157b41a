"""A page a defense: what it is, what was tried on it, and what broke it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.core.showing import number_of
from sparring.defending.defend import SECTION
from sparring.reporting.defended import (
    Row,
    about,
    anchor,
    badge,
    between,
    claimed,
    ends,
    fate,
    name,
    rows,
    sentence,
    share,
    sign,
)
from sparring.reporting.markup import bar, block, details, join, paragraph, table
from sparring.reporting.wording import MISSING, class_namer, count, number

ORDER = 73
TITLE = "Defense by defense"

LONGEST = 160  # letters of a guard's options
_ARTICLE = Markup('<article class="defense" id="{}"><h3>{} {}</h3>{}</article>')
_FACT = Markup("<div><dt>{}</dt><dd>{}</dd></div>")
_ITEM = Markup("<li><strong>{}</strong>: {}</li>")
_CLAIMS = ("differentiable", "randomised", "detects")
_NAIVE, _ADAPTIVE, _CARRIED, _LABELS, _BORROWED = "naive: ", "adaptive: ", "transfer: ", "labels only: ", "borrowed: "
_KINDS = {
    _NAIVE: "ignores the defense: points of the bare net",
    _ADAPTIVE: "knows it, stage by stage, each on what is left",
    _CARRIED: "points made on a bare net, carried over",
    _LABELS: "sees the label alone",
    _BORROWED: "images that broke another defense, on what is left",
}


def render(run: Run) -> str | None:
    """An article a defense, in the order of the ranking."""
    figures, found = run.figures(SECTION) or {}, rows(run)
    if not found:
        return None
    lead = "What each defense is and states, everything that was tried on it, and what broke it."
    return join([paragraph(lead, "lead"), *(_page(run, figures, row) for row in found)])


def _page(run: Run, figures: Mapping[str, Any], row: Row) -> Markup:
    left = block("what", heading_small("What it is"), _facts(row, figures.get("draws")))
    right = block("broke", heading_small("What broke it"), _broke(row), _signs(row))
    back = Markup('<a class="back" href="#defenses">to the ranking</a>')
    body = [paragraph(sentence(row), "finding"), block("halves", left, right), _tried(row), _images(run, row), back]
    return _ARTICLE.format(anchor(row), name(row), badge(row), join(body))


def heading_small(text: str) -> Markup:
    """A heading within an article."""
    return Markup("<h4>{}</h4>").format(text)


def _facts(row: Row, draws: int | None) -> Markup:
    """Whom it is from, what it states of its gradient, and what follows for who attacks it; what it comes to."""
    known = about(row)
    facts = [
        ("its gradient, as it states", _claims(known)),
        ("so the adaptive attack", _follows(known, draws)),
        ("rows without a gradient, as deployed", share(known.get("without_gradient"))),
        ("clean accuracy", share(row.get("clean"))),
        ("naive → adaptive", f"{share(row.get('naive'))} → {share(row.get('adaptive'))}"),
        ("adaptive, 95 % interval", between(ends(row))),
        ("proved", "no proof was within reach" if row.get("certified") is None else share(row.get("certified"))),
        (
            "training, an answer",
            f"{number(row.get('training_cost'), 1)} ×, {number(row.get('inference_cost'), 1)} × plain",
        ),
    ]
    if known.get("guard"):
        facts.insert(0, ("its options", _options(str(known["guard"]))))
    if folder := (known.get("audit") or {}).get("run"):
        facts.append(("evidence of the adaptive attack", folder))
    parts = [_ITEM.format(part.get("name", MISSING), _part(part)) for part in known.get("parts") or []]
    listed = Markup("<ul>{}</ul>").format(join(parts)) if parts else ""
    return join([listed, Markup("<dl>{}</dl>").format(join(_FACT.format(*fact) for fact in facts))])


def _options(text: str) -> str:
    """What a guard is made of, in a line: one that holds nets says much."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def _part(part: Mapping[str, Any]) -> str:
    """A recipe or a guard in its own words, and whom it is from."""
    about_it, paper = (str(part.get(key) or "").rstrip(".") for key in ("about", "paper"))
    return " ".join(filter(None, (f"{about_it}." * bool(about_it), f"({paper})" * bool(paper)))) or "not described."


def _claims(known: Mapping[str, Any]) -> str:
    """What the guard says of itself; a net alone says nothing."""
    if all(known.get(claim) is None for claim in _CLAIMS):
        return "a net alone, with the gradient of its layers"
    words = ["has one" if known.get("differentiable") else "has none"]
    words += ["draws at random" if known.get("randomised") else "always answers alike"]
    words += ["flags what it takes for an attack"] if known.get("detects") else []
    return ", ".join(words)


def _follows(known: Mapping[str, Any], draws: int | None) -> str:
    """How somebody attacks it who knows these claims."""
    if all(known.get(claim) is None for claim in _CLAIMS):
        return "follows the gradient of the net"
    told = ["goes straight through what has no gradient (BPDA)"] if not known.get("differentiable") else []
    told += [f"takes the mean over {number_of(draws or 0, 'draw')} (EOT)"] if known.get("randomised") else []
    told += ["counts the flag as one more class, to be avoided"] if known.get("detects") else []
    return ", ".join(told) or "follows the gradient through it"


def _stages(row: Row, kind: str) -> list[tuple[str, int, int]]:
    """Name, rows met, rows broken of the stages of a kind."""
    return [
        (str(stage.get("stage")).removeprefix(kind), stage.get("rows") or 0, stage.get("broke") or 0)
        for stage in about(row).get("tried") or []
        if str(stage.get("stage")).startswith(kind)
    ]


def _broke(row: Row) -> Markup:
    """Kind by kind, and the strongest of each kind."""
    tried = about(row).get("tried") or []
    items, most = [], max((stage.get("rows") or 0 for stage in tried), default=0)
    for kind in _KINDS:
        if stages := _stages(row, kind):
            told = _together(stages, most) if kind == _ADAPTIVE else _strongest(stages)
            items.append(_ITEM.format(kind.removesuffix(": "), told))
    if proved := sum(stage.get("certified") or 0 for stage in tried):
        items.append(_ITEM.format("proofs", f"{count(proved)} of {number_of(most, 'image')} proved robust"))
    if said := claimed(row):
        items.append(_ITEM.format("claimed, and no proof", said))
    if not items:
        return paragraph("What was tried was not recorded.")
    return Markup("<ul>{}</ul>").format(join(items))


def _strongest(stages: Sequence[tuple[str, int, int]]) -> str:
    """Of stages that each met all the rows: the one that broke most."""
    best, met, broke = max(stages, key=lambda stage: stage[2])
    if not met:
        return f"{best} had no image left to try"
    if not broke:
        return f"{best if len(stages) == 1 else f'all {len(stages)}'} broke none of {number_of(met, 'image')}"
    others = f", the most of {len(stages)}" if len(stages) > 1 else ""
    return f"{best} broke {count(broke)} of {number_of(met, 'image')}{others}"


def _together(stages: Sequence[tuple[str, int, int]], most: int) -> str:
    """Of stages that follow each other, on `most` images or a sample of them: what they broke, and which most."""
    fell: Counter[str] = Counter()
    for stage, _, broke in stages:
        fell[stage] += broke
    told = [f"{count(broke)} by {stage}" for stage, broke in fell.most_common(3) if broke]
    return f"broke {count(fell.total())} of {number_of(most, 'image')}{': ' * bool(told)}{', '.join(told)}"


def _signs(row: Row) -> Markup:
    """The warning signs that are raised."""
    raised = [sign(str(text)) for text in row.get("signs") or []]
    if not raised:
        return paragraph("No warning sign is raised.", "note")
    lines = Markup("<ul>{}</ul>").format(join(_ITEM.format(*told) for told in raised))
    return join([heading_small("Warning signs"), lines])


def _tried(row: Row) -> Markup:
    """Every stage as a table to unfold."""
    stages = about(row).get("tried") or []
    if not stages:
        return Markup()
    proving = any("certified" in stage for stage in stages)
    head = ("stage", "images met", "broken", "share of them", *(("proved",) if proving else ()))
    lines = []
    for stage in stages:
        met, broke = stage.get("rows") or 0, stage.get("broke") or 0
        part = broke / met if met else None
        line = (stage.get("stage"), count(met), count(broke), bar(part, share(part)))
        lines.append((*line, count(stage.get("certified"))) if proving else line)
    kinds = [f"{kind}{told}" for kind, told in _KINDS.items()]
    body = join([paragraph(f"{'; '.join(kinds)}.", "note"), table(f"What was tried on {name(row)}", head, lines)])
    return details(f"What was tried, stage by stage ({len(stages)})", body)


def _images(run: Run, row: Row) -> Markup:
    """What became of the images that are shown, as a table to unfold."""
    facts = about(row).get("images") or []
    if not facts:
        return Markup()
    named = class_namer(run.plan)
    lines = []
    for fact in facts:
        word, said = fate(row, fact, named)
        far = fact.get("distance")
        lines.append(
            (
                f"image {fact.get('id', MISSING)}", named(fact.get("label")), word, fact.get("by") or MISSING, said,
                MISSING if far is None else f"{far:.3g}",
            )
        )  # fmt: skip
    head = ("image", "class", "outcome", "by", "what it says of it", "distance")
    return details(f"The {number_of(len(facts), 'image')}", table(f"The images under {name(row)}", head, lines))
