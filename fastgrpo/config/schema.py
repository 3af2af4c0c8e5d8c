"""Every setting of a run, typed and documented: YAML in, resolved YAML out.

An unknown key, a wrong type or an impossible combination raises `ConfigError` (fastgrpo/config/sections.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastgrpo.config.checks import check_combinations
from fastgrpo.config.sections import (
    NonEmpty,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Unit,
    dump_settings,
    load_settings,
    validate_settings,
)


class Run(Section):
    """Where a run is kept, its seed, and whether it continues."""

    dir: PathText = Field(default="runs/default", description="Where everything this run writes goes.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="The 64-bit key of all noise and all draws."
    )
    resume: bool | Literal["auto"] = Field(
        default=False,
        description="true: continue the checkpoint in run.dir (an error without one); false: refuse a used run.dir; "
        "auto: continue if there is a checkpoint, else start.",
    )


class Lora(Section):
    """Low-rank adapters on a frozen base, in place of full fine-tuning."""

    rank: PositiveInt = Field(default=32, description="Columns of the two matrices whose product is the update.")
    alpha: PositiveFloat = Field(default=64.0, description="The update is scaled by alpha / rank.")
    path: PathText | None = Field(
        default=None,
        description="A LoRA to train on from, of this rank: a .safetensors file, or a directory or hub id with one, in "
        "any form that diffusers reads; null: it begins as nothing. A KL term compares with the model without it.",
    )
    targets: list[NonEmpty] | None = Field(
        default=None, description="Module name endings; null: the family's attention."
    )


class Model(Section):
    """The pipeline that is trained, what its samples are, and which of its weights learn."""

    family: NonEmpty = Field(description="Which model family serves it, such as flux or stable_diffusion.")
    path: PathText = Field(description="A diffusers pipeline directory, a hub id, or shapes:<name> (shipped).")
    variant: NonEmpty | None = Field(
        default=None, description="Of the weights' files: fp16 for model.fp16.safetensors; null: those without one."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Of the forward pass; masters are float32. float16, for GPUs without bfloat16, scales the loss and "
        "keeps the VAE in float32.",
    )
    height: PositiveInt = Field(default=512, description="Of a sample, in pixels; a multiple of what the VAE takes.")
    width: PositiveInt = Field(default=512, description="As height.")
    frames: PositiveInt = Field(default=1, description="1 for images; 4k + 1 for most video VAEs.")
    vae_tiling: bool = Field(
        default=False, description="Decode videos in overlapping tiles that are blended: less memory, faint seams."
    )
    fps: PositiveFloat = Field(default=8.0, description="Frames a second, as rewards and video files see a sample.")
    guidance: Annotated[float, Field(ge=0)] = Field(
        default=3.5, description="Guidance scale, as the pipeline takes it; at most 1 (of z_image 0): no second branch."
    )
    guidance_2: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Guidance scale of a second transformer (Wan 2.2 A14B's); null: model.guidance."
    )
    true_cfg: Annotated[float, Field(ge=1)] = Field(
        default=1.0,
        description="FLUX's second guidance, by a negative branch beside the scale that it is told (true_cfg_scale of "
        "its pipelines); 1: none.",
    )
    negative_prompt: str = Field(
        default="", description="What classifier-free guidance leads away from, where a prompt has none of its own."
    )
    embedding_cache: PathText | None = Field(
        default=None,
        description="Directory of encoded prompts; with it the text encoders load only for a prompt it lacks. "
        "null: encoded prompts are kept in memory only.",
    )
    text_encoders: Literal["keep", "offload", "drop"] = Field(
        default="keep",
        description="keep: on the device; offload: in host memory, on the device while prompts are encoded; drop: the "
        "prompts that the run will draw are encoded before it begins, while what is trained is in host memory, and the "
        "encoders freed.",
    )
    vae: Literal["keep", "offload"] = Field(
        default="keep", description="offload: in host memory, on the device while images are encoded and decoded."
    )
    max_sequence_length: PositiveInt = Field(default=512, description="Text tokens.")
    lora: Lora | None = Field(default=None, description="null: full fine-tuning.")
    quantize: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: the linear layers of a LoRA's frozen blocks in 4.5 bits a weight, whole on every rank, by "
        "bitsandbytes (fastgrpo[gpu]); null: in dtype.",
    )
    trainable: Annotated[list[NonEmpty], Field(min_length=1)] | None = Field(
        default=None,
        description="Full fine-tuning of these parts alone, by dotted name (time_text_embed, norm1.linear); null: all.",
    )
    activation_checkpointing: Literal["none", "selective", "all", "auto"] | PositiveInt = Field(
        default="none",
        description="What is recomputed in backward. all: every block; k: every k-th block; selective: all of a block "
        "but its matrix products and attention; auto: the least of none, selective and all that a plan says fits.",
    )
    compile: Literal["none", "blocks"] = Field(
        default="none",
        description="blocks: torch.compile of each repeated block of the trained components. The rollout runs the code "
        "of the update's forward, so that the first ratio is exactly 1: it takes that much memory, too.",
    )
    attention_backend: NonEmpty | None = Field(
        default=None,
        description="Of the trained components, by diffusers' name: native, flash, xformers, flash_hub and others; "
        "null: PyTorch's own.",
    )


class Prompts(Section):
    """What is drawn: in training, and in evaluation."""

    train: PathText = Field(
        description="A .txt, .jsonl or .csv file; set:images or set:videos (shipped), shapes:train, moving:train, "
        "editing:train, words:train; "
        "hf:<dataset>[:split[:column]] on the hub, or a source of an installed package."
    )
    select: Literal["epochs", "spread"] = Field(
        default="epochs",
        description="epochs: every prompt equally often; spread: more often where its last groups' rewards differed.",
    )
    heldout: PathText | None = Field(default=None, description="Prompts never trained on, for evaluation; same forms.")


class WindowSteps(Section):
    """Consecutive trained steps; the others are deterministic (MixGRPO, arXiv 2507.21802)."""

    kind: Literal["window"] = Field(default="window", description="window: consecutive steps.")
    size: PositiveInt = Field(default=4, description="Trained transitions.")
    start: Annotated[int, Field(ge=0)] = Field(
        default=0, description="First trained transition; 0 is the noisiest. A moving window never goes before it."
    )
    stop: PositiveInt | None = Field(
        default=None, description="A moving window ends before this transition; null: before the last one."
    )
    move: Literal["fixed", "progressive", "random"] = Field(
        default="fixed",
        description="progressive: shifts by stride every `every` iterations, and wraps; random: drawn anew.",
    )
    every: PositiveInt = Field(default=25, description="Iterations between moves.")
    stride: PositiveInt = Field(default=1, description="Transitions that a progressive window moves by.")

    def problems(self, steps: int) -> Iterator[str]:
        """What is wrong unless the window, and what it moves over, lies among the trainable transitions."""
        if self.start + self.size > steps - 1:
            yield (
                f"rollout.trained: the window of {self.size} from step {self.start} reaches the last of "
                f"{steps} transitions, which is never trained; start + size must be at most {steps - 1}"
            )
        elif self.stop is not None and not self.start + self.size <= self.stop <= steps - 1:
            yield (
                f"rollout.trained.stop: {self.stop} should be from {self.start + self.size} (start + size) to "
                f"{steps - 1} (the last of {steps} transitions, which is never trained)"
            )


class SubsetSteps(Section):
    """All transitions but the last (see rollout.last_step) are stochastic; each sample trains a random subset of them
    (DanceGRPO)."""

    kind: Literal["subset"] = Field(default="subset", description="subset: steps drawn at random for each sample.")
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.6, description="Of the transitions, rounded down: how many are trained."
    )


class Rollout(Section):
    """How samples are drawn: the sampler, its steps and noise, and which steps are trained."""

    prompts_per_iteration: PositiveInt = Field(default=8, description="Prompts an iteration, over all ranks.")
    group_size: Annotated[int, Field(ge=2)] = Field(default=12, description="Samples of each prompt.")
    best_of: PositiveInt | None = Field(
        default=None,
        description="Roll out so many of each prompt and train on group_size of them: half the best, half the worst.",
    )
    steps: Annotated[int, Field(ge=2)] = Field(default=16, description="Sampling steps.")
    shift: PositiveFloat | Literal["pipeline"] = Field(
        default="pipeline",
        description="k in k·σ/(1+(k−1)·σ); pipeline: as its scheduler says, by resolution if it does.",
    )
    sampler: Literal["dance_sde", "flow_sde", "cps", "ddim"] = Field(
        default="dance_sde", description="The stochastic transitions; ddim for diffusion models, the others for flows."
    )
    eta: PositiveFloat = Field(default=0.3, description="Noise level of the sampler: η, or n for flow_sde and cps.")
    truncate_timesteps: bool = Field(
        default=False,
        description="Tell a flow's model ⌊1000σ⌋/1000 for σ, in DanceGRPO's float32 arithmetic; for parity only.",
    )
    last_step: Literal["deterministic", "stochastic", "trained"] = Field(
        default="deterministic",
        description="For parity, of the last transition, where trained.kind is subset. stochastic: it adds its noise, "
        "as Flow-GRPO's does, and is not trained; trained: it is drawn like the others too.",
    )
    trained: WindowSteps | SubsetSteps = Field(
        default_factory=WindowSteps, discriminator="kind", description="Which steps are stochastic and trained."
    )
    suffix_steps: PositiveInt | None = Field(
        default=None,
        description="Deterministic steps after the window, evenly over the levels left (MixGRPO-Flash); null: all.",
    )
    suffix_solver: Literal["first_order", "dpmpp_2m"] = Field(
        default="first_order",
        description="Of the deterministic steps after the window. first_order: Euler, or DDIM; dpmpp_2m: DPM-Solver++ "
        "2M, which needs fewer.",
    )
    shared_noise: bool = Field(default=True, description="One initial noise for a prompt's whole group.")
    antithetic: bool = Field(
        default=False,
        description="With shared_noise: a group in pairs, of which one sample takes the other's noise negated at every "
        "stochastic step, so that what is even in it cancels; group_size is even.",
    )
    share_prefix: bool = Field(
        default=True,
        description="With shared_noise: evaluate what a group has in common once per prompt, not per sample.",
    )
    forward_batch: PositiveInt = Field(
        default=16, description="Rows of every forward pass, rollout and replay alike; a constant of the numerics."
    )
    decode_batch: PositiveInt = Field(default=16, description="Samples that the VAE decodes at once.")
    noise: Literal["auto", "keep", "regenerate"] = Field(
        default="auto",
        description="Of the trained steps: kept, or drawn again from its key; auto keeps it on a CPU only.",
    )
    trajectory: Literal["device", "host"] = Field(
        default="device",
        description="Where what the update needs of the trained steps waits for it; host: in page-locked memory, rows "
        "copied as micro-batches take them.",
    )
    gather: Literal["auto", "once", "per_block"] = Field(
        default="auto",
        description="Sharded weights: once: unsharded for the whole rollout; per_block: for each block's forward, and "
        "freed after it; auto: once where memory allows.",
    )
    old_values: Literal["velocity", "log_prob"] = Field(
        default="velocity",
        description="What an update compares with. velocity: the model's output, exact. log_prob: latents and their "
        "log-probabilities, subtracted as other trainers do, to compare with them.",
    )

    @property
    def subset_candidates(self) -> int:
        """The transitions that a random subset is drawn from."""
        return self.steps if self.last_step == "trained" else self.steps - 1

    @property
    def candidates(self) -> int:
        """Samples of each prompt that are rolled out."""
        return self.best_of or self.group_size

    def keeps_noise(self, device: str) -> bool:
        """Whether the noise of trained steps stays in memory on a kind of device."""
        return self.noise == "keep" or (self.noise == "auto" and device == "cpu")


class RewardSpec(Section):
    """One reward. What `options` a reward takes, and where weights come from: docs/rewards.md."""

    name: NonEmpty = Field(description="A registered reward, or module:Class.")
    label: NonEmpty | None = Field(default=None, description="What logs call it; null: its name.")
    weight: float = Field(default=1.0, description="0: watched, not trained.")
    every: PositiveInt = Field(default=1, description="With weight 0: scored in every so many iterations.")
    path: PathText | None = Field(
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
    timeout: PositiveFloat | None = Field(
        default=1800.0,
        description="Seconds that a reward in this process may take for a chunk; later its samples have failed. null: "
        "no limit.",
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
    kl_factor: Annotated[float, Field(gt=1)] = Field(
        default=2.0, description="What raise_kl multiplies objective.kl_weight by."
    )


class Advantage(Section):
    """How the rewards of a group become advantages."""

    clip: PositiveFloat = Field(default=5.0, description="Advantages are clamped to ± this.")
    combine: Literal["advantage", "reward", "losses"] = Field(
        default="advantage",
        description="Several rewards: a weighted sum of normalised advantages (GDPO), of rewards, or of clipped "
        "losses, one for each reward (DanceGRPO).",
    )
    normalize: Literal["std", "global", "mean_only"] = Field(
        default="std",
        description="What divides what is above the group's mean. std: the group's standard deviation; global: that of "
        "all the iteration's rewards, plus 1e-4, as other trainers do; mean_only: nothing.",
    )
    positive_only: bool = Field(default=False, description="Train only samples that are better than their group.")
    keep: PositiveInt | None = Field(
        default=None, description="Train so many samples of each group, those of the largest |A|; null: all."
    )


class TrainingTimes(Section):
    """The noise levels of training rows, of the objectives of the forward process: drawn anew in every epoch."""

    count: PositiveInt = Field(default=4, description="Rows of each sample in an epoch, each at a level of its own.")
    draw: Literal["levels", "strata", "uniform", "logit_normal"] = Field(
        default="levels",
        description="levels: of the rollout's own steps, none twice for a sample; strata: one of each of `count` equal "
        "parts of these steps; uniform, logit_normal: any level, one in each of `count` parts of equal probability.",
    )
    low: Unit = Field(default=0.0, description="No level below this (1: pure noise); of uniform, before the shift.")
    high: Unit = Field(default=1.0, description="No level above this.")
    shift: PositiveFloat = Field(
        default=1.0, description="k in k·t/(1+(k−1)·t), of levels that are drawn uniform or logit_normal."
    )


class OldPolicyDecay(Section):
    """How the old policy of a forward process follows the trained one, at the end of each iteration: it keeps a share
    of itself, rate for every optimizer step after the first `flat`, and at most `most`. All 0: a copy."""

    flat: Annotated[int, Field(ge=0)] = Field(default=0, description="Optimizer steps in which it is a copy.")
    rate: Annotated[float, Field(ge=0)] = Field(default=0.0, description="Grows by this with every step after them.")
    most: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.0, description="The largest share that it keeps.")

    @property
    def copies(self) -> bool:
        """Whether it is the weights of the last rollout, and nothing older."""
        return self.rate == 0 or self.most == 0

    def at(self, steps: int) -> float:
        """The share that it keeps of itself after so many optimizer steps."""
        return min(max(steps - self.flat, 0) * self.rate, self.most)


class ObjectiveConfig(Section):
    """What the policy minimizes: of trajectories, GRPO's clipped ratio; or of the forward process, an objective that
    noises final samples again (docs/adding-an-objective.md). And, where it has a weight, a KL term."""

    kind: NonEmpty = Field(
        default="grpo",
        description="grpo: of trajectories; nft (DiffusionNFT), awm (advantage-weighted matching), dpo (online "
        "Diffusion-DPO), or one of an installed package: of the forward process.",
    )
    ratio: Literal["gaussian", "unit", "ratio_norm"] = Field(
        default="gaussian",
        description="With kind grpo: gaussian: π_new/π_old; unit: CPS trainers' unscaled form; ratio_norm: GRPO-Guard.",
    )
    clip_low: PositiveFloat = Field(default=1e-4, description="With grpo, awm: the ratio is clipped below 1 − this.")
    clip_high: PositiveFloat = Field(default=1e-4, description="… and above 1 + this.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="With kind grpo: bounds the loss where A < 0."
    )
    kl_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Of the KL to the reference model, in the convention of `kl`."
    )
    kl: Literal["gaussian", "flow_grpo", "x", "v"] = Field(
        default="gaussian",
        description="gaussian: that of a step's two Gaussians, per element; flow_grpo: its standard deviation without "
        "√Δσ, as in that project's image scripts; x: the mean squared difference of the steps' means; v: of the "
        "model's outputs, the one that a forward process has.",
    )
    dppo_threshold: PositiveFloat | None = Field(
        default=None,
        description="With kind grpo: Flow-DPPO: drop a pair whose KL exceeds this and whose ratio moves further out.",
    )
    beta: PositiveFloat | None = Field(
        default=None,
        description="With nft: how far its two branches go from the old policy; null: 1. With dpo: how much a pair's "
        "difference of errors counts; null: 2000.",
    )
    weighting: Literal["uniform", "t", "t**2", "huber", "ghuber"] = Field(
        default="uniform", description="With kind awm: what makes its log-probability of the squared error."
    )
    power: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25, description="With weighting ghuber: of the squared error."
    )
    pairs: PositiveInt = Field(
        default=1, description="With kind dpo: of each group, so many of the best with as many of the worst."
    )
    times: TrainingTimes = Field(
        default_factory=TrainingTimes, description="Of a forward process: the noise levels of its rows."
    )
    old_decay: OldPolicyDecay = Field(
        default_factory=OldPolicyDecay,
        description="With nft, awm: how the old policy follows. Unless it is a copy, it rolls out.",
    )
    old_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="With nft, awm: this times the mean squared change of the output since the old policy is added to "
        "a row's loss.",
    )
    guidance: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Of a forward process: the guidance scale of training rows; null: model.guidance."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Of an installed package's objective: passed to it as keyword arguments."
    )

    @property
    def forward(self) -> bool:
        """Whether it trains on final samples that are noised again, not on the steps of trajectories."""
        return self.kind != "grpo"


class Optimizer(Section):
    """AdamW and its learning rate."""

    kind: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw",
        description="adamw_8bit: its moments in 2 bytes a weight in place of 8, by bitsandbytes (fastgrpo[gpu]).",
    )
    lr: PositiveFloat | Literal["auto"] = Field(
        default=1e-5,
        description="Learning rate, after warm-up. auto: finds itself, by how far updates move the policy (travel), "
        "with a forward of the trained rows in the first 16 iterations and every fourth after, which plans leave out.",
    )
    travel: PositiveFloat = Field(
        default=1.5,
        description="What lr: auto divides among a run's iterations: how far their updates, one after the other, move "
        "the mean of a trained step's transition, in units of the step's standard deviation (root mean square of the "
        "elements, at the rate before the schedule).",
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.9, description="Decay of the mean of gradients, each step."
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="Decay of the mean of squared gradients, each step."
    )
    eps: PositiveFloat = Field(default=1e-8, description="Added to the root of the mean square that divides.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=1e-4, description="Decoupled, times the learning rate.")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant", description="After warm-up; cosine falls to zero."
    )
    warmup: Annotated[int, Field(ge=0)] = Field(default=0, description="Optimizer steps of linear warm-up.")


class Update(Section):
    """How the weights follow: optimizer steps, clipping, EMA."""

    optimizer_steps: PositiveInt = Field(
        default=1, description="Per rollout and epoch; each takes an equal share of the samples."
    )
    epochs: PositiveInt = Field(
        default=1,
        description="How often an iteration's samples are gone through: each time divided otherwise over the optimizer "
        "steps and, in a forward process, at other noise levels with other noise.",
    )
    replay: PositiveInt = Field(
        default=1,
        description="Train on so many of the latest rollouts: the newest in its epochs, then each earlier one once, by "
        "its own ratios; objective.dppo_threshold drops what is too far from the policy. 1: the newest alone.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer)
    max_grad_norm: PositiveFloat = Field(default=1.0, description="Gradients of a larger norm are scaled down to it.")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(default=None, description="null: no EMA.")
    ema_per: Literal["optimizer_step", "iteration"] = Field(
        default="optimizer_step", description="What the EMA's decay counts: it is averaged after each of these."
    )
    ema_warmup: bool = Field(
        default=True,
        description="The n-th average has a decay of at most (1 + n)/(10 + n), so that the start weights fade sooner.",
    )
    gather: Literal["auto", "once", "per_block"] = Field(
        default="auto",
        description="Sharded weights: once: kept unsharded over the micro-batches of an optimizer step; per_block: "
        "unsharded for each block's forward, and again for its backward; auto: once where memory allows.",
    )
    grad_sync: Literal["auto", "once", "per_micro_batch"] = Field(
        default="auto",
        description="Gradients reduced over ranks once per optimizer step, which keeps 4 bytes of every trained weight "
        "on every rank, or after each micro-batch; auto: once where that is small (a LoRA, a small model).",
    )


class Train(Section):
    """How long."""

    iterations: PositiveInt = Field(default=300, description="Of the whole run; a resumed run counts on.")
    max_skipped_steps: PositiveInt | None = Field(
        default=20,
        description="So many optimizer steps in a row that are skipped, gradients not being finite, pause the run; "
        "null: never.",
    )


class Eval(Section):
    """Held-out evaluations, drawn deterministically."""

    every: Annotated[int, Field(ge=0)] = Field(
        default=50, description="Iterations between held-out evaluations; 0: never."
    )
    images: PositiveInt = Field(default=64, description="Images an evaluation draws, deterministically.")
    steps: PositiveInt | None = Field(default=None, description="Sampling steps; null: rollout.steps.")
    height: PositiveInt | None = Field(default=None, description="Of what is drawn; null: model.height.")
    width: PositiveInt | None = Field(default=None, description="null: model.width.")
    frames: PositiveInt | None = Field(default=None, description="null: model.frames.")
    guidance: Annotated[float, Field(ge=0)] | None = Field(default=None, description="null: model.guidance.")
    grid: PositiveInt = Field(default=24, description="Images of the fixed-seed grid.")
    mp4: bool = Field(default=False, description="Videos: the grid as MP4 too, which needs PyAV (fastgrpo[video]).")
    ema: bool = Field(default=True, description="Evaluate and export EMA weights where there are any.")


class Checkpoint(Section):
    """When checkpoints are written, and how many stay."""

    every: Annotated[int, Field(ge=0)] = Field(
        default=50, description="Iterations between checkpoints; 0: only at the end."
    )
    keep: PositiveInt = Field(default=2, description="The latest so many stay; the best by held-out reward stays too.")
    background: bool = Field(
        default=True, description="A thread writes them from a copy in host memory while training goes on."
    )


class Telemetry(Section):
    """What is shown and written beside metrics.jsonl and events.jsonl."""

    tensorboard: bool = Field(default=False, description="Also for TensorBoard, in run.dir/tensorboard.")
    wandb_project: str | None = Field(default=None, description="null: no Weights & Biases.")
    progress: bool = Field(default=True, description="A live line on the terminal.")
    stall_seconds: Annotated[float, Field(ge=0)] = Field(
        default=60.0,
        description="A rank that others wait for, a reward, or a rank without a sign of life for so long is named on "
        "stderr, with its phase; 0: never.",
    )
    profile: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        description="Iterations of which each rank writes a torch profiler trace into the run's profile/, as [20, 22].",
    )


class Parallel(Section):
    """How ranks share weights and samples."""

    fsdp: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="FSDP2 sharding; auto: on for several ranks, or where dtype is bfloat16 or float16.",
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
    timeout: PositiveFloat = Field(
        default=1800.0, description="Seconds that a rank waits for the others in a collective before the run ends."
    )
    frozen: Literal["shard", "replicate"] = Field(
        default="shard",
        description="The weights that a LoRA run, or model.trainable, does not train: sharded like the others, "
        "or whole on every rank.",
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
    callbacks: list[NonEmpty] = Field(
        default_factory=list,
        description="Your own, as module:Class or file.py:Class (docs/training.md): called around each iteration.",
    )

    @property
    def evaluated_model(self) -> Model:
        """The model section as evaluations and samples are drawn: `model`, with what `eval` sets in its place."""
        names = ("height", "width", "frames", "guidance")
        wanted = {name: getattr(self.eval, name) for name in names if getattr(self.eval, name) is not None}
        return self.model.model_copy(update=wanted) if wanted else self.model

    @property
    def scored(self) -> list[RewardSpec]:
        """The rewards of the run, one by one: what is loaded, scored, weighted and logged."""
        return flatten_rewards(self.rewards)

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        check_combinations(self)
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config.

    Args:
        path: A YAML file, or a run directory's config.yaml.
        overrides: `key.sub=value` each; of two for one key the last counts.

    Returns:
        The config, every setting resolved that needs no plan.

    Raises:
        ConfigError: For a file that cannot be read, an unknown key, or a value that does not fit; it names the setting.
    """
    return load_settings(Config, path, overrides)


def validate(data: dict[str, Any]) -> Config:
    """A Config from plain data. Raises ConfigError."""
    return validate_settings(Config, data)


def dump(config: Config) -> str:
    """The resolved config as YAML; `load_config` reads it back to an equal Config."""
    return dump_settings(config)
