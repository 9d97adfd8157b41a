"""Verdicts against exact enumeration: every pattern of a small ReLU network is a linear programme."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

from sparring.certificates import properties  # noqa: E402
from sparring.certificates.branch import BROKEN, OPEN, PROVED, Question  # noqa: E402
from sparring.certificates.crown import crown  # noqa: E402
from sparring.certificates.graph import trace  # noqa: E402
from sparring.certificates.properties import verify  # noqa: E402
from sparring.certificates.region import Region  # noqa: E402
from sparring.certificates.splitting import _mixed, split_inputs  # noqa: E402
from sparring.certificates.vnnlib import Case, Conjunction, Property, parse  # noqa: E402
from sparring.core.errors import ModelError, UsageError  # noqa: E402
from sparring.models.onnx_function import open_function  # noqa: E402


def layers(seed, *sizes, scale=1.5):
    draw = np.random.default_rng(seed)
    pairs = pairwise(sizes)
    return [(scale * draw.normal(size=(b, a)) / a**0.5, 0.5 * draw.normal(size=b)) for a, b in pairs]


def stored(path, parts, shape=None, last=""):
    """A dense ReLU network at `path`, and as the function of the file."""
    make, held, nodes, at = onnx.helper, [], [], "x"
    for place, (weight, bias) in enumerate(parts):
        for name, array in ((f"w{place}", weight.T), (f"b{place}", bias)):
            held.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array, dtype=np.float32), name))
        nodes += [make.make_node("MatMul", [at, f"w{place}"], [f"m{place}"])]
        nodes += [make.make_node("Add", [f"m{place}", f"b{place}"], [f"a{place}"])]
        at = f"a{place}"
        if place < len(parts) - 1:
            nodes.append(make.make_node("Relu", [at], [f"r{place}"]))
            at = f"r{place}"
    if last:
        nodes.append(make.make_node(last, [at], ["end"]))
        at = "end"
    ends = [make.make_tensor_value_info("x", 1, shape or [1, parts[0][0].shape[1]])]
    graph = make.make_graph(nodes, "g", ends, [make.make_tensor_value_info(at, 1, None)], held)
    path.write_bytes(
        make.make_model(graph, opset_imports=[make.make_opsetid("", 13)], ir_version=8).SerializeToString()
    )
    return open_function(path)


def rounded(parts):
    return [
        (weight.astype(np.float32).astype(float), bias.astype(np.float32).astype(float)) for weight, bias in parts
    ]


def exists(parts, case, unsafe):
    """Is there a point of the box of `case` whose outputs are `unsafe`? A linear programme for each pattern."""
    (first, bias), (last, end) = parts
    a, b = unsafe.a.numpy(), unsafe.b.numpy()
    box = np.stack([case.low.numpy(), case.high.numpy()], 1)
    for pattern in range(2 ** len(bias)):
        on = np.array([pattern >> i & 1 for i in range(len(bias))], dtype=bool)
        rows = np.concatenate([np.where(on[:, None], -first, first), a @ last[:, on] @ first[on]])
        limits = np.concatenate([np.where(on, bias, -bias), -b - a @ (last[:, on] @ bias[on] + end)])
        if linprog(np.zeros(first.shape[1]), rows, limits, bounds=box, method="highs").status == 0:
            return True
    return False


def drawn(seed, inputs, outputs, conjunctions, constraints, cases=1):
    """Random boxes and constraints, near the edge of what a network of this file reaches."""
    draw = np.random.default_rng(seed + 1000)
    found = []
    for _ in range(cases):
        low = draw.uniform(-1, 0.2, size=inputs)
        unsafe = tuple(
            Conjunction(
                torch.tensor(draw.normal(size=(constraints, outputs))),
                torch.tensor(draw.uniform(0.2, 1.4, size=constraints) - 0.4 * (constraints - 1)),
            )
            for _ in range(conjunctions)
        )
        found.append(Case(torch.tensor(low), torch.tensor(low + draw.uniform(0.1, 0.8, size=inputs)), unsafe))
    return Property(inputs, outputs, tuple(found))


@pytest.mark.parametrize(
    ("inputs", "shape"), [(3, (1, 1)), (3, (3, 1)), (3, (1, 3)), (3, (2, 2, 2)), (14, (1, 1)), (14, (2, 2))]
)
def test_verdicts_are_those_of_exact_enumeration(inputs, shape, tmp_path):
    seen = []
    for seed in range(6):
        parts = rounded(layers(seed, inputs, 4, 3))
        network, prop = stored(tmp_path / f"{seed}.onnx", parts), drawn(seed, inputs, 3, *shape)
        wanted = any(exists(parts, case, unsafe) for case in prop.cases for unsafe in case.unsafe)
        answer = verify(network, prop, timeout=20)
        assert answer.verdict == ("sat" if wanted else "unsat"), seed
        seen.append(answer.verdict)
        if wanted:
            outputs = network.run(answer.point.view(1, -1))[0]
            torch.testing.assert_close(outputs, answer.outputs, rtol=0, atol=0)
            assert any(
                ((case.low <= answer.point) & (answer.point <= case.high)).all() and (u.a @ outputs + u.b <= 0).all()
                for case in prop.cases
                for u in case.unsafe
            )
    assert set(seen) == {"sat", "unsat"}


@pytest.fixture
def hard(tmp_path):
    """A deep network with 30 free inputs, and a bound that only its exact maximum would decide."""
    network = stored(tmp_path / "hard.onnx", layers(0, 30, 40, 40, 40, 40, 2, scale=2.0))
    box = Case(-torch.ones(30).double(), torch.ones(30).double(), ())
    x = torch.rand(4000, 30, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    reached = network.run(x)[:, 0]
    above = float(3 * reached.max() - 2 * reached.min())
    unsafe = Conjunction(torch.tensor([[-1.0, 0.0]]).double(), torch.tensor([above]).double())
    return network, Property(30, 2, (Case(box.low, box.high, (unsafe,)),))


@pytest.mark.parametrize("limit", [0.5, 1.5])
def test_the_time_limit_is_kept(hard, limit):
    verify(*hard, timeout=0.1)  # what is loaded and compiled once
    start = time.monotonic()
    answer = verify(*hard, timeout=limit)
    assert answer.verdict == "timeout"
    assert limit <= time.monotonic() - start < limit + 1
    assert abs(answer.seconds - limit) < 1


def test_the_time_limit_is_kept_with_few_inputs(tmp_path):
    network = stored(tmp_path / "net.onnx", layers(1, 6, 60, 60, 60, 60, 2, scale=3.0))
    ones = torch.ones(6).double()
    unsafe = Conjunction(torch.tensor([[-1.0, 0.0]]).double(), torch.tensor([1e3]).double())
    start = time.monotonic()
    answer = verify(network, Property(6, 2, (Case(-100 * ones, 100 * ones, (unsafe,)),)), timeout=0.7)
    assert time.monotonic() - start < 1.7
    assert answer.verdict in ("timeout", "sat")


@dataclass
class Other:
    """A network that ONNX Runtime answers for otherwise than torch."""

    network: object
    shift: float

    def __getattr__(self, name):
        return getattr(self.network, name)

    def run(self, x):
        return self.network.run(x) + self.shift


@pytest.mark.parametrize("inputs", [3, 14])
def test_a_point_that_onnx_runtime_does_not_confirm_is_none(inputs, tmp_path):
    parts = rounded(layers(3, inputs, 5, 2))
    network = stored(tmp_path / "net.onnx", parts)
    case = Case(-torch.ones(inputs).double(), torch.ones(inputs).double(), ())
    unsafe = Conjunction(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([-1.0]).double())
    prop = Property(inputs, 2, (Case(case.low, case.high, (unsafe,)),))
    assert verify(network, prop, timeout=5).verdict == "sat"
    assert verify(Other(network, 1e3), prop, timeout=0.5).verdict in ("unknown", "timeout")
    assert verify(Other(network, -1e-3), prop, timeout=5).outputs[0] <= 1


def test_the_point_is_in_the_box_as_written(tmp_path):
    """0.1 and 0.7 are no float32; and the network is largest at a corner."""
    network = stored(tmp_path / "net.onnx", [(np.eye(2), np.zeros(2)), (np.eye(2), np.zeros(2))])
    text = """(declare-const X_0 Real)(declare-const X_1 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)
      (assert (<= X_0 0.1)) (assert (>= X_0 0.1)) (assert (<= X_1 0.7)) (assert (>= X_1 0.2)) """
    answer = verify(network, parse(text + "(assert (>= Y_1 0.699999))"), timeout=5)
    assert answer.verdict == "sat"
    assert answer.point[0] == 0.1
    assert 0.2 <= answer.point[1] <= 0.7
    assert verify(network, parse(text + "(assert (>= Y_1 0.7001))"), timeout=5).verdict == "unsat"
    assert verify(network, parse(text + "(assert (>= Y_0 0.1001))"), timeout=5).verdict == "unsat"


def test_a_proof_holds_for_inputs_that_float32_rounds_out_of_the_box(tmp_path):
    """Float32's 0.1 is above 0.1: what lies between is reached by ONNX Runtime, and so never proved."""
    network = stored(tmp_path / "net.onnx", [(np.eye(1), np.zeros(1)), (np.eye(1), np.zeros(1))])
    text = "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (>= X_0 0.1))(assert (<= X_0 0.1))"
    between = 0.1 + 1e-9
    assert between < float(np.float32(0.1))
    assert verify(network, parse(text + f"(assert (>= Y_0 {between!r}))"), timeout=5).verdict == "sat"


