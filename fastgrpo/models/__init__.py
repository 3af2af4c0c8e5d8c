"""The model families: one file each, found by name."""

from __future__ import annotations

import importlib

import torch

from fastgrpo.algorithms.schedule import check_sampler
from fastgrpo.config import Config, Model
from fastgrpo.errors import ConfigError, nearest
from fastgrpo.models.attention import check_backend
from fastgrpo.models.context import check_context
from fastgrpo.models.nf4 import check_quantization
from fastgrpo.models.protocol import Conditioning, ModelFamily, resolve_path

FAMILIES = {
    "flux": "fastgrpo.models.families.flux:Flux",
    "hunyuan_video": "fastgrpo.models.families.hunyuan_video:HunyuanVideo",
    "qwen_image": "fastgrpo.models.families.qwen_image:QwenImage",
    "sd3": "fastgrpo.models.families.sd3:StableDiffusion3",
    "skyreels": "fastgrpo.models.families.skyreels:SkyReels",
    "stable_diffusion": "fastgrpo.models.families.stable_diffusion:StableDiffusion",
    "wan": "fastgrpo.models.families.wan:Wan",
}

__all__ = ["FAMILIES", "Conditioning", "ModelFamily", "check_family", "check_parts", "family_class", "load_family"]


def family_class(name: str) -> type[ModelFamily]:
    """The class of a family. Raises ConfigError, with the nearest match."""
    if name not in FAMILIES:
        raise ConfigError(
            f"model.family: unknown family '{name}'; {nearest(name, FAMILIES)}(one of: {', '.join(sorted(FAMILIES))})"
        )
    module, _, attribute = FAMILIES[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"model.family: '{name}' needs {error.name}, which is not installed; pip install 'fastgrpo[train]'"
        ) from None


def check_family(config: Config) -> None:
    """Raises ConfigError for an unknown family, and for what it cannot have here; UserError for a package that is not
    installed. Loads no weights."""
    check_sampler(config.rollout.sampler, family_class(config.model.family).paradigm, config.model.family)
    check_quantization(config.model)
    check_parts(config, "cuda" if torch.cuda.is_available() else "cpu")


def check_parts(config: Config, device: str) -> None:
    """Raises ConfigError for context parallelism or an attention backend that cannot be had, before weights load.

    device: the kind that will run it.
    """
    check_backend(config.model.attention_backend, config.parallel.context)
    if config.parallel.context > 1:
        cls = family_class(config.model.family)
        parts = cls.read_configs(config.model, resolve_path(config.model.path))
        check_context(config, cls.context_kinds, parts, device)


def load_family(config: Model, device: torch.device, sharded: bool = False) -> ModelFamily:
    """A family with its weights on `device`; with `sharded` those of its trained components are still to be loaded.

    Raises ConfigError for a path that holds no such pipeline.
    """
    return family_class(config.family).from_config(config, device, sharded)
