"""What a model family is: encode conditioning, predict `v`, decode latents; and what its pipeline decides.

A family adds no loop, no loss and no optimizer. Its classes are diffusers' and transformers' own.
"""

from __future__ import annotations

import abc
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.errors import ConfigError
from fastgrpo.prompts import Prompt
from fastgrpo.schedule import linear_levels, shifted

# A batch size is part of the numerics, so text is always encoded in batches of this many prompts.
ENCODE_BATCH = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Conditioning(Mapping[str, Tensor]):
    """What the model is conditioned on: named tensors whose first dimension is the row (a prompt, or a sample)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def rows(self, index: Tensor) -> Conditioning:
        """The rows at `index` [R], in its order, repeats allowed."""
        return Conditioning({name: tensor.index_select(0, index) for name, tensor in self.tensors.items()})


class ModelFamily(abc.ABC):
    """A diffusers pipeline as GRPO needs it.

    Latents are what the transformer takes, [B, *latent_shape], float32; `v` is its output in the compute dtype.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    # Module lists whose members are sharded and checkpointed one by one.
    block_lists: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...]]

    def __init__(self, pipeline: Any, config: Model, device: torch.device) -> None:
        self.pipeline = pipeline
        self.config = config
        self.device = device
        self.dtype = DTYPES[config.dtype]
        self.check_size()
        for module in pipeline.components.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
                # Not where it is there already: fake tensors cannot be moved onto themselves.
                if any(p.device != device for p in module.parameters()):
                    module.to(device)
        self._embeddings: OrderedDict[tuple[str, str | None], dict[str, Tensor]] = OrderedDict()

    @classmethod
    def from_config(cls, config: Model, device: torch.device) -> ModelFamily:
        """Loads the pipeline at model.path. Raises ConfigError when there is none of this family."""
        import diffusers

        compute = DTYPES[config.dtype]
        # Full fine-tuning keeps float32 masters; a LoRA's frozen base stays in the compute dtype.
        dtypes = {"transformer": compute if config.lora else torch.float32, "default": compute}
        path = resolve_path(config.path)
        try:
            pipeline = getattr(diffusers, cls.pipeline_class).from_pretrained(path, dtype=dtypes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"model.path: '{config.path}' does not load as a {cls.pipeline_class}: {reason}"
            ) from None
        if type(pipeline).__name__ != cls.pipeline_class:
            raise ConfigError(f"model.path: '{config.path}' is a {type(pipeline).__name__}, not a {cls.pipeline_class}")
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, config, device)

    @property
    def transformer(self) -> nn.Module:
        """The trained module."""
        return self.pipeline.transformer

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in forward order: the units of sharding and of activation checkpointing."""
        return [block for name in self.block_lists for block in self.transformer.get_submodule(name).children()]

    @property
    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample, without the batch dimension, from model.height, width and frames."""

    @abc.abstractmethod
    def check_size(self) -> None:
        """Raises ConfigError for a height, width or number of frames that the VAE cannot take."""

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Text (and image) embeddings of prompts, [len(prompts), …] each."""

    @abc.abstractmethod
    def predict(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, transformer: nn.Module | None = None
    ) -> Tensor:
        """The model output `v` [B, *latent_shape], compute dtype, guidance included; differentiable in the weights.

        x: float32 latents [B, *latent_shape]; sigma: float32 noise levels [B]; transformer: another than the trained
        one (a frozen reference).
        """

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32."""

    def noise_levels(self, steps: int, shift: float | str) -> list[float]:
        """T + 1 descending levels ending in 0, as the family's pipeline would use them."""
        levels = linear_levels(steps)
        return shifted(levels, self.pipeline_shift() if shift == "pipeline" else float(shift))

    def pipeline_shift(self) -> float:
        """The shift k that the pipeline's scheduler config asks for at this size."""
        return float(self.pipeline.scheduler.config.shift)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], keep: int = 4096) -> Conditioning:
        """The conditioning of prompts; each text is encoded once and kept (the `keep` most recent of them)."""
        keys = [(p.text, p.negative) for p in prompts]
        missing = list({key: p for key, p in zip(keys, prompts, strict=True) if key not in self._embeddings}.items())
        for start in range(0, len(missing), ENCODE_BATCH):
            chunk = missing[start : start + ENCODE_BATCH]
            padded = [p for _, p in chunk] + [chunk[-1][1]] * (ENCODE_BATCH - len(chunk))
            encoded = self.encode_prompts(padded)
            for row, (key, _) in enumerate(chunk):
                self._embeddings[key] = {name: tensor[row].clone() for name, tensor in encoded.items()}
        names = self._embeddings[keys[0]]
        stacked = {name: torch.stack([self._embeddings[key][name] for key in keys]) for name in names}
        for key in keys:
            self._embeddings.move_to_end(key)
        while len(self._embeddings) > max(keep, len(keys)):
            self._embeddings.popitem(last=False)
        return Conditioning(stacked)

    def add_lora(self) -> None:
        """Adds trainable float32 LoRA layers (PEFT) to the frozen transformer. Raises ConfigError without a match."""
        from peft import LoraConfig

        lora = self.config.lora
        assert lora is not None
        targets = list(lora.targets or self.lora_targets)
        try:
            # PEFT's alpha may be any number, whatever its annotation says.
            adapter = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), target_modules=targets)
            self.pipeline.transformer.add_adapter(adapter)
        except ValueError:
            names = sorted(
                {n.rsplit(".", 1)[-1] for n, m in self.transformer.named_modules() if isinstance(m, nn.Linear)}
            )
            raise ConfigError(
                f"model.lora.targets: {targets} match no layer; layers end in: {', '.join(names)}"
            ) from None
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    @contextmanager
    def lora_disabled(self) -> Iterator[None]:
        """The transformer without its LoRA: the reference model of a LoRA run."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.transformer.modules() if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters = False


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
