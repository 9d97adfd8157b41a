"""The front door: its options, its errors, and rows that come back in order whatever the memory."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import nn

from sparring.certificates import bounds as front
from sparring.certificates.ascent import Ascent
from sparring.certificates.bounds import METHODS, bounds
from sparring.certificates.graph import trace
from sparring.core.errors import DataError, ModelError, UsageError
from sparring.core.threat import L1, L2, Linf, threat
from sparring.models.torch import TorchModel


def test_each_method_proves_at_least_what_the_one_before_does(make, images):
    model, (x, _) = TorchModel(make("conv")), images(16)
    y = model.query(x, 0).labels
    found = {m: bounds(model, x, y, Linf(0.012), m, ascent=Ascent(10, deep=5)) for m in METHODS[1:]}
    order = ["ibp", "crown-ibp", "crown", "alpha-crown"]
    counts = [int(found[method].certified.sum()) for method in order]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    for method in METHODS[1:]:
        assert found[method].lower.dtype == torch.float64
        assert found[method].lower.shape == (16, 2)
        assert found[method].worst.shape == x.shape
    wrong = bounds(model, x, (y + 1) % 3, Linf(0.0), "alpha-crown")
    assert not wrong.certified.any()


def test_climbing_again_from_climbed_bounds_proves_more(make, images):
    model, (x, _) = TorchModel(make("dense")), images(40)
    y = model.query(x, 0).labels
    for eps in (0.03, 0.06, 0.1):
        shallow = bounds(model, x, y, Linf(eps), "alpha-crown", ascent=Ascent(20, deep=0))
        deep = bounds(model, x, y, Linf(eps), "alpha-crown", ascent=Ascent(20, deep=20))
        assert (deep.certified >= shallow.certified).all()
        assert (deep.lower >= shallow.lower - 1e-9).all()


def test_memory_that_runs_out_only_narrows(make, images, monkeypatch):
    model, (x, y) = TorchModel(make("conv")), images(11)
    whole = bounds(model, x, y, L2(0.1))
    prove, seen = front._prove, []

    def short(graph, where, y, method, ascent):
        seen.append(len(y))
        if len(y) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return prove(graph, where, y, method, ascent)

    monkeypatch.setattr(front, "_prove", short)
    narrow = bounds(model, x, y, L2(0.1), width=8)
    assert seen == [8, 4, 2, 2, 2, 2, 2, 1]
    for field in fields(whole):
        torch.testing.assert_close(getattr(narrow, field.name), getattr(whole, field.name))


def test_a_trace_is_reused(make, images):
    model, (x, y) = TorchModel(make("dense")), images(3)
    traced = trace(model, x.shape[1:])
    again = bounds(TorchModel(nn.Identity()), x, y, Linf(0.1), traced=traced)
    torch.testing.assert_close(again.lower, bounds(model, x, y, Linf(0.1)).lower)


def test_what_cannot_be_meant_is_refused(make, images):
    model, (x, y) = TorchModel(make("dense")), images(3)
    with pytest.raises(UsageError, match="did you mean 'crown'"):
        bounds(model, x, y, Linf(0.1), "crwon")
    with pytest.raises(DataError, match="expected 3 int64 labels"):
        bounds(model, x, y[:2], Linf(0.1))
    with pytest.raises(DataError, match="expected images"):
        bounds(model, x[0], y, Linf(0.1))
    with pytest.raises(DataError, match="expected images in"):
        bounds(model, x + 1, y, Linf(0.1))
    with pytest.raises(DataError, match="labels from 0 to 2, got 0 to 3"):
        bounds(model, x, torch.tensor([0, 1, 3]), Linf(0.1))
    with pytest.raises(UsageError, match="model's bounds"):
        bounds(model, x, y, threat("linf", 8, (0, 255)))
    with pytest.raises(UsageError, match="linf or l2"):
        bounds(model, x, y, L1(1.0))
    with pytest.raises(ModelError, match="softmax"):
        bounds(TorchModel(nn.Sequential(make("dense"), nn.Softmax(1)), probabilities=True), x, y, Linf(0.1))
