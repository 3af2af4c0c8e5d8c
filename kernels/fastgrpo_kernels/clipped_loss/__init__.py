"""(P, Q, advantage) -> clipped policy loss, statistics and gradient factors; or all of it from latents."""

from .fused import grpo_loss, nft_loss
from .op import FIELDS, LossStatistics, clipped_loss

__all__ = ["FIELDS", "LossStatistics", "clipped_loss", "grpo_loss", "nft_loss"]
