"""Each transform against a reference that shares no code with it."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import median_filter
from scipy.optimize import minimize

from sparring.core.errors import UsageError
from sparring.guards.binarise import Binarise
from sparring.guards.bit_depth import BitDepth
from sparring.guards.ensemble import Ensemble
from sparring.guards.guard import Guarded
from sparring.guards.jpeg import JPEG
from sparring.guards.median import Median
from sparring.guards.random_resize_pad import RandomResizePad
from sparring.guards.smoothing import Smoothing
from sparring.guards.total_variation import TotalVariation


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bit_depth_takes_the_nearest_level(images, bits):
    levels = np.arange(2**bits) / (2**bits - 1)
    wanted = [levels[np.abs(levels - pixel).argmin()] for pixel in images.double().flatten().tolist()]
    np.testing.assert_allclose(BitDepth(bits).transform(images).flatten().numpy(), wanted, atol=1e-7)


def test_binarise_by_hand():
    x = torch.tensor([[[[0.0, 0.499, 0.5, 0.7, 1.0]]]])
    assert Binarise().transform(x).flatten().tolist() == [0, 0, 1, 1, 1]
    assert Binarise(0.7).transform(x).flatten().tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("quality", [20, 75])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_that_of_the_codec(images, quality, channels):
    x = images[:, :channels]
    got = JPEG(quality).transform(x)
    for image, mine in zip(x, got, strict=True):
        array = np.uint8(np.rint(np.moveaxis(image.numpy(), 0, 2) * 255.0))
        file = BytesIO()
        Image.fromarray(array[..., 0] if channels == 1 else array).save(file, format="JPEG", quality=quality)
        wanted = np.asarray(Image.open(file), dtype=np.float32) / 255
        np.testing.assert_allclose(np.squeeze(np.moveaxis(mine.numpy(), 0, 2)), wanted, atol=1e-7)
    assert got.dtype == torch.float32
    assert (got - x).abs().max() > 0.01
    with pytest.raises(UsageError, match="expected images of 1 or 3 channels for JPEG, got 2"):
        JPEG().transform(images[:, :2])


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_the_median_is_that_of_scipy(images, size):
    wanted = median_filter(images.numpy(), size=(1, 1, size, size), mode="reflect")
    np.testing.assert_array_equal(Median(size).transform(images).numpy(), wanted)


def test_a_median_wider_than_the_image_is_refused(images):
    with pytest.raises(UsageError, match=r"expected a window that fits images of \(9, 11\), got 40"):
        Median(40).transform(images)


def differences(height, width):
    """The matrix of all differences of neighbours, by loops."""
    rows = []
    for i in range(height):
        for j in range(width):
            for a, b in ((i + 1, j), (i, j + 1)):
                if a < height and b < width:
                    row = np.zeros(height * width)
                    row[a * width + b], row[i * width + j] = 1.0, -1.0
                    rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("weight", [0.02, 0.1, 0.5])
def test_total_variation_is_at_the_minimum(weight):
    """The dual, min ||x - w D^T p|| over |p| <= 1, solved by L-BFGS-B; x - w D^T p is the one minimiser."""
    x = torch.rand(2, 1, 5, 6, generator=torch.Generator().manual_seed(2)).double()
    matrix = differences(5, 6)
    got = TotalVariation(weight, steps=2000).transform(x).flatten(1).numpy()
    for image, mine in zip(x.flatten(1).numpy(), got, strict=True):

        def cost(p, image=image):
            z = image - weight * matrix.T @ p
            return 0.5 * z @ z, -weight * matrix @ z

        found = minimize(
            cost, np.zeros(len(matrix)), jac=True, method="L-BFGS-B", bounds=[(-1, 1)] * len(matrix),
            options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        np.testing.assert_allclose(mine, image - weight * matrix.T @ found.x, atol=2e-4)


def test_total_variation_is_nearly_there_after_its_default_steps(images):
    far = TotalVariation().transform(images) - TotalVariation(steps=2000).transform(images)
    assert far.abs().max() < 0.01


def test_resizing_and_padding_by_hand(images):
    """Every draw is a smaller image, by the corner rule of bilinear sampling in loops, on black."""
    guard, seen = RandomResizePad(0.5), set()
    x = images[:1, :1]
    for seed in range(40):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            got = guard.transform(x)[0, 0]
        assert got.shape == (9, 11)
        lit = got.nonzero()
        (top, left), (bottom, right) = lit.amin(0).tolist(), (lit.amax(0) + 1).tolist()
        tall, wide = bottom - top, right - left
        assert tall >= 5
        assert wide == round(11 * tall / 9)
        seen.add((tall, top, left))
        torch.testing.assert_close(got[top:bottom, left:right], bilinear(x[0, 0], tall, wide))
    assert {tall for tall, _, _ in seen} == {5, 6, 7, 8, 9}
    assert len({(top, left) for _, top, left in seen}) > 8


def bilinear(image, tall, wide):
    height, width = image.shape
    out = torch.zeros(tall, wide)
    for i in range(tall):
        for j in range(wide):
            y = min(max((i + 0.5) * height / tall - 0.5, 0), height - 1)
            x = min(max((j + 0.5) * width / wide - 0.5, 0), width - 1)
            a, b = int(y), int(x)
            c, d = min(a + 1, height - 1), min(b + 1, width - 1)
            u, v = y - a, x - b
            out[i, j] = (1 - u) * ((1 - v) * image[a, b] + v * image[a, d])
            out[i, j] += u * ((1 - v) * image[c, b] + v * image[c, d])
    return out


def test_smoothing_adds_noise_of_that_size_the_same_to_all_rows(images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.stack([Smoothing(0.3).transform(images) - images for _ in range(60)])
    assert (noise[:, :1] - noise).abs().max() < 1e-6
    assert noise[:, 0].std().item() == pytest.approx(0.3, rel=0.02)
    assert noise[:, 0].mean().abs() < 0.01


def test_an_ensemble_has_the_mean_of_the_probabilities(images, linear):
    others = tuple(lambda x, k=k: linear(x).roll(k, 1) * k for k in (1, 2))
    said = Guarded(Ensemble(others), linear)(images)
    wanted = sum(net(images).double().softmax(1) for net in (linear, *others)) / 3
    torch.testing.assert_close(said.double().exp(), wanted, atol=1e-6, rtol=1e-5)
    with pytest.raises(UsageError, match="expected other nets for an ensemble"):
        Ensemble(())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BitDepth, {"bits": 0}), (Binarise, {"threshold": 0.0}), (JPEG, {"quality": 100}), (Median, {"size": 1}),
        (TotalVariation, {"weight": 0.0}), (TotalVariation, {"steps": 0}), (RandomResizePad, {"least": 1.0}),
        (Smoothing, {"sigma": 0.0}), (Smoothing, {"sigma": float("nan")}),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(kind, options):
    with pytest.raises(UsageError, match="expected"):
        kind(**options)
