"""DiffusionNFT's loss (arXiv 2509.16117): `from fastgrpo_kernels.compat.diffusion_nft import policy_loss`."""

from __future__ import annotations

from torch import Tensor

from .._checks import check_latents
from ..clipped_loss import nft_loss
from ..noise import NoiseKey
from . import _matching


def policy_loss(
    forward_prediction: Tensor,
    old_prediction: Tensor,
    x0: Tensor,
    noise: Tensor | NoiseKey,
    t: float | Tensor,
    advantages: Tensor,
    *,
    beta: float,
    adv_clip_max: float,
) -> Tensor:
    """The `policy_loss` of a micro-batch, before the term of the reference model.

    Args:
        forward_prediction: The policy's velocity [B, ...]; the loss is differentiable in it.
        old_prediction: The old policy's velocity, of the same shape.
        x0: Clean latents, of the same shape.
        noise: The noise of `xt = (1 - t)·x0 + t·noise`, or its NoiseKey: then it is read from no memory.
        t: Time of each sample in (0, 1], [B]; `timesteps / 1000` there.
        advantages: [B].
        beta: Of the branches beta·forward + (1 - beta)·old and (1 + beta)·old - beta·forward.
        adv_clip_max: Advantages are clipped to ±adv_clip_max.

    Returns:
        The mean over samples of adv_clip_max·(r·positive loss + (1 - r)·negative loss)/beta, a float32 scalar.

    Raises:
        ValueError, TypeError: An argument does not fit; the message has its name.
    """
    with _matching.names(v="forward_prediction", v_old="old_prediction", advantage_clip="adv_clip_max"):
        check_latents("v", forward_prediction)
        rows = _matching.times(t, forward_prediction), _matching.target_of(x0, noise), advantages
        old, batch = _matching.detached(old_prediction), len(forward_prediction)
        return nft_loss(forward_prediction, old, *rows, 1.0 / batch, beta=beta, advantage_clip=adv_clip_max)[0]
