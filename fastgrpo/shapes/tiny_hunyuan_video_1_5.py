"""Tiny random HunyuanVideo 1.5 pipelines of the real classes, from text or from an image; a closed vocabulary.

`HunyuanVideo15Pipeline.from_pretrained` loads what `build_pipeline(...).save_pretrained` writes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from fastgrpo.shapes.tiny_parts import END, PAD, START, build_template_tokenizer

# Tokens of the template before the prompt, which the pipeline cuts off, and of our tokenizer for the same; the template
# of a tiny pipeline makes up for what is missing.
TEMPLATE_START, OURS = 108, 98
SYSTEM = (
    "You are a helpful assistant. Describe the video by detailing the following aspects: 1. The main content and theme "
    "of the video. 2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects. "
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects. 4. background "
    "environment, light, style and atmosphere. 5. camera angles, movements, and transitions used in the video."
)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'user' %}" + "\n" * (TEMPLATE_START - OURS) + "{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizers(words: tuple[str, ...]) -> dict[str, Any]:
    """Tokenizers of words behind the template, and of bytes."""
    template = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nassistant"
    tokenizer = build_template_tokenizer(words, TEMPLATE_START + 1000, template)
    tokenizer.chat_template = CHAT
    return {"tokenizer": tokenizer, "tokenizer_2": ByT5Tokenizer()}


def build_pipeline(words: tuple[str, ...], seed: int, from_image: bool = False) -> Any:
    """An untrained pipeline in float32 whose tokenizer knows `words`; resets torch's global seed.

    from_image: the first frame is given.
    """
    torch.manual_seed(seed)
    tokenizers, width = build_tokenizers(words), 48
    text: Any = {
        "vocab_size": len(tokenizers["tokenizer"]), "hidden_size": width, "intermediate_size": width,
        "num_hidden_layers": 4, "num_attention_heads": width // 16, "num_key_value_heads": width // 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "initializer_range": 0.1,
    }  # fmt: skip
    glyphs = T5Config(
        vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=2 * 8 + 1, out_channels=8, num_attention_heads=4, attention_head_dim=16, num_layers=3,
        num_refiner_layers=1, text_embed_dim=width, text_embed_2_dim=32, image_embed_dim=32, rope_axes_dim=(4, 6, 6),
        target_size=32, task_type="i2v" if from_image else "t2v",
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    parts: dict[str, Any] = {
        **tokenizers,
        "text_encoder": Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text)),
        "text_encoder_2": T5EncoderModel(glyphs),
        "transformer": transformer,
        "vae": AutoencoderKLHunyuanVideo15(
            latent_channels=8,
            block_out_channels=(32, 32, 32, 32, 32),  # pyright: ignore[reportArgumentType]
            layers_per_block=1,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }
    if from_image:
        vision = SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
            patch_size=8,
        )  # fmt: skip
        parts["image_encoder"] = SiglipVisionModel(vision)
        parts["feature_extractor"] = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return (HunyuanVideo15ImageToVideoPipeline if from_image else HunyuanVideo15Pipeline)(**parts)
