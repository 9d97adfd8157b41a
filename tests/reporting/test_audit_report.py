"""The report of an audit: each panel on a run made by hand, and nothing said that the evidence does not hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.auditing.audit import audit as run_audit
from sparring.auditing.intervals import clopper_pearson
from sparring.auditing.masking import KINDS
from sparring.auditing.run import Run, write_json
from sparring.core.threat import threat
from sparring.reporting import write_report
from sparring.reporting.audited import pixel_range, progress

Figures = dict[str, Any]
PANELS = ("verdict", "curve", "stages", "classes", "gallery", "confidence", "checklist", "limits")
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """The words of every panel, every tag, and whether tags are closed in their turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {"": []}
        self.panel = ""
        self.source = text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section" and dict(attrs).get("class") == "panel":
            self.panel = str(dict(attrs)["id"])
            self.words[self.panel] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.words[self.panel].append(data)

    def say(self, panel: str) -> str:
        return " ".join(" ".join(self.words[panel]).split())

    @property
    def panels(self) -> list[str]:
        return [name for name in self.words if name]

    def all(self, key: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(key)) is not None]


def read(run: Run) -> Page:
    page = Page(write_report(run).read_text())
    assert page.open == []
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.all("href") if link.startswith("#")} <= set(ids)
    return page


@pytest.fixture
def make(tmp_path: Path, hand: Any) -> Callable[..., Page]:
    """A function from figures to the page of a run that has them."""
    return lambda figures, **options: read(hand.build(tmp_path, figures, **options))


def test_a_whole_audit_has_every_panel_in_order(make: Any, hand: Any) -> None:
    assert tuple(make(hand.audit()).panels) == PANELS


def test_the_head_tells_what_decides(make: Any, hand: Any) -> None:
    head = make(hand.audit()).say("")
    for word in (
        "MNIST: the robustness audit",
        "mine.pt, Linf eps 0.3, 400 test images, seed 3, on cpu",
        "robust accuracy 0.0 % to 49.5 %",
        "clean accuracy 97.0 %",
        "passes per image 33.4",
        "13,353 in all",
        "warnings 1 of 10 signs measured",
        "read as class 0 43.2 %",
    ):
        assert word in head, word


def test_the_verdict_tells_the_interval_and_what_it_is_not(make: Any, hand: Any) -> None:
    figures = hand.audit()
    page = make(figures)
    said, people = page.say("verdict"), figures["population"]
    for word in (
        "0.0 % to 49.5 % robust accuracy on these 400 images, Linf eps 0.3",
        f"95 % confidence: 0.0 % to {100 * people['upper']:.1f} %",
        "Clean accuracy on these images: 97.0 %",
        "undecided 198 (49.5 %)",
        "Undecided (198 images) means",
        "It is not called robust",
        "No proof of robustness has been attempted, so the lower end of the interval is 0.",
        "152 of the 190 adversarial images still are (80.0 %)",
        "The search is complete",
        "rounding alone decided nowhere",
        "1 warning sign is raised",
    ):
        assert word in said, word


def test_the_bar_adds_up_and_the_bracket_spans_what_may_be_robust(make: Any, hand: Any) -> None:
    counts = {"misclassified": 20, "broken": 100, "certified": 40, "undecided": 30, "error": 10}
    text = make(hand.audit(counts=counts)).source
    widths = {name: float(width) for name, width in re.findall(r'<span class="(\w+)" style="width:([\d.]+)%"', text)}
    assert widths == {"certified": 20.0, "undecided": 15.0, "error": 5.0, "broken": 50.0, "misclassified": 10.0}
    left, width = map(float, re.findall(r'<b style="left:([\d.]+)%;width:([\d.]+)%">', text)[0])
    assert (left, width) == (widths["certified"], widths["undecided"] + widths["error"])
    assert "No proof of robustness" not in text


def test_an_audit_cut_short_says_so(make: Any, hand: Any) -> None:
    stages = [hand.stage(0, "clean images", 300, 0, 300, 0)]
    figures = hand.audit(complete=False, stages=stages, forward_passes=1000, also_spent={}, moved=3)
    page = make(figures, full=False)
    said = page.say("verdict")
    assert "The search is not complete" in said
    assert "100 images had not even been looked at; they count as undecided." in said
    assert "The checklist was not measured" in said
    assert "Robust accuracy at other eps was not measured." in said
    assert "3 images looked broken once" in said
    assert "warnings – the checklist was not measured" in page.say("")
    assert "not complete" in page.say("")
    assert "a stage not finished – – 700" in page.say("stages")
    assert "The search is not complete." in page.say("limits")
    assert not {"curve", "gallery", "checklist"} & set(page.panels)


