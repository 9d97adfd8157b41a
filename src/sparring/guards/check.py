"""What a guard claims about the gradient, measured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparring.core.errors import ModelError
from sparring.guards.guard import Guard, Guarded, Net, Transform
from sparring.models.eot import apart

CALLS = 8  # a random guard of few outcomes may say the same several times
NOISE = 1 << 14  # draws that tell Gaussian noise from a tenth more of it
SURE = 2.23  # the limit of sqrt(n) times the Kolmogorov-Smirnov distance that chance passes once in 10,000 times
STEP = 1e-6  # in float64, of pixels
TOLERANCE = 0.01


def check_guard(guard: Guard, net: Net, x: Tensor) -> None:
    """Raise `ModelError` if a claim of `guard` around `net` does not hold on images `x` (n, c, h, w) in [0, 1].

    It is random if two of several calls differ. It detects if it answers with one class more than `net`. It is
    differentiable if its gradient, and that of every transform inside, is neither missing nor zero; and of a
    transform also only if it is the slope that is measured on most of the images, so that a gradient put there by
    hand does not pass. Its noise is Gaussian if what it adds, also to black and to white, is distributed so
    (Kolmogorov and Smirnov). A generator of the guard's own is moved on; the global ones are as they were.
    """
    with apart(x.device) as seed:
        seed(0)
        inside: list[Transform] = []

        def see(transform: Transform, pixels: Tensor) -> Tensor:
            inside.append(transform)
            return transform.transform(pixels)

        guarded = Guarded(guard, net, see)
        with torch.no_grad():
            answers = [guarded(x).nan_to_num() for _ in range(CALLS)]  # NaN is not equal to itself
            classes = net(see(guard, x) if isinstance(guard, Transform) else x).shape[1]
        slopes = [_slopes(transform.transform, x) for transform in dict.fromkeys(inside)]
        _claim(guard, "randomised", any(not torch.equal(answers[0], other) for other in answers))
        _claim(guard, "detects", answers[0].shape[1] == classes + 1)
        _claim(guard, "differentiable", all(slopes) and _answers(guarded, x))
        if (sigma := guard.gaussian_noise) is not None and not _gaussian(guard, sigma, x):
            raise ModelError(
                f"{guard.name} claims gaussian_noise = {sigma}, but is not just a vote on images with such noise; "
                f"mend the claim"
            )


def _claim(guard: Guard, what: str, measured: bool) -> None:
    if getattr(guard, what) != measured:
        raise ModelError(f"{guard.name} claims {what} = {getattr(guard, what)}, measured {measured}; mend the claim")


def _gaussian(guard: Guard, sigma: float, x: Tensor) -> bool:
    """Does it decide by a vote, and does it add noise of N(0, sigma^2) to every pixel, image by image?"""
    if not (isinstance(guard, Transform) and guard.votes and guard.randomised and sigma > 0):
        return False
    with torch.no_grad():
        there = torch.cat([torch.zeros_like(x[:1]), torch.ones_like(x[:1]), x])  # black and white tell of clipping
        images = (there[call % len(there)][None] for call in range(max(2, -(-NOISE // x[0].numel()))))
        draws = torch.cat([(guard.transform(image) - image).double().flatten() for image in images])
    said = torch.special.ndtr(draws / sigma).sort().values
    steps = torch.arange(len(said) + 1, dtype=said.dtype, device=said.device) / len(said)
    apart = torch.maximum((said - steps[:-1]).abs(), (said - steps[1:]).abs()).max()
    return bool(apart <= SURE / len(said) ** 0.5)


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor | None) -> Tensor | None:
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        out = function(leaf)
        if not out.requires_grad:
            return None
        return torch.autograd.grad((out if weights is None else out * weights).sum(), leaf, allow_unused=True)[0]


def _answers(guarded: Guarded, x: Tensor) -> bool:
    """Has the whole a gradient? Of squares, since there may be sums that no image changes."""
    gradient = _gradient(lambda pixels: guarded(pixels).square(), x, None)
    return gradient is not None and bool(gradient.isfinite().all()) and bool((gradient != 0).any())


def _slopes(transform: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Is the gradient of a random weighting of what comes out the slope in a random direction, on most images?"""
    pixels = x.double()
    direction = torch.randn_like(pixels)
    state = torch.get_rng_state()

    def again(at: Tensor) -> Tensor:
        torch.set_rng_state(state)  # the same draws each time
        return transform(at)

    with torch.no_grad():
        one, two = again(pixels + STEP * direction), again(pixels - STEP * direction)
    weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(one)
    gradient = _gradient(again, pixels, weights)
    if gradient is None or not gradient.isfinite().all() or not (gradient != 0).any():
        return False
    measured = ((one - two) * weights).flatten(1).sum(1) / (2 * STEP)
    claimed = (gradient * direction).flatten(1).sum(1)
    close = (measured - claimed).abs() <= TOLERANCE * measured.abs().clamp_min(claimed.abs())
    return bool(close.double().mean() > 0.5)
