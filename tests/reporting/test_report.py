"""The page as a whole: what it says, what it asks for, and that it never changes by itself."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from sparring.reporting import write_report

VOID = {"meta", "link", "img", "br", "hr"}
SECTIONS = ("train", "fgsm", "fooling", "targeted", "compare", "defend", "attack")


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether each tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, key: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(key)) is not None]


def read(run: Any) -> tuple[str, Page]:
    text = write_report(run).read_text()
    return text, Page(text)


TOLD = {
    "train": [
        "97.46 %",
        "109,386",
        "correct (97.5 %)",
        "incorrect (2.5 %)",
        "class 0/class 0",
        "class 1/class 0",
    ],
    "fgsm": ["93.4 %", "500 test images", "drawn × 1.67", "99.91 %", "88.1 %", "0.3 × sign"],
    "fooling": ["4 of 6 noise images", "within 500 steps", "99.99 %", "not reached", "212"],
    "targeted": ["Classic: 4 of 6 pairs at ≥ 99.99 %, mean L2 5.20 where it succeeds.", "saturates", "71 %"],
    "compare": ["71.2 %", "99.8 %", "Linf eps 0.3", "1,224.0", "5.91", "91.3 %", "0.02 s"],
    "defend": [
        "0.2 %",
        "93.1 %",
        "90.5 % to 95.2 %",
        "8.1",
        "upper bound on the true robust accuracy",
        "Linf",
    ],
    "attack": ["77 images of digits", "mine.pt", "L2 eps 1.5", "the two smallest changes", "distance 0.25"],
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_run_with_one_section_tells_its_figures_and_no_other_section(make: Any, name: str) -> None:
    _, page = read(make(name))
    for figure in TOLD[name]:
        assert figure in page.text, figure
    assert [value for value in page.all("id") if value in (*SECTIONS, "limits")] == [name, "limits"]


def test_the_targeted_sentence_states_both_methods(make: Any) -> None:
    _, page = read(make("targeted"))
    assert "Improved (DDN on the log-odds): 6 of 6, mean L2 2.31." in page.text
    assert "On the 4 pairs that both reach: mean L2 5.75 against 2.00." in page.text


def test_the_log_has_the_format_of_the_original(make: Any) -> None:
    text, _ = read(make("train"))
    assert "Step: 100, Loss: 31.362864, Accuracy: 0.925000\nStep: 200, Loss: 15.681432" in text


def test_the_plan_is_told_to_the_last_setting(make: Any) -> None:
    _, page = read(make("compare"))
    for word in (
        "c0ffee",
        "seed 41",
        "60000",
        "inner steps 512",
        "by hand",
        "abacus",
        "Only 500 rows were attacked.",
    ):
        assert word in page.text, word


def test_the_head_shows_the_deciding_figures(full: str) -> None:
    head = Page(full[full.index("<header") : full.index("</header>") + 9]).text
    for word in (
        "MNIST under attack",
        "97.5 %",
        "99.2 %",
        "99.99 %",
        "6 of 6",
        "classic: 4",
        "0.2 % → 93.1 %",
    ):
        assert word in head, word


def test_nothing_is_asked_from_outside(full: str) -> None:
    page = Page(full)
    links = [link for key in ("src", "href", "xlink:href", "srcset", "data", "action") for link in page.all(key)]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", full))
    assert "http" not in re.sub("http-equiv", "", full)
    assert "@import" not in full
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_html_is_sound(full: str) -> None:
    page = Page(full)
    assert page.open == []
    assert full.startswith("<!DOCTYPE html>")
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    wanted = {link[1:] for link in page.all("href") if link.startswith("#")}
    wanted |= set(re.findall(r"url\(#([^)]*)\)", full)) | set(page.all("aria-labelledby"))
    assert wanted <= set(ids)
    assert "<title>MNIST under attack" in full


def test_pictures_and_charts_have_words(full: str) -> None:
    page = Page(full)
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(pictures) > 60
    assert all(attrs.get("alt") for attrs in pictures)
    charts = [attrs["aria-label"] or "" for tag, attrs in page.tags if attrs.get("role") == "img"]
    assert len(charts) == 6
    assert all(re.search(r"\d", words) for words in charts)
    assert any("madry: 98.4 % at eps 0, 96.7 % at eps 0.1, 93.1 % at eps 0.3" in words for words in charts)


def test_charts_take_their_colours_from_the_page(full: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", full, flags=re.S))
    assert "var(--series-2)" in drawn
    assert re.findall(r"#[0-9a-f]{6}", drawn) == []
    used = set(re.findall(r"var\((--[\w-]+)\)", drawn))
    assert used <= set(re.findall(r"(--[\w-]+):", full))


def test_a_second_report_is_the_same_to_the_byte(make: Any) -> None:
    run = make()
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_it_reads_plan_and_evidence_only(make: Any) -> None:
    run = make("train")
    first = write_report(run).read_bytes()
    (run.path / "result.json").write_text("{}")
    (run.path / "events.jsonl").write_text("")
    assert write_report(run).read_bytes() == first


EVIL = "<script>alert('$x_1$')</script>"


def test_what_a_user_names_is_escaped(make: Any, section: Any) -> None:
    run = make("train", data=EVIL, device=EVIL, kind=EVIL, limits=[EVIL], settings={EVIL: EVIL})
    compare, _ = section("compare")
    compare |= {
        "threat": EVIL,
        "net": EVIL,
        "attacks": [attack | {"name": EVIL} for attack in compare["attacks"]],
    }
    run.record("compare", compare)
    defend, _ = section("defend")
    run.record("defend", defend | {"attack": EVIL, "models": {EVIL: defend["models"]["madry"]}})
    attack, tensors = section("attack")
    run.record("attack", attack | {"rule": EVIL, "model": EVIL, "data": EVIL}, tensors)
    text, page = read(run)
    assert "<script" not in text
    assert page.open == []
    assert page.text.count(EVIL) > 12


def test_class_names_are_escaped_in_alt_texts_too(make: Any) -> None:
    evil = '"><script>'
    text, page = read(make(classes=[evil, "b", "c"]))
    assert "<script" not in text
    assert page.open == []
    assert f"a b, read as {evil} with 99.99 %" in page.all("alt")


@pytest.mark.parametrize("classes", [2, 12])
def test_colour_images_and_any_number_of_classes(make: Any, classes: int) -> None:
    _, page = read(make(channels=3, size=classes))
    assert page.open == []
    assert f"{classes * (classes - 1)} of {classes * (classes - 1)}, mean L2 2.31" in page.text


SPARE = {
    "train": {"dense": {}},
    "fgsm": {"shown": [{}]},
    "fooling": {"nets": {"dense": [{}]}},
    "targeted": {"classic": {"cells": [{"source": 0, "goal": 1}]}},
    "compare": {"attacks": [{}, {"name": "only a name"}]},
    "defend": {"models": {"bare": {}, "half": {"clean": 0.5}}},
    "attack": {"attacks": [{}]},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_no_panel_needs_what_it_can_do_without(make: Any, section: Any, name: str) -> None:
    run = make("compare")
    (run.path / "plan.json").write_text("{}")
    _, tensors = section(name)
    for held in ({}, {key: tensor for key, tensor in tensors.items() if "wrong" not in key}):
        run.record(name, SPARE[name], held)
        _, page = read(run)
        assert page.open == []
        assert name in page.all("id")


def test_no_wrong_image_is_said_in_words(make: Any, section: Any) -> None:
    run = make("compare")
    figures, tensors = section("train")
    run.record("train", figures, {key: kept[:0] if "wrong" in key else kept for key, kept in tensors.items()})
    assert "No incorrect image is on record." in read(run)[1].text


def test_a_sign_is_drawn_at_full_scale() -> None:
    from sparring.reporting.pictures import signed

    change = torch.tensor([[[-1.0, 0.0, 1.0]]])
    assert signed(change).tolist() == [[[33, 247, 178]], [[102, 247, 24]], [[172, 247, 43]]]
    assert signed(change.expand(3, 1, 3))[0].tolist() == [[0, 128, 255]]


def test_a_light_import() -> None:
    code = "import sys, sparring.reporting; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
