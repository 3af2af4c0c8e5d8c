"""The settings of a pretraining run, and the worlds and tiny pipelines that it may name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastgrpo.config import Config, Model, validate
from fastgrpo.config.sections import Section, validate_settings
from fastgrpo.data.prompts import Prompt, world_prompts
from fastgrpo.errors import ConfigError, nearest
from fastgrpo.models import family_class
from fastgrpo.shapes import (
    editing_render,
    editing_world,
    moving_render,
    moving_world,
    render,
    word_render,
    word_world,
    world,
)


class AutoencoderConfig(Section):
    """The first stage: mean absolute error, squared error where it has a weight, a small KL term, on fresh renders."""

    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    warmup: int = Field(ge=0)
    kl_weight: float = Field(ge=0)
    # The absolute error alone is content with an empty picture for long: most pixels are background.
    squared_weight: float = Field(default=0.0, ge=0)
    # An image pipeline whose autoencoder a video one starts from: it draws frames before it has seen a video.
    inflate: str | None = None
    bfloat16: bool


class DenoiserConfig(Section):
    """The second stage: denoiser and text encoders jointly, on a pool of encoded renders."""

    # A pipeline directory that both start from; what it has no rows for, such as new words, keeps its random start.
    captions: str | None = None  # shapes, moving, editing or words; None: the world that the family draws
    init: str | None = None
    steps: int = Field(ge=1)
    batch: int = Field(ge=1)
    lr: float = Field(gt=0)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)
    ema_decay: float = Field(ge=0, lt=1)
    pool: int = Field(ge=1)
    # Embedded: the scale the model is told. Without a classifier: the scale of the evaluations.
    guidance: float = Field(ge=0)
    # How many prompts are dropped, so that there is an unconditional branch to guide by.
    drop: float = Field(default=0.0, ge=0, lt=1)
    bfloat16: bool = False
    # How often a category is drawn, relative to the others; 1 where none is given.
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class EvalConfig(Section):
    """Deterministic sampling of held-out prompts, every so many steps of the second stage and at its end."""

    every: int = Field(ge=1)
    images: int = Field(ge=1)
    final_images: int = Field(ge=1)
    steps: int = Field(ge=1)


@dataclass(frozen=True)
class CaptionedWorld:
    """Captions with pictures that show them: still shapes, moving ones, edits or words; of categories `only`, if any.

    reward, options: what reads the pictures; its component `strict` is the share of right ones.
    """

    name: str
    module: Any
    reward: str
    options: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    @property
    def prompts(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """(training, held-out)."""
        train, held_out = self.module.split()
        if not self.only:
            return train, held_out
        return [p for p in train if p.category in self.only], [p for p in held_out if p.category in self.only]

    @property
    def categories(self) -> tuple[str, ...]:
        return self.only or self.module.CATEGORIES

    def source(self, part: str) -> str:
        """The prompts as a run's config names them; part: "train" or "heldout"."""
        return ":".join([self.name, part, *filter(None, [",".join(self.only)])])

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return self.module.vocabulary()

    def render(self, prompts: Sequence[Any], rng: np.random.Generator, sizes: Any) -> Tensor:
        """float32 [N, 3, S, S], or [N, 3, F, S, S], in 0..1: one random picture of each prompt."""
        return self.render_pairs(prompts, rng, sizes)[1]

    def render_pairs(
        self, prompts: Sequence[Any], rng: np.random.Generator, sizes: Any
    ) -> tuple[Tensor | None, Tensor]:
        """`render`, and before it what each picture starts from: its first frame, or the source of its edit."""
        if self.module is editing_world:
            source, result = editing_render.render_batch(prompts, rng, sizes.image_size)
            return _pixels(source), _pixels(result)
        if self.module is word_world:
            return None, _pixels(word_render.render_batch(prompts, rng, sizes.image_size, sizes.width))
        if self.module is world:
            return None, _pixels(render.render_batch(prompts, rng, sizes.image_size))
        videos = _pixels(moving_render.render_batch(prompts, rng, sizes.image_size, sizes.frames))
        return videos[:, :, :1], videos

    def truth(self, prompts: Sequence[Any], rng: np.random.Generator, sizes: Any) -> tuple[Tensor, list[Prompt]]:
        """`render`, and the prompts as the world's reward takes them: an edit's source image is the one it names."""
        if self.module is not editing_world:
            return self.render(prompts, rng, sizes), as_prompts(prompts)
        asked = world_prompts(self.module, prompts)
        scenes = [editing_render.scene_of(p.image, sizes.image_size) for p in asked if p.image is not None]
        return _pixels(editing_render.EditScenes.concatenate(scenes).draw(result=True, size=sizes.image_size)), asked

    def draw(
        self, prompts: Sequence[Any], n: int, rng: np.random.Generator, shares: Mapping[str, float] | None = None
    ) -> list[Any]:
        """`n` random prompts: a category as often as its share of all shares (1 unless given), its prompts evenly."""
        members = [[p for p in prompts if p.category == c] for c in self.categories]
        if shares is None:
            categories = rng.integers(len(members), size=n)
        else:
            weights = np.array([shares.get(c, 1.0) for c in self.categories])
            categories = rng.choice(len(members), size=n, p=weights / weights.sum())
        return [members[c][int(rng.integers(len(members[c])))] for c in categories]


