"""Asking: one image that the model cannot answer does not sink the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.pgd import PGD
from sparring.core.judge import Judge
from sparring.core.model import Access
from sparring.core.threat import Linf
from sparring.engine.asking import ask
from sparring.engine.loop import run
from sparring.models.torch import TorchModel

Rows = tuple[Tensor, Tensor]
Break = Callable[[Tensor, Tensor], Tensor]
MARKS = [[], [0], [8], [3, 4], [1, 3, 5, 7]]
SIDE_BY_SIDE = [[0, 1, 2, 3], [0, 2, 3, 4, 5, 6, 7, 8]]  # with parts in which all fail


class Breaking(nn.Module):
    """Answers as `net`, but not for images whose first pixel is white: `how` says what comes of those."""

    def __init__(self, net: nn.Module, how: Break) -> None:
        super().__init__()
        self.net, self.how, self.asked = net, how, []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(len(x))
        return self.how(self.net(x), x[:, 0, 0, 0] == 1)


def raises(logits: Tensor, marked: Tensor) -> Tensor:
    if marked.any():
        raise ValueError("out of order")
    return logits


def silent(value: float) -> Break:
    def how(logits: Tensor, marked: Tensor) -> Tensor:
        answer = logits.clone()
        answer[marked, 2] = value
        return answer

    return how


@pytest.fixture
def images(rows: Rows) -> Tensor:
    x = rows[0][:9].clone()
    x[:, 0, 0, 0] = 0
    return x


def marked(images: Tensor, marks: list[int]) -> Tensor:
    x = images.clone()
    x[marks, 0, 0, 0] = 1
    return x


def others(marks: list[int]) -> list[int]:
    return [row for row in range(9) if row not in marks]


@pytest.mark.parametrize("access", list(Access))
@pytest.mark.parametrize("marks", MARKS + SIDE_BY_SIDE, ids=str)
def test_the_culprits_fail_and_the_others_are_answered(marks, access, net, images):
    x = marked(images, marks)
    got = ask(TorchModel(Breaking(net, raises)), x, access)
    plain = TorchModel(net).query(x, access)
    fine = others(marks)
    assert sorted(got.failed) == marks
    assert all("out of order" in why for why in got.failed.values())
    assert torch.equal(got.prediction.labels[fine], plain.labels[fine])
    assert (got.prediction.labels[marks] == -1).all()
    if access >= Access.SCORE:
        torch.testing.assert_close(got.prediction.logits[fine], plain.logits[fine])
        assert got.prediction.logits[marks].isnan().all()
    else:
        assert got.prediction.logits is None


@pytest.mark.parametrize("marks", [*MARKS, *(m for m in SIDE_BY_SIDE)], ids=str)
def test_gradients_of_the_joined_parts_are_those_of_the_whole(marks, net, images):
    x = marked(images, marks)
    got = ask(TorchModel(Breaking(net, raises)), x, Access.GRADIENT).prediction
    cotangent = torch.randn(9, 10, generator=torch.Generator().manual_seed(1))
    wanted = TorchModel(net).query(x, Access.GRADIENT).vjp(cotangent)
    wanted[marks] = 0
    assert wanted.any() == bool(others(marks))
    torch.testing.assert_close(got.vjp(cotangent, keep=True), wanted)
    torch.testing.assert_close(got.vjp(cotangent), wanted)


def test_a_culprit_costs_few_questions(net, images):
    x = marked(images.repeat(8, 1, 1, 1)[:64], [37])
    model = Breaking(net, raises)
    got = ask(TorchModel(model), x, Access.SCORE)
    assert list(got.failed) == [37]
    assert len(model.asked) == 1 + 2 * 6  # six halvings of 64
    model.asked.clear()
    assert not ask(TorchModel(model), images, Access.SCORE).failed
    assert model.asked == [9]


def test_one_row_alone(net, images):
    model = TorchModel(Breaking(net, raises))
    bad = ask(model, marked(images, [0])[:1], Access.GRADIENT)
    assert bad.prediction.labels.tolist() == [-1]
    assert bad.prediction.logits is None
    assert "out of order" in bad.failed[0]
    assert torch.equal(bad.prediction.vjp(torch.ones(1, 10)), torch.zeros(1, 1, 8, 8))
    fine = ask(model, images[:1], Access.GRADIENT)
    assert fine.failed == {}
    assert torch.equal(fine.prediction.logits, net(images[:1]))


@pytest.mark.parametrize("access", list(Access))
def test_all_fail(access, net, images):
    got = ask(TorchModel(Breaking(net, raises)), marked(images, list(range(9))), access)
    assert sorted(got.failed) == list(range(9))
    assert got.prediction.labels.tolist() == [-1] * 9
    assert got.prediction.logits is None


def test_the_gradient_of_rows_that_all_fail_is_zero_for_each(net, images):
    got = ask(TorchModel(Breaking(net, raises)), marked(images, list(range(9))), Access.GRADIENT)
    assert torch.equal(got.prediction.vjp(torch.ones(9, 10)), torch.zeros_like(images))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("marks", MARKS, ids=str)
def test_logits_that_are_not_finite_are_failures(marks, value, net, images):
    model = Breaking(net, silent(value))
    got = ask(TorchModel(model), marked(images, marks), Access.SCORE)
    assert sorted(got.failed) == marks
    assert all("expected finite logits, got [" in why for why in got.failed.values())
    fine = others(marks)
    assert torch.equal(got.prediction.logits[fine], net(marked(images, marks))[fine])
    assert model.asked == [9]  # the model did not fail: nothing is to be asked again


def test_huge_logits_are_answers(net, images):
    got = ask(TorchModel(nn.Sequential(net, Times(1e37))), images, Access.SCORE)
    assert got.failed == {}
    assert not got.prediction.logits.sum().isfinite()  # which is what is looked at first


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_only_a_failure_of_the_model_is_taken_for_one(net, images):
    def full(logits: Tensor, marked: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    model = Breaking(net, full)
    with pytest.raises(torch.OutOfMemoryError):
        ask(TorchModel(model), images, Access.SCORE)
    assert model.asked == [9]


@pytest.mark.parametrize("how", [raises, silent(torch.nan)], ids=["raises", "nan"])
@pytest.mark.parametrize("width", [1, 4, 16])
def test_a_judge_of_confidence_bears_with_failures(width, how, net, rows):
    x = rows[0][:9].clone()
    x[:, 0, 0, 0] = 0
    x[4, 0, 0, 0] = 1
    y = net(x).argmax(1)
    got = run(TorchModel(Breaking(net, how)), PGD(), Linf(0.1), x, y, judge=Judge(confidence=0.6), width=width)
    assert got.failed.tolist() == [row == 4 for row in range(9)]
    assert got.found.any()
