"""A sentinel that needs every audit: what broke one defense, tried on all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparring.defending.bench import Bench
from sparring.defending.measure import Borrowed, Measured


def borrow(bench: Bench, found: Sequence[Measured]) -> list[Measured]:
    """Each of `found` with those rows of its `held` that fall to images which broke another; tried once.

    A row meets the images of all others, and is broken by the first that does it by name: the order in which the run
    was told of them says nothing.
    """
    figures, tensors = bench.once("borrowed", lambda: _try(bench, found))
    slugs = [one.subject.entry.slug for one in found]
    parts = [
        Borrowed(figures["names"], *(tensors[f"{what}--{s}"] for what in ("met", "by", "points"))) for s in slugs
    ]
    return [replace(one, borrowed=part) for one, part in zip(found, parts, strict=True)]


def _try(bench: Bench, found: Sequence[Measured]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    by_name = sorted(found, key=lambda one: one.subject.entry.name)
    slugs, rows = [one.subject.entry.slug for one in by_name], bench.images.ids.tolist()
    met = {slug: torch.zeros_like(bench.images.y) for slug in slugs}
    by = {slug: torch.full_like(bench.images.y, -1) for slug in slugs}
    points: dict[str, dict[int, Tensor]] = {slug: {} for slug in slugs}
    for number, lender in enumerate(by_name):
        bench.tell("images that broke others", number, len(found))
        witnesses = lender.audit.witnesses()
        there = torch.tensor([row in witnesses for row in rows])
        for one, slug in zip(by_name, slugs, strict=True):
            at = (one.held & there).nonzero().squeeze(1)
            if not len(at):  # nor has it lent itself a row that it held
                continue
            made = torch.stack([witnesses[rows[place]] for place in at.tolist()])
            hit = bench.judge(one.subject.judged(bench.draws), made, at).hit.cpu()
            met[slug][at] += 1
            fresh = hit & (by[slug][at] < 0)
            by[slug][at[fresh]] = number
            points[slug] |= dict(zip(at[fresh].tolist(), made[fresh], strict=True))
    tensors = {f"met--{slug}": met[slug] for slug in slugs} | {f"by--{slug}": by[slug] for slug in slugs}
    for slug, kept in points.items():
        stacked = [kept[place] for place in sorted(kept)]
        tensors[f"points--{slug}"] = torch.stack(stacked) if stacked else bench.images.x[:0]
    return {"names": [one.subject.entry.name for one in by_name]}, tensors