def test_nothing_to_find(tmp_path):
    network = stored(tmp_path / "net.onnx", layers(0, 3, 4, 2))
    assert verify(network, Property(3, 2, ()), timeout=1).verdict == "unsat"
    for sizes, message in (
        ((4, 2), "a property of 3 inputs.*one of 4"),
        ((3, 5), "a property of 2 outputs.*one of 5"),
    ):
        with pytest.raises(UsageError, match=message):
            verify(network, Property(*sizes, ()), timeout=1)


@pytest.mark.parametrize(("last", "message"), [("Exp", "'exp'"), ("Softmax", "softmax"), ("Hardmax", "Hardmax")])
def test_operators_without_bounds_are_named(last, message, tmp_path):
    with pytest.raises(ModelError, match=f"no proof.*{message}"):
        verify(stored(tmp_path / "net.onnx", layers(0, 3, 4, 2), last=last), drawn(0, 3, 2, 1, 1), timeout=5)


@pytest.mark.parametrize("seed", range(5))
def test_the_weights_of_several_constraints_are_nearly_the_best(seed):
    """max over the simplex of a minimum over the box, as a linear programme in the weights and dual variables."""
    draw = np.random.default_rng(seed)
    a, shift = draw.normal(size=(3, 4)), draw.normal(size=3) * 0.3
    low, high = -np.ones(4), np.ones(4) * 0.5
    # max t: t <= w.shift + p.low - q.high, w.a = p - q, w on the simplex, p and q at least zero
    cost = np.concatenate([-shift, -low, high])
    equal = np.block([[a.T, -np.eye(4), np.eye(4)], [np.ones((1, 3)), np.zeros((1, 8))]])
    best = -linprog(cost, A_eq=equal, b_eq=np.array([0.0] * 4 + [1.0]), bounds=[(0, None)] * 11).fun
    lines, ends = torch.tensor(a)[None], [torch.tensor(end)[None] for end in (low, high)]
    value = torch.tensor(shift + np.where(a >= 0, a * low, a * high).sum(1))[None]
    weights, found = _mixed(lines, value, *ends)
    assert value.max() <= found[0] <= best + 1e-9
    assert found[0] >= best - 0.25 * (best - float(value.max())) - 1e-9
    assert weights.sum() == pytest.approx(1)


