"""The report of a comparison of defenses: every panel on a run made by hand tells its figures in words and tables."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.auditing import audit, curve
from sparring.auditing.run import Run, write_json
from sparring.core.threat import threat
from sparring.data.images import Dataset, Images
from sparring.defending import cost, defend, measure
from sparring.reporting import write_report
from sparring.reporting.panels.defense_price import front, width

Figures = dict[str, Any]
PANELS = [
    "defenses", "defense_pairs", "defense_price", "defense_curve", "defense_gallery", "defense_signs",
    "defense_pages", "limits",
]  # fmt: skip
VOID = {"meta", "link", "img", "br", "hr"}
EVIL = '"><script>alert(1)</script>'
EPS = [0.0, 0.15, 0.3]


class Page(HTMLParser):
    """The words of every panel and of every defense's article, and all tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {"": []}
        self.part = ""
        self.source = text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if named.get("class") in ("panel", "defense"):
            self.part = str(named["id"])
            self.words[self.part] = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.words[self.part].append(data)

    def say(self, part: str) -> str:
        return " ".join(" ".join(self.words[part]).split())

    def all(self, key: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(key)) is not None]

    def alt(self, start: str) -> str:
        return next(words for words in self.all("aria-label") if words.startswith(start))

    @property
    def panels(self) -> list[str]:
        return [str(named["id"]) for tag, named in self.tags if tag == "section" and named.get("class") == "panel"]


def read(run: Run) -> Page:
    page = Page(write_report(run).read_text())
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in page.all("href") if link.startswith("#")} <= set(ids)
    return page


def defense(name: str, clean: float, naive: float, adaptive: float, finding: str, **other: Any) -> Figures:
    """A row as a run records it."""
    row = {"defense": name, "clean": clean, "naive": naive, "adaptive": adaptive, "finding": finding}
    row |= {"lower": 0.0, "upper": adaptive, "certified": None, "training_cost": 1.0, "inference_cost": 1.0}
    curve = {"eps": EPS, "worst": [clean, (clean + adaptive) / 2, adaptive], "rows": 32, "curves": {}}
    about = {
        "role": "reference" if finding == "reference" else "defense",
        "slug": re.sub(r"\W+", "-", name),
        "sentence": f"so much of {name} holds",
        "intervals": {"adaptive": [max(0.0, adaptive - 0.05), adaptive + 0.06], "illusion": [0.0, 0.01, 0.02]},
        "parts": [{"name": "standard", "paper": "empirical risk", "about": "Cross-entropy."}],
        "guard": None,
        **dict.fromkeys(("differentiable", "randomised", "detects")),
        "without_gradient": 0.125,
        "tried": [
            {"stage": "naive: fgsm", "rows": 90, "broke": 30},
            {"stage": "naive: pgd", "rows": 90, "broke": 41},
            {"stage": "adaptive: sprint on a sample", "rows": 16, "broke": 5},
            {"stage": "adaptive: sprint", "rows": 85, "broke": 40},
            {"stage": "adaptive: round of 1", "rows": 45, "broke": 2},
            {"stage": "adaptive: round of 1", "rows": 43, "broke": 3},
            {"stage": "transfer: mifgsm on other", "rows": 90, "broke": 12},
            {"stage": "labels only: rays", "rows": 30, "broke": 0},
            {"stage": "borrowed: images of others", "rows": 1, "broke": 1},
        ],
        "curve": curve,
        "audit": {"run": f"audits/{name}"},
        "images": [
            fact(0, "broken", "adaptive", 2, 0.3),
            fact(1, "misclassified", None, 2, 0.0),
            fact(2, "undecided", None, 2, 0.25),
        ],
    }
    details = other.pop("details", {})
    return row | {"signs": []} | other | {"details": about | details}


def fact(place: int, outcome: str, by: str | None, said: int | None, far: float) -> Figures:
    told = {"id": 10 + place, "label": place, "outcome": outcome, "by": by, "prediction": place}
    return told | {"adversarial_prediction": said, "distance": far}


