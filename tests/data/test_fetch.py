from __future__ import annotations

import gzip
import io
import os
import sys
from pathlib import Path

import pytest

from sparring.core.errors import DataError
from sparring.data import fetch
from sparring.data.named import Request


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_download_is_kept_and_not_repeated(tiny, server, home):
    named = tiny.named(server.serve(tiny, "good"))
    said: list[str] = []
    first = named.load(Request(on_status=said.append))
    assert files(home) == sorted(f"{name}.gz" for name in tiny.contents)
    assert len(server.asked) == 4
    assert f"downloading {server.url}/good/train-images-idx3-ubyte.gz" in said
    assert named.available(None)
    assert named.load(Request()).train.digest() == first.train.digest()
    assert len(server.asked) == 4


def test_the_second_mirror_is_asked_when_the_first_has_nothing(tiny, server):
    named = tiny.named(f"{server.url}/empty/", server.serve(tiny, "good"))
    said: list[str] = []
    assert len(named.load(Request(on_status=said.append)).test) == 2
    assert server.asked[:2] == [f"/{mirror}/train-images-idx3-ubyte.gz" for mirror in ("empty", "good")]
    assert any("404" in line for line in said)


def test_the_second_mirror_is_asked_when_the_first_sends_other_bytes(tiny, server, home):
    bad, good = server.serve(tiny, "bad"), server.serve(tiny, "good")
    server.pages["/bad/train-images-idx3-ubyte.gz"] = gzip.compress(b"something else")
    assert len(tiny.named(bad, good).load(Request()).train) == 6
    kept = gzip.decompress((home / "tiny" / "train-images-idx3-ubyte.gz").read_bytes())
    assert kept == tiny.contents["train-images-idx3-ubyte"]


def test_a_server_that_unpacks_in_transit_is_fine(tiny, server, home):
    server.headers["Content-Encoding"] = "gzip"
    named = tiny.named(server.serve(tiny, "good"))
    named.load(Request())
    assert files(home) == sorted(tiny.contents)
    assert len(named.load(Request(download=False)).train) == 6


def test_corrupted_content_is_an_error_and_leaves_no_file(tiny, server, home):
    mirror = server.serve(tiny, "bad")
    server.pages["/bad/train-images-idx3-ubyte.gz"] = gzip.compress(b"something else")
    with pytest.raises(
        DataError, match=r"expected unpacked SHA-256 [0-9a-f]{64}, got [0-9a-f]{64}; nothing was kept"
    ):
        tiny.named(mirror).load(Request())
    assert files(home) == []


def test_a_connection_that_breaks_leaves_no_file(tiny, server, home):
    server.cut = 20
    with pytest.raises(DataError, match="no mirror sent it"):
        tiny.named(server.serve(tiny, "good")).load(Request())
    assert files(home) == []


def test_a_failed_download_says_where_it_looked_and_what_to_do(tiny, server, tmp_path, home):
    with pytest.raises(DataError) as caught:
        tiny.named(f"{server.url}/none/").load(Request(tmp_path / "mine"))
    message = str(caught.value)
    for expected in (
        str(tmp_path / "mine" / "tiny"),
        str(home),
        "404",
        "t10k-labels-idx1-ubyte.gz",
        "SPARRING_DATA",
    ):
        assert expected in message


@pytest.mark.parametrize("by_environment", [True, False])
def test_downloads_can_be_forbidden(tiny, server, monkeypatch, by_environment):
    named = tiny.named(server.serve(tiny, "good"))
    if by_environment:
        monkeypatch.setenv("SPARRING_OFFLINE", "1")
    with pytest.raises(DataError, match="SPARRING_OFFLINE is set" if by_environment else "download is off"):
        named.load(Request(download=by_environment))
    assert server.asked == []


def test_a_crash_while_writing_leaves_neither_half_nor_temporary(tmp_path, monkeypatch):
    def crash(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        fetch.keep(tmp_path / "cache" / "file.gz", b"data")
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    with pytest.raises(DataError, match="name a writable folder with \\$SPARRING_HOME"):
        fetch.keep(tmp_path / "cache" / "file.gz", b"data")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_only(tiny, server, monkeypatch, capsys):
    url = server.serve(tiny, "good") + "train-images-idx3-ubyte.gz"
    quiet = fetch.download(url)
    assert capsys.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert fetch.download(url) == quiet
    assert "train-images-idx3-ubyte.gz" in terminal.getvalue()
