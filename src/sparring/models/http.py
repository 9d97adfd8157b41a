"""Models behind a server: the Open Inference Protocol (version 2, REST), or a plain JSON endpoint.

Protocol: https://github.com/kserve/open-inference-protocol (KServe, Triton, MLServer, OpenVINO). What a server
refuses about one image (400, 422, NaN) is that image's own and a `ModelError`, and so is a 5xx that lasts while
it answers another image. Whatever else fails, and still does after the retries, ends the run with a
`ServerError`, so that no image is blamed for it.
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparring.core.errors import ModelError, UsageError, unknown
from sparring.core.model import Access, Prediction
from sparring.models.line import (
    FailingError,
    HaltedError,
    Limits,
    Line,
    OutOfQueriesError,
    RefusedError,
    Reply,
    ServerError,
)

__all__ = ["JsonModel", "OutOfQueriesError", "ServedModel", "ServerError"]

KINDS = ("logits", "probabilities", "labels")
LAYOUTS = ("flat", "nchw", "nhwc")
FLOATS = ("FP16", "FP32", "FP64")
LEAST = 1e-38  # of a probability, before its logarithm is taken

Row = NDArray[np.float64] | str  # (classes,) or (1,) what came for a row, or why nothing did


class Remote(ABC):
    """A model that is asked over the network. Equal rows of a query, such as padding, are sent once.

    `options` are the fields of `Limits`. `mean` and `std` (one number a channel) normalise what is sent, in
    raw input units; then `scale` multiplies it. Use it in a `with`, or close it, to give its sockets back.
    """

    def __init__(
        self,
        url: str,
        bounds: tuple[float, float],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        scale: float,
        kind: str,
        options: Mapping[str, Any],
    ) -> None:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        self.bounds, self._kind, self._scale = bounds, kind, scale
        self.access = Access.DECISION if kind == "labels" else Access.SCORE
        self._mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self._std = None if std is None else torch.tensor(std).view(-1, 1, 1)
        self._line = Line(url, Limits.of(options))
        self._batch = self._line.limits.batch
        self._classes: int | None = None
        self._counting = threading.Lock()
        self._fine: Tensor | None = None  # (1, c, h, w) a row that was answered
        self._kept: dict[bytes, Row] = {}  # by row: answers of a query that failed, each for one use; and refusals

    @property
    def queries(self) -> int:
        """Rows sent so far, retries included."""
        return self._line.sent

    def allow(self, queries: int) -> None:
        """Send at most so many rows in all, whatever `max_queries` said before."""
        self._line.limits = replace(self._line.limits, max_queries=queries)

    def close(self) -> None:
        """Close the sockets."""
        self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._line.shown!r})"

    @abstractmethod
    def _request(self, rows: Tensor) -> tuple[str, Any]:
        """The path behind the URL and the body that ask about `rows` (n, c, h, w), ready to be sent."""

    @abstractmethod
    def _answers(self, data: Any, count: int) -> Any:
        """The numbers (count, classes) or (count,) in an answer; ValueError or LookupError if they are not there."""

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w)."""
        pixels = x.detach().cpu().float().contiguous()
        keys = [blake2b(row.numpy(), digest_size=16).digest() for row in pixels]
        place = {key: number for number, key in reversed(list(enumerate(keys)))}
        found = {key: self._kept[key] for key in place if key in self._kept}
        lacking = [key for key in sorted(place, key=place.__getitem__) if key not in found]
        if lacking:
            self._kept = {key: answer for key, answer in self._kept.items() if isinstance(answer, str)}
            self._line.afford(len(lacking))
            rows = pixels[[place[key] for key in lacking]]
            found |= zip(lacking, self._ask_all(rows), strict=True)
        refused = {key: answer for key, answer in found.items() if isinstance(answer, str)}
        if refused:
            # Whoever asks will look for the culprit among ever fewer of these rows: none is sent a second time.
            self._kept |= found
            raise ModelError(next(iter(refused.values())))
        for key in found:
            self._kept.pop(key, None)
        return self._predict(np.stack([np.asarray(found[key]) for key in keys]), x, access)

    def _predict(self, said: NDArray[np.float64], x: Tensor, access: Access) -> Prediction:
        if self._kind == "labels":
            return Prediction(torch.from_numpy(said[:, 0].astype(np.int64)).to(x.device))
        scores = np.log(np.maximum(said, LEAST)) if self._kind == "probabilities" else said
        logits = torch.from_numpy(scores).float().to(x.device)
        return Prediction(logits.argmax(1), logits if access >= Access.SCORE else None)

    def _ask_all(self, rows: Tensor) -> list[Row]:
        """What came for each row; `ServerError` if none was answered, and neither is one that was before."""
        answers = self._spread(rows)
        if self._fine is not None and all(isinstance(answer, str) for answer in answers):
            self._vouch(self._fine, threading.Event())
        return answers

    def _spread(self, rows: Tensor) -> list[Row]:
        """Ask in pieces, several at once if that is allowed; answers in order."""
        pieces, halt = torch.split(rows, self._batch), threading.Event()
        if min(len(pieces), self._line.limits.concurrency) == 1:
            return [answer for piece in pieces for answer in self._ask(piece, halt)]
        with ThreadPoolExecutor(min(len(pieces), self._line.limits.concurrency)) as pool:
            futures = [pool.submit(self._ask, piece, halt) for piece in pieces]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # one failure, or an interrupt, ends the others
                halt.set()
                pool.shutdown(cancel_futures=True)
        errors = [future.exception() for future in futures if not future.cancelled()]
        for error in errors:
            if error is not None and not isinstance(error, HaltedError):
                raise error
        return [answer for future in futures for answer in future.result()]

    def _ask(self, rows: Tensor, halt: threading.Event, *, doubted: bool = False) -> list[Row]:
        """Ask in one request; where the server refuses it or fails, in two, until the culprits stand alone.

        Parts of what failed are `doubted`: retries are for a row alone, before it is blamed.
        """
        try:
            return self._send(rows, halt, doubted=doubted and len(rows) > 1)
        except RefusedError as error:
            why = str(error)
        except FailingError as error:
            grey = torch.full_like(rows[:1], sum(self.bounds) / 2)
            self._vouch(grey if self._fine is None else self._fine, halt)
            why = f"{error}, while it answers another image"
        if len(rows) == 1:
            return [why]
        half = len(rows) // 2
        return self._ask(rows[:half], halt, doubted=True) + self._ask(rows[half:], halt, doubted=True)

    def _vouch(self, row: Tensor, halt: threading.Event) -> None:
        """`ServerError` unless the server answers `row` (1, c, h, w): what fails then is not the images' own."""
        try:
            (answer,) = self._send(row, halt)
        except (RefusedError, FailingError) as error:
            answer = str(error)
        if isinstance(answer, str):
            known = "it fails at a plain grey image" if self._fine is None else "it answered this image before"
            raise ServerError(f"{answer}; {known}: see to the server, then run it again")

    def _send(self, rows: Tensor, halt: threading.Event, *, doubted: bool = False) -> list[Row]:
        """The answers to one request."""
        path, body = self._request(self._prepared(rows))
        reply = self._line.exchange("POST", path, body, len(rows), halt, doubted=doubted)
        try:
            numbers = np.asarray(self._answers(reply.data, len(rows)), dtype=np.float64)
        except (ValueError, LookupError, TypeError) as error:
            raise ServerError(f"{reply.quote}: expected {self._kind} of {len(rows)} rows, got {error}") from None
        with self._counting:
            self._check(numbers, len(rows), reply)
        numbers = numbers.reshape(len(rows), -1)
        fine = [bool(np.isfinite(row).all()) for row in numbers]
        if any(fine):
            self._fine = rows[fine.index(True)][None].clone()
        return [
            numbers[at] if fine[at] else f"{reply.quote}: expected finite {self._kind}, got NaN or infinity"
            for at in range(len(rows))
        ]

    def _check(self, numbers: NDArray[np.float64], count: int, reply: Reply) -> None:
        got, said = f"{reply.quote}: got numbers {numbers.shape}", numbers[np.isfinite(numbers)]
        if self._kind == "labels":
            fits = numbers.shape in ((count,), (count, 1))
            if not fits or (said != said.round()).any() or (said < 0).any() or (said >= 2**31).any():
                raise ServerError(f"{got}, expected a class number from 0 for each of {count} rows; check the output")
            return
        fits = numbers.ndim == 2 and len(numbers) == count and numbers.shape[1] > 1
        if not fits or numbers.shape[1] != (self._classes or numbers.shape[1]):
            classes = "2 or more" if self._classes is None else self._classes
            raise ServerError(f"{got}, expected {count} rows of {classes} {self._kind}; check the output")
        if self._kind == "probabilities" and ((said < -1e-4).any() or (said > 1 + 1e-4).any()):
            raise ServerError(f"{got}, expected probabilities from 0 to 1; are they logits? Then name that kind")
        self._classes = numbers.shape[1]

    def _prepared(self, rows: Tensor) -> Tensor:
        rows = rows if self._mean is None else rows - self._mean
        rows = rows if self._std is None else rows / self._std
        return rows * self._scale