def found() -> list[Figures]:
    """Three that a ranking has, and a user's own."""
    proved = fact(0, "broken", "naive: pgd", 7, 0.3), fact(1, "certified", None, 1, 0.2)
    squeezing = {
        "guard": "Squeezing(threshold=1.5)",
        "parts": [{"name": "squeezing", "paper": "Xu et al. 2018", "about": "It looks twice."}],
        "differentiable": False,
        "randomised": True,
        "detects": True,
        "smoothed": {"sentence": "smoothing's certificate claims nothing here: 1 draw is too few"},
        "intervals": {"adaptive": [0.0, 0.031], "illusion": [0.61, 0.502, 0.707]},
        "images": [*proved, fact(2, "broken", "adaptive", None, 0.3)],
    }
    holding = {"certified": 0.2, "lower": 0.2, "training_cost": 8.25, "inference_cost": 1.0}
    proving = [{"stage": "adaptive: proof: crown", "rows": 40, "broke": 0, "certified": 20}]
    return [
        defense("madry", 0.9, 0.55, 0.4, "holds", **holding)
        | {"signs": ["more_steps_still_help: 24 steps broke 3.; Raise steps until it stands still."]},
        defense("my/net.py:Mine", 0.8, 0.1, 0.1, "breaks", details={"tried": proving}),
        defense("undefended", 0.96, 0.0, 0.0, "reference"),
        defense("squeezing", 0.95, 0.61, 0.0, "hides the gradient", details=squeezing, inference_cost=41.7)
        | {"signs": ["no_gradient: as deployed, all rows have none", "false_claim: it claims so; mend the claim"]},
    ]


def plan(**other: Any) -> Figures:
    settings = {"net": "conv", "threat": "Linf(eps=0.3, bounds=(0.0, 1.0))", "defenses": {"a": {}, "b": {}, "c": {}}}
    told = {"schema": 1, "kind": "defend", "data": "digits", "norm": "linf", "eps": 0.3, "settings": settings}
    return told | {"classes": ["zero", "one", "two"], "rows": {"train": 900, "test": 100}, "seed": 3} | other


def build(path: Path, rows: list[Figures] | None = None, *, images: bool = True, **other: Any) -> Run:
    write_json(path / "plan.json", plan(**other))
    run, rows = Run(path), found() if rows is None else rows
    figures = {"data": "digits", "rows": 100, "draws": 20, "defenses": rows, "warnings": ["The control holds here."]}
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = {f"changed--{row['details']['slug']}": (x + 0.3).clamp(max=1) for row in rows}
    run.record("defenses", figures, {"x": x} | moved if images else None)
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return read(build(tmp_path_factory.mktemp("defend")))


def test_every_panel_is_there_in_order(page: Page) -> None:
    assert page.panels == PANELS


def test_the_head_never_tells_the_naive_figure_alone(page: Page) -> None:
    head = page.say("")
    for words in (
        "Digits: which defenses hold",
        "convolutional network, Linf eps 0.3, 900 train images, 100 test images, seed 3",
        "adaptive accuracy of the first 40.0 % madry; an upper bound",
        "the same, undefended 0.0 % clean 96.0 %",
        "largest illusion, naive → adaptive 61.0 % → 0.0 % squeezing",
        "defenses that hold 1 of 3",
    ):
        assert words in head, words


