"""Attacks that see labels or scores only: queries that ours and the peers' spend on the same rows.

Attacks that go on after a success are compared by their median distance after so many queries; the others by the
queries to their first success within eps, of which two medians are told: over all rows, where a row that holds
counts as infinite, and over the rows that everybody in the family breaks. A median over each one's own successes
would flatter who breaks the easy rows only. The peers have one row at a time, and the net itself notes what they find
and when, wherever in their search, and stops them when their queries are used up; what they return is asked about if
a query is left. Plans that depend on the number of queries are told as many rounds as the queries are worth.

What the peers cannot do here: ART's Square asks three times a proposal, and in L2 divides by the size that a new
square should have; ART's SimBA asks about both signs of a step always, compares probabilities, which saturate in
float32, and keeps no budget, so SimBA has a radius of its own, which its steps do not reach; torchattacks' SPSA takes
samples outside the bounds and asks about its image at the end only, so that each success costs it all queries.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import sparring  # noqa: F401  before torch: see docs/decisions/003

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

from sparring import catalog
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.models.torch import TorchModel
from victims import victim

Peer = Callable[[nn.Module, Tensor, Tensor, float], object]
_FAR = {"linf": 1.0, "l2": 1e3, "l0": 1e6}


class Spent(BaseException):
    """All queries are used up."""


class Witness(nn.Module):
    """A net that notes, for the row at hand, what was found and when."""

    def __init__(
        self, net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, queries: int, *, stops: bool
    ) -> None:
        super().__init__()
        self.stops = stops  # at the first image within eps
        self.net, self.x, self.y, self.eps, self.queries = net, x, y, eps, queries
        self.norm = threat(norm, _FAR[norm])
        self.row, self.asked = 0, 0
        self.nearest = torch.full((len(y),), torch.inf, dtype=torch.float64)
        self.when = torch.full((len(y),), torch.inf)
        self.soft = False

    def forward(self, images: Tensor) -> Tensor:
        """The net's logits, or probabilities if `soft`."""
        logits: Tensor = self.net(images.float())
        row = self.row
        legal = ((images >= -1e-6) & (images <= 1 + 1e-6)).flatten(1).all(1)
        distance = self.norm.distance(images, self.x[row : row + 1].expand_as(images))
        hit = (logits.argmax(1) != self.y[row]) & legal
        for place in hit.nonzero().squeeze(1).tolist()[: self.queries - self.asked]:
            if self.asked + place >= self.queries:
                break
            far = float(distance[place])
            self.nearest[row] = min(float(self.nearest[row]), far)
            if far <= self.eps + 1e-6:
                self.when[row] = min(float(self.when[row]), self.asked + place + 1)
        self.asked += len(images)
        if self.asked >= self.queries or (self.stops and self.when[row].isfinite()):
            raise Spent
        return logits.softmax(1) if self.soft else logits


def _told(options: dict[str, object], eps: float, row: int) -> dict[str, object]:
    """`options` in which words stand for what is known of the row at hand only."""
    whole = int(eps) if eps >= 1 and eps == int(eps) else eps  # counts of pixels
    words: dict[object, object] = {"eps": whole, "eps / 10": eps / 10, "row": row}
    return {key: words.get(value, value) for key, value in options.items()}


