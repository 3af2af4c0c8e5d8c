"""Every setting of a run, typed and documented: YAML in, resolved YAML out.

Strict: an unknown key, a wrong type or an impossible combination raises `ConfigError` (see fastgrpo/settings.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastgrpo.rollout_settings import Lora, Model, Prompts, Rollout, Run, SubsetSteps, WindowSteps
from fastgrpo.settings import (
    NonEmpty,
    PositiveFloat,
    PositiveInt,
    Section,
    Unit,
    dump_settings,
    load_settings,
    validate_settings,
)

__all__ = [
    "Advantage",
    "Checkpoint",
    "CompositeOptions",
    "Config",
    "Eval",
    "Guard",
    "Lora",
    "Model",
    "ObjectiveConfig",
    "Optimizer",
    "Parallel",
    "Prompts",
    "RewardSpec",
    "Rollout",
    "Run",
    "Scoring",
    "SubsetSteps",
    "Telemetry",
    "Train",
    "Update",
    "WindowSteps",
    "dump",
    "flatten_rewards",
    "load_config",
    "validate",
]


class RewardSpec(Section):
    """One reward. What `options` a reward takes, and where weights come from: docs/rewards.md."""

    name: NonEmpty = Field(description="A registered reward, or module:Class.")
    label: NonEmpty | None = Field(default=None, description="What logs call it; null: its name.")
    weight: float = Field(default=1.0, description="0: watched, not trained.")
    every: PositiveInt = Field(default=1, description="With weight 0: scored in every so many iterations.")
    path: NonEmpty | None = Field(
        default=None, description="Of its weights: a directory, file, hub id or shapes:<name>."
    )
    when: dict[str, list[str | int | float | bool]] = Field(
        default_factory=dict,
        description="Only for prompts whose metadata has one of these values under each key; {}: for all.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Passed to the reward as keyword arguments.")

    @property
    def key(self) -> str:
        """Its name in logs, metrics and evaluations."""
        return self.label or self.name


class CompositeOptions(Section):
    """Several rewards as one. `advantage`: each is normalised by itself, as if it stood in `rewards`, weights
    multiplied; `reward`: one weighted sum, which other rewards may wrap."""

    of: Annotated[list[RewardSpec], Field(min_length=1)]
    aggregate: Literal["advantage", "reward"] = "advantage"


def flatten_rewards(specs: Sequence[RewardSpec]) -> list[RewardSpec]:
    """The rewards of a list, composites aggregated by advantage replaced by their parts. Raises ConfigError."""
    flat = []
    for spec in specs:
        if spec.name != "composite":
            flat.append(spec)
            continue
        options = validate_settings(CompositeOptions, spec.options, f"rewards.{spec.key}")
        if options.aggregate == "reward":
            flat.append(spec)
            continue
        for part in flatten_rewards(options.of):
            label = f"{spec.label}.{part.key}" if spec.label else part.key
            when = {**spec.when, **part.when}
            flat.append(part.model_copy(update={"label": label, "weight": spec.weight * part.weight, "when": when}))
    return flat


class Scoring(Section):
    """How an iteration's samples meet the rewards."""

    chunks: PositiveInt = Field(
        default=1, description="Parts in which samples are rolled out; each is scored beside the next one's rollout."
    )
    overlap: bool = Field(
        default=True, description="false: the next chunk waits until one is scored, which keeps one chunk less."
    )
    staleness: Literal[0, 1] = Field(
        default=0,
        description="1: the next iteration is rolled out, on weights one update old, while this one is scored.",
    )
    max_failure_rate: Unit = Field(
        default=0.5,
        description="A larger share of samples without a score pauses the run, with a checkpoint before that update.",
    )


class Guard(Section):
    """Against reward hacking: what happens when a held-out reward (weight 0) falls while what is trained rises."""

    action: Literal["off", "stop", "raise_kl"] = Field(
        default="off", description="stop: with a checkpoint; raise_kl: objective.kl_weight is multiplied by kl_factor."
    )
    window: Annotated[int, Field(ge=2)] = Field(
        default=10, description="The latest so many iterations that scored it are compared with the first so many."
    )
    threshold: PositiveFloat = Field(default=3.0, description="Standard errors that both means must have moved by.")
    kl_factor: Annotated[float, Field(gt=1)] = 2.0


class Advantage(Section):
    clip: PositiveFloat = Field(default=5.0, description="Advantages are clamped to ± this.")
    combine: Literal["advantage", "reward", "losses"] = Field(
        default="advantage",
        description="Several rewards: a weighted sum of normalised advantages (GDPO), of rewards, or of clipped "
        "losses, one for each reward (DanceGRPO).",
    )
    normalize: Literal["std", "mean_only"] = Field(
        default="std", description="Divide by the group's spread, or do not."
    )


