"""The one table of what the static check compiles: a line is a call of the package on tensors without storage.

The kernels, their arguments and the number of launches are recorded from the call itself, so a new kernel needs one
line in CASES and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastgrpo_kernels as fk

from .devices import DEVICES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Inputs:
    """Latents and coefficients on the meta device: x, y, eps and coefficients in float32, model outputs in `dtype`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape = shape
        self.x = torch.empty(shape, device="meta")
        self.y, self.eps = torch.empty_like(self.x), torch.empty_like(self.x)
        self.v = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        self.v_old = torch.empty(shape, dtype=dtype, device="meta")
        self.a, self.b, self.s, self.advantage, self.weight = torch.empty(5, shape[0], device="meta").unbind(0)
        self.v_reference = torch.empty_like(self.v_old)
        self.v_uncond = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        self.advantages = torch.empty(shape[0], 3, device="meta")
        # A value a token of packed latents, a frame's pixel of others.
        self.mask = torch.empty(shape[:2], dtype=torch.bool, device="meta")
        self.p, self.q = torch.empty(2, shape[0], device="meta").unbind(0)
        ids = torch.arange(shape[0])
        self.key = fk.noise_key(2**40 + 1, ids, 0, 0, fk.STREAM_SDE, "meta")
        self.noise: dict[str, Any] = {
            "key": self.key,
            "stored": self.eps,
            "step": fk.StoredStep(self.x, self.y, self.a),
            "target": fk.MatchingTarget(self.x, self.key),
            "stored target": fk.MatchingTarget(self.x, self.eps),
        }

    def bytes_of(self, names: str) -> int:
        """Bytes an element of the named latents, such as "x v y"; grad is v's."""
        return sum((self.v if name == "grad" else getattr(self, name)).element_size() for name in names.split())


class Case(NamedTuple):
    """A call to compile, once for each dtype of the model output if `by_dtype`.

    `forward` and `backward` name the latents that each direction cannot do without moving. `targets` is what it
    is compiled for, everything by default.
    """

    call: Callable[[Inputs], Any]
    forward: str
    backward: str = ""
    makes_noise: bool = False
    by_dtype: bool = True
    targets: tuple[str, ...] = tuple(DEVICES)


def _step(noise: str) -> Callable[[Inputs], Tensor]:
    return lambda i: fk.gaussian_step(i.x, i.v.detach(), i.a, i.b, i.s, i.noise[noise])


def _all_outputs(noise: str) -> Callable[[Inputs], Tensor]:
    def call(i: Inputs) -> Tensor:
        more = {"v_uncond": i.v_uncond.detach(), "guidance_scale": 4.5, "return_all": True, "clean": (1.0, -0.5)}
        return fk.gaussian_step(i.x, i.v.detach(), i.a, i.b, i.s, i.noise[noise], **more).latents

    return call


def _moments(noise: str) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    return lambda i: fk.shift_moments(i.v, i.v_old, i.b, i.s, i.noise[noise])


def _guided(i: Inputs) -> tuple[Tensor, Tensor]:
    return fk.shift_moments(i.v, i.v_old, i.b, i.s, i.key, v_uncond=i.v_uncond, guidance_scale=4.5)


def _grpo(i: Inputs) -> Tensor:
    return fk.grpo_loss(i.v, i.v_old, i.b, i.s, i.key, i.advantage, i.weight, clip_low=1e-4, clip_high=1e-4)[0]


def _grpo_all(noise: str) -> Callable[[Inputs], Tensor]:
    settings = {"clip_low": 1e-4, "clip_high": 1e-4, "dual_clip": 2.0, "dppo_threshold": 1e-3, "kl_weight": 0.1}

    def call(i: Inputs) -> Tensor:
        more = {"v_uncond": i.v_uncond, "guidance_scale": 4.5, "v_reference": i.v_reference}
        return fk.grpo_loss(i.v, i.v_old, i.b, i.s, i.noise[noise], i.advantage, i.weight, **settings, **more)[0]

    return call


def _grpo_as_trainers_lack(i: Inputs) -> Tensor:
    """Masked latents, several advantages a sample, a loss of each."""
    more = {"clip_low": 1e-4, "clip_high": 1e-4, "mask": i.mask, "per_sample": True}
    return fk.grpo_loss(i.v, i.v_old, i.b, i.s, i.key, i.advantages, i.weight, **more)[0].sum()


