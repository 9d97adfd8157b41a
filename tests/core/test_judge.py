"""The judge alone says what is adversarial, so it must refuse everything that is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparring.core.batch import Batch
from sparring.core.errors import ModelError, UsageError
from sparring.core.judge import Judge, confidence
from sparring.core.model import Access, Prediction
from sparring.core.threat import Linf
from sparring.testing import check_judge


def batch(rows: int = 1, target: int = -1) -> Batch:
    y = torch.zeros(rows, dtype=torch.int64)
    return Batch(torch.full((rows, 1, 2, 2), 0.5), y, torch.full_like(y, target), y, Linf(0.1))


def says(logits: list[list[float]]) -> Prediction:
    values = torch.tensor(logits)
    return Prediction(values.argmax(1), values)


def moved(by: float, rows: int = 1) -> Tensor:
    x = torch.full((rows, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] += by
    return x


@pytest.mark.parametrize("judge", [Judge(), Judge(confidence=0.9), Judge(any_wrong=True)])
def test_the_contract(judge):
    check_judge(judge)


@pytest.mark.parametrize(("by", "wanted"), [(0.09, True), (0.1, True), (0.1001, False), (0.11, False)])
def test_the_border_of_the_ball(by, wanted):
    assert Judge().adversarial(batch(), moved(by), says([[0.0, 1.0]])).item() is wanted


def test_a_nan_pixel_is_never_legal():
    assert not Judge().adversarial(batch(), moved(torch.nan), says([[0.0, 1.0]])).item()


def test_nan_logits_fool_nobody():
    got = Judge().adversarial(batch(3), moved(0.0, 3), says([[0.0, 1.0], [torch.nan, 1.0], [0.0, torch.inf]]))
    assert got.tolist() == [True, False, False]


def test_the_shortfall_is_positive_where_the_attacker_has_what_he_wants():
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.5], [0.0, 1.0, 4.0]])
    assert Judge().shortfall(batch(3), logits).tolist() == [-1.0, 2.0, 4.0]
    assert Judge().shortfall(batch(3, target=1), logits).tolist() == [-2.0, 0.5, -3.0]
    assert Judge(any_wrong=True).shortfall(batch(3, target=1), logits).tolist() == [-1.0, 2.0, 4.0]


def test_a_target_is_needed_unless_any_wrong_class_counts():
    three = says([[0.0, 0.0, 5.0]])
    assert not Judge().adversarial(batch(target=1), moved(0.05), three).item()
    assert Judge().adversarial(batch(target=2), moved(0.05), three).item()
    assert Judge(any_wrong=True).adversarial(batch(target=1), moved(0.05), three).item()
    assert not Judge(any_wrong=True).adversarial(batch(target=1), moved(0.05), says([[9.0, 0.0, 5.0]])).item()


def test_confidence_is_a_second_bar():
    low, high = says([[0.0, 1.0]]), says([[0.0, 9.0]])
    judge = Judge(confidence=0.9)
    assert not judge.adversarial(batch(), moved(0.05), low).item()
    assert judge.adversarial(batch(), moved(0.05), high).item()
    assert confidence(low).item() == pytest.approx(1 / (1 + 2.718281828**-1.0), abs=1e-6)
    assert judge.needs == Access.SCORE
    assert Judge().needs == Access.DECISION


@pytest.mark.parametrize("value", [-0.1, 1.0, 2.0, float("nan")])
def test_a_confidence_that_is_no_probability_is_refused(value):
    with pytest.raises(UsageError, match="expected a confidence in"):
        Judge(confidence=value)


def test_confidence_needs_logits():
    with pytest.raises(ModelError, match="gives labels only"):
        confidence(Prediction(torch.tensor([1])))