def test_the_ranking_has_intervals_and_links(page: Page) -> None:
    said = page.say("defenses")
    for words in (
        "1. madry 40.0 % 35.0 % to 46.0 % 55.0 % → 40.0 % holds 90.0 % 20.0 % 8.2, 1.0 1",
        "2. net.py:Mine 10.0 % 5.0 % to 16.0 % 10.0 % → 10.0 % breaks 80.0 % – 1.0, 1.0 0",
        "4. squeezing 0.0 % 0.0 % to 3.1 % 61.0 % → 0.0 % hides the gradient 95.0 % – 1.0, 41.7 2",
        "100 test images, Linf eps 0.3. Adaptive: accuracy under the attacks tried here: an upper bound",
        "The control holds here.",
        "madry holds So much of madry holds.",
        "So much of squeezing holds. Smoothing's certificate claims nothing here: 1 draw is too few.",
    ):
        assert words in said, words
    drawn = re.findall(r"--share:([\d.]+);--low:([\d.]+);--high:([\d.]+)", page.source)
    ranked = [tuple(map(float, one)) for one in drawn]
    assert ranked == [(0.4, 0.35, 0.46), (0.1, 0.05, 0.16), (0.0, 0.0, 0.06), (0.0, 0.0, 0.031)]
    targets = [attrs["href"] for tag, attrs in page.tags if tag == "a" and "title" in attrs]
    assert targets[:4] == ["#defense-madry", "#defense-my-net-py-Mine", "#defense-undefended", "#defense-squeezing"]


def test_the_pairs_tell_what_only_seemed_to_hold(page: Page) -> None:
    said = page.say("defense_pairs")
    assert "squeezing 61.0 % 50.2 % to 70.7 % madry 15.0 % 1.0 % to 2.0 %" in said
    assert "Found to hide the gradient: squeezing." in said
    assert "madry 55.0 % 40.0 % 35.0 % to 46.0 % 15.0 %" in said
    assert "squeezing: 61.0 % naive, 0.0 % adaptive" in page.alt("Pairs of bars")


def test_the_price_has_a_front_and_costs(page: Page) -> None:
    said = page.say("defense_price")
    assert "on the front clean adaptive training inference madry 90.0 % 40.0 % 8.2 × 1.0 × undefended 96.0 %" in said
    assert "squeezing 4 95.0 % 0.0 % 1.0 41.7 no" in said
    assert "squeezing: clean 95.0 %, adaptive 0.0 %, training 1.0 ×, inference 41.7 ×" in page.alt(
        "A point a defense"
    )


def test_the_front_is_what_nobody_beats() -> None:
    at = [(0.9, 0.4), (0.9, 0.3), (0.95, 0.3), (0.8, 0.4), (0.95, 0.3), (0.99, 0.0)]
    rows = [defense(str(k), clean, 0.0, adaptive, "breaks") for k, (clean, adaptive) in enumerate(at)]
    assert [row["defense"] for row in front(rows)] == ["0", "2", "4", "5"]


def test_a_size_grows_with_the_factor_of_ten() -> None:
    assert [width(cost) for cost in (None, 0.5, 1.0, 10.0, 100.0)] == pytest.approx([7, 7, 7, 15, 23])
    assert width(math.inf) == width(1000.0)


def test_the_curve_has_every_defense(page: Page) -> None:
    said = page.say("defense_curve")
    for words in (
        "Drawn on 32 images",
        "defense eps 0 eps 0.15 eps 0.3 madry 90.0 % 65.0 % 40.0 %",
        "squeezing 95.0 % 47.5 % 0.0 %",
        "measured: eps 0.3",
        "quote that, not the line",
    ):
        assert words in said, words
    assert "undefended: 96.0 % at eps 0, 48.0 % at eps 0.15, 0.0 % at eps 0.3" in page.alt("Robust accuracy over eps")


def test_more_defenses_than_colours_are_all_in_the_table(tmp_path: Path) -> None:
    rows = [defense(f"number{place}", 0.9, 0.5, 0.4 - place / 50, "holds") for place in range(9)]
    rows[8]["details"]["curve"] = {}
    page = read(build(tmp_path, rows))
    said = page.say("defense_curve")
    assert "2 others" in said
    assert "The first 6 of the ranking have colours" in said
    assert "number7 90.0 %" in said
    assert "number8" not in said