class ObjectiveConfig(Section):
    ratio: Literal["gaussian", "unit", "ratio_norm"] = Field(
        default="gaussian",
        description="gaussian: π_new/π_old; unit: CPS trainers' unscaled form; ratio_norm: GRPO-Guard.",
    )
    clip_low: PositiveFloat = Field(default=1e-4, description="The ratio is clipped below 1 − this.")
    clip_high: PositiveFloat = Field(default=1e-4, description="… and above 1 + this.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(default=None, description="Bounds the loss where A < 0.")
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Of the Gaussian KL to the reference model."
    )
    dppo_threshold: PositiveFloat | None = Field(
        default=None, description="Flow-DPPO: drop a pair whose KL exceeds this and whose ratio moves further out."
    )


class Optimizer(Section):
    kind: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw",
        description="adamw_8bit: its moments in 2 bytes a weight in place of 8, by bitsandbytes (fastgrpo[gpu]).",
    )
    lr: PositiveFloat = 1e-5
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="After warm-up; cosine falls to zero."
    )
    warmup: Annotated[int, Field(ge=0)] = Field(default=0, description="Optimizer steps of linear warm-up.")


class Update(Section):
    optimizer_steps: PositiveInt = Field(
        default=1, description="Per rollout; each takes an equal share of the samples."
    )
    optimizer: Optimizer = Field(default_factory=Optimizer)
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="null: no EMA.")
    gather: Literal["auto", "once", "per_block"] = Field(
        default="auto",
        description="Sharded weights: once: kept gathered over the micro-batches of an optimizer step; per_block: "
        "gathered for each block's forward, and again for its backward; auto: once where memory allows.",
    )
    grad_sync: Literal["auto", "once", "per_micro_batch"] = Field(
        default="auto",
        description="Gradients reduced over ranks once per optimizer step, which keeps 4 bytes of every trained weight "
        "on every rank, or after each micro-batch; auto: once where that is small (a LoRA, a small model).",
    )


class Train(Section):
    iterations: PositiveInt = 300


class Eval(Section):
    every: Annotated[int, Field(ge=0)] = Field(
        default=50, description="Iterations between held-out evaluations; 0: never."
    )
    images: PositiveInt = Field(default=64, description="Images an evaluation draws, deterministically.")
    steps: PositiveInt | None = Field(default=None, description="Sampling steps; null: rollout.steps.")
    grid: PositiveInt = Field(default=24, description="Images of the fixed-seed grid.")
    mp4: bool = Field(default=False, description="Videos: the grid as MP4 too, which needs PyAV (fastgrpo[video]).")
    ema: bool = Field(default=True, description="Evaluate and export EMA weights where there are any.")


class Checkpoint(Section):
    every: Annotated[int, Field(ge=0)] = Field(
        default=50, description="Iterations between checkpoints; 0: only at the end."
    )
    keep: PositiveInt = Field(default=2, description="The latest so many stay; the best by held-out reward stays too.")
    background: bool = Field(
        default=True, description="A thread writes them from a copy in host memory while training goes on."
    )


class Telemetry(Section):
    tensorboard: bool = False
    wandb_project: str | None = Field(default=None, description="null: no Weights & Biases.")
    progress: bool = Field(default=True, description="A live line on the terminal.")
    profile: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        description="Iterations of which each rank writes a torch profiler trace into the run's profile/, as [20, 22].",
    )


class Parallel(Section):
    fsdp: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="FSDP2 sharding; auto: on for several ranks, or where dtype is bfloat16.",
    )
    replicate: PositiveInt = Field(default=1, description="Copies of the sharded model: HSDP, as one for each node.")
    shard: PositiveInt | Literal["auto"] = Field(
        default="auto", description="Ranks a copy is sharded over, beside context; auto: all there are."
    )
    context: PositiveInt = Field(
        default=1,
        description="Ranks that share the tokens of a sample (Ulysses), which must be of one node; weights are sharded "
        "over them too.",
    )
    context_kind: Literal["ulysses", "ring"] = Field(
        default="ulysses",
        description="How context ranks attend. ulysses: tokens are exchanged for heads; ring: keys and values go "
        "round, on GPUs, for flux and wan.",
    )
    load: Literal["whole", "sharded"] = Field(
        default="whole",
        description="Of full fine-tuning's float32 weights. whole: every rank loads all, then keeps its shard; "
        "sharded: each reads its shards from safetensors, and none ever holds all.",
    )
    frozen: Literal["shard", "replicate"] = Field(
        default="shard",
        description="The weights that a LoRA run, or model.trainable, does not train: sharded and gathered like the "
        "others, or whole on every rank and never gathered.",
    )