def test_the_curve_tells_every_point_and_the_audit(make: Any, hand: Any) -> None:
    page = make(hand.audit())
    said = page.say("curve")
    for word in (
        "Drawn on 64 of the images",
        "Each point is an upper bound",
        "the audit itself at eps 0.3, 0.0 % to 49.5 % on 400 images",
        "0.3 43.8 % 75.0 % 43.8 %",
        "audited: eps 0.3",
    ):
        assert word in said, word
    alt = next(words for words in page.all("aria-label") if words.startswith("Robust accuracy over eps"))
    assert "square: 97.0 % at eps 0, 95.0 % at eps 0.15, 75.0 % at eps 0.3, 12.5 % at eps 0.6" in alt
    assert "the audit’s interval at eps 0.3: 0.0 % to 49.5 %" in alt


def test_a_curve_without_an_audit_stands_alone(tmp_path: Path, hand: Any) -> None:
    write_json(tmp_path / "plan.json", hand.plan(10, 400))
    run = Run(tmp_path)
    run.record("curve", hand.curve())
    page = read(run)
    assert page.panels == ["curve", "limits"]
    assert "interval" not in page.say("curve")


def test_the_stages_tell_rows_passes_and_what_is_left(make: Any, hand: Any) -> None:
    figures = hand.audit()
    page = make(figures)
    said = page.say("stages")
    for word in (
        "Sprint (stage 1) broke 171 of the 190.",
        "All stages together took 13,353 passes, 33.4 per image, and 12.3 s.",
        "1. sprint 388 171 3,492 3,104 0.25 s 38.6",
        "2. round of 1 217 19 5,123 1,234 0.25 s 334.6",
        "beside the verdicts: checklist – – 14,008 7,225 0.84 s",
    ):
        assert word in said, word
    reached = progress(figures)
    assert reached[-1].upper == pytest.approx(figures["robust_accuracy"]["upper"])
    assert reached[-1].passes == pytest.approx(13353 / 400)
    alt = next(words for words in page.all("aria-label") if words.startswith("The upper end"))
    assert "54.2 % after stage 1" in alt
    assert "49.5 % after stage 2" in alt


@pytest.mark.parametrize("classes", [2, 10, 43])
def test_the_heat_map_counts_every_broken_image_once(make: Any, classes: int, hand: Any) -> None:
    figures = hand.audit(classes)
    page = make(figures, classes=classes)
    cells = re.findall(r'<td style="--heat:\d+%" title="class (\d+) → class (\d+)">(\d*)</td>', page.source)
    found = {(int(source), int(goal)): int(hits or 0) for source, goal, hits in cells}
    assert len(found) == classes * (classes - 1)
    assert all(figures["confusion"][source][goal] == hits for (source, goal), hits in found.items())
    assert sum(found.values()) == figures["counts"]["broken"]


def test_classes_have_both_intervals(make: Any, hand: Any) -> None:
    said = make(hand.audit()).say("classes")
    low, high = clopper_pearson(39, 40)
    assert f"class 0 40 97.5 % ({100 * low:.1f} % to {100 * high:.1f} %) 20.0 % (9.1 % to 35.6 %)" in said
    assert "Least is left of class 0: 20.0 %" in said


def test_too_many_classes_are_not_drawn(make: Any, hand: Any) -> None:
    assert "Too many classes to draw" in make(hand.audit(60, confusion=None), classes=60).say("classes")


def test_the_gallery_tells_who_broke_what(make: Any, hand: Any) -> None:
    page = make(hand.audit())
    said = page.say("gallery")
    for word in (
        "the three of the smallest ids.",
        "Image 17, true class class 1, broken by round of 4, also as an 8-bit file",
        "Image 18, true class class 1, broken by round of 4, not as an 8-bit file",
        "drawn × 3.33, distance 0.3",
        "read as class 1 99.91 %",
        "read as class 0 43.2 %",
        "blue is darker",
    ):
        assert word in said, word


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_the_gallery_draws_any_number_of_channels(tmp_path: Path, channels: int, hand: Any) -> None:
    run = hand.build(tmp_path, hand.audit())
    hand.gallery(run, channels)
    assert ("grey is unchanged" in read(run).say("gallery")) == (channels == 3)


