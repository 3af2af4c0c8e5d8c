"""What is timed: each operation as this package does it, as trainers write it in PyTorch today, and that compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastgrpo_kernels as fk

# Latents [B, ...] of one micro-batch: pipelines at the sizes of published recipes.
SHAPES = {
    "sd": (16, 4, 64, 64),
    "flux": (12, 4096, 64),
    "hunyuan": (8, 16, 14, 60, 104),
    "skyreels": (8, 16, 14, 50, 80),
}
ETA, SIGMA, SIGMA_NEXT, CLIP = 0.3, 0.7, 0.65, 1e-4


class Inputs:
    """Latents in float32, model outputs in `dtype` of which v asks for a gradient, and what the rollout kept."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        self.x, v = randn(*shape), randn(*shape)
        self.v_old = (v + 0.01 * randn(*shape)).to(dtype)
        self.v = v.to(dtype).requires_grad_()
        self.advantage = randn(shape[0])
        self.weight = torch.full_like(self.advantage, 1.0 / shape[0])
        self.a, self.b, self.s = fk.transitions.dance_sde(SIGMA, SIGMA_NEXT, ETA)
        key = fk.noise_key(1, torch.arange(shape[0]), 3, 0, fk.STREAM_SDE, device)
        # On a CPU reading noise is faster than making it again: the rollout's is kept, as trainers keep its latents.
        self.noise = fk.normal(key, shape[1:]) if device.type == "cpu" else key
        self.y = fk.gaussian_step(self.x, self.v_old, self.a, self.b, self.s, self.noise)
        self.old_log_prob = fk.log_prob(self.x, self.v_old, self.y, self.a, self.b, self.s)


def step_eager(x: Tensor, v: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A stochastic step in float32, term by term: latents after it, predicted clean latents, log-probability."""
    change = SIGMA_NEXT - SIGMA
    std = ETA * math.sqrt(-change)
    clean = x - SIGMA * v
    score = -(x - (1 - SIGMA) * clean) / SIGMA**2
    mean = x + change * v - 0.5 * ETA**2 * score * change
    if y is None:
        y = mean + std * torch.randn_like(mean)
    density = -((y.detach().float() - mean.float()) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return y, clean, density.mean(dim=tuple(range(1, x.ndim)))


def loss_eager(x: Tensor, v: Tensor, y: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """The clipped loss from stored latents and log-probabilities."""
    *_, log_prob = step_eager(x, v, y)
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()


def _step_ours(i: Inputs) -> Tensor:
    return fk.gaussian_step(i.x, i.v.detach(), i.a, i.b, i.s, i.noise)


def _loss_ours(i: Inputs) -> Tensor:
    return fk.grpo_loss(i.v, i.v_old, i.b, i.s, i.noise, i.advantage, i.weight, clip_low=CLIP, clip_high=CLIP)[0]


def _on_policy_ours(i: Inputs) -> Tensor:
    return fk.on_policy_gradient(i.weight * i.advantage, i.b, i.s, i.noise, i.v.shape, i.v.dtype)


class Operation(NamedTuple):
    """`least` names the latents that the forward and the backward cannot do without moving, as in static_cases."""

    ours: Callable[[Inputs], Tensor]
    eager: Callable[..., object]
    arguments: Callable[[Inputs], tuple]
    modes: tuple[str, ...]
    least: dict[str, str]


ALL_MODES = ("no_grad", "forward", "backward", "full")
_LOSS = {"no_grad": "v v_old", "forward": "v v_old", "backward": "v v_old v", "full": "v v_old v v_old v"}
_DENSITY = {"no_grad": "x v y", "forward": "x v y", "backward": "x v y v", "full": "x v y x v y v"}

OPERATIONS = {
    "step": Operation(_step_ours, step_eager, lambda i: (i.x, i.v.detach(), None), ("no_grad",), {"no_grad": "x v y"}),
    "log_prob": Operation(
        lambda i: fk.log_prob(i.x, i.v, i.y, i.a, i.b, i.s).sum(),
        lambda x, v, y: step_eager(x, v, y)[2].sum(),
        lambda i: (i.x, i.v, i.y),
        ALL_MODES,
        _DENSITY,
    ),
    "loss": Operation(_loss_ours, loss_eager, lambda i: (i.x, i.v, i.y, i.old_log_prob, i.advantage), ALL_MODES, _LOSS),
    # Ours writes the gradient without a loss; the others go forward and backward.
    "on_policy": Operation(
        _on_policy_ours, loss_eager, lambda i: (i.x, i.v, i.y, i.old_log_prob, i.advantage), ("full",), {"full": "v"}
    ),
}
PROVIDERS = ("ours", "eager", "compile")


def least_bytes(operation: str, mode: str, inputs: Inputs) -> int:
    """Bytes that the operation as ours cannot do without moving."""
    return sum(getattr(inputs, name).nbytes for name in OPERATIONS[operation].least[mode].split())


def prepare(operation: str, provider: str, mode: str, inputs: Inputs) -> Callable[[], object]:
    """A function of no arguments that does the timed work; what precedes it is done already."""
    op = OPERATIONS[operation]
    if provider == "ours":
        call: Callable[[], object] = partial(op.ours, inputs)
    else:
        function = torch.compile(op.eager, dynamic=False, fullgraph=True) if provider == "compile" else op.eager
        call = partial(function, *op.arguments(inputs))
    if mode == "no_grad":
        return torch.no_grad()(call)
    if operation == "on_policy" and provider == "ours":
        return call
    if mode == "forward":
        return call
    if mode == "full":
        return lambda: torch.autograd.grad(call(), inputs.v)  # pyright: ignore[reportCallIssue, reportArgumentType]
    output = call()
    return lambda: torch.autograd.grad(output, inputs.v, retain_graph=True)  # pyright: ignore[reportCallIssue, reportArgumentType]
