"""One set of weights in every framework: the same logits, the same gradients, the same verdicts."""

from __future__ import annotations

import warnings

import pytest
import torch

import sparring
from sparring.attacks.apgd import APGD
from sparring.attacks.pgd import PGD
from sparring.attacks.square import Square
from sparring.core.model import Access
from sparring.core.threat import L2, Linf
from sparring.engine.loop import run
from sparring.models.jax import JaxModel
from sparring.models.torch import TorchModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FRAMEWORKS = ("keras", "jax", "onnx", "onnxruntime")
ROWS = 500


@pytest.fixture(scope="module")
def conv():
    return sparring.train("conv", sparring.load("digits"), steps=400).net


@pytest.fixture(scope="module")
def rows(digits):
    return digits[0][-ROWS:], digits[1][-ROWS:]


@pytest.fixture(scope="module")
def theirs(conv):
    return TorchModel(conv)


@pytest.fixture(scope="module")
def models(conv, mirror, tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "conv.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("keras")
        from sparring.models.keras_nets import convert

        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(conv, (torch.zeros(1, 1, 8, 8),), path, dynamo=False, **names)
    from sparring.models.onnx import OnnxRuntimeModel

    return {
        "keras": sparring.wrap(convert(conv, (1, 8, 8))),
        "jax": JaxModel(mirror(conv)),
        "onnx": sparring.wrap(path),
        "onnxruntime": OnnxRuntimeModel(path),
    }


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_logits_and_gradients_agree_within_rounding(name, models, theirs, rows):
    ours = models[name]
    access = min(ours.access, Access.GRADIENT)
    one, two = ours.query(rows[0], access), theirs.query(rows[0], Access.GRADIENT)
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-5, atol=2e-5)
    if one.vjp is not None:
        v = torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(one.vjp(v), two.vjp(v), rtol=1e-4, atol=2e-5)
    assert (one.vjp is None) is (name == "onnxruntime")


ATTACKS = [(PGD(steps=10), Linf(0.15)), (APGD(steps=20, loss="dlr"), L2(0.8)), (Square(steps=100), Linf(0.15))]
CASES = [
    (name, attack, threat)
    for name in FRAMEWORKS
    for attack, threat in ATTACKS
    if name != "onnxruntime" or attack.needs < Access.GRADIENT
]


@pytest.mark.parametrize(("name", "attack", "threat"), CASES)
def test_the_same_seed_gives_the_same_verdicts(name, attack, threat, models, theirs, rows):
    one, two = (run(model, attack, threat, *rows, seed=3, width=128) for model in (models[name], theirs))
    assert torch.equal(one.found, two.found)
    assert torch.equal(one.clean, two.clean)
    assert 50 < int(two.found.sum()) < 450
    assert (one.label == two.label).double().mean() > 0.99
