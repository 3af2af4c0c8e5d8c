"""What a model family is: encode conditioning, predict `v`, decode latents; and what its pipeline decides.

A family adds no loop, no loss and no optimizer. Its classes are diffusers' and transformers' own.
docs/adding-a-model.md tells how to write one.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from fastgrpo.algorithms.schedule import NoiseLevels, flow_levels, linear_levels, shifted
from fastgrpo.config import Model
from fastgrpo.config.dtypes import DTYPES
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError, nearest
from fastgrpo.models.conditioning import Conditioning, PromptEncoding
from fastgrpo.models.embeddings import EmbeddingCache, model_digest
from fastgrpo.models.nf4 import check_quantization, quantize_layers
from fastgrpo.models.offload import Visitor
from fastgrpo.models.sharded_load import empty_component, weight_files
from fastgrpo.models.trainable import check_targets, without_weights

LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


class ModelFamily(PromptEncoding):
    """A diffusers pipeline as GRPO needs it.

    Latents are what the trained component takes, [B, *latent_shape], float32; `v` is its output in the compute dtype.
    """

    name: ClassVar[str]
    # The pipeline classes that it serves.
    pipeline_classes: ClassVar[tuple[str, ...]]
    paradigm: ClassVar[Literal["flow", "diffusion"]] = "flow"
    # Components that are trained; `noise_levels` says which of them acts at a step.
    trained: ClassVar[tuple[str, ...]] = ("transformer",)
    # The encoding of a prompt's image, if the family conditions on one: latents of one frame.
    first_frame: ClassVar[str | None] = None
    # Components that only encoding prompts needs.
    encoders: ClassVar[tuple[str, ...]]
    # Module lists whose members are sharded and checkpointed one by one.
    block_lists: ClassVar[tuple[str, ...]]
    # How context parallelism may split its tokens.
    context_kinds: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, config: Model, device: torch.device, cache: Path | None = None) -> None:
        self.pipeline = pipeline
        self.config = config
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self.embeddings = EmbeddingCache(cache)
        # Of components that are still without weights, the file of each tensor.
        self.weight_files: dict[str, dict[str, Path]] = {}
        # Components that wait on the host.
        self.visitors: dict[str, Visitor] = {}
        self.check(config, {name: c.config for name, c in pipeline.components.items() if hasattr(c, "config")})
        self._place(pipeline)

    @classmethod
    def from_config(cls, config: Model, device: torch.device, sharded: bool = False) -> ModelFamily:
        """Loads the pipeline at model.path. Raises ConfigError, before any weight is loaded where it can be told.

        sharded: the trained components stay without weights; `weight_files` says what `load_shards` is to read.
        """
        check_quantization(config)
        path = resolve_path(config.path)
        parts = cls.read_configs(config, path)
        cls.check(config, parts)
        if config.lora and config.lora.targets:
            with _loading(config, cls):
                for name in parts.keys() & cls.trained:
                    check_targets(config.lora.targets, without_weights(parts[name]))
        cache = None
        if config.embedding_cache is not None:
            settings = {"family": cls.name, "dtype": config.dtype, "max_sequence_length": config.max_sequence_length}
            cache = Path(config.embedding_cache).expanduser() / model_digest(path, cls.encoders, settings)
        # With a cache the encoders wait until a prompt is missing from it.
        given: dict[str, Any] = dict.fromkeys(cls.encoders) if cache is not None else {}
        files = {name: weight_files(path, name) for name in cls.trained if name in parts} if sharded else {}
        with _loading(config, cls):
            given |= {name: empty_component(parts[name], torch.float32) for name in files}
        family = cls(cls._load(config, path, given), config, device, cache)
        family.weight_files = files
        return family

    @classmethod
    def read_configs(cls, config: Model, path: str) -> dict[str, Mapping[str, Any]]:
        """The configs of the pipeline's components, by name. Raises ConfigError for another kind of pipeline."""
        import diffusers

        with _loading(config, cls):
            index = cast(dict[str, Any], diffusers.DiffusionPipeline.load_config(path))
            if index["_class_name"] not in cls.pipeline_classes:
                wanted = " or ".join(cls.pipeline_classes)
                raise ConfigError(f"model.path: '{config.path}' is a {index['_class_name']}, not a {wanted}")
            readers = {"scheduler": diffusers.DDIMScheduler, "vae": diffusers.AutoencoderKL}
            readers |= dict.fromkeys(cls.trained, diffusers.AutoencoderKL)
            return {
                name: cast(dict[str, Any], reader.load_config(path, subfolder=name))
                for name, reader in readers.items()
                if index.get(name, (None,))[0] is not None
            }

    @classmethod
    def _load(cls, config: Model, path: str, given: Mapping[str, Any]) -> Any:
        import diffusers

        compute = DTYPES[config.dtype]
        # Full fine-tuning keeps float32 masters; a LoRA's frozen base stays in the compute dtype.
        master = compute if config.lora else torch.float32
        dtypes = {**dict.fromkeys(cls.trained, master), "default": compute}
        with _loading(config, cls):
            index = cast(dict[str, Any], diffusers.DiffusionPipeline.load_config(path))
            # Components that the directory goes without (SD 3's T5) must be given as None.
            absent = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
            parts = {**dict.fromkeys(absent), **given}
            pipeline = diffusers.DiffusionPipeline.from_pretrained(path, dtype=dtypes, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _place(self, pipeline: Any) -> None:
        for name in self.trained if self.config.quantize else ():
            if isinstance(module := getattr(pipeline, name, None), nn.Module):
                quantize_layers(self.blocks(module), self.device)
        for name, module in pipeline.components.items():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
                away = [t for t in (*module.parameters(), *module.buffers()) if t.device != self.device]
                if self.waits(name):
                    self.visitors[name] = Visitor(module, self.device)
                elif any(t.is_meta for t in away):
                    # Its weights come later; its buffers are there.
                    for part in module.modules():
                        part._buffers.update({n: b.to(self.device) for n, b in part._buffers.items() if b is not None})
                elif away:
                    # Not where it is there already: fake tensors cannot be moved onto themselves.
                    module.to(self.device)
                for part in module.modules():
                    if isinstance(part, nn.Conv2d):
                        # The layout that they are fastest in, on CPUs and on GPUs; a video's convolutions have none.
                        part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def waits(self, name: str) -> bool:
        """Whether a component is on the host but for its visits (`on_device`)."""
        if self.device.type == "cpu":
            return False
        if name == "vae":
            return self.config.vae != "keep"
        return name in self.encoders and self.config.text_encoders != "keep"

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Within it these components are on the device, where they wait on the host otherwise."""
        with ExitStack() as stack:
            for name in names:
                if name in self.visitors:
                    stack.enter_context(self.visitors[name].visit())
            yield

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without values in host memory; page-locked where the device is a GPU, so that copies do not wait."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Within it everything that encodes prompts is on the device."""
        # Loads it where it is not yet.
        _ = self.encoder
        with self.on_device(*self.encoders, "vae"):
            yield

    def drop_encoders(self) -> None:
        """Frees the text encoders; a prompt that is not cached loads them again."""
        vars(self).pop("encoder", None)  # pyright: ignore[reportAttributeAccessIssue]
        for name in self.encoders:
            self.visitors.pop(name, None)
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)

    @cached_property
    def encoder(self) -> Any:
        """The pipeline that encodes prompts: `pipeline`, or its encoders alone, loaded here, where it has none."""
        if all(getattr(self.pipeline, name, None) is None for name in self.encoders):
            loaded = self._load(self.config, resolve_path(self.config.path), dict.fromkeys((*self.trained, "vae")))
            self._place(loaded)
            return loaded
        return self.pipeline

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The trained components, by name."""
        return {name: getattr(self.pipeline, name) for name in self.trained if getattr(self.pipeline, name) is not None}

    @cached_property
    def vae_dtype(self) -> torch.dtype:
        """Of the autoencoder's weights, asked once: diffusers goes through every module for it."""
        return self.pipeline.vae.dtype

    @property
    def transformer(self) -> nn.Module:
        """The trained component, the first of several."""
        return next(iter(self.modules.values()))

    @cached_property
    def policy(self) -> nn.Module:
        """Everything that is trained, as one module: the component, or all of them under their names."""
        return self.transformer if len(self.modules) == 1 else nn.ModuleDict(self.modules)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """A component's repeated blocks in forward order: the units of sharding and of activation checkpointing."""
        return [block for name in self.block_lists for block in module.get_submodule(name).children()]

    @property
    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample, without the batch dimension, from model.height, width and frames."""

    @classmethod
    @abc.abstractmethod
    def check(cls, config: Model, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ConfigError for a size that the VAE cannot take, or a scheduler that cannot be followed.

        parts: the config of each component by name; called before their weights are loaded.
        """

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
        """Images [B, 3, H, W] in [0, 1], float32."""

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents [B, *latent_shape], float32, of images [B, 3, H, W] in [0, 1]: `decode` undone, for pretraining."""
        raise NotImplementedError

    def noise_levels(self, steps: int, shift: float | str) -> NoiseLevels:
        """The levels of a run of `steps`, as the family's pipeline would use them."""
        k = self.pipeline_shift() if shift == "pipeline" else float(shift)
        return flow_levels(shifted(linear_levels(steps), k), self.trained[0])

    def pipeline_shift(self) -> float:
        """The shift k that the pipeline's scheduler config asks for at this size."""
        return float(self.pipeline.scheduler.config.shift)

    def make_trainable(self) -> None:
        """Turns on the gradients of what the config trains: a new LoRA, model.trainable, or every weight.

        Raises ConfigError for names that match nothing.
        """
        if self.config.lora:
            self.add_lora()
            return
        parts = self.config.trainable
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(parts is None or any(f".{part}." in f".{name}." for part in parts))
        for part in parts or ():
            if not any(f".{part}." in f".{name}." for name, _ in self.policy.named_parameters()):
                names = sorted({p for name, _ in self.policy.named_parameters() for p in name.split(".")[:-1]})
                known = [name for name in names if not name.isdigit()]
                raise ConfigError(
                    f"model.trainable: '{part}' matches no parameter; {nearest(part, known)}"
                    f"(parts of their names: {', '.join(known)})"
                )

    def add_lora(self) -> None:
        """Adds trainable float32 LoRA layers (PEFT) to the frozen components. Raises ConfigError for no match."""
        from peft import LoraConfig

        lora = self.config.lora
        assert lora is not None
        targets = list(lora.targets or self.lora_targets)
        for module in self.modules.values():
            check_targets(targets, module)
            # PEFT's alpha may be any number, whatever its annotation says.
            adapter = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), target_modules=targets)
            cast(Any, module).add_adapter(adapter)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """The trained components without their LoRA: the reference model of a LoRA run."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.policy.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False


def guide(branches: Tensor, scale: float, rescale_norm: bool = False) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of a model output [2B, …], negative rows first: [B, …].

    negative + scale·(positive − negative), in float32 at least, rounded to the output's dtype (the gradient passes
    straight through to both branches); with `rescale_norm`, scaled along the last dimension to the norm of the positive
    branch, as Qwen-Image's pipeline does.
    """
    negative, positive = branches.to(torch.promote_types(branches.dtype, torch.float32)).chunk(2)
    guided = negative + scale * (positive - negative)
    if rescale_norm:
        guided = guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
    return guided.to(branches.dtype)