def test_input_splitting_keeps_rows_apart(tmp_path):
    network = stored(tmp_path / "net.onnx", rounded(layers(5, 2, 6, 1)))
    graph = trace(network, network.shape).graph()
    low, high = -torch.ones(3, 2).double(), torch.ones(3, 2).double()
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, 201)] * 2).double()
    least = float(graph.forward(grid).min())
    offset = torch.tensor([[-least + 0.5], [-least - 0.2], [-least + 0.01]]).double()
    question = Question(torch.ones(3, 1, 1).double(), offset)
    asked = []

    def confirm(points, rows):
        asked.append((points, rows))
        return torch.ones(len(rows), dtype=torch.bool)

    found = split_inputs(
        graph, Region(low * 0, low, high), question, deadline=None, confirm=confirm, roundoff=2.0**-53
    )
    assert found.state.tolist() == [PROVED, BROKEN, PROVED]
    assert (graph.forward(found.point[1:2]) + offset[1] <= 0).all()
    assert 0 < found.lower[2] <= 0.011
    assert found.lower[0] <= 0.5
    assert all((graph.forward(points) + offset[rows] <= 0).all() for points, rows in asked)
    late = split_inputs(
        graph, Region(low * 0, low, high), question, deadline=time.monotonic(), confirm=confirm, roundoff=2.0**-53
    )
    assert late.state.tolist() == [OPEN] * 3


