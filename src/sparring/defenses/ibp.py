"""Certified training: descend the loss of the worst logits that interval bounds allow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparring.certificates.crown import interval_lines, lower_bounds
from sparring.certificates.graph import Graph, Trace, trace
from sparring.certificates.ibp import intervals
from sparring.certificates.region import Region, region
from sparring.core.defense import Moment
from sparring.core.errors import UsageError
from sparring.core.threat import L2, Linf, Threat
from sparring.models.keras_nets import KerasModule
from sparring.models.torch import TorchModel


@dataclass(frozen=True)
class IBP:
    """k CE(f(x), y) + (1 - k) CE(worst logits, y): Gowal et al. 2018, section 3.

    The worst logits are 0 for the label and minus the lower bound of its margin for each other class, the margins
    being folded into the last layer (their elision). eps grows from 0 over the first `warmup` of the training while
    k falls from 1 to `kappa`. Large nets prove more at an eps if trained at a larger one (0.4 for 0.3 is usual on
    MNIST). What is bounded is the net in eval mode; once k is 0 the clean images cost nothing.
    """

    threat: Threat
    kappa: float = 0.0
    warmup: float = 0.3

    name: ClassVar[str] = "ibp"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Gowal et al. 2018, arXiv:1810.12715"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        check_boundable(self.name, self.threat)
        check_share("kappa", self.kappa)
        check_share("warmup", self.warmup)

    def loss(self, net: nn.Module, x: Tensor, y: Tensor, moment: Moment) -> Tensor:
        """The mean of both, in the shares of this moment."""
        ramp = moment.risen(self.warmup)
        graph, where = bounded(net, x, self.threat, ramp)
        robust = worst_case(interval_margins(graph, y, where))
        clean = 1 - ramp * (1 - self.kappa)
        return clean * cross_entropy(net(x), y) + (1 - clean) * robust if clean else robust


def worst_case(lower: Tensor) -> Tensor:
    """Mean cross-entropy where each margin of the label is as low as `lower` (n, classes - 1) says."""
    return torch.cat([torch.zeros_like(lower[:, :1]), -lower], 1).logsumexp(1).mean()


def interval_margins(graph: Graph, y: Tensor, where: Region) -> Tensor:
    """(n, classes - 1) what intervals prove of the margins of labels `y` (n,)."""
    return lower_bounds(graph, y, interval_lines(graph, intervals(graph, where)), where)[0]


def bounded(net: nn.Module, x: Tensor, threat: Threat, ramp: float) -> tuple[Graph, Region]:
    """The graph of `net` in eval mode, through which its weights are trained, and the region of `ramp` eps."""
    if isinstance(net, KerasModule):
        raise UsageError(
            "expected a net that torch computes, since bounds are made from its weights, got one in Keras; "
            "leave out --framework tensorflow"
        )
    where = region(replace(threat, eps=threat.eps * ramp), x).to(x.dtype)
    return _traced(net, x, threat.bounds).graph(x.dtype, trainable=True), where


def check_boundable(name: str, threat: Threat) -> None:
    """`UsageError` unless bounds are known for `threat`."""
    if not isinstance(threat, Linf | L2):
        raise UsageError(f"expected linf or l2 for the bounds of {name}, got {threat.norm}")


def check_share(name: str, value: float) -> None:
    """`UsageError` unless `value` lies from 0 to 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"expected {name} from 0 to 1, got {value}")


_TRACES: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Trace]] = WeakKeyDictionary()


def _traced(net: nn.Module, x: Tensor, bounds: tuple[float, float]) -> Trace:
    """The trace of `net`, which costs as much as many steps and is kept while its weights are the same tensors."""
    key = (x.shape[1:], x.device, *map(id, net.parameters()))
    known = _TRACES.get(net)
    if known is None or known[0] != key:
        asked, mode = TorchModel(lambda images: net(images.to(x.dtype)), bounds=bounds), net.training
        net.eval()
        known = _TRACES[net] = (key, trace(asked, x.shape[1:], x.device))
        net.train(mode)
    return known[1]
