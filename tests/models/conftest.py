"""What the adapters' tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring.core.model import Access, Model


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Fails unless two models give the same logits and gradients within float32 rounding."""

    def check(ours: Model, theirs: Model, x: Tensor, classes: int = 10) -> None:
        one, two = ours.query(x, Access.GRADIENT), theirs.query(x, Access.GRADIENT)
        assert one.logits.dtype == torch.float32
        assert one.labels.dtype == torch.int64
        torch.testing.assert_close(one.logits, two.logits, rtol=1e-5, atol=2e-6)
        v = torch.randn(len(x), classes, generator=torch.Generator().manual_seed(1))
        got, wanted = one.vjp(v, keep=True), two.vjp(v)
        assert got.shape == x.shape
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-6)
        assert torch.equal(one.vjp(v), got)

    return check


@pytest.fixture(scope="session")
def shows_no_more() -> Callable[..., None]:
    """Fails unless each access shows what it says and nothing beyond, and the images stay as they were."""

    def check(model: Model, x: Tensor) -> None:
        before = x.clone()
        decision, score, gradient = (model.query(x, access) for access in Access)
        assert decision.logits is None
        assert decision.vjp is None
        assert score.vjp is None
        assert torch.equal(decision.labels, score.labels)
        assert torch.equal(score.logits, gradient.logits)
        assert not score.logits.requires_grad
        assert not gradient.logits.requires_grad
        kept = gradient.logits.clone()
        gradient.vjp(torch.ones_like(kept))
        model.query(1 - x, Access.GRADIENT).vjp(torch.ones_like(kept))
        assert torch.equal(gradient.logits, kept)
        assert torch.equal(x, before)
        assert not x.requires_grad

    return check


@pytest.fixture(scope="session")
def mirror() -> Callable[..., Any]:
    """Makes a function of JAX arrays of a torch network."""
    jax = pytest.importorskip("jax")

    def convert(net: nn.Sequential, channels_last: bool = False) -> Callable[..., Any]:
        """The torch network `net` as a function of JAX arrays."""

        def call(x: Any) -> Any:
            for layer in net:
                if isinstance(layer, nn.Flatten):
                    if channels_last and x.ndim == 4:
                        x = x.transpose(0, 3, 1, 2)
                    x = x.reshape(len(x), -1)
                elif isinstance(layer, nn.Linear):
                    x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
                elif isinstance(layer, nn.ReLU):
                    x = jax.nn.relu(x)
                else:
                    form = ("NHWC", "OIHW", "NHWC") if channels_last else ("NCHW", "OIHW", "NCHW")
                    kernel, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
                    x = jax.lax.conv_general_dilated(
                        x, kernel, layer.stride, [(p, p) for p in layer.padding], dimension_numbers=form
                    )
                    x = x + (bias if channels_last else bias[:, None, None])
            return x

        return call

    return convert
