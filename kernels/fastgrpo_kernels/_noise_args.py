"""How operations take noise: as a key, as a tensor, as the stored step that it made, or not at all."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_latents, check_no_grad
from .noise import NoiseKey, check_key, normal_cpu

Noise = NoiseKey | Tensor | None


class StoredStep(NamedTuple):
    """Latents before and after a step as stored, [B, ...] each, and the step's `a`: ε = (y - a·x - b·v_old)/s."""

    x: Tensor
    y: Tensor
    a: float | Tensor


def split_noise(noise: Noise, like: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
    """Checked (explicit ε, key words, seed); at most one of the first two is a tensor."""
    if noise is None:
        return None, None, 0
    if isinstance(noise, NoiseKey):
        check_key(noise, like.shape[0], like.device)
        return None, noise.words, noise.seed
    check_latents("noise", noise, like=like)
    check_no_grad(noise=noise)
    return noise, None, 0


def noise_cpu(eps: Tensor | None, words: Tensor | None, seed: int, like: Tensor) -> Tensor:
    """ε as float32 in the shape of `like`."""
    if eps is not None:
        return eps.to(torch.float32)
    assert words is not None
    return normal_cpu(words, seed, like[0].numel()).view(like.shape)
