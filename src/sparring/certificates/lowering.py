"""A torch.fx program as nodes, operation by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparring.certificates.operations import LOWER, Add, Ref, Unsupported

_BITS = ("ge", "gt", "le", "lt", "bitwise_not", "clone", "alias", "detach")  # may answer yes or no, which is 1 or 0


def lower(program: Any, images: Ref, add: Add, dtype: torch.dtype, rows: int) -> Ref:
    """Append the nodes of a torch.fx `program` traced with `rows` rows; the last one's output, which is returned."""
    values: dict[Any, Any] = {}

    def known(value: Any) -> Any:
        return torch.fx.node.map_arg(value, lambda node: values[node])

    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = images
        elif node.op == "get_attr":
            held = getattr(program, node.target)
            values[node] = held if torch.is_grad_enabled() else held.detach()
        elif node.op == "output":
            (out,) = node.args
            last = values[out]
            if not isinstance(last, Ref):
                raise Unsupported("expected logits that torch computes from the image, got a constant")
            return last
        elif node.users:
            args, kwargs = known(node.args), known(node.kwargs)
            if _refs((args, kwargs)):
                args, kwargs = _in(dtype, args), _in(dtype, kwargs)
                values[node] = _lower_one(node, args, kwargs, add, rows)
            else:
                values[node] = _constant(node, args, kwargs)
    raise Unsupported("expected a program with an output")


def _constant(node: Any, args: Any, kwargs: Any) -> Any:
    """What does not hang on the images: as the model finds it, so in its own arithmetic."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        raise Unsupported(f"expected a model without noise, got one that draws by {node.target.__name__!r}")
    return node.target(*args, **kwargs)


def _in(dtype: torch.dtype, value: Any) -> Any:
    """`value`, an argument, with its tensors of floating point in `dtype`."""
    if isinstance(value, dict):
        return {key: _in(dtype, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_in(dtype, part) for part in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _refs(value: Any) -> list[Ref]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [ref for part in value for ref in _refs(part)]
    return [value] if isinstance(value, Ref) else []


def _lower_one(node: Any, args: Any, kwargs: Any, add: Add, rows: int) -> Any:
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    name = name if name in LOWER else name.rstrip("_")  # in place: the tracer hands on what it returns
    if name == "getitem":
        return args[0][args[1]]
    if name not in LOWER:
        came = ", ".join(str(("n", *ref.shape)) for ref in _refs((args, kwargs)))
        raise Unsupported(f"no linear bounds for the operation {name!r} (on {came}) of this model")
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        if value.dtype not in (torch.float32, torch.float64) and not (value.dtype == torch.bool and name in _BITS):
            raise Unsupported(f"expected a model in float32 or float64, got {value.dtype} from {name!r}")
        if value.dim() < 1 or value.shape[0] != rows:
            raise Unsupported(f"expected rows that do not mix, but {name!r} joins them")
    try:
        return LOWER[name](add, *args, **kwargs)
    except (AttributeError, TypeError) as error:  # such as a value where a rule expects a constant
        raise Unsupported(f"no linear bounds for {name!r} with these options: {error}") from error
