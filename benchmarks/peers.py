"""The minimum-norm attacks that are compared: ours and the peers', each told how many passes it may spend.

Every side takes (net, images, labels, steps) and gives images back. `cost` is what a step spends on a row,
forward and backward together, so that `budget // cost` steps are as dear for everybody; what was spent is counted.

Where a peer stands out for a reason of its own. torchattacks' EADL1 steps into its own copy of the clean image, so
that its images leave the bounds as the weight grows, and count for nothing. adv-lib's `fmn` in L2 stretches every
point to the radius, which finds more where gradients vanish and less where they do not. Its `pdpgd` gives the norm a
hundredth of the weight, so that it finds nearly every image, at many times the distance. `sigma_zero` is chaotic:
steps longer by 1 % move the median of either side by a feature or two, and the means agree within 2 %.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparring import catalog
from sparring.core.errors import unknown
from sparring.core.threat import threat
from sparring.engine.loop import run
from sparring.models.torch import TorchModel

Side = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
INF = float("inf")


@dataclass(frozen=True)
class Entry:
    """One attack of one library."""

    family: str  # a variant stands behind a colon
    who: str
    cost: float  # passes that one step more costs, in all rounds together
    side: Side

    @property
    def available(self) -> bool:
        """Is its library installed?"""
        if self.who == "sparring":
            return self.family.split(":")[0] in catalog.attacks()
        needed = {"ART": "art", "adv-lib": "adv_lib"}.get(self.who, self.who)
        return importlib.util.find_spec(needed) is not None


def ours(spec: str, norm: str, cost: float = 2.0, rounds: int = 1, *, eps: float = INF, aimed: bool = False) -> Entry:
    """An attack of the catalogue; `{}` stands for the steps. `aimed`: at the class after the true one."""
    name, colon, options = spec.partition(":")
    options = options if colon else "steps={}"

    def side(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        attack = catalog.attack(f"{name}:{options.format(steps)}" if options else name)
        targets = (y[:, None] + 1) % net(x[:1]).shape[1] if aimed else None
        return run(TorchModel(net), attack, threat(norm, eps), x, y, targets=targets, width=len(x)).best

    return Entry(f"{name}:aimed" if aimed else name, "sparring", cost * rounds, side)


def foolbox(family: str, kind: str, cost: float, rounds: int = 1, **options: Any) -> Entry:
    """An attack class of Foolbox; an option that is a function is told the steps, and `epsilon` is the run's."""
    within = {"epsilon": options.pop("epsilon")} if "epsilon" in options else {}

    def side(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        import foolbox as fb

        attack = getattr(fb.attacks, kind)(**told(options, steps))
        model = fb.PyTorchModel(net, bounds=(0, 1), device=torch.device("cpu"))
        return torch.as_tensor(attack.run(model, x, fb.criteria.Misclassification(y), **within))

    return Entry(family, "foolbox", cost * rounds, side)


def art(family: str, kind: str, cost: float, rounds: int = 1, *, aimed: bool = False, **options: Any) -> Entry:
    """An attack class of ART; `aimed`: at the class after the true one."""

    def side(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        from art.attacks import evasion
        from art.estimators.classification import PyTorchClassifier

        shape, classes = tuple(x.shape[1:]), net(x[:1]).shape[1]
        model = PyTorchClassifier(net, nn.CrossEntropyLoss(), shape, classes, clip_values=(0, 1), device_type="cpu")
        attack = getattr(evasion, kind)(model, **told(options, steps))
        labels = (y + 1) % classes if aimed else y
        return torch.from_numpy(attack.generate(x.numpy(), np.eye(classes, dtype=np.float32)[labels.numpy()]))

    return Entry(family, "ART", cost * rounds, side)


def torchattacks(family: str, kind: str, cost: float, rounds: int = 1, **options: Any) -> Entry:
    """An attack class of torchattacks."""

    def side(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        import torchattacks as ta

        return torch.as_tensor(getattr(ta, kind)(net, **told(options, steps))(x, y))

    return Entry(family, "torchattacks", cost * rounds, side)


def advlib(family: str, module: str, function: str, cost: float, rounds: int = 1, **options: Any) -> Entry:
    """An attack function of adversarial-library."""

    def side(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        attack = getattr(importlib.import_module(f"adv_lib.attacks.{module}"), function)
        return torch.as_tensor(attack(net, x.clone(), y, **told(options, steps)))

    return Entry(family, "adv-lib", cost * rounds, side)


def told(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """The options, with functions answered."""
    return {key: value(steps) if callable(value) else value for key, value in options.items()}


def all_steps(steps: int) -> int:
    """Every step that there is."""
    return steps


def part(count: int) -> Callable[[int], int]:
    """The steps of each of `count` rounds."""
    return lambda steps: max(steps // count, 1)


N = all_steps


def entries(norm: str, classes: int) -> list[Entry]:
    """Who takes part in `norm`, the same attacks side by side."""
    warnings.filterwarnings("ignore")
    jacobian = classes  # one forward pass and one backward pass for each rival
    tables: dict[str, list[Entry]] = {
        "l2": [
            ours("nearest", "l2"),
            ours("ddn", "l2"),
            foolbox("ddn", "DDNAttack", 2, steps=N),
            advlib("ddn", "decoupled_direction_norm", "ddn", 2, steps=N, levels=None),
            ours("fmn", "l2"),
            foolbox("fmn", "L2FMNAttack", 2, steps=N),
            advlib("fmn", "fast_minimum_norm", "fmn", 2, norm=2, steps=N),
            ours("cw", "l2", rounds=7),
            foolbox("cw", "L2CarliniWagnerAttack", 2, rounds=5, steps=N, binary_search_steps=5, initial_const=1.0),
            art("cw", "CarliniL2Method", 6, rounds=5, max_iter=N, binary_search_steps=5, initial_const=1.0,
                batch_size=512, verbose=False),
            torchattacks("cw", "CW", 2, c=1.0, steps=N, lr=0.01),
            advlib("cw", "carlini_wagner.l2", "carlini_wagner_l2", 2, rounds=5, max_iterations=N,
                   binary_search_steps=5, initial_const=1.0, learning_rate=0.01),
            ours("pdgd", "l2"),
            advlib("pdgd", "primal_dual_gradient_descent", "pdgd", 2, num_steps=N),
            ours("pdpgd", "l2"),
            advlib("pdpgd", "primal_dual_gradient_descent", "pdpgd", 2, num_steps=N, norm=2),
            ours("deepfool", "l2", jacobian),
            foolbox("deepfool", "L2DeepFoolAttack", 2 * (classes - 1), steps=N, candidates=classes),
            art("deepfool", "DeepFool", classes + 1, max_iter=N, epsilon=0.02, nb_grads=classes, batch_size=512,
                verbose=False),
            torchattacks("deepfool", "DeepFool", classes + 1, steps=N),
            advlib("deepfool", "deepfool", "df", classes + 1, steps=N),
            ours("superdeepfool", "l2", jacobian),
            advlib("superdeepfool", "superdeepfool", "sdf", classes + 1, steps=N),
            ours("brendel_bethge", "l2"),
            advlib("alma", "augmented_lagrangian", "alma", 2, num_steps=N, distance="l2", init_lr_distance=1.0),
            torchattacks("fab", "FAB", 11, norm="L2", eps=10.0, steps=N, n_classes=classes),
            advlib("fab", "fast_adaptive_boundary", "fab", 11, norm=2, n_iter=N),
        ],
        "linf": [
            ours("nearest", "linf"),
            ours("brendel_bethge", "linf"),
            ours("fmn", "linf"),
            foolbox("fmn", "LInfFMNAttack", 2, steps=N),
            advlib("fmn", "fast_minimum_norm", "fmn", 2, norm=INF, steps=N),
            ours("pdpgd", "linf"),
            advlib("pdpgd", "primal_dual_gradient_descent", "pdpgd", 2, num_steps=N, norm=INF),
            ours("deepfool", "linf", jacobian),
            foolbox("deepfool", "LinfDeepFoolAttack", 2 * (classes - 1), steps=N, candidates=classes),
            advlib("deepfool", "deepfool", "df", classes + 1, steps=N, norm=INF),
            torchattacks("fab", "FAB", 11, norm="Linf", eps=1.0, steps=N, n_classes=classes),
            advlib("fab", "fast_adaptive_boundary", "fab", 11, norm=INF, n_iter=N),
            art("cw", "CarliniLInfMethod", 12, max_iter=N, batch_size=512, verbose=False),
            advlib("apgd", "auto_pgd", "minimal_apgd", 2, norm=INF, max_eps=1.0, n_iter=part(8),
                   binary_search_steps=8),
        ],
        "l1": [
            ours("brendel_bethge", "l1"),
            ours("nearest", "l1"),
            ours("ead", "l1", rounds=6),
            foolbox("ead", "EADAttack", 3, rounds=5, steps=N, binary_search_steps=5, initial_const=1.0,
                    regularization=0.02, decision_rule="L1", abort_early=False),
            torchattacks("ead", "EADL1", 3, rounds=5, max_iterations=N, binary_search_steps=5, initial_const=1.0,
                         beta=0.02, abort_early=False),
            art("ead", "ElasticNet", 16, rounds=5, max_iter=N, binary_search_steps=5, initial_const=1.0, beta=0.02,
                decision_rule="L1", batch_size=512, verbose=False),
            ours("fmn", "l1"),
            foolbox("fmn", "L1FMNAttack", 2, steps=N),
            advlib("fmn", "fast_minimum_norm", "fmn", 2, norm=1, steps=N),
            ours("pdpgd", "l1"),
            advlib("pdpgd", "primal_dual_gradient_descent", "pdpgd", 2, num_steps=N, norm=1),
            advlib("alma", "augmented_lagrangian", "alma", 2, num_steps=N, distance="l1", init_lr_distance=10.0),
            torchattacks("fab", "FAB", 11, norm="L1", eps=50.0, steps=N, n_classes=classes),
            advlib("fab", "fast_adaptive_boundary", "fab", 11, norm=1, n_iter=N),
        ],
        "l0": [
            ours("sigma_zero", "l0"),
            advlib("sigma_zero", "sigma_zero", "sigma_zero", 2, num_steps=N),
            ours("fmn", "l0"),
            foolbox("fmn", "L0FMNAttack", 2, steps=N),
            advlib("fmn", "fast_minimum_norm", "fmn", 2, norm=0, steps=N),
            ours("pdpgd", "l0"),
            advlib("pdpgd", "primal_dual_gradient_descent", "pdpgd", 2, num_steps=N, norm=0),
            advlib("vfga", "stochastic_sparse_attacks", "vfga", 11, max_iter=N, targeted=False),
        ],
        "ssim": [
            ours("perceptual", "ssim"),
            advlib("perceptual", "augmented_lagrangian", "alma", 2, num_steps=N, distance="ssim",
                   init_lr_distance=1e-4),
        ],
    }  # fmt: skip
    if norm not in tables:
        raise unknown("norm", norm, tables)
    return [entry for entry in tables[norm] if entry.available]
