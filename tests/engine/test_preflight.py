"""What is checked before a run: every refusal says what came and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparring.attacks.fooling import Fooling
from sparring.attacks.pgd import PGD
from sparring.core.errors import AttackError, DataError, ModelError
from sparring.core.model import Access, Prediction
from sparring.core.threat import L0, Linf, Unbounded
from sparring.engine.loop import run
from sparring.models.torch import TorchModel

LIMIT = Linf(0.1)


def linear(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), *more).eval()


def attack(net=None, x=None, y=None, limit=LIMIT, kind=None, **options):
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)) if x is None else x
    y = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    model = net if hasattr(net, "query") else TorchModel(net or linear())
    return run(model, kind or PGD(steps=2), limit, x, y, **options)


def images(**pixel):
    x = torch.full((5, 1, 4, 4), 0.5)
    for value in pixel.values():
        x[3, 0, 1, 2] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images(p=0.5) * 510, r"expected images in \[0, 1\], got a maximum of 255.0; divide by 255"),
        (images(p=-1.5), r"got a minimum of -1.5; give raw pixels, and mean and std to the model: wrap"),
        (images(p=300.0), r"got a maximum of 300.0; give raw pixels"),
        (images(p=torch.nan), "expected finite pixels, got NaN or infinity in image 3"),
        (images(p=torch.inf), "expected finite pixels, got NaN or infinity in image 3"),
        (images()[0], r"expected images \(n, channels, height, width\), got \(1, 4, 4\); reshape them"),
        (images()[:0], r"got \(0, 1, 4, 4\)"),
        (images().double(), "expected float32 images, got torch.float64"),
        ((images() * 255).to(torch.uint8), r"uint8: x.float\(\) / 255"),
    ],
)
def test_bad_images(x, message):
    with pytest.raises(DataError, match=message):
        attack(x=x)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 0]), "expected labels from 0 to 2, got 0 to 3; does the model fit the data?"),
        (torch.tensor([0, 1, -1, 2, 0]), "expected labels from 0 to 2, got -1 to 2"),
        (torch.zeros(5), "expected 5 int64 labels, got torch.float32"),
        (torch.zeros(4, dtype=torch.int64), r"expected 5 int64 labels, got torch.int64 \(4,\)"),
    ],
)
def test_bad_labels(y, message):
    with pytest.raises(DataError, match=message):
        attack(y=y)


def test_bad_targets():
    with pytest.raises(DataError, match="expected targets from 0 to 2, got 7 to 7"):
        attack(targets=torch.full((5, 1), 7))
    with pytest.raises(AttackError, match=r"expected targets \(n, tries\), got \(5,\)"):
        attack(targets=torch.zeros(5, dtype=torch.int64))
    with pytest.raises(AttackError, match="fooling works towards a class; give targets"):
        attack(kind=Fooling(), limit=Unbounded())


def test_an_attack_that_does_not_suit():
    with pytest.raises(AttackError, match="pgd works in linf, l2, l1, not in l0; name another norm"):
        attack(limit=L0(2.0))

    class Labels:
        access, bounds = Access.DECISION, (0.0, 1.0)

        def query(self, x, access):
            return Prediction(TorchModel(linear()).query(x, access).labels)

    with pytest.raises(AttackError, match="pgd needs GRADIENT access, the model gives DECISION"):
        attack(Labels())


class Function(nn.Module):
    """A module that is any function of the flat pixels."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear = linear()

    def forward(self, x):
        return self.function(self, x)


def broken(net, x):
    raise ValueError("no such layer")


class Mixing(nn.Module):
    """Normalises over the batch, without a module that says so."""

    def forward(self, x):
        return (x - x.mean(0)) / (x.std(0) + 0.1)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: linear(nn.Softmax(1)), "expected logits, got probabilities .* probabilities=True"),
        (lambda: linear(nn.LogSoftmax(1)), None),
        (lambda: Function(lambda n, x: nn.functional.dropout(n.linear(x), 0.5)), "expected the same answer twice"),
        (lambda: Function(lambda n, x: n.linear(x) + 0.1 * torch.randn(len(x), 3)), "got different logits"),
        (lambda: nn.Sequential(nn.Flatten(), Mixing(), nn.Linear(16, 3)), "logits change with the rest of the batch"),
        (lambda: Function(broken), r"the model failed on images \(\d+, 1, 4, 4\): no such layer"),
        (lambda: Function(lambda n, x: n.linear(x) * torch.nan), r"expected finite logits, got \[nan.* weights"),
        (lambda: Function(lambda n, x: n.linear(x)[:, :1]), r"expected logits \(\d+, classes >= 2\)"),
        (lambda: Function(lambda n, x: n.linear(x).sum(0)), r"expected logits .* got \(3,\)"),
        (lambda: Function(lambda n, x: (n.linear(x), 1)), "expected logits .* got tuple"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), "the model failed on images .* shapes cannot be"),
    ],
)  # fmt: skip
def test_bad_models(net, message):
    torch.manual_seed(0)
    if message is None:
        attack(net())
        return
    with pytest.raises(ModelError, match=message):
        attack(net())


def test_a_model_without_a_gradient():
    net = Function(lambda n, x: n.linear(x).detach())
    with pytest.raises(ModelError, match="expected logits that depend on the image, got a constant"):
        attack(net, y=net(images()).argmax(1))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_train_mode_is_refused(layer):
    with pytest.raises(ModelError, match=f"got {type(layer).__name__} '2' in train mode; call net.eval()"):
        TorchModel(linear(layer).train())
    TorchModel(linear(layer).eval())


def test_nan_weights_are_found():
    net = linear()
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="check the weights"):
        attack(net)


def test_a_model_that_writes_to_its_input_never_reaches_the_images():
    """`x -= mean` in forward is common; it gets a copy, and the caller's images stay as they are."""
    x = images()
    before = x.clone()
    writing = Function(lambda n, z: n.linear(z.sub_(0.3)))
    reading = Function(lambda n, z: n.linear(z - 0.3))
    reading.load_state_dict(writing.state_dict())
    got = attack(writing, x=x)
    assert torch.equal(x, before)
    assert torch.equal(got.best, attack(reading, x=x).best)


def test_probabilities_may_be_declared():
    net = linear(nn.Softmax(1))
    got = run(TorchModel(net, probabilities=True), PGD(steps=5), LIMIT, images(), torch.zeros(5, dtype=torch.int64))
    plain = run(TorchModel(net[:2]), PGD(steps=5), LIMIT, images(), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(got.found, plain.found)


def test_a_decision_only_model_passes_the_check():
    from sparring.engine.preflight import check_model

    class Labels:
        access, bounds = Access.DECISION, (0.0, 1.0)

        def query(self, x, access):
            return Prediction(torch.zeros(len(x), dtype=torch.int64))

    assert check_model(Labels(), images()) is None
