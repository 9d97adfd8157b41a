"""The connection to a server that answers in JSON: at its pace, within a number of rows, again where that may help.

Credentials come from the environment alone: `SPARRING_HTTP_TOKEN`, or `SPARRING_HTTP_HEADERS` (a JSON object).
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

from sparring.core.errors import IncompleteError, UsageError, unknown

PASSING = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
REFUSED = (400, 422)  # statuses that speak of what was sent
PATIENCE = 300.0  # seconds: a server that wants a longer pause ends the run
SLOWEST = 30.0  # seconds between two tries, unless the server wants more
SHOWN = 200  # characters of a body in an error
ADVICE = {
    401: "set SPARRING_HTTP_TOKEN or SPARRING_HTTP_HEADERS",
    403: "set SPARRING_HTTP_TOKEN or SPARRING_HTTP_HEADERS",
    404: "check the URL",
    413: "lower `batch`",
}


class ServerError(IncompleteError):
    """A server that does not answer as it should, retries included; once it does, the same command resumes."""


class OutOfQueriesError(IncompleteError):
    """As many rows were sent as may be; with a higher `max_queries` the same command resumes."""


class RefusedError(Exception):
    """The server will not have these rows."""


class FailingError(Exception):
    """The server keeps failing (5xx) at these rows: it may be theirs, or its own."""


class HaltedError(Exception):
    """Another request of the same query has failed for good."""


class _PassingError(Exception):
    """A failure that may pass; `pause` is what the server asks for, in seconds; `status` 0 if none came."""

    def __init__(self, why: str, pause: float = 0.0, status: int = 0) -> None:
        super().__init__(why)
        self.pause, self.status = pause, status


@dataclass(frozen=True)
class Limits:
    """How a server may be used."""

    batch: int = 32  # rows a request
    concurrency: int = 1  # requests in flight
    rate: float | None = None  # requests a second, at most
    retries: int = 5  # of a request that failed
    backoff: float = 0.5  # seconds before the first retry; it doubles with each
    timeout: float = 30.0  # seconds to connect, to wait for an answer, and to read it
    max_queries: int | None = None  # rows sent, retries included

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Limits:
        """Limits from options by name; `UsageError` for a name or a value that cannot be meant."""
        for name in options:
            if name not in {field.name for field in fields(cls)}:
                raise unknown("option", name, [field.name for field in fields(cls)])
        limits = cls(**options)
        least = {"batch": 1, "concurrency": 1, "retries": 0, "backoff": 0, "max_queries": 0}
        for name, lowest in least.items():
            value = getattr(limits, name)
            if value is not None and value < lowest:
                raise UsageError(f"expected {name} of at least {lowest}, got {value}")
        for name, value in (("rate", limits.rate), ("timeout", limits.timeout)):
            if value is not None and not value > 0:
                raise UsageError(f"expected {name} above 0, got {value}")
        return limits


@dataclass(frozen=True)
class Reply:
    """What a server said: the JSON, and how to quote it in an error."""

    data: Any
    quote: str


class Line:
    """The connection to one server: requests at their pace and within their number, again where that may help."""

    def __init__(self, url: str, limits: Limits) -> None:
        parts = _place(url)
        self.url, self.limits = url, limits
        self.shown = parts._replace(query="", fragment="").geturl()  # a query may hold a key
        self.sent = 0  # rows
        self._secrets = _secrets({"": parts.query})
        self._next = 0.0  # the earliest time of the next request
        self._client: Any = None
        self._lock = threading.Lock()
        self._jitter = random.Random()  # keeps many clients from coming back all at once; it decides nothing else

    def close(self) -> None:
        """Close the sockets; a later request opens others."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def afford(self, rows: int) -> None:
        """`OutOfQueriesError` unless so many rows may still be sent."""
        most = self.limits.max_queries
        if most is not None and self.sent + rows > most:
            raise OutOfQueriesError(
                f"expected to send at most {most} rows to {self.shown}, got {rows} to send after {self.sent}; raise "
                f"max_queries (--max-queries); an audit goes on from what is stored"
            )

    def exchange(
        self, method: str, path: str, body: Any, rows: int, halt: threading.Event, *, doubted: bool = False
    ) -> Reply:
        """The answer to one request that sends so many rows; `halt` ends the waiting.

        `FailingError` if it ends with a 5xx, for rows that are `doubted` at once.
        """
        content = None if body is None else json.dumps(body).encode()
        for attempt in range(self.limits.retries + 1):
            self._await_turn(halt)
            try:
                return self._once(method, path, content, rows)
            except _PassingError as error:
                failure, status = f"{error}; tried {attempt + 1} times", error.status
                if error.pause > PATIENCE:
                    raise ServerError(
                        f"{error}; it wants a pause of {error.pause:.0f} s: run it again then"
                    ) from None
                if doubted and status >= 500 and not error.pause:
                    break
                delay = min(SLOWEST, self.limits.backoff * 2**attempt) * self._jitter.uniform(1.0, 1.5)
                if error.pause:
                    self._hold(error.pause)
                if attempt < self.limits.retries:
                    halt.wait(max(delay, error.pause))
        if rows and status >= 500:
            raise FailingError(failure)
        raise ServerError(f"{failure}: see to the server, then run it again")

    def _await_turn(self, halt: threading.Event) -> None:
        while not halt.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + (1 / self.limits.rate if self.limits.rate else 0.0)
                    return
                left = self._next - now
            halt.wait(left)
        raise HaltedError

    def _hold(self, seconds: float) -> None:
        """Nobody sends anything for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _once(self, method: str, path: str, content: bytes | None, rows: int) -> Reply:
        httpx, client, where = _httpx(), self._open(), f"{method} {self.shown}{path}"
        split = urlsplit(self.url)
        url = split._replace(path=split.path.rstrip("/") + path if path else split.path, fragment="").geturl()
        with self._lock:
            self.afford(rows)
            self.sent += rows
        try:
            end = time.monotonic() + self.limits.timeout
            with client.stream(method, url, content=content) as answer:
                parts = []
                for part in answer.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > end:
                        raise httpx.ReadTimeout(f"still reading after {self.limits.timeout:g} s")
            status, headers, text = answer.status_code, answer.headers, b"".join(parts).decode(errors="replace")
        except httpx.InvalidURL:
            raise UsageError(
                "expected a URL such as http://host:8000/v2/models/name, got another form; check it"
            ) from None
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
                with self._lock:
                    self.sent -= rows  # they never left
            why = f"expected an answer, got {type(error).__name__} ({self._clean(str(error))})"
            # Without the chain: what the library says may hold what was sent.
            raise _PassingError(f"{where}: {why}") from None
        quote = f"{where}: status {status}, body {self._clean(text)[:SHOWN]!r}"
        return self._read(status, headers, text, quote, rows)

    def _read(self, status: int, headers: Mapping[str, str], text: str, quote: str, rows: int) -> Reply:
        if 200 <= status < 300:
            try:
                return Reply(json.loads(text), quote)
            except ValueError:
                if text.lstrip()[:1] in ("", "{", "["):
                    raise _PassingError(f"{quote}: expected JSON, got a part of it") from None
                raise ServerError(f"{quote}: expected JSON; check the URL") from None
        if status in PASSING:
            raise _PassingError(quote, _pause(headers.get("retry-after", "")), status)
        if status in REFUSED and rows:
            raise RefusedError(quote)
        raise ServerError(f"{quote}; {ADVICE.get(status, 'see to the server, then run it again')}")

    def _open(self) -> Any:
        with self._lock:
            if self._client is None:
                headers = _credentials()
                self._secrets += _secrets(headers)
                at_once = self.limits.concurrency
                self._client = _httpx().Client(
                    headers={"Content-Type": "application/json", **headers},
                    timeout=self.limits.timeout,
                    limits=_httpx().Limits(max_connections=at_once, max_keepalive_connections=at_once),
                    follow_redirects=False,  # credentials are for this server alone
                )
            return self._client

    def _clean(self, text: str) -> str:
        """`text` without what must not be told; a server may repeat what it was sent."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _httpx() -> Any:
    try:
        return importlib.import_module("httpx")
    except ImportError as error:
        raise UsageError("a model behind a server needs httpx; pip install 'sparring[http]'") from error