def _clipped_as_trainers_lack(i: Inputs) -> Tensor:
    more = {"clip_low": 1e-4, "clip_high": 1e-4, "per_sample": True}
    return fk.clipped_loss(i.p, i.q, i.s, i.advantages, i.weight, **more)[0]


def _nft(noise: str) -> Callable[[Inputs], Tensor]:
    """The one that reads most of a target; the others' backward is its own."""

    def call(i: Inputs) -> Tensor:
        rows = i.s, i.noise[noise], i.advantage, i.weight
        return fk.nft_loss(i.v, i.v_old, *rows, beta=1.0, advantage_clip=5.0)[0]

    return call


def _grpo_to_target(ratio: Any) -> Callable[[Inputs], Tensor]:
    def call(i: Inputs) -> Tensor:
        more = {"clip_low": 1e-4, "clip_high": 1e-4, "ratio": ratio}
        return fk.grpo_loss(i.v, i.v_old, i.s, i.s, i.noise["target"], i.advantage, i.weight, **more)[0]

    return call


def _on_policy(noise: str) -> Callable[[Inputs], Tensor]:
    return lambda i: fk.on_policy_gradient(i.weight, i.b, i.s, i.noise[noise], i.shape, i.v.dtype)


def _clipped(i: Inputs) -> Tensor:
    return fk.clipped_loss(i.p, i.q, i.s, i.advantage, i.weight, clip_low=1e-4, clip_high=1e-4)[0]


# All that the loss can read of model outputs.
_ALL = "v v_uncond v_old v_reference"

CASES = {
    "normal": Case(lambda i: fk.normal(i.key, i.shape[1:]), "eps", makes_noise=True, by_dtype=False),
    "gaussian_step/key": Case(_step("key"), "x v y", makes_noise=True),
    "gaussian_step/stored": Case(_step("stored"), "x v eps y"),
    "gaussian_step/all": Case(_all_outputs("key"), "x v v_uncond y y v", makes_noise=True),
    "gaussian_step/all stored": Case(_all_outputs("stored"), "x v v_uncond eps y y v"),
    "shift_moments/key": Case(_moments("key"), "v v_old", "v v_old grad", makes_noise=True),
    "shift_moments/stored": Case(_moments("stored"), "v v_old eps", "v v_old eps grad"),
    "shift_moments/step": Case(_moments("step"), "v v_old x y", "v v_old x y grad"),
    "shift_moments/guided": Case(_guided, "v v_uncond v_old", "v v_uncond v_old grad grad", makes_noise=True),
    "grpo_loss/key": Case(_grpo, "v v_old", "v v_old grad", makes_noise=True),
    "grpo_loss/all": Case(_grpo_all("key"), _ALL, f"{_ALL} grad grad", makes_noise=True),
    "grpo_loss/all stored": Case(_grpo_all("stored"), f"{_ALL} eps", f"{_ALL} eps grad grad"),
    "grpo_loss/all step": Case(_grpo_all("step"), f"{_ALL} x y", f"{_ALL} x y grad grad"),
    "grpo_loss/masked": Case(_grpo_as_trainers_lack, "v v_old mask", "v v_old mask grad", makes_noise=True),
    "grpo_loss/matching": Case(_grpo_to_target("matching"), "v v_old x", makes_noise=True),
    "grpo_loss/huber": Case(_grpo_to_target("huber"), "v v_old x", makes_noise=True),
    "nft_loss/key": Case(_nft("target"), "v v_old x", "v v_old x grad", makes_noise=True),
    "nft_loss/stored": Case(_nft("stored target"), "v v_old x eps", "v v_old x eps grad"),
    "log_prob": Case(lambda i: fk.log_prob(i.x, i.v, i.y, i.a, i.b, i.s), "x v y", "x v y grad"),
    "on_policy_gradient/key": Case(_on_policy("key"), "grad", makes_noise=True),
    "on_policy_gradient/stored": Case(_on_policy("stored"), "eps grad"),
    "clipped_loss": Case(_clipped, "", by_dtype=False),
    "clipped_loss/several": Case(_clipped_as_trainers_lack, "", by_dtype=False),
}
