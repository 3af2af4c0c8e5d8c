"""Real pipelines with random weights, made where they run: no file is read and nothing is downloaded.

Tokenizers know the words of the embedded worlds alone, and pad as the real ones do.
"""

from __future__ import annotations

from typing import Any

import torch

from fastgrpo.config import Model
from fastgrpo.models import ModelFamily
from fastgrpo.models.architectures import build_family


def random_family(config: Model, device: torch.device, sharded: bool = False) -> ModelFamily:
    """What `fastgrpo.models.load_family` gives, of the configuration at model.path; takes its place in a Trainer."""
    assert not sharded, "random weights are made whole"
    return build_family(config, device, tokenizers(config.family, config.max_sequence_length))


def tokenizers(family: str, length: int) -> dict[str, Any]:
    """A family's tokenizers by the name of their component, for texts of at most `length` tokens."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    from fastgrpo.shapes import moving_world, tiny_hunyuan_video, tiny_qwen_image, world
    from fastgrpo.shapes.tiny_parts import build_template_tokenizer, build_tokenizer

    words = moving_world.vocabulary() if family in ("hunyuan_video", "skyreels", "wan") else world.vocabulary()
    clip = build_tokenizer(words, 77, start=True)
    if family == "flux":
        return {"tokenizer": clip, "tokenizer_2": build_tokenizer(words, length, start=False)}
    if family == "sd3":
        t5 = build_tokenizer(words, length, start=False)
        return {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5}
    if family == "qwen_image":
        whole = tiny_qwen_image.TEMPLATE_START + length
        return {"tokenizer": build_template_tokenizer(words, whole, tiny_qwen_image.TEMPLATE)}
    if family in ("hunyuan_video", "skyreels"):
        whole = DEFAULT_PROMPT_TEMPLATE["crop_start"] + length
        template = tiny_hunyuan_video.build_tokenizer(words, whole, template=True)
        return {"tokenizer": template, "tokenizer_2": clip}
    if family == "wan":
        return {"tokenizer": tiny_hunyuan_video.build_tokenizer(words, length, template=False)}
    return {"tokenizer": clip}