def _place(url: str) -> SplitResult:
    """The parts of a URL that can be meant; errors do not repeat it, since it may hold a key."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        named = False
    if not named:
        raise UsageError("expected a URL such as http://host:8000/v2/models/name, got another form; check it")
    if "@" in parts.netloc:
        raise UsageError("expected a URL without credentials, got some in it; put them in $SPARRING_HTTP_TOKEN")
    return parts


def _credentials() -> dict[str, str]:
    """Headers from the environment; errors do not repeat them."""
    wanted = 'SPARRING_HTTP_HEADERS: expected a JSON object of names and texts such as {"X-Key": "..."}'
    try:
        headers = json.loads(os.environ.get("SPARRING_HTTP_HEADERS", "").strip() or "{}")
    except ValueError:
        raise UsageError(f"{wanted}, got no JSON; mend it") from None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise UsageError(f"{wanted}, got something else; mend it")
    token = os.environ.get("SPARRING_HTTP_TOKEN", "").strip()
    if token:
        headers["Authorization"] = f"Bearer {token}"
    for name, value in headers.items():
        if not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", name, re.ASCII) or not re.fullmatch(r"[ -~]+", value):
            raise UsageError(
                "SPARRING_HTTP_TOKEN or _HEADERS: expected printable ASCII, got other characters; mend it"
            )
    return headers


def _secrets(headers: Mapping[str, str]) -> list[str]:
    """What must not be told of headers, or of what is like them: the values, and their longer words."""
    words = [word for value in headers.values() for word in [value, *re.split(r"[\s;,=&]+", value)]]
    return sorted({word for word in words if len(word) > 5}, key=len, reverse=True)


def _pause(text: str) -> float:
    """The seconds in a Retry-After: a number, or a date; 0 if it is neither."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
