"""Tiny IDX data sets, and a web server on this machine that counts what it is asked for."""

from __future__ import annotations

import gzip
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from sparring.data.idx_set import IdxFile, IdxSet

NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def encode(array: np.ndarray) -> bytes:
    """An array of bytes in the IDX format."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@dataclass
class Tiny:
    """A data set of 6 + 2 images of 4 x 5 pixels in three classes, as unpacked file contents."""

    arrays: dict[str, np.ndarray]
    contents: dict[str, bytes]

    def named(self, *mirrors: str) -> IdxSet:
        """The data set as a `Named`, to be downloaded from `mirrors`."""
        ranks = (3, 1, 3, 1)
        files = [
            IdxFile(name, rank, hashlib.sha256(self.contents[name]).hexdigest())
            for name, rank in zip(NAMES, ranks, strict=True)
        ]
        return IdxSet("tiny", "for tests", ("a", "b", "c"), mirrors, (files[0], files[1], files[2], files[3]))

    def write(self, folder: Path, spell: Callable[[str], str] = "{}.gz".format) -> Path:
        """All four files in `folder`, gzipped when the spelling ends so."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.contents.items():
            path = folder / spell(name)
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
        return folder


@pytest.fixture
def tiny() -> Tiny:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 4, 5), dtype=np.uint8) for n in (6, 2)]
    arrays = dict(
        zip(
            NAMES,
            (images[0], np.uint8([0, 1, 2, 0, 1, 2]), images[1], np.uint8([1, 0])),
            strict=True,
        )
    )
    return Tiny(arrays, {name: encode(array) for name, array in arrays.items()})


@dataclass
class Server:
    """What each path is answered with, and the paths that were asked for."""

    url: str
    pages: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut: int | None = None  # close the connection after so many bytes

    def serve(self, tiny: Tiny, prefix: str) -> str:
        """Offer all files of `tiny`, gzipped, below `prefix`; returns the mirror's address."""
        self.pages |= {f"/{prefix}/{name}.gz": gzip.compress(data) for name, data in tiny.contents.items()}
        return f"{self.url}/{prefix}/"


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            body = state.pages.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            for key, value in state.headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write((body or b"")[: state.cut])

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        state = Server(f"http://127.0.0.1:{httpd.server_port}")
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, and none of the caller's settings."""
    for name in ("SPARRING_DATA", "SPARRING_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SPARRING_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
