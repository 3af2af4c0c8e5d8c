"""Tiny random video pipelines of the real classes, and configs over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgrpo.config import Config, validate
from fastgrpo.shapes import moving_world, tiny_hunyuan_video_1_5, tiny_ltx2, tiny_wan
from fastgrpo.shapes.tiny_hunyuan_video import TinyHunyuanVideoSizes, build_pipeline

MODELS: dict[str, dict[str, Any]] = {
    "hunyuan_video": {"family": "hunyuan_video", "guidance": 6.018, "max_sequence_length": 14},
    "hunyuan_15": {"family": "hunyuan_video_1_5", "guidance": 3.0, "max_sequence_length": 24},
    "hunyuan_15_i2v": {"family": "hunyuan_video_1_5", "guidance": 3.0, "max_sequence_length": 24},
    "ltx2": {"family": "ltx2", "guidance": 3.0, "max_sequence_length": 16},
    "ltx2_3": {"family": "ltx2", "guidance": 3.0, "max_sequence_length": 16},
    "skyreels": {"family": "skyreels", "guidance": 3.0, "max_sequence_length": 14},
    "wan": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
    "wan_5b": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
    "wan_i2v": {"family": "wan", "guidance": 3.0, "max_sequence_length": 512},
    "wan_5b_i2v": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
    "wan_two": {"family": "wan", "guidance": 3.0, "guidance_2": 2.0, "max_sequence_length": 14},
    "wan_two_i2v": {"family": "wan", "guidance": 3.0, "max_sequence_length": 14},
}


def build(kind: str, seed: int = 0) -> Any:
    """A random pipeline whose outputs are not nearly zero."""
    if kind in ("hunyuan_video", "skyreels"):
        sizes = TinyHunyuanVideoSizes(task="image" if kind == "skyreels" else "text", single_layers=1)
        return build_pipeline(moving_world.vocabulary(), sizes, seed)
    if kind.startswith("hunyuan_15"):
        pipeline = tiny_hunyuan_video_1_5.build_pipeline(moving_world.vocabulary(), seed, kind.endswith("i2v"))
        # The published pipeline has 1000 text tokens, and 729 of an image that is not there.
        pipeline.tokenizer_max_length = MODELS[kind]["max_sequence_length"]
        pipeline.vision_num_semantic_tokens = 16
        return pipeline
    if kind.startswith("ltx2"):
        return tiny_ltx2.build_pipeline(moving_world.vocabulary(), seed, per_modality=kind == "ltx2_3")
    from_image, per_token, two = kind.endswith("i2v"), "5b" in kind, "two" in kind
    return tiny_wan.build_pipeline(moving_world.vocabulary(), seed, from_image, per_token, two)


def video_config(path: Path | str, kind: str, **sections: Any) -> Config:
    """A valid config over a pipeline directory; keyword arguments update whole sections."""
    data: dict[str, Any] = {
        "run": {"dir": "runs/none", "seed": 7},
        "model": {"path": str(path), "height": 32, "width": 32, "frames": 9, **MODELS[kind]},
        "prompts": {"train": "moving:train", "heldout": "moving:heldout"},
        "rewards": [{"name": "moving_shapes"}],
        "rollout": {"prompts_per_iteration": 2, "group_size": 2, "steps": 4, "forward_batch": 2, "decode_batch": 2,
                    "trained": {"kind": "window", "size": 2, "start": 1}},
        "update": {"optimizer": {"lr": 1e-4}},
        "train": {"iterations": 2}, "eval": {"every": 0}, "checkpoint": {"every": 0},
        "telemetry": {"progress": False},
    }  # fmt: skip
    for name, values in sections.items():
        data[name] = {**data[name], **values} if isinstance(values, dict) and name in data else values
    return validate(data)
