"""A classifier as a list of nodes: what torch computes for it, with its weights by reference.

The model is asked once for scores under torch's tracer, so whatever it is made of (modules, functions, an ONNX
graph, normalisation by a mean) arrives here as the same few dozen operations of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize

from sparring.certificates.lowering import lower
from sparring.certificates.operations import Ref, Unsupported
from sparring.certificates.operators import Activation, Input, Linear, Operator
from sparring.core.errors import ModelError
from sparring.core.model import Access, Model

_ROWS = 2  # of the trace: one row would hide a network that mixes rows


@dataclass(frozen=True)
class Node:
    """One operation on the values of earlier nodes."""

    op: Operator
    inputs: tuple[int, ...]
    shape: tuple[int, ...]  # of one row


class OutOfTime(Exception):
    """A computation was not finished in time; nothing that hangs on the clock is told."""


def go_on() -> None:
    """There is time."""


@dataclass(frozen=True)
class Graph:
    """Nodes in order: the images come first, the logits last."""

    nodes: tuple[Node, ...]
    pause: Callable[[], None] = go_on  # called each fraction of a second of a proof; may raise to end it

    @property
    def classes(self) -> int:
        """How many logits there are."""
        return self.nodes[-1].shape[0]

    @property
    def widest(self) -> int:
        """The entries of the largest value."""
        return max(math.prod(node.shape) for node in self.nodes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of `x` (n, *shape)."""
        values = [x]
        for node in self.nodes[1:]:
            values.append(evaluate(node, [values[i] for i in node.inputs]))
        return values[-1]

    def activations(self) -> list[int]:
        """The places of the nodes that are not linear."""
        return [place for place, node in enumerate(self.nodes) if isinstance(node.op, Activation)]


def evaluate(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """The value of `node` from those of its inputs."""
    if isinstance(node.op, Input):
        raise ModelError("expected a node with inputs, got the images themselves")
    return node.op.forward(*inputs)


@dataclass(frozen=True)
class Trace:
    """What torch computes for a model on images (c, h, w); `graph` reads its weights as they then are.

    What bounds its graphs calls `pause` each fraction of a second, which may raise to end a computation.
    """

    program: Any  # torch.fx.GraphModule, whose attributes are the model's own parameters and buffers
    shape: tuple[int, ...]
    device: torch.device
    pause: Callable[[], None] = go_on

    def graph(self, dtype: torch.dtype = torch.float64, *, trainable: bool = False) -> Graph:
        """The nodes, computing in `dtype`; if `trainable`, bounds can be differentiated by the weights."""
        with torch.set_grad_enabled(trainable):
            return self._graph(dtype)

    def _graph(self, dtype: torch.dtype) -> Graph:
        nodes: list[Node] = [Node(Input(), (), self.shape)]
        like = torch.empty(0, dtype=dtype, device=self.device)

        def add(op: Linear | Activation, *inputs: Ref) -> Ref:
            places = tuple(ref.place for ref in inputs)
            with torch.no_grad():
                shape = tuple(op.forward(*(like.new_zeros(1, *nodes[p].shape) for p in places)).shape[1:])
            nodes.append(Node(op, places, shape))
            return Ref(len(nodes) - 1, shape, like)

        last = lower(self.program, Ref(0, self.shape, like), add, dtype, _ROWS)
        used = needed(nodes, last.place)
        place = {old: new for new, old in enumerate(used)}
        kept = tuple(
            Node(nodes[old].op, tuple(place[i] for i in nodes[old].inputs), nodes[old].shape) for old in used
        )
        if len(kept[-1].shape) != 1:
            raise ModelError(f"expected logits (n, classes), got {('n', *kept[-1].shape)}")
        return Graph(kept, self.pause)


def needed(nodes: Sequence[Node], last: int) -> list[int]:
    """The places that the value at `last` hangs on, in order: the images first, itself last."""
    wanted = {0, last}
    for place in range(last, 0, -1):
        if place in wanted:
            wanted.update(nodes[place].inputs)
    return sorted(wanted)


def _writes(target: Any) -> bool:
    """Does an operation of torch change one of its arguments?"""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _changes_itself(program: Any) -> bool:
    """Does it write to a tensor that it also reads?"""
    nodes = program.graph.nodes
    own = {at.target for node in nodes if _writes(node.target) for at in node.all_input_nodes if at.op == "get_attr"}
    users = [user for node in nodes if node.op == "get_attr" and node.target in own for user in node.users]
    return any(user.users or not _writes(user.target) for user in users)


def trace(model: Model, shape: Sequence[int], device: torch.device | str = "cpu") -> Trace:
    """What torch computes when `model` is asked for the logits of images of `shape` (c, h, w).

    `ModelError` when it computes outside torch, goes different ways for different images, mixes rows, or does
    what has no linear bounds here.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    def scores(x: Tensor) -> Tensor:
        logits = model.query(x, Access.SCORE).logits
        if logits is None:
            raise ModelError("expected logits, got a model that gives labels only")
        return logits

    low, high = model.bounds
    example = torch.rand(_ROWS, *shape, generator=torch.Generator().manual_seed(0)).to(device) * (high - low) + low
    try:
        program = make_fx(scores, tracing_mode="fake", _allow_non_fake_inputs=True)(example)
        if any(_writes(node.target) for node in program.graph.nodes):
            # What is written through a view reaches all that share its memory, as no list of operations tells.
            program = make_fx(functionalize(program), tracing_mode="fake", _allow_non_fake_inputs=True)(example)
    except Exception as error:
        raise ModelError(
            f"no proof: expected a model that torch alone computes, the same way for every image; "
            f"its trace failed: {error}"
        ) from error
    if _changes_itself(program):
        raise ModelError("no proof: the model keeps state: it changes a tensor of its own, and computes with it")
    found = Trace(program, tuple(shape), example.device)
    with torch.no_grad():
        try:
            again, said = found.graph().forward(example.double()), scores(example).double()
        except Unsupported as error:
            raise ModelError(f"no proof: {error}") from error
    if again.shape != said.shape or not torch.allclose(again, said, rtol=1e-2, atol=1e-2):
        raise ModelError("no proof: the model does not answer as its trace does; does it keep state or draw noise?")
    return found