class Config(Section):
    """A run. Written back, resolved, to `run.dir/config.yaml`."""

    run: Run = Field(default_factory=Run)
    model: Model
    prompts: Prompts
    rollout: Rollout = Field(default_factory=Rollout)
    rewards: Annotated[list[RewardSpec], Field(min_length=1)]
    scoring: Scoring = Field(default_factory=Scoring)
    advantage: Advantage = Field(default_factory=Advantage)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    update: Update = Field(default_factory=Update)
    train: Train = Field(default_factory=Train)
    eval: Eval = Field(default_factory=Eval)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    telemetry: Telemetry = Field(default_factory=Telemetry)
    guard: Guard = Field(default_factory=Guard)
    parallel: Parallel = Field(default_factory=Parallel)

    @property
    def scored(self) -> list[RewardSpec]:
        """The rewards of the run, one by one: what is loaded, scored, weighted and logged."""
        return flatten_rewards(self.rewards)

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        roll, trained = self.rollout, self.rollout.trained
        if isinstance(trained, WindowSteps):
            trained.check(roll.steps)
        for key, plain in (("suffix_steps", None), ("suffix_solver", "first_order")):
            if isinstance(trained, SubsetSteps) and getattr(roll, key) != plain:
                raise ValueError(f"rollout.{key}: needs a window of trained steps; set rollout.trained.kind to window")
        if isinstance(trained, SubsetSteps) and int(trained.fraction * (roll.steps - 1)) < 1:
            raise ValueError(
                f"rollout.trained.fraction: {trained.fraction} of {roll.steps - 1} transitions is less than one step"
            )
        if roll.sampler == "cps" and roll.eta >= 1:
            raise ValueError(f"rollout.eta: {roll.eta} is not below 1, as the noise level of cps must be")
        objective = self.objective
        if roll.old_values == "log_prob" and (
            objective.ratio != "gaussian" or objective.kl_weight or objective.dppo_threshold is not None
        ):
            raise ValueError(
                "rollout.old_values: log_prob knows the ratio alone; another objective.ratio than gaussian, kl_weight "
                "and dppo_threshold need velocity"
            )
        if roll.best_of is not None and (roll.best_of < roll.group_size or roll.group_size % 2):
            raise ValueError(
                f"rollout.best_of: half the best and half the worst of {roll.best_of} cannot be {roll.group_size} "
                "(rollout.group_size), which must be even and no more than it"
            )
        if roll.best_of is not None and roll.prompts_per_iteration % self.update.optimizer_steps:
            raise ValueError(
                f"update.optimizer_steps: {self.update.optimizer_steps} does not divide the "
                f"{roll.prompts_per_iteration} prompts of an iteration, whose groups rollout.best_of keeps whole"
            )
        if late := next((r.key for r in self.scored if r.every > 1 and r.weight), None):
            raise ValueError(
                f"rewards: '{late}' is trained, so it is scored every iteration; drop every, or its weight"
            )
        samples = roll.prompts_per_iteration * roll.candidates
        if samples % self.update.optimizer_steps:
            raise ValueError(
                f"update.optimizer_steps: {self.update.optimizer_steps} does not divide the {samples} samples of an "
                "iteration (rollout.prompts_per_iteration × rollout.group_size)"
            )
        if self.eval.every and self.prompts.heldout is None:
            raise ValueError("eval.every: needs prompts.heldout; give held-out prompts, or set eval.every to 0")
        names = [reward.key for reward in self.scored]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"rewards: '{twice}' is named twice; give its weights as one, or each a label")
        if sum(abs(r.weight) for r in self.scored) == 0:
            raise ValueError("rewards: every weight is 0, so nothing would be learned; give one a weight")
        if self.guard.action != "off" and all(r.weight for r in self.scored):
            raise ValueError(f"guard.action: {self.guard.action} needs a held-out reward; give one weight 0")
        if self.guard.action == "raise_kl" and not objective.kl_weight:
            raise ValueError("guard.action: raise_kl needs a KL term to raise; set objective.kl_weight above 0")
        if self.model.trainable and self.model.lora:
            raise ValueError(
                "model.trainable: chooses among full weights, and model.lora trains none; drop one of them"
            )
        if self.model.text_encoders == "drop" and self.model.embedding_cache is None:
            raise ValueError("model.text_encoders: drop needs a place for what they encode; set model.embedding_cache")
        if self.parallel.load == "sharded" and self.model.lora:
            raise ValueError("parallel.load: sharded is for full fine-tuning, and model.lora is set; set it to whole")
        if self.model.quantize and not self.model.lora:
            raise ValueError(
                f"model.quantize: {self.model.quantize} weights cannot be trained; set model.lora, or quantize to null"
            )
        if self.model.dtype == "bfloat16" and self.parallel.fsdp == "off":
            raise ValueError("parallel.fsdp: off cannot serve model.dtype bfloat16, whose float32 masters FSDP2 keeps")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a YAML file and `key.sub=value` overrides. Raises ConfigError."""
    return load_settings(Config, path, overrides)


def validate(data: dict[str, Any]) -> Config:
    """A Config from plain data. Raises ConfigError."""
    return validate_settings(Config, data)


def dump(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal Config."""
    return dump_settings(config)
