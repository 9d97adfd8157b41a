"""The adapter for Keras and TensorFlow answers as the same network does in torch."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from sparring.attacks.pgd import PGD
from sparring.core.errors import ModelError, UsageError
from sparring.core.model import Access
from sparring.core.threat import L2, Linf
from sparring.engine.loop import run
from sparring.models import nets
from sparring.models.keras import KerasModel
from sparring.models.torch import TorchModel

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf = pytest.importorskip("tensorflow")
    keras = pytest.importorskip("keras")
if keras.config.backend() != "tensorflow":
    pytest.skip("these tests run Keras on TensorFlow", allow_module_level=True)
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
layers = keras.layers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def images(rows=4, channels=1, size=8, seed=0):
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(seed))


def mirror(net, shape, ending=(), activation=None):
    """The torch network `net` in Keras, for channels-last images of `shape`; `activation` is the last layer's."""
    model = keras.Sequential([keras.Input(shape)])
    last = [layer for layer in net if isinstance(layer, nn.Linear)][-1]
    for layer in net:
        if isinstance(layer, nn.Flatten):
            if len(shape) == 3:
                model.add(layers.Permute((3, 1, 2)))  # torch flattens channels first
            model.add(layers.Flatten())
        elif isinstance(layer, nn.ReLU):
            model.add(layers.ReLU())
        elif isinstance(layer, nn.Linear):
            model.add(layers.Dense(layer.out_features, activation=activation if layer is last else None))
            model.layers[-1].set_weights([layer.weight.detach().numpy().T, layer.bias.detach().numpy()])
        else:
            model.add(layers.ZeroPadding2D(layer.padding))
            model.add(layers.Conv2D(layer.out_channels, layer.kernel_size, strides=layer.stride))
            weight = layer.weight.detach().permute(2, 3, 1, 0).numpy()
            model.layers[-1].set_weights([weight, layer.bias.detach().numpy()])
    for layer in ending:
        model.add(layer)
    return model


@pytest.fixture
def small():
    return nets.build("dense", (1, 8, 8), 10)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize(("name", "channels", "size"), [("dense", 1, 8), ("conv", 1, 28), ("conv", 3, 8)])
def test_logits_and_gradients_are_those_of_torch(name, channels, size, rows, agree):
    net = nets.build(name, (channels, size, size), 10)
    ours = KerasModel(mirror(net, (size, size, channels)))
    agree(ours, TorchModel(net), images(rows, channels, size))


def test_one_trace_serves_every_width(small):
    traces = []

    def call(x):
        traces.append(x.shape)
        return tf.reshape(x, (-1, 64)) @ tf.ones((64, 3))

    model = KerasModel(call)
    for rows in (1, 7, 64):
        model.query(images(rows), Access.GRADIENT).vjp(torch.ones(rows, 3))
        model.query(images(rows), Access.SCORE)
    assert len(traces) == 1  # the way back needs none of its own


@pytest.mark.parametrize("shape", [(8, 8), (64,), (1, 8, 8), (8, 8, 1), (None, None, 1)])
def test_images_are_given_as_the_input_asks(shape, small, agree):
    inputs = keras.Input(shape)
    dense = mirror(small, (64,))
    flat = inputs if shape == (64,) else layers.Reshape((64,))(inputs)
    agree(KerasModel(keras.Model(inputs, dense(flat))), TorchModel(small), images())


def test_colours_come_in_the_right_places(agree):
    inputs = keras.Input((3, 8, 8))
    net = nets.build("dense", (3, 8, 8), 10)
    first = keras.Model(inputs, mirror(net, (192,))(layers.Reshape((192,))(inputs)))
    agree(KerasModel(first), TorchModel(net), images(5, 3))
    with pytest.raises(ModelError, match=r"fit the model's input \(None, 3, 8, 8\), got \(3, 9, 9\)"):
        KerasModel(first).query(images(2, 3, 9), Access.SCORE)


def test_mean_std_and_bounds_are_part_of_the_model(agree):
    net = nets.build("conv", (3, 8, 8), 10)
    options = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "bounds": (0.0, 2.0)}
    ours = KerasModel(mirror(net, (8, 8, 3)), **options)
    agree(ours, TorchModel(net, **options), images(5, 3))
    assert ours.bounds == (0.0, 2.0)


def test_rows_of_a_larger_tensor_and_other_strides(agree):
    net = nets.build("dense", (1, 9, 7), 10)
    x = torch.rand(9, 1, 9, 7, generator=torch.Generator().manual_seed(0))
    model = KerasModel(mirror(net, (9, 7, 1)))
    agree(model, TorchModel(net), x[3:8])
    agree(model, TorchModel(net), x.transpose(2, 3).contiguous().transpose(2, 3))


