"""VNN-LIB 1.0: whatever form a property is written in, its unsafe points are those that the text names."""

from __future__ import annotations

import gzip
import itertools

import pytest
import torch

from sparring.certificates.vnnlib import parse, read_property
from sparring.core.errors import UsageError

TWO = "(declare-const X_0 Real)\n(declare-const X_1 Real)\n(declare-const Y_0 Real)\n(declare-const Y_1 Real)\n"
BOX = "(assert (>= X_0 -1))(assert (<= X_0 1))(assert (>= X_1 0))(assert (<= X_1 0.5))\n"

ACAS = """; ACAS Xu property 2

(declare-const X_0 Real)
(declare-const X_1 Real)

(declare-const Y_0 Real)
(declare-const Y_1 Real)
(declare-const Y_2 Real)

; Unscaled Input 0: (55947.691, 60760)
(assert (<= X_0 0.679857769))
(assert (>= X_0 0.6))

; Unscaled Input 1: (-3.141592653589793, 3.141592653589793)
(assert (<= X_1 0.5))
(assert (>= X_1 -0.5))

; unsafe if COC is maximal
(assert (<= Y_1 Y_0))
(assert (<= Y_2 Y_0))
"""


def unsafe(prop, x, y):
    """Does the normal form call this point unsafe?"""
    for case in prop.cases:
        inside = ((case.low <= x) & (x <= case.high)).all()
        if inside and any((u.a @ y + u.b <= 0).all() for u in case.unsafe):
            return True
    return False


def pairs(tensor):
    return tensor.tolist()


def test_a_property_in_the_competitions_style():
    prop = parse(ACAS)
    (case,) = prop.cases
    assert (prop.inputs, prop.outputs) == (2, 3)
    assert pairs(case.low) == [0.6, -0.5]
    assert pairs(case.high) == [0.679857769, 0.5]
    (one,) = case.unsafe
    assert pairs(one.a) == [[-1, 1, 0], [-1, 0, 1]]
    assert pairs(one.b) == [0, 0]


def test_a_disjunction_of_outputs_is_one_box_with_many_conjunctions():
    outputs = "(assert (or (and (>= Y_0 Y_1)) (and (>= Y_0 3.99) (<= Y_1 2))\n))"
    (case,) = parse(TWO + outputs + BOX).cases
    assert [pairs(u.a) for u in case.unsafe] == [[[-1, 1]], [[-1, 0], [0, 1]]]
    assert [pairs(u.b) for u in case.unsafe] == [[0], [3.99, -2]]


def test_a_disjunction_of_boxes_is_one_case_each():
    text = """(assert (or
      (and (<= X_0 1) (>= X_0 0) (<= X_1 1) (>= X_1 0) (<= Y_0 0))
      (and (<= X_0 3) (>= X_0 2) (<= X_1 1) (>= X_1 0) (>= Y_0 5) (<= Y_1 Y_0))
      (and (<= X_0 1) (>= X_0 0) (<= X_1 1) (>= X_1 0) (<= Y_1 7))))"""
    first, second = parse(TWO + text).cases
    assert (pairs(first.low), pairs(first.high)) == ([0, 0], [1, 1])
    assert [pairs(u.b) for u in first.unsafe] == [[0], [-7]]
    assert (pairs(second.low), pairs(second.high)) == ([2, 0], [3, 1])
    assert [pairs(u.a) for u in second.unsafe] == [[[-1, 0], [-1, 1]]]


def test_boxes_and_outputs_of_two_disjunctions_multiply():
    text = """(assert (or (and (<= X_0 0) (>= X_0 -1)) (and (<= X_0 1) (>= X_0 0.5))))
      (assert (<= X_1 0.5)) (assert (>= X_1 0))
      (assert (or (<= Y_0 0) (and (<= Y_1 0) (or (>= Y_0 1) (>= Y_0 2)))))"""
    cases = parse(TWO + text).cases
    assert [len(case.unsafe) for case in cases] == [3, 3]
    assert [case.high[0] for case in cases] == [0, 1]


