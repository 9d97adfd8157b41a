"""Counts in words."""

from __future__ import annotations

from sparring.core.showing import number_of


def test_one_row_and_two_rows():
    assert [number_of(count, "row") for count in (0, 1, 2, 1024)] == ["0 rows", "1 row", "2 rows", "1,024 rows"]
