"""Training in Keras on TensorFlow: to rounding the same as in torch, and a checkpoint that is of Keras."""

import json
import warnings

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import sparring
from sparring.attacks.pgd import PGD
from sparring.cli.main import build as program
from sparring.core.errors import DataError, ModelError, UsageError
from sparring.core.model import Access
from sparring.core.threat import L2, Linf
from sparring.data import load
from sparring.defenses.free import Free
from sparring.defenses.madry import Madry
from sparring.defenses.standard import Standard
from sparring.defenses.trades import TRADES
from sparring.models import nets
from sparring.models.checkpoint import open_checkpoint
from sparring.models.keras_nets import KerasModule, convert
from sparring.models.torch import TorchModel
from sparring.training.fit import Settings, fit
from sparring.training.holdback import HoldBack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    keras = pytest.importorskip("keras")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAPES = [("dense", (1, 8, 8)), ("conv", (1, 8, 8)), ("conv", (3, 12, 20)), ("wide_contrast_conv", (2, 8, 12))]


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_our_nets_in_keras_answer_as_they_do_in_torch(name, shape):
    net, x = nets.build(name, shape, 10), torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    model = convert(net, shape)
    plain = {"Flatten", "Dense", "ReLU", "ZeroPadding2D", "Conv2D"}
    assert {type(layer).__name__ for layer in model.layers} <= plain | {"Functional"}  # several, as one of ours
    one, two = (sparring.wrap(m).query(x, Access.GRADIENT) for m in (model, net))
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-5, atol=2e-6)
    v = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(one.vjp(v), two.vjp(v), rtol=1e-4, atol=2e-6)


