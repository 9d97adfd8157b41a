"""The exact minimum over a region of a small ReLU network, by mixed-integer programming: an independent truth.

A ReLU h of z in [l, u] is h >= 0, h >= z, h <= u d, h <= z - l (1 - d) with d in {0, 1} (Tjeng et al. 2019).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from sparring.certificates.ibp import intervals
from sparring.certificates.operators import Activation, Maximum
from sparring.certificates.region import Region


class Program:
    """One row of a region and a graph as constraints on (x, h, d, t)."""

    def __init__(self, graph, region: Region, sides: int = 0) -> None:
        low, high = region.low[0].flatten().numpy(), region.high[0].flatten().numpy()
        self.inputs, self.rows = len(low), []
        hidden = sum(int(np.prod(graph.nodes[at].shape)) for at in graph.activations())
        self.size = self.inputs + 2 * hidden + 1
        self.low = np.concatenate([low, np.zeros(2 * hidden), [-np.inf]])
        self.high = np.concatenate([high, np.full(hidden, np.inf), np.ones(hidden), [np.inf]])
        self.whole = np.concatenate([np.zeros(self.inputs + hidden), np.ones(hidden), [0]])
        ends, first = intervals(graph, region), self.inputs
        self.nodes = [(np.eye(self.inputs, self.size), np.zeros(self.inputs))]
        for node in graph.nodes[1:]:
            before = [self.nodes[i] for i in node.inputs]
            if isinstance(node.op, Activation):
                least, most = (end[0].flatten().numpy() for end in ends[node.inputs[0]])
                self.nodes.append(self._relu(*before[0], least, most, first, first + hidden))
                first += len(least)
            elif isinstance(node.op, Maximum):
                self.nodes.append(tuple(q + r for q, r in zip(before[1], before[2], strict=True)))
            else:
                self.nodes.append(self._linear(graph, node, before))
        for side in range(sides):  # around the ball, in two dimensions
            way = np.array([np.cos(2 * np.pi * side / sides), np.sin(2 * np.pi * side / sides)])
            centre = region.x[0].flatten().numpy()
            self._at_most(np.pad(way, (0, self.size - 2))[None], np.array([way @ centre + region.radius]))

    def _at_most(self, matrix, end) -> None:
        self.rows.append((matrix, end))

    def _relu(self, matrix, shift, least, most, first, chosen):
        k = len(least)
        h, d = (np.eye(self.size)[at : at + k] for at in (first, chosen))
        least, most = np.minimum(least, 0), np.maximum(most, 0)
        self._at_most(matrix - h, -shift)
        self._at_most(h - most[:, None] * d, np.zeros(k))
        self._at_most(h - matrix - least[:, None] * d, shift - least)
        return h, np.zeros(k)

    def _linear(self, graph, node, before):
        def run(columns):
            pairs = zip(columns, node.inputs, strict=True)
            shaped = [torch.tensor(column).view(-1, *graph.nodes[i].shape) for column, i in pairs]
            return node.op.forward(*shaped).flatten(1).numpy()

        zero = run([np.zeros((1, len(shift))) for _, shift in before])
        matrix = run([m.T.copy() for m, _ in before]) - zero
        return matrix.T, run([shift[None] for _, shift in before])[0]

    def minimum(self, asked, offset, splits=()) -> float:
        """Min over the region of max_s asked_s . logits + offset_s; `splits` are (place, entry, sign)."""
        matrix, shift = self.nodes[-1]
        t = np.eye(self.size)[-1]
        rows = [*self.rows, (asked @ matrix - t, -(asked @ shift + offset))]
        for place, entry, sign in splits:
            z, c = self.nodes[place]
            rows.append((-sign * z[entry][None], np.array([sign * c[entry]])))
        limit = LinearConstraint(np.vstack([m for m, _ in rows]), -np.inf, np.concatenate([e for _, e in rows]))
        found = milp(t, constraints=limit, bounds=Bounds(self.low, self.high), integrality=self.whole,
                     options={"mip_rel_gap": 1e-9})  # fmt: skip
        if found.status == 2:
            return np.inf
        assert found.status == 0, found.message
        return found.fun