def test_pictures_use_the_bounds_of_the_threat_model(hand: Any) -> None:
    from sparring.reporting.pictures import as_bytes

    assert pixel_range(hand.plan(2, 1)) == (-1.0, 1.0)
    assert pixel_range({"settings": {"threat": "L2(eps=1e-05, bounds=(0.0, 255.0))"}}) == (0.0, 255.0)
    assert pixel_range({}) == (0.0, 1.0)
    ends = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
    assert as_bytes(ends, (-1.0, 1.0)).flatten().tolist() == [0, 128, 255]


def test_the_confidence_before_and_after(make: Any, hand: Any) -> None:
    page = make(hand.audit())
    assert "At 90 % or more: 100.0 % of them before the attack, 0.0 % after it." in page.say("confidence")
    assert "Broken images by confidence after the attack: 190 at 50 to 60 %." in page.all("aria-label")


def test_the_checklist_puts_what_is_raised_first(make: Any, hand: Any) -> None:
    said = make(hand.audit()).say("checklist")
    assert "1 of 11 signs is raised, 1 could not be measured." in said
    assert said.index("more steps still help raised") < said.index("loss still climbing not measured")
    assert said.index("loss still climbing not measured") < said.index("random outputs not raised")
    assert KINDS["more_steps_still_help"][1] in said
    assert KINDS["random_outputs"][1] not in said
    assert "Not measured: loss_still_climbing is unknown." in said


def test_no_sign_raised_is_called_no_proof(tmp_path: Path, hand: Any) -> None:
    run = hand.build(tmp_path, hand.audit())
    run.record("checklist", hand.checklist(raised="", unknown=""))
    page = read(run)
    assert "None of 11 signs is raised, and all were measured." in page.say("checklist")
    assert "That is no proof" in page.say("checklist")
    assert "warnings 0 of 11 signs measured" in page.say("")


def test_the_limits_do_not_call_the_lower_end_an_upper_bound(make: Any, hand: Any) -> None:
    said = make(hand.audit()).say("limits")
    assert "Where a robust accuracy stands here, it is" not in said
    assert "Robust accuracy stands here as an interval" in said
    assert "Linf eps 0.3 alone" in said