def test_what_has_no_counterpart_is_named():
    with pytest.raises(ModelError, match="got Dropout"):
        convert(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout()), (1, 8, 8))


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_the_gradients_of_the_weights_are_those_of_torch(name, shape):
    net, x = nets.build(name, shape, 10), torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6)
    module = KerasModule(convert(net, shape), shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(module(ours), y).backward()
    torch.nn.functional.cross_entropy(net(theirs), y).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
    norms = [[p.grad.norm() for p in m.parameters()] for m in (module, net)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-7)  # the layout differs
    torch.testing.assert_close(module.weights[-2].grad, net[-1].weight.grad.T, rtol=1e-4, atol=1e-7)
    (again,) = torch.autograd.grad(module(ours).sum(), ours)
    assert again.abs().max() > 0
    torch.testing.assert_close([p.grad.norm() for p in module.parameters()], norms[0])  # untouched


def test_the_keras_model_gets_the_trained_weights():
    net, x = nets.build("dense", (1, 8, 8), 10), torch.rand(3, 1, 8, 8)
    module = KerasModule(convert(net, (1, 8, 8)), (1, 8, 8))
    with torch.no_grad():
        module.weights[-1].add_(torch.arange(10.0))
        wanted = module(x)
    assert not torch.allclose(wanted, net(x), atol=1)
    answer = module.finish()(x.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(answer, wanted, rtol=1e-5, atol=1e-5)


RECIPES = [
    (Standard(), 1e-5),
    (Madry(PGD(steps=2), Linf(0.1), warmup=0), 1e-5),
    (Free(L2(0.5), replays=3, warmup=0), 1e-4),
    (TRADES(Linf(0.1), steps=2, warmup=0), 2e-2),  # takes the sign of what is near 0 where it starts
]


@pytest.mark.parametrize(("defense", "tolerance"), RECIPES)
def test_the_same_seed_gives_the_same_training_as_torch(digits, tmp_path, defense, tolerance):
    done = {
        framework: fit(Settings("conv", 30, every=10, framework=framework), digits, defense, tmp_path / framework)
        for framework in ("torch", "tensorflow")
    }
    ours, theirs = (sparring.wrap(c.net).query(digits.test.x[:100], Access.SCORE).logits for c in done.values())
    untrained = TorchModel(nets.build("conv", (1, 8, 8), 10)).query(digits.test.x[:100], Access.SCORE).logits
    assert (ours - theirs).abs().max() < tolerance * (ours - untrained).abs().max()
    logs = [[line["loss"] for line in c.card["log"]] for c in done.values()]
    assert logs[0] == pytest.approx(logs[1], rel=tolerance)


class Killed(Exception):
    pass


def test_a_stopped_training_goes_on_to_the_same_weights(digits, tmp_path):
    settings = Settings("conv", 20, every=5, framework="tensorflow")

    def stop(step):
        if step == 13:
            raise Killed

    with pytest.raises(Killed):
        fit(settings, digits, Standard(), tmp_path / "a", on_step=stop)
    steps = []
    resumed = fit(settings, digits, Standard(), tmp_path / "a", on_step=steps.append)
    whole = fit(settings, digits, Standard(), tmp_path / "b")
    assert steps[0] == 11
    assert all(np.array_equal(*two) for two in zip(resumed.net.get_weights(), whole.net.get_weights(), strict=True))
    with pytest.raises(UsageError, match=r"framework|rate"):
        fit(Settings("conv", 20, rate=1e-3, framework="tensorflow"), digits, Standard(), tmp_path / "a")


def test_the_best_weights_on_images_held_back_are_kept_after_a_stop_too(digits, tmp_path):
    settings = Settings("conv", 16, every=4, rate=0.02, framework="tensorflow")
    held = HoldBack(100, Linf(0.2), PGD(steps=2))

    def stop(step):
        if step == 14:
            raise Killed

    with pytest.raises(Killed):
        fit(settings, digits, Standard(), tmp_path / "a", hold_back=held, on_step=stop)
    resumed = fit(settings, digits, Standard(), tmp_path / "a", hold_back=held)
    whole = fit(settings, digits, Standard(), tmp_path / "b", hold_back=held)
    assert all(np.array_equal(*two) for two in zip(resumed.net.get_weights(), whole.net.get_weights(), strict=True))
    rows = digits.train.select(torch.arange(len(digits.train) - 100, len(digits.train)))
    found = sparring.attack(whole.net, rows.x, rows.y, PGD(steps=2), Linf(0.2), sample=rows.ids)
    assert found.robust_accuracy == pytest.approx(whole.card["robust_accuracy"])
    assert whole.card["best_step"] < 16


def told(*words):
    """What a command prints with --json."""
    done = CliRunner().invoke(program(), [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_train_and_attack_from_the_command_line(tmp_path):
    out = tmp_path / "run"
    options = ("--data", "digits", "--net", "dense", "--steps", 300, "--framework", "tensorflow")
    trained = told("train", *options, "--out", out)
    assert trained["checkpoint"] == str(out / "dense.keras")
    assert trained["accuracy"] > 0.85
    card = json.loads((out / "dense.json").read_text())
    assert card["framework"] == "tensorflow"
    assert card["versions"]["keras"] == keras.__version__
    model = keras.models.load_model(out / "dense.keras", compile=False)
    test = load("digits").test
    said = model.predict(test.x.permute(0, 2, 3, 1).numpy(), verbose=0).argmax(1)
    assert (said == test.y.numpy()).mean() == pytest.approx(trained["accuracy"])
    for place in (out, out / "dense.keras", out / "dense.json"):  # the card names the data
        words = ("attack", place, "--attack", "fgsm", "--eps", 0.2, "--limit", 50)
        assert 0.3 < told(*words, "--out", tmp_path / f"on-{place.name}")["attacks"][0]["success"] < 1


def test_a_cut_keras_checkpoint_and_a_strange_framework_are_refused(digits, tmp_path):
    path = fit(Settings("dense", 2, framework="tensorflow"), digits, Standard(), tmp_path / "a").path
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="sha256"):
        open_checkpoint(path)
    with pytest.raises(UsageError, match="tensorflow"):
        Settings("dense", 2, framework="tensorflw")