def test_a_proof_leaves_room_for_its_own_rounding(tmp_path, monkeypatch):
    network = stored(tmp_path / "net.onnx", rounded(layers(5, 2, 6, 1)))
    graph = trace(network, network.shape).graph()
    where = Region(torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), torch.zeros(1, 2).double())
    exact = float(graph.forward(where.x)[0, 0])
    question = Question(torch.ones(1, 1, 1).double(), torch.tensor([[1e-7 - exact]]).double())
    for roundoff, state in ((2.0**-53, PROVED), (2.0**-24, OPEN)):
        found = split_inputs(
            graph, where, question, deadline=time.monotonic() + 2, roundoff=roundoff,
            confirm=lambda points, rows: torch.zeros(len(rows), dtype=torch.bool),
        )  # fmt: skip
        assert found.state.tolist() == [state]
    assert properties._EXACT == 2.0**-53


def test_each_box_has_its_own_constraints(tmp_path):
    """Each case is proved a little below its own minimum, and only there."""
    network = stored(tmp_path / "net.onnx", rounded(layers(5, 2, 8, 1)))
    graph = trace(network, network.shape).graph()
    ends = [(-torch.ones(2).double(), torch.ones(2).double()), (-torch.ones(2).double(), torch.zeros(2).double())]
    cases, least = [], []
    for low, high in ends:
        grid = low + (high - low) * torch.cartesian_prod(*[torch.linspace(0, 1, 301)] * 2).double()
        least.append(float(graph.forward(grid).min()))
        unsafe = Conjunction(torch.ones(1, 1).double(), torch.tensor([0.03 - least[-1]]).double())
        cases.append(Case(low, high, (unsafe,)))
    assert abs(least[0] - least[1]) > 0.1
    for order in (cases, cases[::-1]):
        answer = verify(network, Property(2, 1, tuple(order)), timeout=5)
        assert (answer.verdict, answer.by) == ("unsat", "input splitting")
    swapped = [Case(one.low, one.high, two.unsafe) for one, two in zip(cases, cases[::-1], strict=True)]
    assert verify(network, Property(2, 1, tuple(swapped)), timeout=5).verdict == "sat"


def test_a_confirmation_asks_for_all_constraints_of_one_conjunction(tmp_path):
    network = stored(tmp_path / "net.onnx", [(np.eye(2), np.zeros(2)), (np.eye(2), np.zeros(2))])
    both = Conjunction(torch.eye(2).double(), torch.tensor([-0.5, -0.5]).double())
    search = properties._Search(network, Property(2, 2, (Case(torch.zeros(2), torch.ones(2), (both,)),)), None)
    points = torch.tensor([[0.1, 0.9], [0.9, 0.1]]).double()
    assert search._confirm(points, torch.zeros(2, dtype=torch.int64)).tolist() == [False, False]
    with pytest.raises(properties._Found) as found:
        search._confirm(torch.tensor([[0.1, 0.2]]), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(found.value.point, torch.tensor([0.1, 0.2]).double())


def test_the_bounded_box_holds_what_float32_rounds_its_points_to():
    low = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    box = properties._region((Case(low, low + 1 / 3, ()),), (200,))
    for end in (low, low + 1 / 3):
        assert (box.low[0] <= end.float()).all()
        assert (end.float() <= box.high[0]).all()
    assert (box.low[0] <= low).all()
    assert (low + 1 / 3 <= box.high[0]).all()


def test_a_bound_proves_with_its_offset(tmp_path):
    network = stored(tmp_path / "net.onnx", [(np.eye(1), np.zeros(1)), (np.eye(1), np.zeros(1))])
    graph, ones = trace(network, network.shape).graph(), torch.ones(1, 1).double()
    relaxed = crown(graph, Region(ones, ones, ones))
    question = Question(torch.ones(3, 2, 1).double(), torch.tensor([[-2, -3], [0, -2], [-1, -1]]).double())
    assert properties._proved(torch.ones(1, 6).double(), graph, relaxed, question).tolist() == [False, True, False]
