"""What a model family is: encode prompts, predict `v`, decode latents; and what its pipeline decides.

A family is one file with one subclass of `ModelFamily`. It adds no loop, no loss and no optimizer, and its classes are
diffusers' and transformers' own. docs/adding-a-model.md tells how to write one.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models.conditioning import Conditioning, PromptEncoding
from fastgrpo.models.embeddings import EmbeddingCache, encoded_size
from fastgrpo.models.placement import PlacedPipeline
from fastgrpo.models.sampling import PipelineSampling


class ModelFamily(PlacedPipeline, PromptEncoding, PipelineSampling):
    """A diffusers pipeline as GRPO needs it.

    Latents are what the trained component takes, [B, *latent_shape], float32; `v` is its output in the compute dtype.
    `PipelineSampling` has the noise levels; a family overrides of it where its pipeline differs.
    """

    name: ClassVar[str]
    # The pipeline classes that it serves.
    pipeline_classes: ClassVar[tuple[str, ...]]
    paradigm: ClassVar[Literal["flow", "diffusion"]] = "flow"
    # embedded: the scale is an input of the model. cfg: two branches, the negative prompt's and the prompt's.
    guidance_style: ClassVar[Literal["embedded", "cfg"]]
    # The largest scale, as the pipeline takes it, without a second branch.
    unguided_scale: ClassVar[float] = 1.0
    # Whether an embedded family takes model.true_cfg: two branches beside the scale that the model is told.
    takes_true_cfg: ClassVar[bool] = False
    # Components that are trained; `noise_levels` says which of them acts at a step.
    trained: ClassVar[tuple[str, ...]] = ("transformer",)
    # Components that only encoding prompts needs.
    encoders: ClassVar[tuple[str, ...]]
    # Those of them that a directory may go without.
    optional_encoders: ClassVar[tuple[str, ...]] = ()
    # Whether its pipeline reads its tokenizer when it is made, so that it is never without.
    reads_tokenizer: ClassVar[bool] = False
    # Module lists whose members are sharded and checkpointed one by one.
    block_lists: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    # Encodings whose values the host must know (`Conditioning.host`), such as how long a text is.
    host_names: ClassVar[tuple[str, ...]] = ()
    # Encodings that are boolean masks.
    mask_names: ClassVar[tuple[str, ...]] = ()
    # Those of its pipeline classes that start from a picture of the prompt's: a first frame, or the source of an edit.
    image_pipelines: ClassVar[tuple[str, ...]] = ()
    # The encoding of that picture, for pretraining: latents of one frame.
    image_encoding: ClassVar[str | None] = None
    # How context parallelism may split its tokens: `ulysses`, `ring`.
    context_kinds: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipeline: Any, config: Model, device: torch.device, cache: Path | None = None) -> None:
        super().__init__(pipeline, config, device)
        self.embeddings = EmbeddingCache(cache, encoded_size(config))
        self.check(config, self.component_configs)
        self.place(pipeline)

    @classmethod
    @abc.abstractmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ConfigError for a size that the VAE cannot take, or a scheduler that cannot be followed.

        parts: the config of each component by name; called before their weights are loaded.
        """

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Encodes prompts' texts (and images) by `encoder`, [len(prompts), …] each; negative prompts alike."""

    def encode_texts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """`encode_prompts` without what images bring."""
        return self.encode_prompts(prompts)

    @abc.abstractmethod
    def predict(self, x: Tensor, time: Tensor, conditioning: Conditioning, module: nn.Module | None = None) -> Tensor:
        """The model output `v` [B, *latent_shape], compute dtype, guidance included; differentiable in the weights.

        x: float32 latents [B, *latent_shape]; time: float32 [B], as `NoiseLevels.times` has it; module: the component
        that acts, one of `modules` or a frozen copy of it; None: the first.
        """

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], or videos [B, 3, F, H, W], in [0, 1], float32."""

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, *latent_shape], float32, of images [B, 3, H, W] in [0, 1]: `decode` undone, for pretraining."""
        raise self.lacks("encode_images", "pretraining")

    @property
    def takes_image(self) -> bool:
        """Whether its pipeline starts from a picture of the prompt's."""
        return type(self.pipeline).__name__ in self.image_pipelines

    def comfyui_layer(self, layer: str) -> tuple[str, tuple[str, ...]]:
        """The key of a LoRA's layer in ComfyUI, and the layers whose weights are one matrix there, in their order."""
        raise self.lacks("comfyui_layer", "a LoRA for ComfyUI")

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of everything that `encode_prompts` gives and the device holds, for plans."""
        raise self.lacks("encoded_shapes", "a plan")

    @classmethod
    def token_lengths(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """The lengths of a sample's token sequences that context parallelism splits; parts: as in `check`."""
        raise cls.lacks("token_lengths", "parallel.context")

    def context_plan(self, module: nn.Module) -> Mapping[str, Any] | None:
        """Where a trained component's tokens are split and joined, in diffusers' form; by default its own plan."""
        return getattr(module, "_cp_plan", None)

    @classmethod
    def word_tokenizers(cls, length: int) -> dict[str, Any]:
        """Tokenizers of the embedded worlds' words by component, for pipelines with random weights; length: in tokens.

        They pad as the real ones do, so that a benchmark at real sizes reads no file.
        """
        raise cls.lacks("word_tokenizers", "a pipeline with random weights")

    @classmethod
    def lacks(cls, method: str, needed_by: str) -> ConfigError:
        """The error for something that a family may leave out, where it is asked for."""
        return ConfigError(f"model.family: '{cls.name}' has no `{method}`, which {needed_by} needs")