def test_access_shows_no_more_than_it_says(small, shows_no_more):
    shows_no_more(KerasModel(mirror(small, (8, 8, 1))), images())


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.8)])
def test_an_attack_finds_what_it_finds_in_torch(net, digits, threat):
    x, y = digits[0][1400:1700], digits[1][1400:1700]
    ours, theirs = (
        run(model, PGD(steps=10), threat, x, y, restarts=2, seed=3, width=64)
        for model in (KerasModel(mirror(net, (8, 8, 1), activation="softmax")), TorchModel(net))
    )
    assert torch.equal(ours.found, theirs.found)
    assert torch.equal(ours.label, theirs.label)
    assert 30 < int(theirs.found.sum()) < 270
    assert not ours.failed.any()


ENDINGS = {
    "dense": lambda net: mirror(net, (8, 8, 1), activation="softmax"),
    "tf.nn": lambda net: mirror(net, (8, 8, 1), activation=tf.nn.softmax),
    "layer": lambda net: mirror(net, (8, 8, 1), [layers.Softmax()]),
    "dropout": lambda net: mirror(net, (8, 8, 1), [layers.Dropout(0.9), layers.Softmax()]),
    "activation": lambda net: mirror(net, (8, 8, 1), [layers.Activation("softmax")]),
    "nested": lambda net: keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Reshape((64,)), mirror(net, (64,), activation="softmax")]
    ),
    "operation": lambda net: operation(mirror(net, (8, 8, 1))),
}


def operation(model):
    return keras.Model(model.inputs[0], keras.ops.softmax(model.outputs[0]))


@pytest.mark.parametrize("ending", sorted(ENDINGS))
@pytest.mark.parametrize("probabilities", [None, True])
def test_a_final_softmax_is_left_out(ending, probabilities, small):
    with torch.no_grad():
        small[-1].weight.mul_(900)  # the softmax saturates: its logarithm would not do
    model = ENDINGS[ending](small)
    before, names = model.get_config(), [weight.path for weight in model.weights]
    values = model.get_weights()
    answer = KerasModel(model, probabilities=probabilities).query(images(), Access.SCORE)
    wanted = small(images()).detach()
    assert (wanted.amax(1) - wanted.amin(1)).max() > 100
    torch.testing.assert_close(answer.logits, wanted, rtol=1e-5, atol=1e-3)
    assert model.get_config() == before
    assert [weight.path for weight in model.weights] == names
    assert all(np.array_equal(one, two) for one, two in zip(values, model.get_weights(), strict=True))
    np.testing.assert_allclose(model(images().permute(0, 2, 3, 1).numpy()), wanted.softmax(1), atol=1e-5)


def test_a_softmax_may_be_the_only_layer_and_may_be_taken_as_it_is():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(3, activation="softmax")])
    flat = images().flatten(1)
    kernel = torch.from_numpy(model.get_weights()[0])
    torch.testing.assert_close(KerasModel(model).query(images(), Access.SCORE).logits, flat @ kernel)
    raw = KerasModel(model, probabilities=False).query(images(), Access.SCORE).logits
    torch.testing.assert_close(raw, (flat @ kernel).softmax(1))


def test_the_weights_are_shared_not_copied(small):
    model = mirror(small, (8, 8, 1), activation="softmax")
    ours = KerasModel(model)
    first = ours.query(images(), Access.SCORE).logits
    model.set_weights([2 * weight for weight in model.get_weights()])
    assert not torch.allclose(ours.query(images(), Access.SCORE).logits, first)
    torch.testing.assert_close(
        ours.query(images(), Access.SCORE).logits, KerasModel(model).query(images(), Access.SCORE).logits
    )


@pytest.mark.parametrize("ending", ["dense", "layer"])
def test_one_unit_with_a_sigmoid_is_two_classes(ending, agree):
    one = nets.build("dense", (1, 8, 8), 1)
    endings = {"dense": {"activation": "sigmoid"}, "layer": {"ending": [layers.Activation("sigmoid")]}}
    model = mirror(one, (8, 8, 1), **endings[ending])
    two = TorchModel(lambda x: torch.cat([0 * one(x), one(x)], 1))
    agree(KerasModel(model), two, images(), classes=2)
    given = KerasModel(lambda x: model(x, training=False), probabilities=True).query(images(), Access.SCORE)
    torch.testing.assert_close(given.logits.diff(dim=1), one(images()).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="probabilities=True"):
        KerasModel(model, probabilities=False).query(images(), Access.SCORE)


def test_a_function_and_its_probabilities(small, agree):
    model = mirror(small, (8, 8, 1))
    agree(KerasModel(lambda x: model(x, training=False)), TorchModel(small), images())
    soft = KerasModel(lambda x: tf.nn.softmax(model(x)), probabilities=True).query(images(), Access.SCORE)
    torch.testing.assert_close(soft.logits, small(images()).log_softmax(1).detach(), rtol=1e-4, atol=1e-5)
    hard = KerasModel(lambda x: tf.one_hot(0 * tf.range(tf.shape(x)[0]), 3), probabilities=True)
    answer = hard.query(images(), Access.GRADIENT)
    assert answer.logits.isfinite().all()
    assert (answer.logits[:, 1:] < -87).all()
    assert torch.equal(answer.vjp(torch.ones(4, 3)), torch.zeros(4, 1, 8, 8))
    with pytest.raises(ModelError, match="probabilities=True"):
        run(KerasModel(lambda x: tf.nn.softmax(model(x))), PGD(), Linf(0.1), images(), torch.arange(4))


