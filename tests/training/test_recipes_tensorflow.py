"""Every recipe on a Keras net that TensorFlow computes: loss and gradients of the weights as in torch."""

from __future__ import annotations

import warnings

import pytest
import torch

from sparring import catalog
from sparring.attacks.pgd import PGD
from sparring.core import noise
from sparring.core.defense import Moment
from sparring.core.errors import UsageError
from sparring.core.threat import L2
from sparring.data import load
from sparring.defenses.awp import AWP
from sparring.defenses.crown_ibp import CrownIBP
from sparring.defenses.distillation import Distillation, Temperature
from sparring.defenses.fast import Fast
from sparring.defenses.free import Free
from sparring.defenses.gaussian import Gaussian
from sparring.defenses.ibp import IBP
from sparring.defenses.label_smoothing import LabelSmoothing
from sparring.defenses.madry import Madry
from sparring.defenses.mart import MART
from sparring.defenses.mtl_ibp import MTLIBP
from sparring.defenses.standard import Standard
from sparring.defenses.trades import TRADES
from sparring.models import nets
from sparring.models.checkpoint import Checkpoint
from sparring.models.keras_nets import KerasModule, convert
from sparring.training.fit import Settings, fit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("keras")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SHAPE, ROWS = (1, 8, 8), 16
LIMIT, STEPS = L2(0.5), PGD(steps=2)  # in L2: the sign of a gradient near 0 is another in another framework


def taught() -> Checkpoint:
    card = {"plan": {"recipe": {"options": repr(Temperature())}}, "weights_sha256": "abc"}
    return Checkpoint(None, nets.build("dense", SHAPE, 10, seed=1).eval(), card)


RECIPES = {
    "standard": Standard(),
    "madry": Madry(STEPS, LIMIT),
    "trades": TRADES(LIMIT, steps=2),
    "fast": Fast(STEPS, LIMIT, watch=8, tolerance=0.0),
    "free": Free(LIMIT, replays=2),
    "mart": MART(STEPS, LIMIT),
    "awp": AWP(MART(STEPS, LIMIT), gamma=0.05),
    "gaussian": Gaussian(),
    "label_smoothing": LabelSmoothing(),
    "temperature": Temperature(),
    "distillation": Distillation(taught()),
}
REFUSED = [IBP(LIMIT), CrownIBP(LIMIT), MTLIBP(STEPS, LIMIT)]  # their bounds are made by torch


def test_no_recipe_is_left_out():
    assert {*RECIPES, *(recipe.name for recipe in REFUSED)} == set(catalog.defenses())


@pytest.mark.parametrize("recipe", REFUSED, ids=lambda recipe: recipe.name)
def test_a_recipe_that_needs_bounds_says_that_torch_makes_them(recipe, tmp_path):
    with pytest.raises(UsageError, match=r"a net that torch computes.*leave out --framework tensorflow"):
        fit(Settings("dense", 3, framework="tensorflow"), load("digits"), recipe, tmp_path / "a")


@pytest.fixture(scope="module")
def module() -> KerasModule:
    return KerasModule(convert(nets.build("conv", SHAPE, 10), SHAPE), SHAPE)


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_and_its_gradient_are_those_of_torch(name, module):
    net, digits = nets.build("conv", SHAPE, 10), load("digits").train
    x, y = digits.x[:ROWS], digits.y[:ROWS]
    key = noise.keys(0, torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64))
    before = [weight.detach().clone() for weight in module.parameters()]
    ours, theirs = (RECIPES[name].loss(one, x, y, Moment(1.0, key)) for one in (module, net))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    found = [torch.autograd.grad(loss, list(one.parameters())) for loss, one in ((ours, module), (theirs, net))]
    norms = [[gradient.norm() for gradient in gradients] for gradients in found]
    assert min(norms[1]) > 0
    torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-7)  # the layout differs
    torch.testing.assert_close(found[0][-2], found[1][-2].T, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(weight, old) for weight, old in zip(module.parameters(), before, strict=True))


def test_a_keras_student_learns_from_a_keras_teacher(tmp_path):
    digits = load("digits")
    teacher = fit(Settings("dense", 3, framework="tensorflow"), digits, Temperature(), tmp_path / "t")
    done = fit(Settings("dense", 3, framework="tensorflow"), digits, Distillation(teacher), tmp_path / "s")
    assert done.card["plan"]["recipe"]["options"] == repr(Distillation(teacher))
    with torch.no_grad():
        logits = torch.tensor(teacher.net(digits.test.x[:5].permute(0, 2, 3, 1).numpy()).numpy())
    wanted = (logits / 40).softmax(1)
    torch.testing.assert_close(Distillation(teacher).answers(digits.test.x[:5]), wanted)
