"""What `fastgrpo bench train` measures: a recipe of every family at two sizes, and the sweeps, as data.

tiny: real classes with about a million parameters, a CPU is enough. real: the real configuration with random weights,
on one GPU. Every sample is trained in every iteration and the window stays, so iterations cost the same.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgrpo.config import Config, load_config, validate
from fastgrpo.errors import UserError
from fastgrpo.models import family_class
from fastgrpo.models.attention import check_backend
from fastgrpo.planning.plan import overridden

from .tables import ROOT

SIZES = ("tiny", "real")
# Scores anything with a spread, at no cost that would count; the world's own verifier is watched beside it.
REWARD = {"name": "clip", "path": "shapes:clip"}


@dataclass(frozen=True)
class Case:
    """A family's recipes. world: of its prompts. tiny: its model section. recipe: a file of configs, of which `real`
    are the settings that differ on one GPU. family: where it is not the case's name."""

    world: str
    tiny: dict[str, Any]
    recipe: str
    real: dict[str, Any] = field(default_factory=dict)
    family: str | None = None


LORA = {"model.lora": {"rank": 64, "alpha": 128.0}}
MODELS = {
    "flux": Case("shapes", {"guidance": 3.5, "max_sequence_length": 10}, "flux-fast-8xh100", LORA),
    "flux_kontext": Case("editing", {"guidance": 2.5, "max_sequence_length": 10}, "flux-kontext-fast-8xh100", LORA),
    "stable_diffusion": Case("shapes", {"guidance": 3.0}, "sd-fast-8xh100", {"rollout.forward_batch": 16}),
    "sd3": Case("shapes", {"guidance": 3.0, "max_sequence_length": 10}, "sd3.5-large-fast-8xh100"),
    "qwen_image": Case("shapes", {"guidance": 1.0, "max_sequence_length": 14}, "qwen-image-fast-8xh100"),
    "qwen_image_2_1": Case("shapes", {"guidance": 1.0, "max_sequence_length": 32}, "qwen-image-2.1-fast-8xh100"),
    "qwen_image_edit": Case(
        "editing", {"guidance": 1.0, "max_sequence_length": 48}, "qwen-image-edit-plus-fast-8xh100"
    ),
    "flux2": Case("shapes", {"guidance": 1.0, "max_sequence_length": 28}, "flux2-klein-9b-fast-8xh100"),
    "z_image": Case("shapes", {"guidance": 0.0, "max_sequence_length": 18}, "z-image-turbo-fast-8xh100"),
    "hunyuan_video": Case("moving", {"guidance": 6.0, "max_sequence_length": 8}, "hunyuan-video-fast-8xh100"),
    "hunyuan_video_1_5": Case("moving", {"guidance": 1.0, "max_sequence_length": 24}, "hunyuan-video-1.5-fast-8xh100"),
    "ltx2": Case("moving", {"guidance": 1.0, "max_sequence_length": 16}, "ltx2-fast-8xh100"),
    "skyreels": Case("moving", {"guidance": 3.0, "max_sequence_length": 8}, "skyreels-fast-8xh100"),
    "wan": Case("moving", {"guidance": 3.0, "max_sequence_length": 14}, "wan-2.1-1.3b-fast-8xh100"),
    "wan_2_2_a14b": Case(
        "moving", {"guidance": 3.0, "max_sequence_length": 14}, "wan-2.2-a14b-fast-8xh100", family="wan"
    ),
}
# Tiny pipelines without shipped weights, built with random ones: a module of fastgrpo.shapes, and its sizes or
# settings.
BUILT: dict[str, tuple[str, str | dict[str, Any] | None]] = {
    "sd3": ("tiny_sd3", "TinySD3Sizes"),
    "qwen_image": ("tiny_qwen_image", "TinyQwenImageSizes"),
    "qwen_image_2_1": ("tiny_qwen_image_2_1", None),
    "qwen_image_edit": ("tiny_qwen_image_edit", None),
    "hunyuan_video_1_5": ("tiny_hunyuan_video_1_5", None),
    "ltx2": ("tiny_ltx2", None),
    "wan": ("tiny_wan", None),
    "wan_2_2_a14b": ("tiny_wan", {"two": True}),
}
# Of each world.
VERIFIERS = {"shapes": "shapes", "moving": "moving_shapes", "editing": "editing"}
# What every real recipe has on one GPU: few samples, encoders on the host between their visits, nothing read.
ONE_GPU = {
    "rewards": [REWARD], "rollout.prompts_per_iteration": 2, "rollout.group_size": 4, "prompts.select": "epochs",
    "model.embedding_cache": None, "model.text_encoders": "offload", "parallel.load": "whole", "checkpoint.every": 0,
    "telemetry.progress": False,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One place of a sweep, or `base`."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


# By sweep: the settings that take each value, of the tiny recipe and of the real one.
SWEEPS: dict[str, tuple[tuple[str, ...], dict[str, tuple[Any, ...]]]] = {
    "batch": (("rollout.forward_batch",), {"tiny": (4, 32), "real": (1, 4, 8)}),
    "steps": (("rollout.steps",), {"tiny": (5, 16), "real": (10, 32)}),
    "window": (("rollout.trained.size",), {"tiny": (1, 4), "real": (1, 6)}),
    "resolution": (("model.height", "model.width"), {"tiny": (48, 64), "real": (256, 512)}),
    "frames": (("model.frames",), {"tiny": (9, 13), "real": (17, 49)}),
    "training": (("model.lora",), dict.fromkeys(SIZES, ({"rank": 8, "alpha": 16.0}, None))),
    "attention": (
        ("model.attention_backend",),
        {"tiny": ("native", "_native_math"), "real": ("native", "_native_cudnn", "flash", "xformers")},
    ),
    "compile": (("model.compile",), dict.fromkeys(SIZES, ("blocks",))),
}


def family_name(model: str) -> str:
    """The family of a case."""
    return MODELS[model].family or model


def points(model: str, size: str, sweeps: list[str]) -> list[Point]:
    """`base`, and every place of the sweeps that this model and machine have."""
    found = [Point("base")]
    for sweep in sweeps:
        settings, values = SWEEPS[sweep]
        for value in values[size]:
            if sweep == "frames" and MODELS[model].world != "moving":
                continue
            if sweep == "attention" and not _available(value):
                continue
            shown = ("full" if value is None else "lora") if sweep == "training" else value
            found.append(Point(f"{sweep}={shown}", dict.fromkeys(settings, value)))
    return found


def _available(backend: str) -> bool:
    try:
        check_backend(backend, 1)
    except UserError:
        return False
    return True


def case_config(model: str, size: str, settings: dict[str, Any], folder: Path) -> Config:
    """The config of a recipe with settings replaced. Its run is in `folder`, and so is a tiny pipeline that is not
    shipped, which `build_tiny` makes."""
    case = MODELS[model]
    if size == "real":
        config = load_config(ROOT / "configs" / f"{case.recipe}.yaml")
        window = config.rollout.trained.model_dump() | {"move": "fixed", "start": 1}
        config = overridden(config, ONE_GPU | {"prompts.train": f"{case.world}:train", "rollout.trained": window})
        return overridden(config, case.real | settings | {"run.dir": str(folder / "run")})
    family = family_name(model)
    diffusion = {"sampler": "ddim", "eta": 1.0} if family_class(family).paradigm == "diffusion" else {"shift": 3.0}
    verifier = {"name": VERIFIERS[case.world], "weight": 0.0}
    data: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "seed": 0},
        "model": {"family": family, "path": f"shapes:{model}", "height": 32, "width": 32,
                  "frames": 5 if case.world == "moving" else 1, **case.tiny},
        "prompts": {"train": f"{case.world}:train"},
        "rewards": [REWARD, verifier],
        "rollout": {"prompts_per_iteration": 4, "group_size": 8, "steps": 8, "forward_batch": 16, "decode_batch": 16,
                    "trained": {"kind": "window", "size": 2, "start": 0}, **diffusion},
        "update": {"optimizer": {"lr": 1e-5}},
        "eval": {"every": 0}, "checkpoint": {"every": 0}, "telemetry": {"progress": False},
    }  # fmt: skip
    if model in BUILT:
        data["model"]["path"] = str(folder / "pipeline")
    return overridden(validate(data), settings)


def build_tiny(model: str) -> Any:
    """A tiny pipeline of random weights."""
    from fastgrpo.shapes import editing_world, moving_world, world

    name, sizes = BUILT[model]
    module = importlib.import_module(f"fastgrpo.shapes.{name}")
    words = {"shapes": world, "moving": moving_world, "editing": editing_world}[MODELS[model].world].vocabulary()
    if isinstance(sizes, dict):
        return module.build_pipeline(words, seed=0, **sizes)
    return module.build_pipeline(words, *([getattr(module, sizes)()] if sizes else []), seed=0)


def shape_of(config: Config) -> str:
    """A recipe's sizes: pixels, frames, prompts × samples, steps and trained ones, rows of a forward, what trains."""
    model, roll = config.model, config.rollout
    frames = f"x{model.frames}" if model.frames > 1 else ""
    trained = "full" if model.lora is None else f"lora {model.lora.rank}"
    size = getattr(roll.trained, "size", "subset")
    return (
        f"{model.height}x{model.width}{frames}, {roll.prompts_per_iteration}x{roll.candidates} samples, {roll.steps} "
        f"steps, {size} trained, batch {roll.forward_batch}, {model.dtype} {trained}"
    )