def test_a_subclassed_model_gets_channels_last(small, agree):
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.drop = mirror(small, (8, 8, 1)), layers.Dropout(0.9)

        def call(self, x, training=None):
            assert x.shape[1:] == (8, 8, 1)
            return self.drop(self.inner(x), training=training)

    model = Net()
    with pytest.raises(ModelError, match="never built"):
        KerasModel(model)
    model(np.zeros((1, 8, 8, 1), np.float32))
    agree(KerasModel(model), TorchModel(small), images())


def test_a_keras_file_and_a_saved_model(tmp_path, small, agree):
    model = mirror(small, (8, 8, 1), activation="softmax")
    model.save(tmp_path / "net.keras")
    agree(KerasModel(str(tmp_path / "net.keras")), TorchModel(small), images())
    mirror(small, (8, 8, 1)).export(tmp_path / "logits", verbose=False)
    agree(KerasModel(tmp_path / "logits"), TorchModel(small), images(7))
    model.export(tmp_path / "soft", verbose=False)
    soft = KerasModel(tmp_path / "soft", probabilities=True).query(images(), Access.SCORE)
    torch.testing.assert_close(soft.logits, small(images()).log_softmax(1).detach(), rtol=1e-4, atol=1e-5)


def test_what_is_no_model_is_said(tmp_path, small):
    with pytest.raises(UsageError, match="found no"):
        KerasModel(tmp_path / "missing.keras")
    (tmp_path / "net.keras").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="expected a Keras model"):
        KerasModel(tmp_path / "net.keras")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelError, match="expected a SavedModel"):
        KerasModel(tmp_path / "folder")
    with pytest.raises(UsageError, match="got int"):
        KerasModel(3)
    two = [keras.Input((64,)), keras.Input((64,))]
    with pytest.raises(ModelError, match="one input"):
        KerasModel(keras.Model(two, layers.Add()(two)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"expected logits .*got \(None, 8, 8, 1\)"),
        (lambda x: tf.reshape(x, (-1, 64))[:2], r"expected logits \(4, classes >= 2\).*got \(2, 64\)"),
        (lambda x: {"logits": x}, "got dict"),
        (lambda x: x @ tf.ones((3, 3)), r"the model failed on images \(4, 1, 8, 8\)"),
    ],
)
def test_a_wrong_answer_is_said(function, message):
    with pytest.raises(ModelError, match=message):
        KerasModel(function).query(images(), Access.SCORE)
    with pytest.raises(ModelError, match=message):
        KerasModel(function).query(images(), Access.GRADIENT)


def test_too_little_memory_is_said_as_torch_says_it():
    def hungry(x):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    with pytest.raises(torch.OutOfMemoryError):
        KerasModel(hungry).query(images(), Access.SCORE)


ELSEWHERE = """
import sys, torch
import keras
from sparring.core.model import Access
from sparring.models.keras import KerasModel
folder, backend = sys.argv[1:]
assert keras.config.backend() == backend
x, v = torch.load(folder + "/asked.pt")
model = keras.models.load_model(folder + "/net.keras")
ours = KerasModel(model, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
answer = ours.query(x, Access.GRADIENT)
score = ours.query(x, Access.SCORE)
told = answer.logits, answer.vjp(v, keep=True), answer.vjp(v), score.logits
model.set_weights([2 * weight for weight in model.get_weights()])
torch.save((*told, ours.query(x, Access.SCORE).logits), folder + "/told.pt")
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_on_another_backend(backend, tmp_path):
    pytest.importorskip(backend)
    net = nets.build("conv", (3, 8, 8), 10)
    x, v = images(5, 3), torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    mirror(net, (8, 8, 3), activation="softmax").save(tmp_path / "net.keras")
    torch.save((x, v), tmp_path / "asked.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), backend]
    done = subprocess.run(
        command, env={**os.environ, "KERAS_BACKEND": backend}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    logits, gradient, again, score, doubled = torch.load(tmp_path / "told.pt")
    theirs = TorchModel(net, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).query(x, Access.GRADIENT)
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient, theirs.vjp(v), rtol=1e-4, atol=2e-6)
    assert torch.equal(again, gradient)
    assert torch.equal(score, logits)
    assert not torch.allclose(doubled, logits)  # the weights are those of now


@pytest.mark.parametrize("name", ["keras", "tensorflow"])
def test_without_the_framework_the_install_line_is_said(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"pip install 'sparring\[tensorflow\]'"):
        KerasModel(lambda x: x)
