from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest
import torch

from sparring.core.errors import DataError
from sparring.data import idx
from sparring.data.named import Request

IMAGES = "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    "spell",
    [
        "{}.gz".format,
        "{}".format,
        lambda name: name.replace("-idx", ".idx"),
        lambda name: name.replace("-idx", ".idx") + ".gz",
    ],
)
@pytest.mark.parametrize("below", ["", "tiny"])
def test_every_spelling_is_found_beside_and_below(tiny, tmp_path, spell, below):
    named = tiny.named()
    assert not named.available(tmp_path / "data")
    tiny.write(tmp_path / "data" / below, spell)
    assert named.available(tmp_path / "data")
    data = named.load(Request(tmp_path / "data", download=False))
    assert torch.equal(data.train.x[:, 0] * 255, torch.from_numpy(tiny.arrays[IMAGES]).float())
    assert data.train.y.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test.y.tolist() == [1, 0]
    assert (data.train.name, data.test.x.shape) == ("tiny/train", (2, 1, 4, 5))


def test_environment_and_cache_are_searched_after_data_dir(tiny, tmp_path, home, monkeypatch):
    named = tiny.named()
    tiny.write(home / "tiny")
    assert named.available(None)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / IMAGES).write_bytes(b"not the data")
    monkeypatch.setenv("SPARRING_DATA", str(tmp_path / "shared"))
    with pytest.raises(DataError, match="shared"):
        named.load(Request())
    tiny.write(tmp_path / "mine")
    assert len(named.load(Request(tmp_path / "mine")).train) == 6


def damage_truncate(data: bytes) -> bytes:
    return data[:-7]


def damage_flip(data: bytes) -> bytes:
    return data[:30] + bytes([data[30] ^ 1]) + data[31:]


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip])
def test_altered_content_names_file_and_both_checksums(tiny, tmp_path, damage):
    folder = tiny.write(tmp_path / "data")
    bad = damage(tiny.contents[IMAGES])
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(bad))
    with pytest.raises(DataError) as caught:
        tiny.named().load(Request(folder, download=False))
    message = str(caught.value)
    assert str(folder / f"{IMAGES}.gz") in message
    assert hashlib.sha256(tiny.contents[IMAGES]).hexdigest() in message
    assert hashlib.sha256(bad).hexdigest() in message
    assert "delete or replace it" in message


@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, lambda data: data[:5]])
def test_a_damaged_gzip_is_one_data_error(tiny, tmp_path, damage):
    folder = tiny.write(tmp_path / "data")
    path = folder / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"damaged gzip .*delete or replace it") as caught:
        tiny.named().load(Request(folder, download=False))
    assert str(path) in str(caught.value)


def test_regzipped_and_unpacked_copies_are_the_same_data(tiny, tmp_path):
    folder = tiny.write(tmp_path / "data")
    (folder / f"{IMAGES}.gz").write_bytes(gzip.compress(tiny.contents[IMAGES], 1, mtime=5))
    labels = "t10k-labels-idx1-ubyte"
    (folder / f"{labels}.gz").write_bytes(tiny.contents[labels])  # unpacked, but still called .gz
    assert tiny.named().load(Request(folder)).test.y.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "magic 00000801, got nothing"),
        (bytes([0, 0, 8, 3]), "magic 00000801, got 00000803"),
        (bytes([0, 0, 9, 1]), "magic 00000801, got 00000901"),
        (bytes([0, 0, 8, 1, 0, 0]), "header of 8 bytes, got 6"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 2, 5]), r"expected 10 bytes for \(2,\), got 9"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 5, 6]), r"expected 9 bytes for \(1,\), got 10"),
        (bytes([0, 0, 8, 1, 255, 255, 255, 255]), "expected 4294967303 bytes"),
    ],
)
def test_the_idx_reader_accounts_for_every_byte(data, message):
    with pytest.raises(DataError, match=f"^labels: .*{message}"):
        idx.decode(data, 1, "labels")


def test_the_idx_reader_reads_rows_first():
    data = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    assert np.array_equal(idx.decode(data, 2, "m"), [[1, 2, 3], [4, 5, 6]])
