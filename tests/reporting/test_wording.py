"""Figures as a person reads them: never rounded to a certainty that was not measured."""

from __future__ import annotations

import pytest

from sparring.reporting import wording


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (0.9746, "97.5 %"),
        (1.0, "100.0 %"),
        (0.0, "0.0 %"),
        (0.9998, "99.98 %"),
        (0.0002, "0.02 %"),
        (None, "–"),
    ],
)
def test_a_share_is_never_falsely_all_or_none(share: float | None, words: str) -> None:
    assert wording.percent(share) == words


@pytest.mark.parametrize(
    ("sure", "words"),
    [
        (0.99998, "99.99 %"),
        (0.9998999834060669, "99.99 %"),  # 0.9999 as a 32-bit float
        (0.99986, "99.98 %"),
        (1.0, "> 99.99 %"),
        (0.99999999, "> 99.99 %"),
        (0.8899, "88.9 %"),
        (0.0, "0.0 %"),
        (None, "–"),
    ],
)
def test_a_confidence_is_rounded_down(sure: float | None, words: str) -> None:
    assert wording.confidence(sure) == words


@pytest.mark.parametrize(("sure", "words"), [(0.9999, "99 %"), (1.0, "99 %"), (0.71, "71 %"), (0.004, "< 1 %")])
def test_a_tile_has_room_for_little(sure: float, words: str) -> None:
    assert wording.brief_confidence(sure) == words


def test_a_label_without_a_name_is_itself() -> None:
    name = wording.class_namer({"classes": ["cat", "dog"]})
    assert [name(0), name(1), name(2), name(None)] == ["cat", "dog", "2", "–"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.021, "0.021 s"), (7.24, "7.2 s"), (1234.0, "1,234 s"), (None, "–")]
)
def test_a_duration(seconds: float | None, words: str) -> None:
    assert wording.duration(seconds) == words
