"""The adapter for JAX functions answers as the same network does in torch."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from sparring.attacks.pgd import PGD
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access
from sparring.core.threat import L2, Linf
from sparring.engine.loop import run
from sparring.models import nets
from sparring.models.jax import JaxModel
from sparring.models.torch import TorchModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    jax = pytest.importorskip("jax")
import jax.numpy as jnp

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def images(rows=4, channels=1, size=8, seed=0):
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(("name", "channels", "size"), [("dense", 1, 8), ("conv", 1, 28), ("conv", 3, 8)])
def test_logits_and_gradients_are_those_of_torch(name, channels, size, rows, agree, mirror):
    net = nets.build(name, (channels, size, size), 10)
    agree(JaxModel(mirror(net)), TorchModel(net), images(rows, channels, size))


def test_channels_last(agree, mirror):
    net = nets.build("conv", (3, 8, 8), 10)
    agree(JaxModel(mirror(net, channels_last=True), channels_last=True), TorchModel(net), images(5, 3))


def test_mean_and_std_are_part_of_the_model(agree, mirror):
    net = nets.build("conv", (3, 8, 8), 10)
    options = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "bounds": (0.0, 2.0)}
    ours = JaxModel(mirror(net), **options)
    agree(ours, TorchModel(net, **options), images(5, 3))
    assert ours.bounds == (0.0, 2.0)


def test_rows_of_a_larger_tensor_and_other_strides(agree, mirror):
    net = nets.build("dense", (1, 9, 7), 10)
    x = torch.rand(9, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    agree(JaxModel(mirror(net)), TorchModel(net), x[3:8])
    agree(JaxModel(mirror(net)), TorchModel(net), x.transpose(2, 3).contiguous().transpose(2, 3))


def test_access_shows_no_more_than_it_says(shows_no_more, mirror):
    shows_no_more(JaxModel(mirror(nets.build("dense", (1, 8, 8), 10))), images())


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8)])
def test_an_attack_finds_what_it_finds_in_torch(net, digits, threat, mirror):
    x, y = digits[0][1400:1700], digits[1][1400:1700]
    ours, theirs = (
        run(model, PGD(steps=10), threat, x, y, restarts=2, seed=3, width=64)
        for model in (JaxModel(mirror(net)), TorchModel(net))
    )
    assert torch.equal(ours.found, theirs.found)
    assert torch.equal(ours.label, theirs.label)
    assert 30 < int(theirs.found.sum()) < 270
    assert not ours.failed.any()


def test_probabilities_become_logits(mirror):
    net = nets.build("dense", (1, 8, 8), 10)
    call = mirror(net)
    soft = JaxModel(lambda x: jax.nn.softmax(call(x)), probabilities=True).query(images(), Access.SCORE)
    torch.testing.assert_close(soft.logits, net(images()).log_softmax(1).detach(), rtol=1e-4, atol=1e-5)
    hard = JaxModel(lambda x: jax.nn.one_hot(jnp.zeros(len(x), int), 3) + 0 * x.sum(), probabilities=True)
    logits = hard.query(images(), Access.SCORE).logits
    assert logits.isfinite().all()
    assert (logits[:, 1:] < -87).all()


def test_weights_that_are_asked_for_may_change():
    box = [torch.ones(64, 3).numpy()]
    model = JaxModel(lambda x, w: x.reshape(len(x), -1) @ w, weights=lambda: box[0])
    first = model.query(images(), Access.GRADIENT)
    box[0] = 2 * box[0]
    second = model.query(images(), Access.GRADIENT)
    torch.testing.assert_close(second.logits, 2 * first.logits)
    v = torch.ones(4, 3)
    torch.testing.assert_close(second.vjp(v), 2 * first.vjp(v))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"expected logits \(4, classes >= 2\).*got \(4, 1, 8, 8\)"),
        (lambda x: x.reshape(len(x), -1)[:, :1], r"got \(4, 1\)"),
        (lambda x: x.reshape(len(x), -1)[:2], r"got \(2, 64\)"),
        (lambda x: {"logits": x}, "got dict"),
        (lambda x: np.zeros((len(x), 3)), "got ndarray"),
        (lambda x: x @ jnp.ones((3, 3)), r"the model failed on images \(4, 1, 8, 8\)"),
    ],
)
def test_a_wrong_answer_is_said(function, message):
    with pytest.raises(ModelError, match=message):
        JaxModel(function).query(images(), Access.SCORE)


def test_too_little_memory_is_said_as_torch_says_it():
    def hungry(x):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    with pytest.raises(torch.OutOfMemoryError):
        JaxModel(hungry).query(images(), Access.SCORE)


def test_flax_linen():
    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Conv(6, (3, 3), strides=2)(x))
            return linen.Dense(10)(x.reshape(len(x), -1))

    net = Net()
    variables = net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    check(JaxModel(net.bind(variables), channels_last=True), lambda x: net.apply(variables, x), channels_last=True)


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.norm = nnx.Conv(1, 6, (3, 3), strides=2, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
            self.out = nnx.Linear(96, 10, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.conv(x))).reshape(len(x), -1))

    net = Net(nnx.Rngs(0))
    net.eval()
    check(JaxModel(net, channels_last=True), net, channels_last=True)


def test_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 6, 3, 2, key=jax.random.key(0)),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(54, 10, key=jax.random.key(1)),
        ]
    )
    check(JaxModel(jax.vmap(net)), jax.vmap(net))


def check(model, reference, channels_last=False):
    """`model` answers as the bare call does, gradient included."""
    x = images()
    answer = model.query(x, Access.GRADIENT)
    array = jnp.asarray(x.numpy())

    def bare(array):
        return reference(array.transpose(0, 2, 3, 1) if channels_last else array)

    logits, pull = jax.vjp(bare, array)
    np.testing.assert_allclose(answer.logits.numpy(), logits, rtol=1e-4, atol=1e-5)
    v = np.arange(40, dtype=np.float32).reshape(4, 10)
    np.testing.assert_allclose(answer.vjp(torch.from_numpy(v)).numpy(), pull(v)[0], rtol=1e-4, atol=1e-4)


def test_without_jax_the_install_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(UsageError, match=r"pip install 'sparring\[jax\]'"):
        JaxModel(lambda x: x)


def test_the_adapters_are_light_to_import():
    code = (
        "import sys, sparring, sparring.models.keras, sparring.models.jax\n"
        "print(*[name for name in ('tensorflow', 'keras', 'jax', 'flax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
