"""The objectives by name; a package adds its own by the entry point group `fastgrpo.objectives`."""

from __future__ import annotations

from fastgrpo.algorithms.objectives.base import ForwardObjective, RowInputs, RowLosses, RowSums
from fastgrpo.config import Config, ObjectiveConfig
from fastgrpo.errors import ConfigError
from fastgrpo.registry import Registry

OBJECTIVES = Registry(
    "objective",
    "fastgrpo.objectives",
    {
        "awm": "fastgrpo.algorithms.objectives.awm:AWM",
        "dpo": "fastgrpo.algorithms.objectives.dpo:DPO",
        "grpo": "fastgrpo.algorithms.objectives.grpo:clipped_loss_settings",
        "nft": "fastgrpo.algorithms.objectives.nft:NFT",
    },
)
# Settings of `objective` that GRPO reads, and those of every objective of the forward process.
GRPO_SETTINGS = ("ratio", "clip_low", "clip_high", "dual_clip", "kl_weight", "kl", "dppo_threshold")
FORWARD_SETTINGS = ("kl_weight", "kl", "times", "guidance")

__all__ = ["OBJECTIVES", "ForwardObjective", "RowInputs", "RowLosses", "RowSums", "available", "forward_objective"]


def available() -> list[str]:
    """The objectives that a config can name, of installed packages too."""
    return OBJECTIVES.available()


def forward_objective(config: Config) -> ForwardObjective | None:
    """Makes the objective of a run; None for GRPO, which trains trajectories.

    Raises:
        ConfigError: For an unknown name, with the nearest match; for settings that it does not read; for what it
            cannot use.
    """
    settings, kind = config.objective, config.objective.kind
    if not settings.forward:
        _check_settings(settings, GRPO_SETTINGS)
        return None
    cls = OBJECTIVES.load(kind, "objective.kind")
    if not (isinstance(cls, type) and issubclass(cls, ForwardObjective)):
        raise ConfigError(
            f"objective.kind: '{kind}' is not a subclass of fastgrpo.algorithms.objectives.ForwardObjective"
        )
    own = () if kind in OBJECTIVES.built_in else ("options",)
    _check_settings(settings, (*FORWARD_SETTINGS, *cls.settings, *own))
    found = cls(config)
    roll = config.rollout
    if found.paired and roll.forward_batch % 2:
        raise ConfigError(
            f"rollout.forward_batch: {roll.forward_batch} rows do not hold whole pairs, as objective.kind {kind} "
            "needs; make it even"
        )
    return found


def _check_settings(settings: ObjectiveConfig, read: tuple[str, ...]) -> None:
    """Raises ConfigError for a setting that would change nothing."""
    plain = ObjectiveConfig(kind=settings.kind)
    problems = [
        f"objective.{name}: is nothing that objective.kind {settings.kind} reads; leave it out"
        for name in ObjectiveConfig.model_fields
        if name not in ("kind", *read) and getattr(settings, name) != getattr(plain, name)
    ]
    if problems:
        raise ConfigError(*problems)
