"""Alpha-CROWN on whole maps: `pull` with the best lower slopes (see `ascent`).

With the bounds of the arguments held fixed, the optimum over the slopes is that of the linear programme of the
triangle relaxation (Salman et al. 2019, arXiv:1902.08722).
"""

from __future__ import annotations

from torch import Tensor

from sparring.certificates.ascent import Ascent, Enough, Slopes, climb, movable, moved
from sparring.certificates.graph import Graph
from sparring.certificates.pulling import Relaxed, pull
from sparring.certificates.region import Region


def ascend(
    graph: Graph,
    place: int,
    a: Tensor,
    lines: Relaxed,
    region: Region,
    ascent: Ascent,
    steps: int,
    enough: Enough | None = None,
) -> tuple[Tensor, Tensor]:
    """`pull` of `a` (n, s, *shape) from `place`, climbing for `steps`: (n, s) bounds and (n, s, *image) points."""
    found = {at: movable(line) for at, line in lines.items() if at < place}
    splits = {at: split for at, split in found.items() if split is not None}
    if not splits:
        return pull(graph, place, a, lines, region)

    def bound(slopes: Slopes) -> tuple[Tensor, Tensor]:
        own = {at: moved(lines[at], split, slopes[at]) for at, split in splits.items()}
        return pull(graph, place, a, {**lines, **own}, region)

    start = {at: _each(lines[at].low_slope, a.shape[1]) for at in splits}
    return climb(bound, start, ascent, steps, enough)


def _each(slope: Tensor | None, asked: int) -> Tensor:
    """(n, *shape) lower slopes, once for each of the questions."""
    assert slope is not None
    return slope.unsqueeze(1).repeat(1, asked, *(1,) * (slope.dim() - 1))
