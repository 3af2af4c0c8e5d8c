"""The GRPO objective as the kernels take it; its definition is fastgrpo_kernels/clipped_loss.

Clip: PPO (arXiv 1707.06347) as in DanceGRPO (arXiv 2505.07818); dual clip: arXiv 1912.09729; RatioNorm: GRPO-Guard
(arXiv 2510.22319); the trust-region mask: Flow-DPPO.
"""

from __future__ import annotations

from typing import Any

from fastgrpo.config import ObjectiveConfig


def clipped_loss_settings(config: ObjectiveConfig) -> dict[str, Any]:
    """Returns what `fastgrpo_kernels.clipped_loss` and `grpo_loss` take of a config's objective, but for its KL."""
    return {
        "ratio": config.ratio,
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
        "dppo_threshold": config.dppo_threshold,
    }