def peers(norm: str, queries: int) -> dict[tuple[str, str], Peer]:
    """Who takes part, by family and library."""

    def foolbox(kind: str, **options: object) -> Peer:
        def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> object:
            import foolbox as fb

            model = fb.PyTorchModel(net, bounds=(0, 1), device=torch.device("cpu"))
            return getattr(fb.attacks, kind)(**options).run(model, x, fb.criteria.Misclassification(y))

        return attack

    def art(kind: str, *, soft: bool = False, **options: object) -> Peer:
        def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> object:
            from art.attacks import evasion
            from art.estimators.classification import PyTorchClassifier

            net.soft = soft
            model = PyTorchClassifier(net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1))
            told = _told(options, eps, net.row)
            return getattr(evasion, kind)(model, **told).generate(x.numpy(), np.eye(10, dtype=np.float32)[y.numpy()])

        return attack

    def torchattacks(kind: str, **options: object) -> Peer:
        def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> object:
            import torchattacks as ta

            told = _told(options, eps, net.row)
            return getattr(ta, kind)(net, **told)(x, y)

        return attack

    order, spent = {"linf": np.inf, "l2": 2}.get(norm, 2), queries // 2
    tables: dict[str, dict[tuple[str, str], Peer]] = {
        "linf": {
            ("hopskipjump", "foolbox"): foolbox("HopSkipJumpAttack", constraint="linf"),
            ("hopskipjump", "ART"): art("HopSkipJump", norm=order, max_iter=64, verbose=False),
            ("square", "torchattacks"): torchattacks(
                "Square", norm="Linf", eps="eps", n_queries=queries, n_restarts=1, seed="row"
            ),
            ("square", "ART"): art("SquareAttack", norm=order, eps="eps", max_iter=queries // 3, verbose=False),
            ("spsa", "torchattacks"): torchattacks(
                "SPSA", eps="eps", lr="eps / 10", nb_iter=(queries - 1) // 20, nb_sample=10, max_batch_size=64
            ),
        },
        "l2": {
            ("hopskipjump", "foolbox"): foolbox("HopSkipJumpAttack", constraint="l2"),
            ("hopskipjump", "ART"): art("HopSkipJump", norm=order, max_iter=64, verbose=False),
            ("boundary", "foolbox"): foolbox("BoundaryAttack", steps=queries),
            ("boundary", "ART"): art("BoundaryAttack", targeted=False, max_iter=queries, verbose=False),
            ("square", "torchattacks"): torchattacks(
                "Square", norm="L2", eps="eps", n_queries=queries, n_restarts=1, seed="row"
            ),
            ("square", "ART"): art("SquareAttack", norm=order, eps="eps", max_iter=queries // 3, verbose=False),
            ("simba", "ART"): art(
                "SimBA", soft=True, attack="px", max_iter=spent, epsilon=0.2, order="random", verbose=False
            ),
        },
        "l0": {
            ("pointwise", "foolbox"): foolbox("PointwiseAttack"),
            ("one_pixel", "torchattacks"): torchattacks("OnePixel", pixels="eps", steps=queries, popsize=100),
            ("one_pixel", "ART"): art("PixelAttack", th="eps", verbose=False),
        },
    }
    return tables[norm]


OURS = {
    "linf": ("hopskipjump", "rays", "square", "nes", "spsa"),
    "l2": ("hopskipjump", "boundary", "surfree", "square", "simba"),
    "l0": ("pointwise", "one_pixel"),
}


def ours(
    name: str, net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, queries: int
) -> tuple[Tensor, Tensor]:
    """(n,) nearest distances, and queries until an image within eps was found; inf where there is none."""
    attack = catalog.attack(f"{name}:steps={queries - 1}")
    limit = threat(norm, _FAR[norm] if attack.minimizes else eps)
    found = run(TorchModel(net), attack, limit, x, y, width=len(y))
    never = torch.full_like(found.distance, torch.inf)
    return torch.where(found.found, found.distance, never), torch.where(found.found, found.forward.double(), never)


def theirs(peer: Peer, witness: Witness) -> tuple[Tensor, Tensor]:
    """The same of a peer, one row after the other."""
    for row in range(len(witness.y)):
        torch.manual_seed(row)
        np.random.seed(row)  # noqa: NPY002  the peers draw from it
        witness.row, witness.asked = row, 0
        with contextlib.suppress(Spent):
            returned = peer(witness, witness.x[row : row + 1], witness.y[row : row + 1], witness.eps)
            if isinstance(returned, tuple):  # foolbox: raw, clipped, success
                returned = returned[0]
            witness(torch.as_tensor(returned))
    return witness.nearest, witness.when


def lines(name: str, minimizes: bool, results: dict[str, tuple[Tensor, Tensor]], seconds: dict[str, float]) -> str:
    """A family's rows of the table: distances for who goes on, queries for who stops at the first success."""
    common = torch.stack([when.isfinite() for _, when in results.values()]).all(0)
    rows = []
    for whose, (nearest, when) in results.items():
        share = float((nearest if minimizes else when).isfinite().double().mean())
        both = f"{float(when[common].median()):.0f} ({int(common.sum())})" if common.any() else "none"
        score = f"{float(nearest.median()):.4f} | | |" if minimizes else f"| {float(when.median()):.0f} | {both} |"
        rows.append(f"| `{name}` | {whose} | {share:.2f} | {score} {seconds[whose]:.0f} |")
    return "\n".join(rows)


def family(name: str, net: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float, queries: int) -> str:
    """Our attack of this name, and the peers' beside it."""
    minimizes = bool(catalog.attack(name).minimizes)
    results, seconds, failed = {}, {}, []
    for whose in ("sparring", *(whose for each, whose in peers(norm, queries) if each == name)):
        began = time.perf_counter()
        try:
            with contextlib.redirect_stdout(sys.stderr):  # peers may talk
                if whose == "sparring":
                    results[whose] = ours(name, net, x, y, norm, eps, queries)
                else:
                    witness = Witness(net, x, y, norm, eps, queries, stops=not minimizes).eval()
                    results[whose] = theirs(peers(norm, queries)[name, whose], witness)
        except Exception as error:
            failed.append(f"| `{name}` | {whose} | {repr(error)[:100]} | | | | |")
        seconds[whose] = time.perf_counter() - began
    return "\n".join([lines(name, minimizes, results, seconds), *failed])


def main() -> None:
    """Parse, train what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="undefended", help="see victims.py")
    parser.add_argument("--norms", default="linf,l2,l0")
    parser.add_argument("--only", default="", help="comma separated families")
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument(
        "--eps",
        default="linf=0.1,l2=1.5,l0=80,nes=0.2,spsa=0.2,simba=4",
        help="of those that stop at the first success: by norm, or by family where that is named",
    )
    parser.add_argument("--models", type=Path, default=Path("runs/victims"), help="where trained nets are kept")
    parser.add_argument("--data-dir", type=Path, default=None, help="before $SPARRING_DATA")
    args = parser.parse_args()
    data_dir = args.data_dir or (Path(os.environ["SPARRING_DATA"]) if "SPARRING_DATA" in os.environ else None)
    radii = {key: float(value) for key, value in (pair.split("=") for pair in args.eps.split(","))}
    net, test = victim(args.net, args.models, data_dir, lambda text: print(text, file=sys.stderr, flush=True))
    net.requires_grad_(False)
    with torch.no_grad():
        right = (net(test.x).argmax(1) == test.y).nonzero().squeeze(1)[: args.rows]
    x, y, only = test.x[right].contiguous(), test.y[right], set(args.only.split(",")) - {""}
    for norm in args.norms.split(","):
        eps = ", ".join(f"{radii[name]:g} for {name}" for name in OURS[norm] if name in radii)
        print(
            f"\n{args.net}, {norm}, eps {radii[norm]:g}{eps and f' ({eps})'}, {len(y)} rows, {args.queries} queries\n"
        )
        print(
            "| attack | whose | success | median distance | median queries, inf where a row holds | "
            "over rows that all break (so many) | seconds |\n|---|---|---|---|---|---|---|",
            flush=True,
        )
        for name in OURS[norm]:
            if not only or name in only:
                print(family(name, net, x, y, norm, radii.get(name, radii[norm]), args.queries), flush=True)


if __name__ == "__main__":
    main()
