"""What the engine costs above the bare calls of each framework, and whether its verdicts are the same in all.

One set of weights of `conv` in torch, Keras on TensorFlow, JAX and ONNX. (A) every seat full: PGD where no row ever
falls. `bare` is a loop of that framework's own calls, in TensorFlow and JAX one compiled function for logits and
gradient together; `calls` is the adapter's two calls without the engine; on TensorFlow ART and Foolbox too. (B)
verdicts of one attack with one seed on the trained net, row by row against torch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sparring  # before torch: see docs/decisions/003

# isort: split
import numpy as np
import torch
from torch import Tensor, nn

from contenders import CLASSES, SHAPE, STEPS, Setting
from overhead import FULL_EPS, say, sure_rows
from sparring.attacks.apgd import APGD
from sparring.attacks.pgd import PGD
from sparring.attacks.square import Square
from sparring.core.model import Access, Model
from sparring.core.threat import L2, Linf
from sparring.engine.loop import run
from sparring.engine.process import keep_freed_memory
from sparring.models.jax import JaxModel
from sparring.models.keras_nets import convert
from sparring.models.nets import build
from sparring.models.torch import TorchModel

Runner = Callable[[Tensor, Tensor], Any]
ATTACKS = ((PGD(steps=40), Linf(0.1)), (APGD(steps=50, loss="dlr"), L2(1.0)), (Square(steps=300), Linf(0.1)))


def ours(model: Model, setting: Setting) -> Runner:
    """Our engine, its checks, its judge and its last replay included."""
    pgd = PGD(steps=setting.steps, step_size=setting.step_size)
    return lambda x, y: run(model, pgd, Linf(setting.eps), x, y, width=setting.width)


def looped(step: Callable[[Any, Any], Any], last: Callable[[Any], Any], give: Any, setting: Setting) -> Runner:
    """The model calls alone: for each batch `steps` gradients, and one forward pass at the end."""

    def attack(x: Tensor, y: Tensor) -> None:
        for rows, labels in zip(x.split(setting.width), y.split(setting.width), strict=True):
            given = give(rows), give(labels)
            for _ in range(setting.steps):
                step(*given)
            last(given[0])

    return attack


def calls(model: Model, setting: Setting) -> Runner:
    """The adapter's calls alone, logits and then the way back: what the engine cannot do without."""

    def step(x: Tensor, y: Tensor) -> Tensor | None:
        answer = model.query(x, Access.GRADIENT)
        return answer.vjp(answer.logits) if answer.vjp and answer.logits is not None else None

    return looped(step, lambda x: model.query(x, Access.SCORE), lambda part: part, setting)


def torch_bare(net: nn.Module, setting: Setting) -> Runner:
    """Autograd."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(nn.functional.cross_entropy(net(leaf), y, reduction="sum"), leaf)[0]

    return looped(step, torch.no_grad()(net), lambda part: part, setting)


def tensorflow_bare(model: Any, setting: Setting) -> Runner:
    """Logits and gradient in one traced function, on images in the layout that the model wants."""
    import tensorflow as tf

    def both(x: Any, y: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            logits = model(x, training=False)
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        return logits, tape.gradient(loss, x)

    def give(part: Tensor) -> Any:
        return tf.constant(part.permute(0, 2, 3, 1).numpy() if part.dim() == 4 else part.numpy())

    forward = tf.function(lambda x: model(x, training=False))
    return looped(tf.function(both), lambda x: forward(x).numpy(), give, setting)


def in_jax(net: nn.Sequential) -> Callable[[Any], Any]:
    """`net` as a function of JAX arrays (n, c, h, w)."""
    import jax

    def call(x: Any) -> Any:
        for layer in net:
            if isinstance(layer, nn.Flatten):
                x = x.reshape(len(x), -1)
            elif isinstance(layer, nn.ReLU):
                x = jax.nn.relu(x)
            else:
                weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
                if isinstance(layer, nn.Linear):
                    x = x @ weight.T + bias
                else:
                    pads = [(p, p) for p in layer.padding]
                    x = jax.lax.conv_general_dilated(x, weight, layer.stride, pads) + bias[:, None, None]
        return x

    return call


def jax_bare(function: Callable[[Any], Any], setting: Setting) -> Runner:
    """Logits and gradient in one compiled function."""
    import jax

    def loss(x: Any, y: Any) -> Any:
        logits = function(x)
        return -jax.nn.log_softmax(logits)[np.arange(len(x)), y].sum(), logits

    both, forward = jax.jit(jax.value_and_grad(loss, has_aux=True)), jax.jit(function)
    return looped(
        lambda x, y: jax.block_until_ready(both(x, y)),
        lambda x: jax.block_until_ready(forward(x)),
        lambda part: jax.numpy.asarray(part.numpy()),
        setting,
    )


def exported(net: nn.Module, folder: Path) -> Path:
    """`net` as an ONNX file."""
    path = folder / "conv.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
        torch.onnx.export(net, (torch.zeros(1, *SHAPE),), path, dynamo=False, **names)
    return path


def art(model: Any, setting: Setting) -> Runner:
    """ART's PGD on the same TensorFlow model; its numpy in and numpy out are part of it."""
    import tensorflow as tf
    from art.attacks.evasion import ProjectedGradientDescentTensorFlowV2
    from art.estimators.classification import TensorFlowV2Classifier

    entropy = tf.keras.losses.CategoricalCrossentropy(from_logits=True)
    victim = TensorFlowV2Classifier(
        model, nb_classes=CLASSES, input_shape=(*SHAPE[1:], 1), loss_object=entropy, clip_values=(0, 1)
    )
    pgd = ProjectedGradientDescentTensorFlowV2(
        victim,
        eps=setting.eps,
        eps_step=setting.step_size,
        max_iter=setting.steps,
        num_random_init=1,
        batch_size=setting.width,
        verbose=False,
    )
    one_hot = torch.eye(CLASSES)
    return lambda x, y: pgd.generate(x.permute(0, 2, 3, 1).numpy(), one_hot[y].numpy())