@pytest.mark.parametrize(
    ("text", "a", "b"),
    [
        ("(<= Y_0 1.5e-3)", [1, 0], -1.5e-3),
        ("(>= Y_0 -2.E+1)", [-1, 0], -20),
        ("(<= .5 Y_1)", [0, -1], 0.5),
        ("(<= (+ Y_0 (* -2 Y_1) 3) (- 4))", [1, -2], 7),
        ("(>= (- Y_0 Y_1 1) (* 2 (+ Y_0 1)))", [1, 1], 3),
        ("(<= (- Y_0) (* Y_1 3 0.5))", [-1, -1.5], 0),
        ("(<= Y_0 +1)", [1, 0], -1),
    ],
)
def test_linear_terms(text, a, b):
    (case,) = parse(f"{TWO}{BOX}(assert {text})").cases
    (one,) = case.unsafe
    assert pairs(one.a) == [a]
    assert pairs(one.b) == [b]


def test_bounds_of_inputs_in_any_form_and_the_tightest_counts():
    text = """(assert (and (<= -1 X_0) (>= 2 X_0) (<= X_0 1e0))) (assert (<= (* -2 X_1) 1)) (assert (<= (+ X_1 1) 3))
      (assert (>= X_0 -5)) (assert (<= Y_0 0))"""
    (case,) = parse(TWO + text).cases
    assert pairs(case.low) == [-1, -0.5]
    assert pairs(case.high) == [1, 2]


def test_declarations_in_any_order_and_as_functions():
    text = """(set-logic QF_LRA) (declare-fun Y_0 () Real) (assert (<= X_1 1)) (assert (>= X_1 1)) ; used before
      (declare-const X_1 Real) (declare-const X_0 Real) (assert (<= X_0 0)) (assert (>= X_0 0)) (assert (>= Y_0 X_0x))
      """.replace("X_0x", "0")
    prop = parse(text)
    assert (prop.inputs, prop.outputs) == (2, 1)
    assert pairs(prop.cases[0].low) == [0, 1]


def test_an_empty_box_is_no_case_and_no_constraint_holds_always():
    assert parse(TWO + BOX + "(assert (>= X_0 2)) (assert (<= Y_0 0))").cases == ()
    assert parse(TWO + BOX + "(assert (or))").cases == ()
    prop = parse(TWO + BOX)
    assert unsafe(prop, torch.zeros(2).double(), torch.tensor([9.0, -9.0]).double())
    assert not unsafe(parse(TWO + BOX + "(assert (<= 1 0))"), torch.zeros(2).double(), torch.zeros(2).double())


def holds(form, values):
    """What a formula, given as nested tuples, says of `values`: written without the normal form."""
    head, *parts = form
    if head in ("and", "or"):
        return (all if head == "and" else any)(holds(part, values) for part in parts)
    left, right = (values[p] if isinstance(p, str) else p for p in parts)
    return left <= right if head == "<=" else left >= right


def written(form):
    return f"({' '.join(written(p) if isinstance(p, tuple) else str(p) for p in form)})"


