"""A fitted scikit-learn estimator or pipeline, or one that looks like it, as a model to be queried."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparring.core.errors import ModelError, unknown
from sparring.core.model import Access, Prediction

METHODS = ("predict_proba", "decision_function", "predict")
LEAST = 1e-38  # of a probability, before its logarithm is taken

Numbers = NDArray[np.float64]


class SklearnModel:
    """A fitted classifier of rows (n, features), asked about images (n, c, h, w) that are flattened to rows.

    It is asked by the first of `METHODS` that it has, or by `method`. Logits are logarithms of probabilities,
    or the decision function: one column d becomes [0, d], whose softmax is the logistic of d; the columns of
    one-vs-rest stay as they are; those of one-vs-one are refused. An estimator with neither gives labels only.

    The label is the place in `classes` of the highest logit. An estimator may name another one in `predict`
    (SVC(probability=True), a tuned threshold): give it method="predict" to attack just what that says.
    `mean` and `std` (one number a channel) normalise inside the model, so that eps stays in raw input units.
    """

    def __init__(
        self,
        estimator: Any,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        method: str | None = None,
    ) -> None:
        self.estimator, self.bounds = estimator, bounds
        self._name = type(estimator).__name__
        self._labels = self._known()
        self.classes = tuple(map(str, self._labels))
        self._method = self._way(method)
        self.access = Access.DECISION if self._method == "predict" else Access.SCORE
        self._mean = 0.0 if mean is None else torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
        self._std = 1.0 if std is None else torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)

    def _known(self) -> list[Any]:
        """The labels that the estimator tells apart, in its order."""
        if isinstance(self.estimator, type):
            raise ModelError(
                f"expected a fitted classifier, got the class {self.estimator.__name__}; make one, fit it"
            )
        found = getattr(self.estimator, "classes_", None)
        if found is None:
            raise ModelError(
                f"expected a fitted classifier, got {self._name} without classes_; call its fit(x, y) first, "
                f"with class labels (a regressor or a clustering has none)"
            )
        if isinstance(found, list) and found and isinstance(found[0], np.ndarray):
            raise ModelError(f"expected one label a row, got {self._name} with {len(found)}; fit one model for each")
        labels: list[Any] = np.asarray(found).tolist()
        if len(labels) < 2:
            raise ModelError(f"expected at least 2 classes, got {self._name} fitted on {labels}")
        return labels

    def _way(self, method: str | None) -> str:
        """The method that it is asked by."""
        if method is not None and method not in METHODS:
            raise unknown("method", method, METHODS)
        # An estimator has a method or not by its settings, so that there is no type to look at.
        having = [name for name in METHODS if callable(getattr(self.estimator, name, None))]
        if not having or (method is not None and method not in having):
            raise ModelError(
                f"expected an estimator with {method or ', '.join(METHODS[:-1]) + ' or ' + METHODS[-1]}, got "
                f"{self._name} with {', '.join(having) or 'none of them'}; choose another estimator or method"
            )
        chosen = method or having[0]
        final = _innermost(self.estimator)
        if (
            chosen == "decision_function"
            and len(self._labels) > 2
            and getattr(final, "decision_function_shape", "") == "ovo"
        ):
            raise ModelError(
                f"expected a column of scores for each class, got {type(final).__name__} with one for each pair; "
                f"call set_params(decision_function_shape='ovr') on it, it need not be fitted again"
            )
        return chosen

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        answer = self._ask(x)
        if self._method == "predict":
            return Prediction(self._places(answer, x))
        scores = self._scores(answer, x)
        labels = torch.from_numpy(scores.argmax(1)).to(x.device)  # before float32 makes close ones equal
        logits = torch.from_numpy(scores).float().to(x.device) if access >= Access.SCORE else None
        return Prediction(labels, logits)

    def _ask(self, x: Tensor) -> NDArray[Any]:
        """What the method says, in the estimator's own form."""
        inputs = (x.detach().cpu().double() - self._mean) / self._std
        rows = inputs.flatten(1).numpy()
        wanted = getattr(self.estimator, "n_features_in_", None)
        if wanted is not None and wanted != rows.shape[1]:
            raise ModelError(
                f"expected images of {wanted} numbers, as {self._name} was fitted on, got {tuple(x.shape[1:])}, "
                f"which is {rows.shape[1]}; resize them as for the training"
            )
        try:
            with warnings.catch_warnings():
                # One fitted on a table says so of every row that comes without names.
                warnings.filterwarnings("ignore", message="X does not have valid feature names")
                return np.asarray(getattr(self.estimator, self._method)(rows))
        except Exception as error:
            raise ModelError(
                f"{self._name}.{self._method} failed on images {tuple(x.shape)}: {type(error).__name__}: {error}"
            ) from error

    def _scores(self, answer: NDArray[Any], x: Tensor) -> Numbers:
        """(n, classes) what serves as logits."""
        count = len(self._labels)
        if self._method == "decision_function" and count == 2 and answer.shape in ((len(x),), (len(x), 1)):
            one = answer.astype(np.float64).reshape(-1)
            return np.stack([np.zeros_like(one), one], 1)
        if answer.shape != (len(x), count):
            raise ModelError(
                f"expected {self._method} to give ({len(x)}, {count}), a column for each class, got {answer.shape} "
                f"from {self._name}; choose another method"
            )
        scores: Numbers = answer.astype(np.float64)
        return np.log(np.maximum(scores, LEAST)) if self._method == "predict_proba" else scores

    def _places(self, answer: NDArray[Any], x: Tensor) -> Tensor:
        """(n,) the places of predicted labels in `classes`."""
        place = {label: number for number, label in enumerate(self._labels)}
        said = answer.reshape(-1).tolist()
        strange = [label for label in said if label not in place]
        if strange or len(said) != len(x):
            got = f"{strange[0]!r}" if strange else f"{len(said)}"
            raise ModelError(
                f"expected {len(x)} labels out of {', '.join(self.classes)}, got {got} from {self._name}"
            )
        return torch.tensor([place[label] for label in said], dtype=torch.int64, device=x.device)


def _innermost(estimator: Any) -> Any:
    """The estimator that answers, inside pipelines and searches for parameters."""
    while True:
        steps = getattr(estimator, "steps", None)
        inner = steps[-1][1] if steps else getattr(estimator, "best_estimator_", None)
        if inner is None:
            return estimator
        estimator = inner


def adapt(source: object, **options: Any) -> SklearnModel | None:
    """A scikit-learn estimator, or what looks like a fitted one; see `sparring.wrap`."""
    known = any(kind.__module__.partition(".")[0] == "sklearn" for kind in type(source).__mro__)
    estimator = known or (hasattr(source, "classes_") and hasattr(source, "predict"))
    return SklearnModel(source, **options) if estimator else None
