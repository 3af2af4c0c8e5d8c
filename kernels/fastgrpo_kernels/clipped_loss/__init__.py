"""(P, Q, advantage) -> clipped policy loss, statistics and gradient factors in one launch."""

from .op import LossStatistics, clipped_loss

__all__ = ["LossStatistics", "clipped_loss"]
