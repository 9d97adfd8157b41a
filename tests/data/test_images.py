from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sparring.core.errors import DataError, UsageError
from sparring.data.images import Dataset, Images, Raw


def some(n: int = 12, channels: int = 1) -> Images:
    x = np.random.default_rng(n).integers(0, 256, (n, channels, 3, 4), dtype=np.uint8)
    return Images.checked("some", Raw("somewhere", x, np.arange(n) % 3))


def test_bytes_become_fractions_of_255():
    images = Images.checked("two", Raw("two", np.uint8([[[0, 51]], [[102, 255]]]), np.array([0, 1])))
    assert images.x.dtype == torch.float32
    assert torch.equal(images.x, torch.tensor([[[[0.0, 0.2]]], [[[0.4, 1.0]]]]))
    assert images.y.dtype == images.ids.dtype == torch.int64


def test_select_keeps_rows_labels_and_ids_together():
    images = some()
    order = torch.tensor([7, 2, 9])
    chosen = images.select(order).select(torch.tensor([True, False, True]))
    assert chosen.ids.tolist() == [7, 9]
    assert torch.equal(chosen.x, images.x[[7, 9]])
    assert torch.equal(chosen.y, images.y[[7, 9]])
    assert chosen.classes == images.classes == ("0", "1", "2")


def test_take_gives_the_first_rows():
    images = some()
    assert images.take(None) is images
    assert images.take(5).ids.tolist() == [0, 1, 2, 3, 4]
    assert len(images.take(99)) == 12
    for limit in (0, -1):
        with pytest.raises(UsageError, match=f"at least 1 image, got {limit}"):
            images.take(limit)


def test_digest_sees_pixels_labels_and_shape():
    images = some()
    moved = images.x.clone()
    moved[3, 0, 1, 1] += 1e-6
    others = [
        Images("some", moved, images.y, images.ids, images.classes),
        Images("some", images.x, images.y.flip(0), images.ids, images.classes),
        Images("some", images.x.reshape(12, 1, 4, 3), images.y, images.ids, images.classes),
    ]
    digests = [each.digest() for each in others]
    assert len({images.digest(), *digests}) == 4
    assert some().digest() == images.digest()
    strided = Images("some", images.x.mT.contiguous().mT, images.y, images.ids, images.classes)
    assert strided.digest() == images.digest()


@pytest.mark.parametrize(("n", "kept"), [(1, 1), (2, 1), (5, 4), (12, 10)])
def test_validation_is_the_last_sixth(n, kept):
    train, validation = Dataset("d", some(n), some(2)).with_validation()
    assert train.ids.tolist() == list(range(kept))
    assert validation.ids.tolist() == list(range(kept if n > 1 else 0, n))
    assert validation.name == "d/validation"


def test_validation_of_60000_is_10000():
    train = Images("d/train", torch.zeros(60_000, 1, 1, 1), torch.zeros(60_000), torch.arange(60_000), ("0", "1"))
    kept, validation = Dataset("d", train, train).with_validation()
    assert (len(kept), len(validation), int(validation.ids[0])) == (50_000, 10_000, 50_000)


def test_a_split_numbers_each_part_from_zero():
    whole = some(6)
    data = Dataset.split(whole, torch.tensor([False, True, False, False, True, False]))
    assert torch.equal(data.test.x, whole.x[[1, 4]])
    assert torch.equal(data.train.y, whole.y[[0, 2, 3, 5]])
    assert (data.test.ids.tolist(), data.train.ids.tolist()) == ([0, 1], [0, 1, 2, 3])
    assert (data.train.name, data.test.name) == ("some/train", "some/test")


PIXELS, LABELS = np.zeros((4, 2, 2), np.float32), np.zeros(4, np.int64)


def with_pixel(value: float, dtype: type = np.float32) -> np.ndarray:
    x = np.zeros((4, 2, 2), dtype)
    x[2, 1, 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (with_pixel(255), LABELS, "expected images in [0, 1], got a maximum of 255.0; divide by 255"),
        (with_pixel(-0.5), LABELS, "expected images in [0, 1], got a minimum of -0.5"),
        (with_pixel(np.nan), LABELS, "got NaN or infinity"),
        (with_pixel(1e300, np.float64), LABELS, "got NaN or infinity"),
        (with_pixel(1, np.int64), LABELS, "of uint8, got int64"),
        (np.zeros((4, 4)), LABELS, "got (4, 4)"),
        (np.zeros((0, 2, 2)), LABELS, "got (0, 2, 2)"),
        (np.zeros((4, 32, 32, 3)), LABELS, "channels first, got shape (4, 32, 32, 3); transpose"),
        (PIXELS, LABELS[:3], "got 4 images, 3 labels"),
        (PIXELS, LABELS - 1, "expected labels from 0, got -1"),
        (PIXELS, LABELS.astype(float), "integer labels, got float64"),
        (PIXELS, np.zeros((4, 2), int), "shape (n,), got (4, 2)"),
        (PIXELS, LABELS[:0], "one or more labels"),
        (PIXELS, LABELS + 10**6, "number the classes from 0, got 1000000"),
    ],
)
def test_what_is_no_image_set_is_refused_with_its_source(x, y, message):
    with pytest.raises(DataError, match=r"^here\.npz: .*" + re.escape(message)):
        Images.checked("bad", Raw("here.npz", x, y))


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(DataError, match="expected labels below 2, got 2"):
        Images.checked("bad", Raw("here", PIXELS, np.array([0, 1, 2, 0])), ("cat", "dog"))


def test_splits_share_classes_and_must_share_a_shape():
    train, test = Raw("a", PIXELS, LABELS), Raw("b", PIXELS, LABELS + 4)
    assert Dataset.checked("d", train, test).train.classes == ("0", "1", "2", "3", "4")
    with pytest.raises(DataError, match=re.escape("(1, 2, 2) in a and (1, 2, 3) in b")):
        Dataset.checked("d", train, Raw("b", np.zeros((4, 2, 3)), LABELS))


def test_foreign_byte_order_and_read_only_arrays_are_read():
    x = np.full((2, 1, 1), 0.25, ">f8")
    x.flags.writeable = False
    images = Images.checked("far", Raw("far", x, np.array([0, 1], ">i4")))
    assert images.x.flatten().tolist() == [0.25, 0.25]
    assert images.y.tolist() == [0, 1]
