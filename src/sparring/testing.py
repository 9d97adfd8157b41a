"""Contract checks for plug-in authors: `check_attack(MyAttack)` and `check_judge(judge)`.

Each raises `ContractError`, which says what was promised and what came. Our own tests run them over every
attack that the catalogue finds. The models asked here compute in float64, so that a row's answer does not
depend on the rows beside it, and whatever varies is the attack's own doing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from sparring import catalog
from sparring.core import noise
from sparring.core.attack import Attack, Observation
from sparring.core.batch import Batch, Rows
from sparring.core.errors import AttackError
from sparring.core.judge import Judge
from sparring.core.model import Access, Prediction, Pullback
from sparring.core.threat import NAMES, NORMS, Threat, Unbounded, threat
from sparring.engine.loop import run
from sparring.engine.outcome import Outcome

SHAPE, CLASSES, ROWS, WIDTH = (1, 4, 5), 4, 12, 8
RADII = {"linf": 0.1, "l2": 0.35, "l1": 1.0, "l0": 3.0, "ssim": 0.05}
DUALS = {"linf": 1, "l2": 2, "l1": torch.inf, "unbounded": 2}


class ContractError(AssertionError):
    """A promise that every attack, or every judge, must keep was broken."""


def _expect(kept: bool, message: str) -> None:
    if not kept:
        raise ContractError(message)


@dataclass(frozen=True)
class Probe:
    """A classifier that applies `net` to (n, d) float64 pixels and shows no more than it is asked for."""

    net: Callable[[Tensor], Tensor]
    bounds: tuple[float, float] = (0.0, 1.0)
    access: Access = Access.GRADIENT

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        with torch.enable_grad():
            leaf = x.detach().flatten(1).double().requires_grad_()
            logits = self.net(leaf)

        def vjp(cotangent: Tensor, *, keep: bool = False) -> Tensor:
            (gradient,) = torch.autograd.grad(logits, leaf, cotangent.double(), retain_graph=keep)
            return gradient.float().view_as(x)

        values = logits.detach().float()
        pullback: Pullback | None = vjp if access >= Access.GRADIENT else None
        return Prediction(values.argmax(1), values if access >= Access.SCORE else None, pullback)


class Watched:
    """An attack whose every step is looked at: it must leave its inputs as they are and stay legal."""

    def __init__(self, attack: Attack, needs: Access | None = None) -> None:
        self.inner, self.name, self.version, self.paper = attack, attack.name, attack.version, attack.paper
        self.norms, self.minimizes, self.needs_target = attack.norms, attack.minimizes, attack.needs_target
        self.needs = attack.needs if needs is None else needs

    def init(self, batch: Batch) -> Any:
        """Start, and compare."""
        before = _snapshot(batch)
        state = self.inner.init(batch)
        self._unchanged("init", before, batch)
        _expect(
            isinstance(state, Rows) and is_dataclass(state),
            f"{self.name}: expected a frozen core.attack.State, got {type(state).__name__}",
        )
        self._in_range(batch, state)
        return state

    def step(self, batch: Batch, state: Any, seen: Observation) -> Any:
        """Step, and compare."""
        before_batch, before_state = _snapshot(batch), _snapshot(state)
        after = self.inner.step(batch, state, seen)
        self._unchanged("step", before_batch, batch)
        self._unchanged("step", before_state, state)
        for name, was in before_state.items():
            now = getattr(after, name)
            changed = f"{self.name}: step turned state.{name} from {was.dtype} {tuple(was.shape)}"
            same = (now.dtype, now.shape) == (was.dtype, was.shape)
            _expect(same, f"{changed} into {now.dtype} {tuple(now.shape)}; rows could not share a batch")
        self._in_range(batch, after)
        return after

    def _unchanged(self, where: str, before: dict[str, Tensor], rows: Rows) -> None:
        for name, was in before.items():
            now = getattr(rows, name)
            same = torch.equal(was.contiguous().view(torch.uint8), now.contiguous().view(torch.uint8))
            what = f"{self.name}: {where} changed {type(rows).__name__}.{name} in place"
            _expect(same, f"{what}; make a new tensor, not x.add_()")

    def _in_range(self, batch: Batch, state: Any) -> None:
        for name, tensor in _snapshot(state).items():
            rows = f"{self.name}: expected {len(batch.x)} rows in state.{name}, got {tuple(tensor.shape)}"
            _expect(tensor.dim() > 0 and len(tensor) == len(batch.x), rows)
        low, high = batch.threat.bounds
        outside = ~((state.x >= low) & (state.x <= high)).flatten(1).all(1)
        _expect(not bool(outside.any()), f"{self.name}: asks about a pixel outside [{low:g}, {high:g}]; clip it")
        last = state.done.nonzero().squeeze(1)
        self.legal(batch.threat, state.x[last], batch.x[last], "its last point")

    def legal(self, limit: Threat, x: Tensor, x0: Tensor, what: str) -> None:
        """Refuse points farther than eps, measured here and not by the threat model."""
        far = _norm(limit, x, x0)
        worst = float(far.max()) if len(far) else 0.0
        most = f"{self.name}: {what} lies {worst:.7g} away in {limit.norm}, expected at most {limit.eps:g}"
        _expect(worst <= limit.eps + limit.slack, f"{most}; project it")


def _snapshot(rows: Rows) -> dict[str, Tensor]:
    names = [field.name for field in fields(rows)] + (["label", "sign"] if isinstance(rows, Batch) else [])
    values = {name: getattr(rows, name) for name in names}
    return {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}


def _norm(limit: Threat, x: Tensor, x0: Tensor) -> Tensor:
    """(n,) float64 distances, written plainly and without the threat model."""
    change = (x.double() - x0.double()).abs().flatten(1)
    if limit.norm == "l0":
        return (change > 0).double().sum(1)
    if limit.norm == "ssim":
        return 1.0 - _similarity(x.double() - limit.bounds[0], x0.double() - limit.bounds[0], limit.bounds)
    return {"linf": change.amax(1), "l1": change.sum(1)}.get(limit.norm, change.square().sum(1).sqrt())


def _similarity(x: Tensor, x0: Tensor, bounds: tuple[float, float]) -> Tensor:
    """(n,) mean SSIM, a window around every pixel (Wang et al. 2004, equation 13)."""
    height, width = x.shape[2:]
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    apart = place[:, None] - place
    weight = (-apart.square().sum(2) / (2 * 1.5**2)).exp() * (apart.abs().amax(2) <= 5)
    weight = (weight / weight.sum(1, keepdim=True)).T  # (pixels, windows)
    a, b = x.flatten(2), x0.flatten(2)
    one, two = a @ weight, b @ weight
    spread, other, joint = (a * a) @ weight - one**2, (b * b) @ weight - two**2, (a * b) @ weight - one * two
    c1, c2 = ((k * (bounds[1] - bounds[0])) ** 2 for k in (0.01, 0.03))
    ssim = (2 * one * two + c1) * (2 * joint + c2) / ((one**2 + two**2 + c1) * (spread + other + c2))
    return ssim.flatten(1).mean(1)


@dataclass(frozen=True)
class Puzzle:
    """A model, a threat model and some rows, of which an attack breaks some and others not."""

    model: Probe
    limit: Threat
    x: Tensor
    y: Tensor
    targets: Tensor | None

    def play(self, attack: Any, order: Tensor | None = None, *, width: int = WIDTH, restarts: int = 1) -> Outcome:
        """Run `attack` on the rows in this order (default: all as they come)."""
        order = torch.arange(len(self.x)) if order is None else order
        targets = None if self.targets is None else self.targets[order]
        more: dict[str, Any] = {"targets": targets, "width": width, "restarts": restarts}
        return run(self.model, attack, self.limit, self.x[order], self.y[order], sample=100 + order, **more)


def _draw(name: int, *shape: int) -> Tensor:
    """Standard normal float64 numbers, the same each time."""
    return noise.normal(torch.tensor([name]), shape).squeeze(0).double()


def puzzle(norm: str, *, targeted: bool = False) -> Puzzle:
    """A small curved classifier of (1, 4, 5) images, and its own labels."""
    size = SHAPE[0] * SHAPE[1] * SHAPE[2]
    hidden, out = _draw(1, size, 16), _draw(2, 16, CLASSES)
    model = Probe(lambda flat: (2.0 * (flat - 0.5) @ hidden).tanh() @ out)
    x = noise.uniform(torch.arange(ROWS), SHAPE)
    y = model.query(x, Access.DECISION).labels
    limit = Unbounded() if norm == "unbounded" else threat(norm, RADII[norm])
    return Puzzle(model, limit, x, y, ((y + 1) % CLASSES)[:, None] if targeted else None)


def _puzzles(attack: Attack) -> Iterator[Puzzle]:
    for norm in attack.norms:
        if not attack.needs_target:
            yield puzzle(norm)
        yield puzzle(norm, targeted=True)


def check_attack(kind: type[Attack], **options: Any) -> int:
    """Run every check on an attack class; returns how many rows rounding alone decided at another width."""
    attack = check_declaration(kind, **options)
    moved = 0
    for case in _puzzles(attack):
        usual = check_legal(attack, case)
        check_order(attack, case, usual)
        check_subset(attack, case, usual)
        check_restarts(attack, case, usual)
        moved += check_width(attack, case, usual)
    check_access(attack)
    for norm in set(attack.norms) & set(DUALS):
        check_optimum(attack if attack.needs == Access.GRADIENT else kind(), norm)
    return moved


def check_declaration(kind: type[Attack], **options: Any) -> Attack:
    """Its class attributes are there, and its options are stored, frozen, and survive being written down."""
    name = kind.__name__
    _expect(is_dataclass(kind), f"{name}: expected a frozen dataclass, got a plain class")
    _expect(kind.__dataclass_params__.frozen, f"{name}: expected @dataclass(frozen=True)")  # type: ignore[attr-defined]
    for field, wanted in {"name": str, "paper": str, "version": int, "needs": Access, "norms": tuple}.items():
        value = getattr(kind, field, None)
        _expect(
            isinstance(value, wanted) and value != "",
            f"{name}: expected {field} ({wanted.__name__}), got {value!r}",
        )
    unknown = set(kind.norms) - {*NAMES}
    _expect(bool(kind.norms) and not unknown, f"{name}: expected norms among {[*NAMES]}, got {kind.norms}")
    attack = kind(**options)
    values = {field.name: getattr(attack, field.name) for field in fields(attack)}  # type: ignore[arg-type]
    for key, given in options.items():
        _expect(values[key] is given, f"{name}: expected option {key} stored as given, got {values[key]!r}")
    text = ",".join(f"{key}={value}" for key, value in values.items())
    again = catalog.build({kind.name: kind}, "attack", *catalog.parse(f"{kind.name}:{text}"))
    _expect(again == attack, f"{name}: expected {text!r} to give {attack}, got {again}")
    return attack


def check_legal(attack: Attack, case: Puzzle) -> Outcome:
    """Every last point and every point found is legal, and no step writes to what it is given."""
    watched = Watched(attack)
    outcome = case.play(watched)
    watched.legal(case.limit, outcome.best, case.x, "what it leaves behind")
    answer = case.model.query(outcome.best, Access.DECISION).labels
    hit = answer != case.y if case.targets is None else answer == case.targets[:, 0]
    fools = bool(hit[outcome.found].all())
    _expect(fools, f"{attack.name}: an image counted as found does not fool the model")
    return outcome


def _same(attack: Attack, law: str, one: Outcome, two: Outcome) -> None:
    for field in ("found", "best", "forward", "backward"):
        differ = (getattr(one, field) != getattr(two, field)).flatten(1 if field == "best" else 0)
        rows = (differ.any(1) if differ.dim() > 1 else differ).nonzero().squeeze(1).tolist()
        what = f"{attack.name}: {law}: {field} of rows {rows} differ"
        _expect(not rows, f"{what}; draw noise from batch.key only")


def check_order(attack: Attack, case: Puzzle, usual: Outcome) -> None:
    """Shuffled rows get the same verdicts and images, bit for bit, at one padded width."""
    order = noise.uniform(torch.tensor([7]), (len(case.x),)).squeeze(0).argsort()
    _same(attack, "rows in another order", usual.take(order), case.play(attack, order))


def check_subset(attack: Attack, case: Puzzle, usual: Outcome) -> None:
    """Some of the rows, asked for alone under their sample ids, get what they got among all."""
    some = torch.tensor([10, 3, 5])
    _same(attack, "some rows alone", usual.take(some), case.play(attack, some))


def check_restarts(attack: Attack, case: Puzzle, usual: Outcome) -> None:
    """More tries never lose what one try found."""
    more = case.play(attack, restarts=3)
    same = (usual.best == more.best).flatten(1).all(1)
    better = more.distance <= usual.distance if attack.minimizes else same
    kept = bool((more.found & better)[usual.found].all())
    _expect(kept, f"{attack.name}: a row found in one try is lost or worse after three")


def check_width(attack: Attack, case: Puzzle, usual: Outcome) -> int:
    """Other widths start from the same noise and end in the same verdicts; returns rows moved by rounding."""
    batch = _batch(case)
    starts = attack.init(batch).x
    for row in range(len(case.x)):
        alone = attack.init(batch.take(torch.tensor([row]))).x[0]
        same = torch.equal(alone, starts[row])
        _expect(same, f"{attack.name}: row {row} starts elsewhere when it is alone")
    moved = 0
    for width in (1, 3, 7, 64):
        got = case.play(attack, torch.arange(min(len(case.x), 2 * width)), width=width)
        for row in (got.found != usual.found[: len(got.found)]).nonzero().squeeze(1).tolist():
            edge = min(_margin(case, one.best, row) for one in (got, usual))
            what = f"{attack.name}: row {row} has another verdict at width {width}"
            _expect(edge < 1e-5, f"{what}, margin {edge:.2g}")
            moved += 1
    return moved


def _batch(case: Puzzle) -> Batch:
    goal = torch.full_like(case.y, -1) if case.targets is None else case.targets[:, 0]
    keys = noise.keys(0, torch.arange(len(case.x)), torch.zeros_like(case.y))
    return Batch(case.x, case.y, goal, keys, case.limit)


def _margin(case: Puzzle, x: Tensor, row: int) -> float:
    """How far the two leading logits are apart on one image."""
    logits = case.model.query(x[row : row + 1], Access.SCORE).logits
    assert logits is not None
    first, second = logits[0].topk(2).values.tolist()
    return float(first - second)


def check_access(attack: Attack) -> None:
    """An attack works with the access that it declares, and is refused with less."""
    case = puzzle(attack.norms[0], targeted=attack.needs_target)
    try:
        case.play(attack)
    except AttackError as error:
        raise ContractError(f"{attack.name}: fails with the access that it declares: {error}") from error
    if attack.needs == Access.DECISION:
        return
    less = Access(attack.needs - 1)
    try:
        case.play(Watched(attack, needs=less))
    except AttackError:
        return
    raise ContractError(f"{attack.name}: declares Access.{attack.needs.name} but runs with {less.name}")


def linear(norm: str, shape: tuple[int, ...], rows: int, distance: float = 0.5) -> Puzzle:
    """Two classes and a hyperplane `distance` from every row in `norm`; the bounds do not matter."""
    weight = _draw(3, *shape).flatten()
    x = noise.uniform(torch.arange(rows), shape).double().flatten(1) - 0.5
    away = distance * weight.norm(DUALS[norm]) - x @ weight
    x = (x + away[:, None] * weight / weight.square().sum()).float().view(rows, *shape)

    def logits(flat: Tensor) -> Tensor:
        half = flat @ weight / 2
        return torch.stack([half, -half], 1)

    model = Probe(logits, bounds=(-20.0, 20.0))
    y = torch.zeros(rows, dtype=torch.int64)
    return Puzzle(model, threat(norm, 50.0, model.bounds), x, y, None)


def check_optimum(attack: Attack, norm: str, *, tolerance: float = 0.05) -> None:
    """On a linear model the nearest adversarial image is |w x + b| / ||w||_dual away: no more, no less.

    Random search in L2 and L1 never quite gets there: from an attack that sees no gradients, half as much
    again is accepted. An attack with `restricted = True` looks at a family of images of its own (transforms,
    random draws), which need not hold the nearest: of it only the "no less" is asked.
    """
    restricted = getattr(attack, "restricted", False)
    if attack.needs < Access.GRADIENT and norm != "linf":
        tolerance = max(tolerance, 0.5)
    case = linear(norm, SHAPE, 5)
    if attack.needs_target:
        case = Puzzle(case.model, case.limit, case.x, case.y, torch.ones(5, 1, dtype=torch.int64))
    if attack.minimizes or norm == "unbounded":
        outcome = case.play(attack)
        farthest = 0.5 * (1 + tolerance) if attack.minimizes else torch.inf
        far = outcome.distance.where(outcome.found, torch.tensor(torch.inf))
        _expect(
            float(far.min()) > 0.499,
            f"{attack.name}: {norm} {float(far.min()):.4g} is nearer than possible, 0.5",
        )
        _expect(
            restricted or (float(far.max()) <= farthest and bool(outcome.found.all())),
            f"{attack.name}: expected images 0.5 away in {norm} on a linear model, got {far.tolist()}",
        )
        return
    for factor, wanted in ((0.99, False),) if restricted else ((0.99, False), (1 + tolerance, True)):
        limit = threat(norm, 0.5 * factor, case.model.bounds)
        found = Puzzle(case.model, limit, case.x, case.y, case.targets).play(attack).found
        what = f"{attack.name}: the boundary of a linear model is 0.5 away in {norm}; with eps {limit.eps:.4g}"
        _expect(
            bool((found == wanted).all()),
            f"{what} expected all rows {'' if wanted else 'un'}broken, got {found.tolist()}",
        )


def check_judge(judge: Judge) -> None:
    """A judge accepts a legal point that fools the model, and refuses every other."""
    for norm, kind in NORMS.items():
        limit = kind(1.0 if norm == "l0" else 0.25)
        x0 = torch.full((1, *SHAPE), 0.5)
        y = torch.zeros(1, dtype=torch.int64)
        batch = Batch(x0, y, y - 1, y, limit)
        index = torch.arange(x0.numel()).view_as(x0)
        two = x0 + 0.26 * ((index == 3) | (index == 5))
        points = {"inside": x0 + 0.2 * (index == 3), "outside the ball": two, "NaN": x0 / 0 * 0}
        points["outside the bounds"] = x0 + 0.6 * (index == 3)
        for what, x in points.items():
            for label in (0, 1):
                logits = torch.tensor([[0.0, 0.0]]).index_fill(1, torch.tensor([label]), 50.0)
                said = bool(judge.adversarial(batch, x, Prediction(torch.tensor([label]), logits)))
                wanted = what == "inside" and label == 1
                verdict = f"expected {wanted}, got {said}, for a point {what} ({norm}) that the model calls {label}"
                _expect(said == wanted, f"judge: {verdict} (its true class is 0)")