def test_the_gallery_tells_every_outcome(page: Page) -> None:
    said = page.say("defense_gallery")
    assert "untouched zero image 10 one image 11 two image 12" in said
    assert "madry broken read as two not right read as two not broken read as two" in said
    assert "squeezing broken read as 7 proved read as one broken flagged" in said
    alts = page.all("alt")
    assert len(alts) == 3 + 4 * 3 * 2
    assert "image 12 under squeezing: broken, flagged" in alts
    assert "what was added to it, distance 0.25" in alts
    assert sum(attrs.get("class") == "tile fooled" for _, attrs in page.tags) == 3 + 2


@pytest.mark.parametrize("channels", [2, 3])
def test_the_gallery_draws_any_number_of_channels(tmp_path: Path, channels: int) -> None:
    run = build(tmp_path)
    tensors = {key: value.repeat(1, channels, 1, 1) for key, value in run.tensors("defenses").items()}
    run.record("defenses", run.figures("defenses") or {}, tensors)
    assert ("grey is unchanged" in read(run).say("defense_gallery")) == (channels == 3)


def test_the_signs_stand_by_defense(page: Page) -> None:
    said = page.say("defense_signs")
    for words in (
        "3 signs raised on 2 of 4 defenses; most often: more steps still help (1).",
        "madry more steps still help 24 steps broke 3. Raise steps until it stands still.",
        "squeezing no gradient As deployed, all rows have none.",
        "squeezing false claim It claims so; mend the claim.",
        "None raised: net.py:Mine , undefended .",
    ):
        assert words in said, words


def test_a_page_tells_what_it_is_what_was_tried_and_what_broke_it(page: Page) -> None:
    said = page.say("defense-squeezing")
    for words in (
        "squeezing hides the gradient So much of squeezing holds.",
        "squeezing : It looks twice. (Xu et al. 2018)",
        "its options Squeezing(threshold=1.5)",
        "its gradient, as it states has none, draws at random, flags what it takes for an attack",
        "goes straight through what has no gradient (BPDA), takes the mean over 20 draws (EOT), counts the flag",
        "rows without a gradient, as deployed 12.5 %",
        "naive → adaptive 61.0 % → 0.0 %",
        "proved no proof was within reach",
        "training, an answer 1.0 ×, 41.7 × plain",
        "audits/squeezing",
        "naive : pgd broke 41 of 90 images, the most of 2",
        "adaptive : broke 50 of 90 images: 40 by sprint, 5 by sprint on a sample, 5 by round of 1",
        "transfer : mifgsm on other broke 12 of 90 images",
        "labels only : rays broke none of 30 images",
        "borrowed : images of others broke 1 of 1 image",
        "claimed, and no proof : Smoothing's certificate claims nothing here: 1 draw is too few.",
        "no gradient : As deployed, all rows have none.",
        "What was tried, stage by stage (9)",
        "adaptive: sprint on a sample 16 5 31.2 %",
        "image 12 two broken adaptive flagged 0.3",
        "image 10 zero broken naive: pgd read as 7 0.3",
    ):
        assert words in said, words
    assert "proofs : 20 of 40 images proved robust" in page.say("defense-my-net-py-Mine")
    assert "a net alone, with the gradient of its layers" in page.say("defense-undefended")
    assert "No warning sign is raised." in page.say("defense-undefended")


def test_claims_of_a_plain_guard_are_told(tmp_path: Path) -> None:
    claims = {"differentiable": True, "randomised": False, "detects": False, "guard": "Soft(nets=(\n  Net()," * 40}
    said = read(build(tmp_path, [defense("soft", 0.9, 0.5, 0.5, "holds", details=claims)])).say("defense-soft")
    assert re.search(r"its options Soft\(nets=\( Net\(\),[^…]{141}… its gradient, as it states has one, always", said)
    assert "follows the gradient through it" in said


