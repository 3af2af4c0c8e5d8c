"""Settings that are valid each by itself, and impossible together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastgrpo.errors import ConfigError

if TYPE_CHECKING:
    from fastgrpo.config.schema import Config


def check_is_config(config: object) -> None:
    """Raises ConfigError for a path, or plain data, in place of a config."""
    from fastgrpo.config.schema import Config

    if not isinstance(config, Config):
        raise ConfigError(
            f"config: {config!r:.80} is {type(config).__name__}; give a config, as fastgrpo.load_config(PATH) reads it"
        )


def check_combinations(config: Config) -> None:
    """Raises ConfigError with every combination that cannot be, each naming the setting and what to use instead."""
    if problems := list(_impossible(config)):
        raise ConfigError(*problems)


def _impossible(config: Config) -> Iterator[str]:
    from fastgrpo.config.schema import SubsetSteps, WindowSteps

    roll, trained = config.rollout, config.rollout.trained
    if isinstance(trained, WindowSteps):
        yield from trained.problems(roll.steps)
    for key, plain in (("suffix_steps", None), ("suffix_solver", "first_order")):
        if isinstance(trained, SubsetSteps) and getattr(roll, key) != plain:
            yield (f"rollout.{key}: needs a window of trained steps; set rollout.trained.kind to window")
    if isinstance(trained, SubsetSteps) and int(trained.fraction * roll.subset_candidates) < 1:
        yield (
            f"rollout.trained.fraction: {trained.fraction} of {roll.subset_candidates} transitions is less than one "
            "step"
        )
    if isinstance(trained, WindowSteps) and roll.last_step != "deterministic":
        yield (
            f"rollout.last_step: {roll.last_step} is for a subset of trained steps; set it to deterministic, or "
            "rollout.trained.kind to subset"
        )
    if roll.sampler == "cps" and roll.eta >= 1:
        yield (f"rollout.eta: {roll.eta} is not below 1, as the noise level of cps must be")
    if roll.antithetic and not roll.shared_noise:
        yield "rollout.antithetic: pairs start from one initial noise; set rollout.shared_noise to true, or drop it"
    if roll.antithetic and roll.candidates % 2:
        yield f"rollout.antithetic: needs pairs, and a group has {roll.candidates} samples; make them even"
    objective = config.objective
    if roll.old_values == "log_prob" and (
        objective.ratio != "gaussian" or objective.kl_weight or objective.dppo_threshold is not None
    ):
        yield (
            "rollout.old_values: log_prob knows the ratio alone; another objective.ratio than gaussian, kl_weight "
            "and dppo_threshold need velocity"
        )
    if roll.best_of is not None and (roll.best_of < roll.group_size or roll.group_size % 2):
        yield (
            f"rollout.best_of: half the best and half the worst of {roll.best_of} cannot be {roll.group_size} "
            "(rollout.group_size), which must be even and no more than it"
        )
    if roll.best_of is not None and roll.prompts_per_iteration % config.update.optimizer_steps:
        yield (
            f"update.optimizer_steps: {config.update.optimizer_steps} does not divide the "
            f"{roll.prompts_per_iteration} prompts of an iteration, whose groups rollout.best_of keeps whole"
        )
    if config.advantage.keep is not None and config.advantage.keep > roll.group_size:
        yield (
            f"advantage.keep: {config.advantage.keep} is more than a group's {roll.group_size} samples "
            "(rollout.group_size)"
        )
    if late := next((r.key for r in config.scored if r.every > 1 and r.weight), None):
        yield (f"rewards: '{late}' is trained, so it is scored every iteration; drop every, or its weight")
    samples = roll.prompts_per_iteration * roll.candidates
    if samples % config.update.optimizer_steps:
        yield (
            f"update.optimizer_steps: {config.update.optimizer_steps} does not divide the {samples} samples of an "
            "iteration (rollout.prompts_per_iteration × rollout.group_size)"
        )
    if config.eval.every and config.prompts.heldout is None:
        yield ("eval.every: needs prompts.heldout; give held-out prompts, or set eval.every to 0")
    drawn, trained_at = config.evaluated_model, config.model
    if config.parallel.context > 1 and (drawn.height, drawn.width, drawn.frames) != (
        trained_at.height, trained_at.width, trained_at.frames
    ):  # fmt: skip
        yield "eval.height, width, frames: parallel.context splits the tokens of one size; leave them out"
    names = [reward.key for reward in config.scored]
    if twice := next((name for name in names if names.count(name) > 1), None):
        yield (f"rewards: '{twice}' is named twice; give its weights as one, or each a label")
    if common := next((name for name in names if name in ("mean", "std")), None):
        yield (f"rewards: reward/{common} is the metric of all trained rewards together; give '{common}' another label")
    if sum(abs(r.weight) for r in config.scored) == 0:
        yield ("rewards: every weight is 0, so nothing would be learned; give one a weight")
    if config.guard.action != "off" and all(r.weight for r in config.scored):
        yield (f"guard.action: {config.guard.action} needs a held-out reward; give one weight 0")
    if config.guard.action == "raise_kl" and not objective.kl_weight:
        yield ("guard.action: raise_kl needs a KL term to raise; set objective.kl_weight above 0")
    if config.update.optimizer.lr == "auto" and (objective.forward or roll.old_values == "log_prob"):
        what = f"objective.kind: {objective.kind} trains" if objective.forward else "rollout.old_values: log_prob keeps"
        yield f"update.optimizer.lr: auto is found by the outputs of trained steps, which {what} none; give a number"
    yield from _of_forward_process(config) if objective.forward else ()
    if config.model.trainable and config.model.lora:
        yield ("model.trainable: chooses among full weights, and model.lora trains none; drop one of them")
    if config.model.text_encoders == "drop" and config.model.embedding_cache is None:
        yield ("model.text_encoders: drop needs a place for what they encode; set model.embedding_cache")
    if config.parallel.load == "sharded" and config.model.lora:
        yield ("parallel.load: sharded is for full fine-tuning, and model.lora is set; set it to whole")
    if config.model.quantize and not config.model.lora:
        yield (
            f"model.quantize: {config.model.quantize} weights cannot be trained; set model.lora, or quantize to null"
        )
    if config.model.dtype != "float32" and config.parallel.fsdp == "off":
        yield (f"parallel.fsdp: off cannot serve model.dtype {config.model.dtype}, whose float32 masters FSDP2 keeps")


def _of_forward_process(config: Config) -> Iterator[str]:
    """What an objective of the forward process cannot have."""
    roll, objective = config.rollout, config.objective
    times, kind = objective.times, f"objective.kind: {objective.kind}"
    if objective.kl_weight and objective.kl != "v":
        yield (
            f"objective.kl: {objective.kl} is of a trajectory's steps, which {kind} does not train; set it to v, the "
            "mean squared difference of the model's outputs"
        )
    if roll.old_values == "log_prob":
        yield f"rollout.old_values: log_prob is of a trajectory's steps, which {kind} does not train; leave it out"
    if config.scoring.staleness:
        yield f"scoring.staleness: {kind} compares with the policy of the rollout, which staleness leaves; set it to 0"
    if config.advantage.combine == "losses":
        yield f"advantage.combine: losses is for objective.kind grpo, and {kind} takes one advantage; use advantage"
    if not roll.shared_noise and roll.suffix_steps is not None:
        yield "rollout.suffix_steps: without rollout.shared_noise every step is deterministic; lower rollout.steps"
    if times.low >= times.high:
        yield f"objective.times.low: {times.low:g} is not below objective.times.high, {times.high:g}"
