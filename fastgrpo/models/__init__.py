"""The model families: one file each, found by name; a package adds its own by the entry point group
`fastgrpo.families`."""

from __future__ import annotations

import torch

from fastgrpo.algorithms.schedule import check_sampler
from fastgrpo.config import Config, Model
from fastgrpo.errors import ConfigError
from fastgrpo.models.attention import check_backend
from fastgrpo.models.context import check_context
from fastgrpo.models.loading import from_config, read_configs
from fastgrpo.models.nf4 import check_quantization
from fastgrpo.models.protocol import Conditioning, ModelFamily
from fastgrpo.observe.quiet import quiet_libraries
from fastgrpo.registry import Registry

FAMILIES = Registry(
    "family",
    "fastgrpo.families",
    {
        "flux": "fastgrpo.models.families.flux:Flux",
        "flux2": "fastgrpo.models.families.flux2:Flux2",
        "flux_kontext": "fastgrpo.models.families.flux_kontext:FluxKontext",
        "hunyuan_video": "fastgrpo.models.families.hunyuan_video:HunyuanVideo",
        "hunyuan_video_1_5": "fastgrpo.models.families.hunyuan_video_1_5:HunyuanVideo15",
        "ltx2": "fastgrpo.models.families.ltx2:LTX2",
        "qwen_image": "fastgrpo.models.families.qwen_image:QwenImage",
        "qwen_image_2_1": "fastgrpo.models.families.qwen_image_2_1:QwenImage21",
        "qwen_image_edit": "fastgrpo.models.families.qwen_image_edit:QwenImageEdit",
        "sd3": "fastgrpo.models.families.sd3:StableDiffusion3",
        "skyreels": "fastgrpo.models.families.skyreels:SkyReels",
        "stable_diffusion": "fastgrpo.models.families.stable_diffusion:StableDiffusion",
        "wan": "fastgrpo.models.families.wan:Wan",
        "z_image": "fastgrpo.models.families.z_image:ZImage",
    },
)
# What a family must declare: the rest of `ModelFamily`'s settings have defaults.
DECLARED = ("name", "pipeline_classes", "guidance_style", "encoders")

__all__ = [
    "FAMILIES",
    "Conditioning",
    "ModelFamily",
    "available",
    "check_family",
    "check_guidance",
    "check_parts",
    "family_class",
    "load_family",
]


def available() -> list[str]:
    """The families that a config can name, of installed packages too."""
    return FAMILIES.available()


def family_class(name: str) -> type[ModelFamily]:
    """The class of a family.

    Raises:
        ConfigError: For an unknown name, with the nearest match, and for what is not a family or lacks a part of one.
    """
    cls = FAMILIES.load(name, "model.family")
    if not (isinstance(cls, type) and issubclass(cls, ModelFamily)):
        raise ConfigError(f"model.family: '{name}' is not a subclass of fastgrpo.models.ModelFamily")
    silent = [part for part in DECLARED if not hasattr(cls, part)]
    if lacks := sorted((*cls.__abstractmethods__, *silent)):
        raise ConfigError(f"model.family: '{name}' does not define {', '.join(lacks)}, as every family must")
    return cls


def check_family(config: Config) -> None:
    """Raises ConfigError for an unknown family, and for what it cannot have here; UserError for a package that is not
    installed. Loads no weights."""
    check_sampler(config.rollout.sampler, family_class(config.model.family).paradigm, config.model.family)
    check_quantization(config.model)
    check_guidance(config.model)
    check_parts(config, "cuda" if torch.cuda.is_available() else "cpu")


def check_guidance(config: Model) -> None:
    """Raises ConfigError for model.true_cfg of a family that has no branches beside its guidance."""
    if config.true_cfg > 1 and not family_class(config.family).takes_true_cfg:
        raise ConfigError(
            f"model.true_cfg: {config.true_cfg:g}, but {config.family} has no second guidance; its scale is "
            "model.guidance"
        )


def check_parts(config: Config, device: str) -> None:
    """Raises ConfigError for context parallelism or an attention backend that cannot be had, before weights load.

    device: the kind that will run it.
    """
    check_backend(config.model.attention_backend, config.parallel.context)
    if config.parallel.context > 1:
        cls = family_class(config.model.family)
        check_context(config, cls, read_configs(cls, config.model), device)


def load_family(config: Model, device: torch.device | str, sharded: bool = False) -> ModelFamily:
    """Loads a family with its weights.

    Args:
        config: The model section of a run.
        device: Where the components go.
        sharded: Leaves the trained components without weights, which are loaded shard by shard later.

    Returns:
        The family, frozen and in eval mode, its components where the config wants them.

    Raises:
        ConfigError: For a path that holds no such pipeline, before any weight is loaded where it can be told by then.
    """
    cls = family_class(config.family)
    # Loading needs both, and both are quiet once they are there.
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    quiet_libraries()
    return from_config(cls, config, torch.device(device), sharded)