ODD = {
    "nothing broken": {"misclassified": 3, "broken": 0, "certified": 0, "undecided": 37, "error": 0},
    "nothing right": {"misclassified": 40, "broken": 0, "certified": 0, "undecided": 0, "error": 0},
    "all broken": {"misclassified": 0, "broken": 40, "certified": 0, "undecided": 0, "error": 0},
    "all failed": {"misclassified": 0, "broken": 0, "certified": 0, "undecided": 0, "error": 40},
    "all certified": {"misclassified": 0, "broken": 0, "certified": 40, "undecided": 0, "error": 0},
    "one image": {"misclassified": 0, "broken": 1, "certified": 0, "undecided": 0, "error": 0},
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("full", [True, False])
def test_odd_audits_are_told_too(make: Any, name: str, full: bool, hand: Any) -> None:
    figures = hand.audit(counts=ODD[name])
    page = make(figures, full=full)
    low, high = (100 * figures["robust_accuracy"][end] for end in ("lower", "upper"))
    told = f"{low:.1f} %" if low == high else f"{low:.1f} % to {high:.1f} %"
    assert f"{told} robust accuracy on these" in page.say("verdict")
    broken = figures["counts"]["broken"]
    assert ("confidence" in page.panels) == (broken > 0)
    assert ("No image was broken" in page.say("classes")) == (broken == 0)


def test_errors_are_told_and_count_towards_the_upper_end(make: Any, hand: Any) -> None:
    counts = {"misclassified": 2, "broken": 10, "certified": 0, "undecided": 24, "error": 4}
    said = make(hand.audit(counts=counts, errors={"7": "expected finite logits, got [nan]"})).say("verdict")
    assert "0.0 % to 70.0 %" in said
    assert "On 4 images the model failed; they may be either, and count towards the upper end." in said
    assert "7 expected finite logits, got [nan]" in said


@pytest.mark.parametrize("section", ["audit", "curve", "checklist", "gallery"])
def test_no_panel_needs_what_it_can_do_without(tmp_path: Path, section: str, hand: Any) -> None:
    for place, spare in enumerate(({}, {"rows": 0}, {"rows": 5, "signs": [{}], "eps": [0.0], "shown": [{}]})):
        run = hand.build(tmp_path / str(place), hand.audit())
        write_json(run.path / "plan.json", {"kind": "audit"})
        run.record(section, spare)
        read(run)


EVIL = '"><script>alert(1)</script>'


def test_what_a_user_names_is_escaped(tmp_path: Path, hand: Any) -> None:
    figures = hand.audit(2, errors={EVIL: EVIL})
    figures["stages"] = [one | {"name": EVIL} for one in figures["stages"]]
    figures["classes"] = [one | {"class": EVIL} for one in figures["classes"]]
    run = hand.build(tmp_path, figures, classes=2)
    named = {"model": EVIL, "profile": EVIL, "classes": [EVIL, EVIL], "norm": EVIL}
    write_json(run.path / "plan.json", hand.plan(2, 400) | named)
    run.record("curve", hand.curve() | {"curves": {EVIL: hand.curve()["worst"]}})
    signs = hand.checklist()["signs"]
    told = [sign | {"name": EVIL, "finding": EVIL, "advice": EVIL} for sign in signs]
    run.record("checklist", hand.checklist() | {"signs": told})
    facts = run.figures("gallery") or {}
    run.record("gallery", facts | {"rule": EVIL, "shown": [fact | {"decided_by": EVIL} for fact in facts["shown"]]})
    page = read(run)
    assert "<script" not in page.source
    assert all(EVIL in page.say(panel) for panel in ("verdict", "curve", "stages", "classes", "gallery", "checklist"))


def test_every_chart_has_words_and_figures(make: Any, hand: Any) -> None:
    page = make(hand.audit())
    charts = [attrs["aria-label"] or "" for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(charts) == 6
    assert all(re.search(r"\d", words) for words in charts)
    assert page.source.count("<summary>The figures</summary>") == 7
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.S))
    assert re.findall(r"#[0-9a-f]{6}", drawn) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", drawn))
    assert used <= set(re.findall(r"(--[\w-]+):", page.source))
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_a_second_report_is_the_same_to_the_byte(tmp_path: Path, hand: Any) -> None:
    run = hand.build(tmp_path, hand.audit())
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_real_audit_is_told_as_its_evidence_has_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(3, 36, generator=generator))
        net[1].bias.zero_()
        x = torch.rand(40, 1, 6, 6, generator=generator)
        y = net(x).argmax(1)
        y[:4] = (y[:4] + 1) % 3
    found = run_audit(net.eval(), (x, y), threat("linf", 0.02), profile="quick", out=tmp_path)
    page, figures = read(Run.open(tmp_path)), found.figures
    counts, ends = figures["counts"], figures["robust_accuracy"]
    assert 0 < counts["broken"] < 36  # otherwise this shows little
    said = page.say("verdict")
    assert ends["lower"] == ends["upper"]  # of a linear model nothing stays unknown
    assert f"{100 * ends['upper']:.1f} % robust accuracy on these 40 images" in said
    assert "means: proved that no image within eps is read as anything else" in said
    assert f"{counts['certified']} of 40 images are proved robust" in page.say("certified")
    assert "were attacked all the same; none fell" in page.say("certified")
    for verdict, number in counts.items():
        assert f"{verdict} {number} ({100 * number / 40:.1f} %)" in said
    for one in figures["stages"]:
        line = (
            f"{one['stage']}. {one['name']} {one['rows']:,} {one['broken']:,} {one.get('certified', '–')} "
            f"{one['forward']:,} {one['backward']:,}"
        )
        assert line in page.say("stages")
    cells = re.findall(r'<td style="--heat:\d+%" title="(\d) → (\d)">(\d*)</td>', page.source)
    assert sum(int(hits or 0) for *_, hits in cells) == counts["broken"]
    assert progress(figures)[-1].upper == pytest.approx(ends["upper"])
    for fact in (Run.open(tmp_path).figures("gallery") or {})["shown"]:
        assert f"Image {fact['id']}, true class {fact['label']}, broken by {fact['decided_by']}" in page.say(
            "gallery"
        )
    for sign in (Run.open(tmp_path).figures("checklist") or {})["signs"]:
        assert sign["finding"] in page.say("checklist")
