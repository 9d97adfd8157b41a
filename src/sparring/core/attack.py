"""What an attack is: a small state machine over rows that asks for a point and is told what came back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from sparring.core.batch import Batch, Rows
from sparring.core.errors import AttackError
from sparring.core.losses import Loss, unflagged
from sparring.core.model import Access, Prediction


class Observation:
    """What an attack sees of one query: labels, and logits and gradients where it has access to them."""

    def __init__(self, batch: Batch, prediction: Prediction, adversarial: Tensor, access: Access) -> None:
        self.labels = prediction.labels  # (n,) int64
        self.adversarial = adversarial  # (n,) bool: the judge's word on the point that was asked about
        self.backward_passes = 0
        self._batch, self._prediction, self._access = batch, prediction, access

    def _need(self, access: Access) -> None:
        if self._access < access:
            raise AttackError(
                f"this attack uses {access.name} access but declares needs = Access.{self._access.name}; "
                f"declare what it uses"
            )

    @property
    def logits(self) -> Tensor:
        """(n, classes) float32; needs SCORE access. A detector's flag counts as the true class: see `unflagged`."""
        return self._weigh(self._said)

    @property
    def _said(self) -> Tensor:
        self._need(Access.SCORE)
        if self._prediction.logits is None:
            raise AttackError("expected logits, got a model that gives labels only; use a decision-based attack")
        return self._prediction.logits

    def _weigh(self, logits: Tensor) -> Tensor:
        return logits if self._prediction.flagged is None else unflagged(logits, self._batch.y)

    def value_and_grad(self, loss: Loss, *, keep: bool = False) -> tuple[Tensor, Tensor]:
        """(n,) values of `loss` and (n, c, h, w) gradients at the point asked about; needs GRADIENT access.

        A second call on the same observation needs `keep=True` in the first.
        """
        self._need(Access.GRADIENT)
        if self._prediction.vjp is None:
            raise AttackError("expected gradients, got a model without them; use a score- or decision-based attack")
        with torch.enable_grad():
            logits = self._said.detach().requires_grad_()
            values = loss(self._weigh(logits), self._batch)
            (cotangent,) = torch.autograd.grad(values, logits, torch.ones_like(values))
        self.backward_passes += 1
        gradient = self._prediction.vjp(cotangent, keep=keep)
        if not gradient.sum().isfinite():  # NaN says nothing about where to go; a step of zero is harmless
            gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        return values.detach(), gradient


@dataclass(frozen=True)
class State(Rows):
    """What an attack remembers of its rows between two queries; attacks add fields of their own."""

    x: Tensor  # (n, c, h, w): the next point to ask the model about
    done: Tensor  # (n,) bool: `x` is the last point this row asks about


class Attack(Protocol):
    """A search for adversarial images. A frozen dataclass: its fields are its options.

    An attack never calls the model, decides success, keeps its best point, or draws global randomness.
    """

    name: ClassVar[str]
    version: ClassVar[int]  # raised whenever its behaviour changes
    needs: ClassVar[Access]
    norms: ClassVar[tuple[str, ...]]
    paper: ClassVar[str]

    @property
    def minimizes(self) -> bool:
        """Does it go on after the first success, to come nearer?"""
        ...

    @property
    def needs_target(self) -> bool:
        """Does it work towards a class only?"""
        ...

    def init(self, batch: Batch) -> Any:
        """The state before the first query."""
        ...

    def step(self, batch: Batch, state: Any, seen: Observation) -> Any:
        """The state after one query; `state` and `batch` are left as they were."""
        ...
