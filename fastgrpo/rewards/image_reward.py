"""ImageReward (arXiv 2304.05977): a BLIP that reads prompt and image together, and a linear head on its first token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.clip import linear_head
from fastgrpo.rewards.images import ImageProcessor, middle_frame
from fastgrpo.rewards.neural import Dtype, NeuralReward, options
from fastgrpo.rewards.weights import check_exists, load_strict, load_tokenizer, read_state, resolve

# The published normalisation of its scores, and the length of its texts.
MEAN, STD, LENGTH = 0.16717362830052426, 1.0333394966054072, 35
# Left over from BLIP's pretraining.
UNUSED = (r"^vision_proj\.", r"^text_proj\.", r"position_ids$")


class ImageRewardModel(nn.Module):
    """The vision tower, the text tower that attends to it, and the head."""

    def __init__(self, vision: Any, text: Any) -> None:
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = linear_head(text.hidden_size)


class ImageRewardReward(NeuralReward):
    """ImageReward's score, about 0 ± 1. path: its published checkpoint, converted to safetensors; tokenizer: BERT's.
    Of a video, the middle frame is judged."""

    @options
    def __init__(
        self,
        path: str,
        tokenizer: str = "google-bert/bert-base-uncased",
        batch: int = 32,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(path, batch, dtype, device, offload)
        check_exists(tokenizer)
        self.tokenizer_path = tokenizer

    def load(self) -> nn.Module:
        where = resolve(self.path)
        state = from_published(read_state(where))
        vision, text = blip_configs(state)
        self.tokenizer = load_tokenizer(self.tokenizer_path)
        self.images = ImageProcessor(vision.image_size)
        model = load_strict(ImageRewardModel(vision, text), state, where, UNUSED)
        # Five small products, in float32: bfloat16 is too coarse for a score.
        self.head = model.head.to(self.device)
        del model.head
        return model

    def judge(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> dict[str, Tensor]:
        model: Any = self.module
        texts = [p.text for p in prompts]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(self.device)
        pixels = self.images(middle_frame(samples)).to(self.dtype)
        seen = model.vision(pixel_values=pixels).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=self.device)
        read = model.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen, encoder_attention_mask=everywhere,
        )  # fmt: skip
        features = read.last_hidden_state[:, 0].float()
        for layer in self.head.values():
            features = layer(features)
        return {"score": (features.squeeze(-1) - MEAN) / STD}


def blip_configs(state: Mapping[str, Tensor], head: int = 64) -> tuple[Any, Any]:
    """The towers' sizes, read from the tensors; heads are 64 wide, as in ViT-L and BERT. Raises ConfigError."""
    from transformers import BlipTextConfig, BlipVisionConfig

    def depth(prefix: str) -> int:
        return 1 + max(int(m[1]) for key in state if (m := re.match(prefix + r"\.(\d+)\.", key)))

    try:
        patch, width = (
            state["vision.embeddings.patch_embedding.weight"].shape[-1],
            state["vision.post_layernorm.weight"],
        )
        positions = state["vision.embeddings.position_embedding"].shape[1]
        vision = BlipVisionConfig(
            hidden_size=len(width),
            intermediate_size=state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=depth(r"vision\.encoder\.layers"),
            num_attention_heads=len(width) // head,
            image_size=round((positions - 1) ** 0.5) * patch,
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
        vocabulary, hidden = state["text.embeddings.word_embeddings.weight"].shape
        text = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            encoder_hidden_size=state["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
            intermediate_size=state["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=depth(r"text\.encoder\.layer"),
            num_attention_heads=hidden // head,
            max_position_embeddings=state["text.embeddings.position_embeddings.weight"].shape[0],
        )
    except (KeyError, ValueError) as error:
        raise ConfigError(f"path: not a checkpoint in ImageReward's layout: {error} is missing") from None
    return vision, text


_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's tensors under the names of `ImageRewardModel`; a key it does not know keeps its name."""
    found = {}
    for key, tensor in state.items():
        name = key.removeprefix("blip.")
        if name.startswith("text_encoder."):
            name = "text." + name.removeprefix("text_encoder.")
        elif name.startswith("mlp.layers."):
            name = "head." + name.removeprefix("mlp.layers.")
        elif name.startswith("visual_encoder."):
            name = "vision." + _vision_name(name.removeprefix("visual_encoder."))
        found[name] = tensor
    return found


def _vision_name(name: str) -> str:
    if name in _VISION:
        return _VISION[name]
    stem, _, leaf = name.rpartition(".")
    if block := re.match(r"blocks\.(\d+)\.(.+)", stem):
        return f"encoder.layers.{block[1]}.{_BLOCK.get(block[2], block[2])}.{leaf}"
    return f"{_VISION.get(stem, stem)}.{leaf}"
