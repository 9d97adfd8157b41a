from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sparring import data as datasets
from sparring.core.errors import DataError


def save(path, n=10, **arrays):
    rng = np.random.default_rng(n)
    given = {"x": rng.random((n, 1, 3, 3), np.float32), "y": np.arange(n) % 2} | arrays
    np.savez(path, **given)
    return given


@pytest.mark.parametrize(("n", "cut"), [(2, 1), (4, 3), (5, 4), (8, 7), (11, 9), (16, 13)])
def test_the_last_fifth_is_held_out(tmp_path, n, cut):
    given = save(tmp_path / "mine.npz", n)
    data = datasets.load(str(tmp_path / "mine.npz"))
    assert torch.equal(data.train.x, torch.from_numpy(given["x"][:cut]))
    assert torch.equal(data.test.x, torch.from_numpy(given["x"][cut:]))
    assert data.test.y.tolist() == given["y"][cut:].tolist()
    assert (data.name, data.test.name, data.test.classes) == ("mine", "mine/test", ("0", "1"))


def test_a_single_row_is_both_splits(tmp_path):
    save(tmp_path / "one.npz", 1, x=np.full((1, 3, 3), 255, np.uint8))
    data = datasets.load(str(tmp_path / "one.npz"))
    assert torch.equal(data.train.x, torch.ones(1, 1, 3, 3))
    assert data.train.digest() == data.test.digest()
    assert data.test.classes == ("0", "1")


def test_a_folder_of_two_files_keeps_their_splits(tmp_path):
    train, test = save(tmp_path / "train.npz", 6), save(tmp_path / "test.npz", 3)
    data = datasets.load(str(tmp_path))
    assert data.name == tmp_path.name
    assert torch.equal(data.train.x, torch.from_numpy(train["x"]))
    assert torch.equal(data.test.x, torch.from_numpy(test["x"]))


def test_half_a_pair_names_the_missing_file(tmp_path):
    save(tmp_path / "train.npz")
    with pytest.raises(DataError, match=r"test\.npz: expected an \.npz file with x and y, got no file"):
        datasets.load(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an .npz file"),
        (b"\x89PNG and so on", "expected an .npz file"),
        (b"PK\x03\x04 a zip no more", "expected an .npz file"),
    ],
)
def test_what_is_no_npz_is_one_data_error(tmp_path, content, message):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz: " + re.escape(message)):
        datasets.load(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize(("part", "offset"), [(b"NUMPY", 200), (b"PK\1\2", 10)])
def test_a_damaged_archive_is_one_data_error(tmp_path, part, offset):
    path = tmp_path / "bad.npz"
    save(path, 10)
    content = bytearray(path.read_bytes())
    content[content.index(part) + offset] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz: .*save it again"):
        datasets.load(str(path))


def test_a_single_array_is_no_npz(tmp_path):
    with (tmp_path / "bad.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="got another kind"):
        datasets.load(str(tmp_path / "bad.npz"))


def test_a_missing_key_is_named_with_what_is_there(tmp_path):
    np.savez(tmp_path / "bad.npz", x=np.zeros((2, 3, 3)), labels=np.zeros(2, int))
    with pytest.raises(DataError, match="expected arrays x and y, got x, labels"):
        datasets.load(str(tmp_path / "bad.npz"))


def test_pickles_are_refused(tmp_path):
    save(tmp_path / "bad.npz", 2, y=np.array([0, None], object))
    with pytest.raises(DataError, match="plain arrays"):
        datasets.load(str(tmp_path / "bad.npz"))


def test_bad_tensors_are_refused_with_the_path(tmp_path):
    save(tmp_path / "bad.npz", 10, y=np.zeros(9, int))
    with pytest.raises(DataError, match=r"bad\.npz: .*10 images, 9 labels"):
        datasets.load(str(tmp_path / "bad.npz"))
