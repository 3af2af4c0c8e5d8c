"""The loss of Advantage Weighted Matching (arXiv 2509.25050): `from fastgrpo_kernels.compat.awm import policy_loss`."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from .._checks import check_latents
from ..clipped_loss import grpo_loss
from ..noise import NoiseKey
from . import _matching

Weighting = Literal["Uniform", "t", "t**2", "huber"]


def policy_loss(
    model_output: Tensor,
    old_output: Tensor,
    x0: Tensor,
    noise: Tensor | NoiseKey,
    t: float | Tensor,
    advantages: Tensor,
    *,
    weighting: Weighting,
    clip_range: float,
) -> Tensor:
    """The `policy_loss` of loss_type "exp_first": the mean over the batch of each row's clipped loss.

    Args:
        model_output: The policy's velocity [B, ...]; the loss is differentiable in it.
        old_output: The velocity of the policy that `old_log_probs` are of, of the same shape.
        x0: Clean latents, of the same shape.
        noise: The noise of `(1 - t)·x0 + t·noise`, or its NoiseKey: then it is read from no memory.
        t: Time of each sample in (0, 1], [B] or [B, 1, 1, 1].
        advantages: [B], clipped already.
        weighting: Of the log-probability: "Uniform", "t", "t**2" or "huber".
        clip_range: The ratio is clipped to 1 ± clip_range.

    Returns:
        The loss, a float32 scalar.

    Raises:
        ValueError, TypeError: An argument does not fit; the message has its name.
    """
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting: unknown {weighting!r}; one of: {', '.join(get_args(Weighting))}")
    clip: Any = {"clip_low": clip_range, "clip_high": clip_range}
    with _matching.names(v="model_output", v_old="old_output", clip_low="clip_range", clip_high="clip_range"):
        check_latents("v", model_output)
        time = _matching.times(t, model_output)
        weight = 1.0 if weighting == "Uniform" else time * time if weighting == "t**2" else time
        rows = weight, weight, _matching.target_of(x0, noise), advantages, 1.0 / len(model_output)
        form = "huber" if weighting == "huber" else "matching"
        return grpo_loss(model_output, _matching.detached(old_output), *rows, **clip, ratio=form)[0]
