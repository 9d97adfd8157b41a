"""Who takes part: the bare model calls, sparring and its peers, each through its own public door."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparring.attacks.pgd import PGD
from sparring.core.threat import Linf
from sparring.engine.loop import run
from sparring.models.torch import TorchModel

SHAPE, CLASSES, STEPS = (1, 28, 28), 10, 40

Runner = Callable[[Tensor, Tensor], Tensor]  # images (n, c, h, w) and labels (n,) to the attacked images


@dataclass(frozen=True)
class Setting:
    """What every contender is told."""

    eps: float
    width: int
    steps: int = STEPS

    @property
    def step_size(self) -> float:
        """Madry et al. 2018, section B."""
        return 2.5 * self.eps / self.steps


def bare(net: nn.Module, setting: Setting) -> Runner:
    """The model calls alone: for each batch `steps` forward and backward, and one forward at the end."""

    def attack(x: Tensor, y: Tensor) -> Tensor:
        for rows, labels in zip(x.split(setting.width), y.split(setting.width), strict=True):
            for _ in range(setting.steps):
                leaf = rows.detach().requires_grad_()
                torch.autograd.grad(F.cross_entropy(net(leaf), labels, reduction="sum"), leaf)
            with torch.no_grad():
                net(rows)
        return x

    return attack


def sparring(net: nn.Module, setting: Setting) -> Runner:
    """Our engine, its checks, its judge and its last replay included."""
    pgd = PGD(steps=setting.steps, step_size=setting.step_size)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        return run(TorchModel(net), pgd, Linf(setting.eps), x, y, width=setting.width).best

    return attack


def foolbox(net: nn.Module, setting: Setting) -> Runner:
    """Foolbox's LinfPGD."""
    import foolbox as fb

    model = fb.PyTorchModel(net, bounds=(0, 1), device=torch.device("cpu"))
    pgd = fb.attacks.LinfPGD(abs_stepsize=setting.step_size, steps=setting.steps, random_start=True)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(x.split(setting.width), y.split(setting.width), strict=True)
        return torch.cat([pgd(model, rows, labels, epsilons=setting.eps)[1] for rows, labels in pairs])

    return attack


def torchattacks(net: nn.Module, setting: Setting) -> Runner:
    """Torchattacks' PGD."""
    from torchattacks import PGD as Theirs

    pgd = Theirs(net, eps=setting.eps, alpha=setting.step_size, steps=setting.steps, random_start=True)

    def attack(x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(x.split(setting.width), y.split(setting.width), strict=True)
        return torch.cat([pgd(rows, labels) for rows, labels in pairs])

    return attack


def art(net: nn.Module, setting: Setting) -> Runner:
    """ART's PGD for PyTorch; its numpy in and numpy out are part of it."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        net,
        loss=nn.CrossEntropyLoss(),
        input_shape=SHAPE,
        nb_classes=CLASSES,
        clip_values=(0, 1),
        device_type="cpu",
    )
    pgd = ProjectedGradientDescentPyTorch(
        model,
        eps=setting.eps,
        eps_step=setting.step_size,
        max_iter=setting.steps,
        num_random_init=1,
        batch_size=setting.width,
        verbose=False,
    )

    def attack(x: Tensor, y: Tensor) -> Tensor:
        return torch.from_numpy(pgd.generate(x.numpy(), F.one_hot(y, CLASSES).numpy()))

    return attack


CONTENDERS = {f.__name__: f for f in (bare, sparring, foolbox, torchattacks, art)}