@dataclass(frozen=True)
class _Form:
    """How a served model wants its images, and what it calls things."""

    input: str
    datatype: str
    shape: tuple[int, ...]  # the rows first; -1 where any number will do
    output: str


class ServedModel(Remote):
    """A model under the Open Inference Protocol at `url`, such as http://host:8000/v2/models/name.

    Input, layout and output are what its metadata say; `layout` and `output` name others. `kind` is what the
    output holds: logits, probabilities or labels. The rest: see `Remote`.
    """

    def __init__(
        self,
        url: str,
        *,
        kind: str = "logits",
        layout: str | None = None,
        output: str | None = None,
        scale: float = 1.0,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(url, bounds, mean, std, scale, kind, options)
        if layout is not None and layout not in LAYOUTS:
            raise unknown("layout", layout, LAYOUTS)
        self._layout, self._output = layout, output
        self._form: _Form | None = None

    def query(self, x: Tensor, access: Access) -> Prediction:
        """Answer for images `x` (n, c, h, w); the first time it asks for the metadata before."""
        if self._form is None:
            self._form = self._meet()
            if self._form.shape[0] == 1:
                self._batch = 1
        return super().query(x, access)

    def _meet(self) -> _Form:
        reply = self._line.exchange("GET", "", None, 0, threading.Event())
        try:
            (entry,) = reply.data["inputs"]
            names = [output["name"] for output in reply.data["outputs"]]
            output = names[0] if self._output is None else self._output
            form = _Form(entry["name"], entry["datatype"], tuple(int(size) for size in entry["shape"]), output)
        except (ValueError, LookupError, TypeError):
            raise ServerError(f"{reply.quote}: expected metadata with one input; check the URL") from None
        if output not in names:
            raise unknown("output", output, names)
        if form.datatype not in FLOATS or len(form.shape) < 2 or form.shape[0] not in (-1, 1):
            raise UsageError(
                f"{reply.quote}: expected an input of {', '.join(FLOATS)} and of any number of rows, got "
                f"{form.datatype} {list(form.shape)}; serve the model with such an input"
            )
        return form

    def _request(self, rows: Tensor) -> tuple[str, Any]:
        assert self._form is not None, "query asks for the metadata first"
        arranged = _arrange(rows, self._layout or self._suiting(self._form, rows))
        entry = {
            "name": self._form.input,
            "shape": list(arranged.shape),
            "datatype": self._form.datatype,
            "data": arranged.flatten().tolist(),
        }
        return "/infer", {"inputs": [entry], "outputs": [{"name": self._form.output}]}

    def _suiting(self, form: _Form, rows: Tensor) -> str:
        """The layout of which the server's input is; channels first where both would do."""
        for layout in LAYOUTS:
            sizes = _arrange(rows[:1], layout).shape[1:]
            wanted = form.shape[1:]
            if len(sizes) == len(wanted) and all(w in (-1, s) for w, s in zip(wanted, sizes, strict=True)):
                return layout
        raise UsageError(
            f"{self._line.shown}: expected images for an input of {list(form.shape)}, got {tuple(rows.shape[1:])}; "
            f"resize them, or name another layout"
        )

    def _answers(self, data: Any, count: int) -> Any:
        assert self._form is not None, "query asks for the metadata first"
        output = next((each for each in data["outputs"] if each["name"] == self._form.output), None)
        if output is None:
            raise LookupError(f"no output {self._form.output!r}")
        numbers = np.asarray(output["data"], dtype=np.float64).reshape(output["shape"])
        return numbers.reshape(count, -1) if numbers.ndim > 1 and len(numbers) == count else numbers


@dataclass(frozen=True)
class Endpoint:
    """A plain JSON endpoint: where it is, and where in the two bodies images and answers are."""

    url: str
    input: str = "instances"  # a dotted path; "" for the body itself
    output: str = "predictions"  # a dotted path; a name that meets a list is looked up in each of its elements
    layout: str = "nchw"
    scale: float = 1.0
    kind: str = "logits"
    extra: Mapping[str, Any] | None = None  # what else the body must hold

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Endpoint:
        """From a mapping; `UsageError` for a name or a value that cannot be meant."""
        names = [field.name for field in fields(cls)]
        for name in spec:
            if name not in names:
                raise unknown("field of an endpoint", name, names)
        if "url" not in spec:
            raise UsageError(f"expected an endpoint with a url, got only {', '.join(spec) or 'nothing'}; add it")
        endpoint = cls(**spec)
        if endpoint.layout not in LAYOUTS:
            raise unknown("layout", endpoint.layout, LAYOUTS)
        return endpoint


class JsonModel(Remote):
    """A model behind a plain JSON endpoint, described by the fields of `Endpoint`; the rest: see `Remote`."""

    def __init__(
        self,
        endpoint: Mapping[str, Any],
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        self.endpoint = Endpoint.of(endpoint)
        super().__init__(self.endpoint.url, bounds, mean, std, self.endpoint.scale, self.endpoint.kind, options)

    def _request(self, rows: Tensor) -> tuple[str, Any]:
        body: Any = _arrange(rows, self.endpoint.layout).tolist()
        steps = self.endpoint.input.split(".") if self.endpoint.input else []
        for step in reversed(steps):
            body = {step: body}
        return "", {**(self.endpoint.extra or {}), **body} if steps else body

    def _answers(self, data: Any, count: int) -> Any:
        return _walk(data, self.endpoint.output.split(".") if self.endpoint.output else [])


def _arrange(rows: Tensor, layout: str) -> Tensor:
    """Images (n, c, h, w) in another layout."""
    return rows.flatten(1) if layout == "flat" else rows.permute(0, 2, 3, 1) if layout == "nhwc" else rows


def _walk(data: Any, steps: list[str]) -> Any:
    for number, step in enumerate(steps):
        if isinstance(data, list) and not step.isdigit():
            return [_walk(each, steps[number:]) for each in data]
        try:
            data = data[int(step)] if isinstance(data, list) else data[step]
        except (LookupError, TypeError):
            raise LookupError(f"nothing at {'.'.join(steps)!r}") from None
    return data


def adapt(source: object, **options: Any) -> Remote | None:
    """The URL of a v2 server, or a mapping (also a .json file) that describes an endpoint; see `sparring.wrap`."""
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return ServedModel(source, **options)
    if isinstance(source, str | Path) and str(source).endswith(".json"):
        source = json.loads(Path(source).read_text())
    return JsonModel(source, **options) if isinstance(source, Mapping) and "url" in source else None