def check_image_size(config: Model, multiple: int, family: str) -> None:
    """Raises ConfigError unless model.height and width are multiples of `multiple` and model.frames is 1."""
    for key in ("height", "width"):
        size = getattr(config, key)
        if size % multiple:
            below = max(size // multiple, 1) * multiple
            raise ConfigError(f"model.{key}: {size} is not a multiple of {multiple}; the nearest is {below}")
    if config.frames != 1:
        raise ConfigError(f"model.frames: {config.frames}, but {family} makes images; set it to 1")


def to_pixels(decoded: Tensor) -> Tensor:
    """A VAE's output in −1..1 as float32 pixels in 0..1."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


@contextmanager
def _loading(config: Model, family: type[ModelFamily]) -> Iterator[None]:
    """Whatever a library raises over a directory it cannot load, as one line."""
    try:
        yield
    except ConfigError:
        raise
    except LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        wanted = " or ".join(family.pipeline_classes)
        raise ConfigError(f"model.path: '{config.path}' does not load as a {wanted}: {reason}") from None


def resolve_path(path: str) -> str:
    """model.path with shapes:<name> replaced by the shipped directory. Raises ConfigError for an unknown one."""
    if not path.startswith("shapes:"):
        if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            raise ConfigError(f"model.path: there is no directory '{path}'")
        return str(Path(path).expanduser()) if path.startswith("~") else path
    from fastgrpo.shapes import weights_path

    try:
        return str(weights_path(path.removeprefix("shapes:")))
    except ValueError as error:
        raise ConfigError(f"model.path: '{path}' is not shipped: {error}") from None