def _pixels(drawn: np.ndarray) -> Tensor:
    """float32 [N, 3, …] in 0..1 of uint8 [N, …, 3]."""
    return torch.from_numpy(drawn).movedim(-1, 1).float() / 255


STILL = CaptionedWorld("shapes", world, "shapes")
MOVING = CaptionedWorld("moving", moving_world, "moving_shapes")
EDITING = CaptionedWorld("editing", editing_world, "editing")
WORDS = CaptionedWorld("words", word_world, "ocr", {"detect": False, "match": "equal"})
WORLDS = {known.name: known for known in (STILL, MOVING, EDITING, WORDS)}


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline that can be built: its module, its sizes, and the world that it draws.

    preset: sizes that the family decides, whatever the recipe says.
    """

    module: str
    sizes: str
    world: CaptionedWorld = STILL
    preset: Mapping[str, Any] = field(default_factory=dict)

    def sizes_of(self, data: Mapping[str, Any]) -> Any:
        """Checked sizes. Raises ConfigError."""
        kind = getattr(importlib.import_module(self.module), self.sizes)
        return validate_settings(kind, {**data, **self.preset}, "sizes")

    def build(self, config: PretrainConfig) -> Any:
        """The untrained pipeline, float32."""
        builder = importlib.import_module(self.module).build_pipeline
        return builder(config.world.vocabulary, self.sizes_of(config.sizes), config.seed)


TINY = {
    "flux": Tiny("fastgrpo.shapes.tiny_flux", "TinyFluxSizes"),
    "flux_kontext": Tiny("fastgrpo.shapes.tiny_flux", "TinyFluxSizes", EDITING, {"task": "edit"}),
    "stable_diffusion": Tiny("fastgrpo.shapes.tiny_stable_diffusion", "TinyStableDiffusionSizes"),
    "sd3": Tiny("fastgrpo.shapes.tiny_sd3", "TinySD3Sizes"),
    "qwen_image": Tiny("fastgrpo.shapes.tiny_qwen_image", "TinyQwenImageSizes"),
    "flux2": Tiny("fastgrpo.shapes.tiny_flux2", "TinyFlux2Sizes"),
    "z_image": Tiny("fastgrpo.shapes.tiny_z_image", "TinyZImageSizes"),
    "hunyuan_video": Tiny("fastgrpo.shapes.tiny_hunyuan_video", "TinyHunyuanVideoSizes", MOVING, {"task": "text"}),
    "skyreels": Tiny("fastgrpo.shapes.tiny_hunyuan_video", "TinyHunyuanVideoSizes", MOVING, {"task": "image"}),
}


class PretrainConfig(Section):
    """Every setting of a pretraining run."""

    family: str
    seed: int
    threads: int = Field(ge=1)
    out: str
    captions: str | None = None  # shapes, moving, editing or words; None: the world that the family draws
    init: str | None = None  # a pipeline directory of an earlier run, whose autoencoder is taken as it is
    sizes: dict[str, Any] = Field(default_factory=dict)
    empty_channels: int = Field(default=0, ge=0)  # more latent channels of what is written, see empty_channels.py
    categories: list[str] = Field(default_factory=list)  # of the world's captions; all of them where none is given
    autoencoder: AutoencoderConfig | None = None
    denoiser: DenoiserConfig
    eval: EvalConfig

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.family not in TINY:
            known = ", ".join([*TINY, "clip"])
            raise ConfigError(f"family: unknown family '{self.family}'; {nearest(self.family, TINY)}(one of: {known})")
        if self.captions is not None and self.captions not in WORLDS:
            known = ", ".join(WORLDS)
            raise ConfigError(
                f"captions: unknown world '{self.captions}'; {nearest(self.captions, WORLDS)}(one of: {known})"
            )
        known = self._whole_world.categories
        for key, names, valid in (
            ("categories", self.categories, known),
            ("denoiser.shares", self.denoiser.shares, self.world.categories),
        ):
            for name in names:
                if name not in valid:
                    raise ConfigError(
                        f"{key}.{name}: unknown category; {nearest(name, valid)}(one of: {', '.join(valid)})"
                    )
        TINY[self.family].sizes_of(self.sizes)
        if self.autoencoder and self.autoencoder.inflate and self.world.module is not moving_world:
            raise ConfigError(f"autoencoder.inflate: {self.family} draws no videos; leave it out")
        if self.empty_channels and TINY[self.family].module != TINY["flux"].module:
            raise ConfigError(f"empty_channels: only a FLUX is written with them, not {self.family}; leave it out")
        if (self.init is None) == (self.autoencoder is None):
            raise ConfigError("autoencoder: give its recipe, or in `init` the pipeline to take it from; one of the two")
        return self

    @property
    def world(self) -> CaptionedWorld:
        return replace(self._whole_world, only=tuple(self.categories))

    @property
    def _whole_world(self) -> CaptionedWorld:
        return TINY[self.family].world if self.captions is None else WORLDS[self.captions]

    @property
    def checked_sizes(self) -> Any:
        return TINY[self.family].sizes_of(self.sizes)

    def model(self, path: str, guidance: float) -> Model:
        """The pipeline in a directory, as the trainer would name it."""
        return self.evaluation(path, guidance).model

    def evaluation(self, path: str, guidance: float) -> Config:
        """A run's config that evaluates the pipeline in a directory."""
        sizes = self.checked_sizes
        return validate(
            {
                "run": {"dir": self.out, "seed": self.seed},
                "model": {
                    "family": self.family,
                    "path": path,
                    "height": sizes.image_size,
                    "width": getattr(sizes, "width", sizes.image_size),
                    "frames": getattr(sizes, "frames", 1),
                    "max_sequence_length": sizes.text_length,
                    "guidance": float(guidance),
                },
                "prompts": {"train": self.world.source("train"), "heldout": self.world.source("heldout")},
                "rewards": [{"name": self.world.reward, "options": dict(self.world.options)}],
                "rollout": {
                    "steps": self.eval.steps,
                    "sampler": "ddim" if family_class(self.family).paradigm == "diffusion" else "dance_sde",
                    "trained": {"kind": "window", "size": 1},
                    "forward_batch": 96,
                    "decode_batch": 96,
                },
            }
        )


def as_prompts(drawn: Sequence[Any]) -> list[Prompt]:
    """Captions of a world as the trainer's prompts, without images."""
    return [Prompt(p.text, metadata={"category": p.category}) for p in drawn]
