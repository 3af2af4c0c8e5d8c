"""What a rollout is made of: the run, the model, its prompts, the sampler and the trained steps (see config.py)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastgrpo.settings import NonEmpty, PositiveFloat, PositiveInt, Section


class Run(Section):
    dir: NonEmpty = Field(default="runs/default", description="Where everything this run writes goes.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="The 64-bit key of all noise and all draws."
    )
    resume: bool | Literal["auto"] = Field(
        default=False,
        description="true: continue the checkpoint in run.dir (an error without one); false: refuse a used run.dir; "
        "auto: continue if there is a checkpoint, else start.",
    )


class Lora(Section):
    rank: PositiveInt = 32
    alpha: PositiveFloat = Field(default=64.0, description="The update is scaled by alpha / rank.")
    targets: list[NonEmpty] | None = Field(
        default=None, description="Module name endings; null: the family's attention."
    )


class Model(Section):
    family: NonEmpty = Field(description="Which file of fastgrpo/models serves it, such as flux or stable_diffusion.")
    path: NonEmpty = Field(description="A diffusers pipeline directory, a hub id, or shapes:<name> (shipped).")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the forward pass; masters are float32."
    )
    height: PositiveInt = 512
    width: PositiveInt = 512
    frames: PositiveInt = Field(default=1, description="1 for images; 4k + 1 for most video VAEs.")
    vae_tiling: bool = Field(
        default=False, description="Decode videos in overlapping tiles that are blended: less memory, faint seams."
    )
    fps: PositiveFloat = Field(default=8.0, description="Frames a second, as rewards and video files see a sample.")
    guidance: Annotated[float, Field(ge=0)] = Field(
        default=3.5, description="Guidance scale, as the pipeline takes it; at most 1: no classifier-free guidance."
    )
    negative_prompt: str = Field(
        default="", description="What classifier-free guidance leads away from, where a prompt has none of its own."
    )
    embedding_cache: NonEmpty | None = Field(
        default=None,
        description="Directory of encoded prompts; with it the text encoders load only for a prompt it lacks. "
        "null: encoded prompts are kept in memory only.",
    )
    text_encoders: Literal["keep", "offload", "drop"] = Field(
        default="keep",
        description="keep: on the device; offload: in host memory, on the device while prompts are encoded; drop: the "
        "prompts that the run will draw are encoded before it begins, and the encoders freed.",
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
        description="blocks: torch.compile of each repeated block of the trained components. Rollout and update are "
        "compiled apart, so the first ratio is 1 to rounding, not to the bit.",
    )
    attention_backend: NonEmpty | None = Field(
        default=None,
        description="Of the trained components, by diffusers' name: native, flash, xformers, flash_hub and others; "
        "null: PyTorch's own.",
    )


class Prompts(Section):
    train: NonEmpty = Field(
        description="A .txt, .jsonl or .csv file, shapes:train, moving:train, or hf:<dataset>[:split[:column]] on the "
        "hub."
    )
    select: Literal["epochs", "spread"] = Field(
        default="epochs",
        description="epochs: every prompt equally often; spread: more often where its last groups' rewards differed.",
    )
    heldout: str | None = Field(default=None, description="Prompts never trained on, for evaluation; same forms.")


class WindowSteps(Section):
    """Consecutive trained steps; the others are deterministic (MixGRPO, arXiv 2507.21802)."""

    kind: Literal["window"] = "window"
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
    stride: PositiveInt = 1

    def check(self, steps: int) -> None:
        """Raises ValueError unless the window, and what it moves over, lies among the trainable transitions."""
        if self.start + self.size > steps - 1:
            raise ValueError(
                f"rollout.trained: the window of {self.size} from step {self.start} reaches the last of "
                f"{steps} transitions, which is never trained; start + size must be at most {steps - 1}"
            )
        if self.stop is not None and not self.start + self.size <= self.stop <= steps - 1:
            raise ValueError(
                f"rollout.trained.stop: {self.stop} should be from {self.start + self.size} (start + size) to "
                f"{steps - 1} (the last of {steps} transitions, which is never trained)"
            )


class SubsetSteps(Section):
    """All transitions but the last are stochastic; each sample trains a random subset (DanceGRPO)."""

    kind: Literal["subset"] = "subset"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.6


class Rollout(Section):
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
        default=False, description="Tell a flow's model ⌊1000σ⌋/1000 for σ, as DanceGRPO does; for parity only."
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
    share_prefix: bool = Field(
        default=True,
        description="With shared_noise: evaluate what a group has in common once per prompt, not per sample.",
    )
    forward_batch: PositiveInt = Field(
        default=16, description="Rows of every forward pass, rollout and replay alike; a constant of the numerics."
    )
    decode_batch: PositiveInt = 16
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
        description="Sharded weights: once: gathered for the whole rollout; per_block: for each block's forward, and "
        "freed after it; auto: once where memory allows.",
    )
    old_values: Literal["velocity", "log_prob"] = Field(
        default="velocity",
        description="What an update compares with. velocity: the model's output, exact. log_prob: latents and their "
        "log-probabilities, subtracted as other trainers do, to compare with them.",
    )

    @property
    def candidates(self) -> int:
        """Samples of each prompt that are rolled out."""
        return self.best_of or self.group_size

    def keeps_noise(self, device: str) -> bool:
        """Whether the noise of trained steps stays in memory on a kind of device."""
        return self.noise == "keep" or (self.noise == "auto" and device == "cpu")
