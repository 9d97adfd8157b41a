"""What was run, to the last setting, and what these figures do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from sparring.auditing.run import Run
from sparring.reporting.markup import block, heading, join, paragraph
from sparring.reporting.wording import UPPER_BOUND, threat_name

ORDER = 90
TITLE = "Settings and limits"

_SAMPLE = "A figure measured on n test images carries sampling error; another seed gives other digits."
_PROOF = (
    "A proof speaks of the model as torch computes it here, with the roundings of plain sums and products covered; "
    "another runtime, another precision or a fast convolution (Winograd) may round more."
)
_ALWAYS = (f"Where a robust accuracy stands here, it is {UPPER_BOUND}.", _SAMPLE)


def render(run: Run) -> str | None:
    """Every field of the plan, and the limits it states."""
    plan = run.plan
    of_kind = {"audit": _of_an_audit, "certify": _of_proofs}.get(str(plan.get("kind")))
    limits = [*(plan.get("limits") or ()), *(_ALWAYS if of_kind is None else of_kind(run))]
    items = Markup("").join(Markup("<li>{}</li>").format(limit) for limit in limits)
    honest = block("limits", heading("Honest limits"), Markup("<ul>{}</ul>").format(items))
    single = {key: value for key, value in plan.items() if not isinstance(value, dict) and key != "limits"}
    groups = [
        ("run", single),
        *_groups({key: value for key, value in plan.items() if isinstance(value, dict)}),
    ]
    lists = [_definitions(title, fields) for title, fields in groups if fields]
    return join(
        [
            honest,
            paragraph("Everything the run was asked for, as its plan holds it.", "lead"),
            block("plan", *lists),
        ]
    )


def _of_an_audit(run: Run) -> Iterator[str]:
    """What the figures of an audit do not show."""
    yield (
        "Robust accuracy stands here as an interval: the upper end counts all that nothing tried here broke, the "
        "lower end only what was proved robust. A stronger attack lowers the one, a proof raises the other."
    )
    yield f"It is about {threat_name(run.plan)} alone, and says nothing of other changes to an image."
    if run.figures("proofs"):
        yield _PROOF
    if run.figures("curve"):
        yield "The curve over eps is an upper bound at each point, by few and quick attacks on few images."
    if (run.figures("audit") or {}).get("distances"):
        yield "A distance is the smallest that was found: the curve drawn from them is an upper bound at each point."
    if run.figures("checklist"):
        yield "The checklist looks for known failures of attacks, on a sample; no warning is no proof."
    else:
        yield "The checklist was not measured: known failures of attacks were not looked for."
    if not (run.figures("audit") or {}).get("complete"):
        yield "The search is not complete."
    yield _SAMPLE


def _of_proofs(run: Run) -> Iterator[str]:
    """What proofs do not show."""
    yield _PROOF
    yield f"They are about {threat_name(run.plan)} alone, and say nothing of other changes to an image."
    yield "An image that is not proved may be robust all the same: bounds are not tight."
    if not (run.figures("certify") or {}).get("complete"):
        yield "The search is not complete."
    yield _SAMPLE


def _definitions(title: str, fields: Mapping[str, Any]) -> Markup:
    """One group of settings as a definition list."""
    row = Markup("<div><dt>{}</dt><dd>{}</dd></div>")
    pairs = [row.format(_words(name), _shown(value)) for name, value in fields.items()]
    return Markup("<section><h3>{}</h3><dl>{}</dl></section>").format(_words(title), join(pairs))


def _groups(fields: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Nested settings as one group for each level that holds values."""
    for key, value in fields.items():
        yield above + key, {name: inner for name, inner in value.items() if not isinstance(inner, dict)}
        deeper = {name: inner for name, inner in value.items() if isinstance(inner, dict)}
        yield from _groups(deeper, f"{above}{key}: ")


def _shown(value: object) -> str:
    """A setting's value in words."""
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "none" if value is None else str(value)


def _words(name: str) -> str:
    """A field's name with spaces."""
    return name.replace("_", " ")