def foolbox(model: Any, setting: Setting) -> Runner:
    """Foolbox's LinfPGD on the same TensorFlow model."""
    import foolbox as fb
    import tensorflow as tf

    victim = fb.TensorFlowModel(model, bounds=(0, 1), device="/CPU:0")
    pgd = fb.attacks.LinfPGD(abs_stepsize=setting.step_size, steps=setting.steps, random_start=True)

    def attack(x: Tensor, y: Tensor) -> None:
        for rows, labels in zip(x.split(setting.width), y.split(setting.width), strict=True):
            given = tf.constant(rows.permute(0, 2, 3, 1).numpy()), tf.constant(labels.numpy())
            pgd(victim, *given, epsilons=setting.eps)

    return attack


def groups(net: nn.Sequential, setting: Setting, folder: Path) -> dict[str, dict[str, Runner]]:
    """By framework: the bare calls first, then who else takes part."""
    keras, function = convert(net, SHAPE), in_jax(net)
    models = {
        "torch": (torch_bare(net, setting), TorchModel(net)),
        "tensorflow": (tensorflow_bare(keras, setting), sparring.wrap(keras)),
        "jax": (jax_bare(function, setting), JaxModel(function)),
        "onnx": (torch_bare(net, setting), sparring.wrap(exported(net, folder))),
    }
    found = {
        name: {"bare": bare, "calls": calls(model, setting), "sparring": ours(model, setting)}
        for name, (bare, model) in models.items()
    }
    found["tensorflow"] |= {"foolbox": foolbox(keras, setting), "art": art(keras, setting)}
    return found


def race(runners: dict[str, Runner], x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds over those of the bare calls in the same round: median, least and greatest."""
    names = []
    for name, runner in runners.items():
        try:
            runner(x, y)  # warms up
            names.append(name)
        except Exception as error:
            if name in ("bare", "sparring"):
                raise
            say(f"{name} is left out: {type(error).__name__}: {error}")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            runners[name](x, y)
            seconds[name].append(time.perf_counter() - began)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["bare"], strict=True)] for name in names}
    return {
        name: {
            "ratio": round(statistics.median(values), 3),
            "spread": [round(min(values), 3), round(max(values), 3)],
            "seconds": round(statistics.median(seconds[name]), 3),
        }
        for name, values in ratios.items()
    }


def overhead(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """(A) no row leaves before its last step."""
    net = build("conv", SHAPE, CLASSES, args.seed).eval().requires_grad_(False)
    x, y = sure_rows(net, args.rows, args.seed)
    found = {}
    for name, runners in groups(net, Setting(FULL_EPS, args.width), folder).items():
        found[name] = race(runners, x, y, args.rounds)
        say(f"{name}: " + ", ".join(f"{who} {part['ratio']:.3f}" for who, part in found[name].items()))
    return found


def parity(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """(B) verdicts on `args.verdicts` test rows, against torch."""
    data = sparring.load(args.data)
    net = sparring.train("conv", data, steps=args.train, seed=args.seed).net
    shape, rows = data.test.x.shape[1:], data.test.take(args.verdicts)
    models = {
        "torch": TorchModel(net),
        "tensorflow": sparring.wrap(convert(net, shape)),
        "jax": JaxModel(in_jax(net)),
    }
    if tuple(shape) == SHAPE:
        models["onnx"] = sparring.wrap(exported(copy.deepcopy(net), folder))
    answers = {name: model.query(rows.x, Access.GRADIENT) for name, model in models.items()}
    v = torch.randn(len(rows), CLASSES, generator=torch.Generator().manual_seed(args.seed))
    pulled = {name: answer.vjp(v) for name, answer in answers.items() if answer.vjp}
    found: dict[str, Any] = {}
    for attack, threat in ATTACKS:
        outcomes = {n: run(m, attack, threat, rows.x, rows.y, seed=args.seed, width=256) for n, m in models.items()}
        for name, outcome in outcomes.items():
            same = int((outcome.found == outcomes["torch"].found).sum())
            found.setdefault(name, {})[f"{attack.name} {threat.describe()}"] = f"{same} of {len(rows)}"
    for name, part in found.items():
        part["logits"] = float((answers[name].logits - answers["torch"].logits).abs().max())
        part["gradients"] = float((pulled[name] - pulled["torch"]).abs().max())
        say(f"{name}: {part}")
    return found


def main() -> None:
    """Parse, measure, print JSON."""
    keep_freed_memory()  # for all alike
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024, help="images to attack, a multiple of the width")
    parser.add_argument("--width", type=int, default=256, help="rows in one model call")
    parser.add_argument("--rounds", type=int, default=7, help="rounds in turn; the median counts")
    parser.add_argument("--data", default="mnist", help="what the net of (B) is trained on")
    parser.add_argument("--train", type=int, default=1000, help="steps that it is trained for")
    parser.add_argument("--verdicts", type=int, default=500, help="test rows of (B)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.rows, args.width, args.rounds) < 1 or args.rows % args.width:
        parser.error("expected at least one round, and rows that are a multiple of the width")
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):  # peers may talk
        say("(A) every seat full; time over the bare calls of the framework")
        result = {"overhead": overhead(args, Path(name)), "steps": STEPS, "threads": torch.get_num_threads()}
        say("(B) rows with the same verdict as in torch, and the largest differences")
        result["parity"] = parity(args, Path(name))
    print(json.dumps({**result, **vars(args)}, indent=2))


if __name__ == "__main__":
    main()
