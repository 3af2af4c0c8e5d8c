"""A tiny AuraFlow of random weights, for tests: seconds instead of hours."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from fastgrpo.shapes.tiny_parts import build_autoencoder, build_tokenizer

from .prompts import ANIMALS

TEXT_LENGTH = 8


def build_pipeline(seed: int = 0) -> AuraFlowPipeline:
    """A pipeline of random weights that draws images of 32 × 32; resets torch's global seed."""
    torch.manual_seed(seed)
    words = build_tokenizer(("a", *ANIMALS), TEXT_LENGTH, start=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, model_input_names=["input_ids", "attention_mask"],
        pad_token=words.pad_token, eos_token=words.eos_token, unk_token=words.unk_token,
        model_max_length=TEXT_LENGTH,
    )  # fmt: skip
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
        pos_embed_max_size=64,
    )  # fmt: skip
    # Random weights of the usual size would hardly look at the text.
    for block in (transformer.time_step_embed, transformer.context_embedder, *transformer.joint_transformer_blocks):
        for parameter in block.parameters():
            parameter.data.mul_(4.0)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    parts: dict[str, Any] = {
        "tokenizer": tokenizer,
        "text_encoder": UMT5EncoderModel(text),
        "vae": build_autoencoder(32, 4, [16, 32, 48]),
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.73),
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return AuraFlowPipeline(**parts)
