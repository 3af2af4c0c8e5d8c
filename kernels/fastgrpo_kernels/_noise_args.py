"""How operations take noise: as a key, as a tensor, as the stored step that it made, in a training target, or not at
all."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_latents, check_no_grad, elements_of, per_sample
from .noise import NoiseKey, check_key, normal_cpu

Noise = NoiseKey | Tensor | None


class StoredStep(NamedTuple):
    """Latents before and after a step as stored, [B, ...] each, and the step's `a`: ε = (y - a·x - b·v_old)/s.

    A table of float32 coefficients holds a - 1 instead, which keeps its digits: give it as `a_less_one`, and None for
    `a`. Nothing of the size of a batch is then launched to make it.
    """

    x: Tensor
    y: Tensor
    a: float | Tensor | None = None
    a_less_one: float | Tensor | None = None


class MatchingTarget(NamedTuple):
    """The target that forward-process objectives hold model outputs against: noise_scale·ε + x0_scale·x̂0.

    In the place of an operation's noise it makes P the moment against the old output's residual, P = mean(d·e) with
    e = v_old - (noise_scale·ε + x0_scale·x̂0). ε noised the clean latents x̂0 to those that the model saw.

    Args:
        x0: Clean latents [B, ...], such as a rollout's final ones.
        key: The NoiseKey of ε, which is then made in registers, or ε as a tensor [B, ...].
        noise_scale, x0_scale: A float or [B] float32/float64 each. Velocity of a rectified flow: (1, -1), the default.
            Epsilon: (1, 0). v-prediction: (√ᾱ, -√(1-ᾱ)).
    """

    x0: Tensor
    key: NoiseKey | Tensor
    noise_scale: float | Tensor = 1.0
    x0_scale: float | Tensor = -1.0


def check_less_one(prefix: str, a: object, a_less_one: object, like: Tensor) -> float | Tensor:
    """a - 1, checked, from the one of the two that was given."""
    if (a is None) == (a_less_one is None):
        raise TypeError(f"{prefix}a: expected either a or a_less_one")
    name, value = ("a", a) if a is not None else ("a_less_one", a_less_one)
    check_no_grad(**{prefix + name: value})
    return per_sample(prefix + name, value, like, less_one=a is not None)


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
    return normal_cpu(words, seed, elements_of(like)).view(like.shape)