@pytest.mark.parametrize("seed", range(30))
def test_nested_formulas_name_the_points_that_they_say(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return int(torch.randint(0, n, (1,), generator=generator))

    def formula(depth):
        if depth == 0 or draw(3) == 0:
            sign, name = ("<=", ">=")[draw(2)], ("X_0", "X_1", "Y_0", "Y_1")[draw(4)]
            other = "Y_0" if name == "Y_1" and draw(2) else draw(5) - 2
            return (sign, name, other) if draw(2) else (sign, other, name)
        return (("and", "or")[draw(2)], *(formula(depth - 1) for _ in range(1 + draw(3))))

    asserted = [formula(3) for _ in range(1 + draw(2))]
    text = TWO + BOX + "".join(f"(assert {written(form)})\n" for form in asserted)
    prop = parse(text)
    grid = [-2.5, -2, -1, -0.5, 0, 0.25, 0.5, 1, 1.5, 2]
    for x0, x1, y0, y1 in itertools.product(grid, grid[3:7], grid[::2], grid[1::2]):
        values = {"X_0": x0, "X_1": x1, "Y_0": y0, "Y_1": y1}
        wanted = -1 <= x0 <= 1 and 0 <= x1 <= 0.5 and all(holds(form, values) for form in asserted)
        x, y = torch.tensor([x0, x1]).double(), torch.tensor([y0, y1]).double()
        assert unsafe(prop, x, y) == wanted, (text, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(assert (< Y_0 1))", r"p, line 6: expected and, or, \(<= a b\) or \(>= a b\), got \(< Y_0 1\)"),
        ("\n\n(assert (not (<= Y_0 1)))", "line 8: expected and, or"),
        ("(assert (<= (* Y_0 Y_1) 1))", "line 6: expected a linear term"),
        ("(assert (<= (/ Y_0 2) 1))", "line 6: expected a number, a variable"),
        ("(assert (<= Y_2 1))", "line 6: expected a number or a declared variable, got Y_2"),
        ("(assert (<= Y_0 1e999))", "line 6: expected a number of float64, got 1e999"),
        ("(assert (<= Y_0 nan))", "line 6: expected a number or a declared variable, got nan"),
        ("(assert (<= X_0 X_1))", "line 6: expected a bound on one input, got a constraint on X_0, X_1"),
        ("(assert (or (<= Y_0 1)\n (<= X_0 Y_1)))", "line 7: expected a bound on one input"),
        ("(assert (<= Y_0 1)", r"line 6: the \( here is never closed"),
        ("(assert (<= Y_0 1)))", r"line 6: a \) without"),
        ("(assert (<= Y_0 1 2))", "line 6: expected and, or"),
        ("(assert)", r"line 6: expected \(assert formula\)"),
        ("(push 1)", "line 6: expected declare-const, declare-fun or assert, got"),
        ("hello", r"line 6: expected a list such as \(assert ...\), got hello"),
        ('(assert "a")', "line 6: unexpected character"),
        ("(declare-const X_0 Real)", "line 6: X_0 is declared twice, first in line 1"),
        ("(declare-const Z_0 Real)", "line 6: expected an input X_0, X_1, ... or an output"),
        ("(declare-const X_2 Int)", r"line 6: expected \(declare-const X_0 Real\)"),
        ("(declare-const X_4 Real)", "expected X_0 to X_4, but X_2 is not declared"),
        ("(declare-const X_2 Real)", "expected bounds on every input, but X_2 has no lower one"),
        ("(declare-const X_2 Real)(assert (>= X_2 1))", "X_2 has no upper one"),
        ("(vnnlib-version <2.0>)", "line 6: expected VNN-LIB 1.0"),
        ("(assert (and " + "(or (<= Y_0 1) (<= Y_1 1))" * 20 + "))", "line 6: expected at most 100,000 alternatives"),
        ("(assert (or (<= Y_0 1) (<= Y_1 1)))" * 20, "expected at most 100,000 alternatives"),
        ("(assert " + "(and " * 3000 + "(<= Y_0 1)" + ")" * 3001, "nested"),
    ],
)
def test_what_is_not_understood_is_named_with_its_line(text, message):
    with pytest.raises(UsageError, match=message):
        parse(TWO + BOX + text, "p")


def test_no_outputs_or_no_inputs():
    with pytest.raises(UsageError, match="expected Y_0 to be declared, found no Y"):
        parse("(declare-const X_0 Real)")
    with pytest.raises(UsageError, match="expected X_0 to be declared, found no X"):
        parse("")


def test_files_packed_or_not(tmp_path):
    (tmp_path / "p.vnnlib").write_text(ACAS)
    (tmp_path / "p.vnnlib.gz").write_bytes(gzip.compress(ACAS.encode()))
    plain, packed = (read_property(tmp_path / name) for name in ("p.vnnlib", "p.vnnlib.gz"))
    assert torch.equal(plain.cases[0].unsafe[0].a, packed.cases[0].unsafe[0].a)
    (tmp_path / "bad.vnnlib.gz").write_bytes(b"nothing packed")
    (tmp_path / "bytes.vnnlib").write_bytes(b"\xff\xfe")
    for name in ("bad.vnnlib.gz", "bytes.vnnlib", "none.vnnlib"):
        with pytest.raises(UsageError, match=f"could not read .*{name}"):
            read_property(tmp_path / name)


def test_a_large_property_is_read_in_time():
    count = 3072
    names = "".join(f"(declare-const X_{i} Real)\n" for i in range(count))
    bounds = "".join(f"(assert (<= X_{i} 0.5{i}))\n(assert (>= X_{i} -0.25{i}))\n" for i in range(count))
    outputs = "".join(f"(declare-const Y_{i} Real)\n" for i in range(10))
    text = (
        names + outputs + bounds + f"(assert (or {' '.join(f'(and (>= Y_{i} Y_3))' for i in range(10) if i != 3)}))"
    )
    (case,) = parse(text).cases
    assert len(case.unsafe) == 9
    assert case.high[17] == 0.517