def test_names_are_escaped(tmp_path: Path) -> None:
    rows = [defense(name, 0.9, 0.6, 0.5, EVIL) | {"signs": [f"{EVIL}: {EVIL}"]} for name in (EVIL, "a$b$ " * 20)]
    known = {"sentence": EVIL, "guard": EVIL, "audit": {"run": EVIL}, "slug": "evil"}
    known |= {"parts": [dict.fromkeys(("name", "paper", "about"), EVIL)]}
    known |= {"tried": [{"stage": f"adaptive: {EVIL}", "rows": 3, "broke": 1}]}
    known |= {"images": [fact(0, EVIL, EVIL, 0, 0.1)]}
    rows[0]["details"] |= known
    page = read(build(tmp_path, rows, classes=[EVIL], data=EVIL, norm=EVIL))
    assert "<script" not in page.source
    assert page.panels == PANELS
    for panel in set(PANELS) - {"defense_pages"}:  # a name stands without the folders that it seems to have
        assert "script>" in page.say(panel), panel
    assert page.say("defense-evil").count(EVIL) == 16


def test_a_second_report_is_the_same_to_the_byte(tmp_path: Path) -> None:
    run = build(tmp_path)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_every_chart_has_words_and_figures(page: Page) -> None:
    charts = [attrs["aria-label"] or "" for _, attrs in page.tags if attrs.get("role") == "img"]
    assert [bool(re.search(r"\d", words)) for words in charts] == [True] * 3
    assert page.source.count("<summary>The figures</summary>") == 3
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.source, flags=re.S))
    assert re.findall(r"#[0-9a-f]{6}", drawn) == []
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")


def test_a_run_cut_short_says_how_far_it_came(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", plan())
    run = Run(tmp_path)
    for name in ("labels--a", "labels--b", "judged--a", "judged--b", "judged--c"):
        run.record(name, {"rows": 1})
    page = read(run)
    assert page.panels == ["defenses", "limits"]
    assert "everything was tried on 2 of 3 defenses" in page.say("defenses")


def test_another_run_has_none_of_these_panels(tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", {"kind": "audit"})
    assert read(Run(tmp_path)).panels == ["limits"]


def test_what_was_not_recorded_is_left_out(tmp_path: Path) -> None:
    assert "defense_gallery" not in read(build(tmp_path / "images", images=False)).panels
    alone = read(build(tmp_path / "alone", [defense("one", 0.9, 0.9, 0.9, "holds", details={"curve": {}})]))
    assert not {"defense_price", "defense_curve"} & set(alone.panels)
    assert "Nothing here seemed to hold that does not." in alone.say("defense_pairs")
    bare = read(
        build(tmp_path / "bare", [{"defense": "bare", "details": {"slug": "bare"}}, {"details": {"slug": ""}}])
    )
    assert bare.panels == ["defenses", "defense_signs", "defense_pages", "limits"]
    assert "What was tried was not recorded." in bare.say("defense-bare")


def test_a_real_run_is_told_as_its_evidence_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, little in (
        (curve, "ROWS", 4), (audit, "CHECKED", 8), (measure, "QUERIES", 50), (cost, "ROUNDS", 2),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, little)
    noise = torch.Generator().manual_seed(1)
    y = torch.arange(60) % 2
    x = (0.25 + 0.5 * y.view(-1, 1, 1, 1) + 0.2 * torch.rand(60, 1, 4, 4, generator=noise)).clamp(0, 1)
    images = Images("made", x, y, torch.arange(60), ("low", "high"))
    small = Images("made", x[:12], y[:12], torch.arange(12), ("low", "high"))
    data = Dataset("made", images, small)
    made = defend(data, threat("linf", 0.1), net="dense", defenses=[], steps=30, profile="quick", out=tmp_path)
    page = read(Run.open(tmp_path))
    assert page.panels == PANELS
    for place, row in enumerate(made.rows, 1):
        ranked = page.say("defenses")
        adaptive, naive = (f"{math.floor(1000 * row[key] + 1e-3) / 10:.1f} %" for key in ("adaptive", "naive"))
        assert re.search(rf"{place}\. {row['defense']} {adaptive} .* {naive} → {adaptive} {row['finding']}", ranked)
        for stage in row["details"]["tried"]:
            words = f"{stage['stage']} {stage['rows']} {stage['broke']}"
            assert words in page.say(f"defense-{row['defense']}"), words
