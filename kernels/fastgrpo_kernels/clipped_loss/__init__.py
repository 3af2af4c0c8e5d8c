"""(P, Q, advantage) -> clipped policy loss, statistics and gradient factors; or all of it from latents."""

from .fused import grpo_loss
from .op import LossStatistics, clipped_loss

__all__ = ["LossStatistics", "clipped_loss", "grpo_loss"]
