from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from sparring import data as datasets
from sparring.core.errors import DataError


def paint(path, value=0, size=(4, 3), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_every_fifth_of_a_class_is_held_out(tmp_path):
    for i in range(11):
        paint(tmp_path / "b" / f"{i:02}.png", 100 + i)
    for i in range(3):
        paint(tmp_path / "a" / f"{i}.png", i)
    paint(tmp_path / "c" / "only.png", 200)
    data = datasets.load(str(tmp_path))
    values = (data.test.x[:, 0, 0, 0] * 255).round().int().tolist()
    assert values == [2, 104, 109]
    assert data.test.y.tolist() == [0, 1, 1]
    assert data.train.classes == ("a", "b", "c")
    assert len(data.train) == 12
    assert data.train.x.shape[1:] == (1, 3, 4)


def test_train_and_test_folders_are_kept(tmp_path):
    for split, value in (("train", 10), ("test", 20)):
        for name in ("dog", "cat"):
            paint(tmp_path / split / name / "1.png", value)
    paint(tmp_path / "train" / "newt" / "1.png", 30)
    data = datasets.load(str(tmp_path))
    assert data.train.classes == data.test.classes == ("cat", "dog", "newt")
    assert (data.train.x[:, 0, 0, 0] * 255).round().tolist() == [10, 10, 30]
    assert (data.test.x[:, 0, 0, 0] * 255).round().tolist() == [20, 20]
    assert data.test.y.tolist() == [0, 1]


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    paint(tmp_path / "train" / "a" / "1.png", 51)
    paint(tmp_path / "train" / "b" / "1.png", 255, mode="1")
    paint(tmp_path / "test" / "b" / "1.png", (51, 102, 255), mode="RGB")
    data = datasets.load(str(tmp_path))
    assert torch.allclose(data.test.x[0, :, 1, 2], torch.tensor([0.2, 0.4, 1.0]))
    assert torch.allclose(data.train.x[0, :, 1, 2], torch.full((3,), 0.2))
    assert torch.equal(data.train.x[1], torch.ones(3, 3, 4))


def test_rows_and_columns_are_not_swapped(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    assert np.array_equal((datasets.load(str(tmp_path)).test.x[0, 0] * 255).round().numpy(), pixels)


def test_two_sizes_name_two_files(tmp_path):
    paint(tmp_path / "a" / "1.png")
    paint(tmp_path / "b" / "2.png", size=(5, 3))
    expected = f"got 4 x 3 in {tmp_path / 'a' / '1.png'} and 5 x 3 in {tmp_path / 'b' / '2.png'}"
    with pytest.raises(DataError, match=re.escape(expected)):
        datasets.load(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 20, 40])
def test_an_unreadable_image_is_named(tmp_path, keep):
    paint(tmp_path / "a" / "good.png")
    paint(tmp_path / "a" / "poor.png")
    path = tmp_path / "a" / "poor.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=re.escape(f"{path}: expected an image")):
        datasets.load(str(tmp_path))


def test_sixteen_bits_are_refused_rather_than_clipped(tmp_path):
    paint(tmp_path / "a" / "deep.png", 40_000, mode="I;16")
    with pytest.raises(DataError, match=r"deep\.png: expected 8 bits a channel, got mode I;16"):
        datasets.load(str(tmp_path))


def test_what_is_no_image_is_passed_over(tmp_path):
    paint(tmp_path / "a" / "1.PNG")
    for name in ("a/notes.txt", "a/._1.png", "README.md"):
        (tmp_path / name).write_text("not an image")
    (tmp_path / ".git").mkdir()
    assert len(datasets.load(str(tmp_path)).train) == 1


def test_empty_folders_and_strange_classes_are_errors(tmp_path):
    with pytest.raises(DataError, match="a folder of images for each class, got none"):
        datasets.load(str(tmp_path))
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="expected images of class 'a', got none"):
        datasets.load(str(tmp_path))
    paint(tmp_path / "train" / "a" / "1.png")
    with pytest.raises(DataError, match=r"test: expected a folder of images"):
        datasets.load(str(tmp_path))
    paint(tmp_path / "test" / "b" / "1.png")
    with pytest.raises(DataError, match=r"test/b: expected a class of"):
        datasets.load(str(tmp_path))
