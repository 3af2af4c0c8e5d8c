"""Rewards that are the cosine of an image and its prompt in a CLIP: CLIP itself, PickScore (arXiv 2305.01569) and
HPS-v2.1 (arXiv 2306.09341); and the LAION aesthetic predictor, a head on CLIP's image features.

Of a video, the middle frame is judged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards.images import ImageProcessor, middle_frame
from fastgrpo.rewards.neural import Dtype, NeuralReward, options
from fastgrpo.rewards.weights import (
    check_exists,
    load_pretrained,
    load_strict,
    load_tokenizer,
    read_json,
    read_state,
    resolve,
)

LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
OPENAI_L = "openai/clip-vit-large-patch14"


class ClipReward(NeuralReward):
    """The cosine of image and prompt. path: a directory or hub id in the layout of transformers' CLIPModel, such as
    openai/clip-vit-large-patch14, or shapes:clip, which is shipped; processor: where tokenizer and image processor are,
    if not there."""

    @options
    def __init__(
        self,
        path: str,
        processor: str | None = None,
        batch: int = 64,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(path, batch, dtype, device, offload)
        self.processor = processor or path
        check_exists(self.processor)

    def load(self) -> nn.Module:
        from transformers import CLIPModel

        self.tokenizer = load_tokenizer(self.processor)
        where = resolve(self.processor, weights=False)
        self.images = ImageProcessor.of(read_json(where / "preprocessor_config.json"), "processor")
        return load_pretrained(CLIPModel, resolve(self.path))

    def encode_texts(self, texts: list[str]) -> Tensor:
        model = self.module
        length = model.config.text_config.max_position_embeddings  # pyright: ignore
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        pooled = model.text_model(**tokens).pooler_output  # pyright: ignore
        return F.normalize(model.text_projection(pooled).float(), dim=-1)  # pyright: ignore

    def encode_images(self, samples: Tensor) -> Tensor:
        """Normalised features [B, D], float32."""
        model = self.module
        pixels = self.images(middle_frame(samples)).to(self.dtype)
        pooled = model.vision_model(pixel_values=pixels).pooler_output  # pyright: ignore
        return F.normalize(model.visual_projection(pooled).float(), dim=-1)  # pyright: ignore

    @torch.no_grad()
    def embed(self, samples: Tensor) -> Tensor:
        """Normalised features [B, D] of any number of samples, float32 on the host: to measure how they differ."""
        parts = [self.encode_images(part.to(self.device)).cpu() for part in samples.split(self.batch)]
        return torch.cat(parts)

    def judge(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> dict[str, Tensor]:
        images = self.encode_images(samples)
        return {"score": (images * self.texts([p.text for p in prompts])).sum(dim=-1)}


class PickScoreReward(ClipReward):
    """PickScore's cosine; its weights are in CLIPModel's layout, its processor is that of the CLIP it started from."""

    @options
    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str = LAION_H,
        batch: int = 64,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(path, processor, batch, dtype, device, offload)


class HPSReward(ClipReward):
    """HPS-v2.1's cosine. path: its published checkpoint, converted to safetensors (open_clip's key names)."""

    @options
    def __init__(
        self,
        path: str,
        processor: str = LAION_H,
        batch: int = 64,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(path, processor, batch, dtype, device, offload)

    def load(self) -> nn.Module:
        from transformers import CLIPModel

        where = resolve(self.path)
        state = read_state(where)
        config = open_clip_config(state)
        self.tokenizer = load_tokenizer(self.processor)
        # Its own code scales the longer edge and pads with black.
        self.images = ImageProcessor(config.vision_config.image_size, fit="pad")
        return load_strict(CLIPModel(config), from_open_clip(state), where)


def linear_head(width: int) -> nn.ModuleDict:
    """LAION's and ImageReward's five linear layers, under their published indices: dropout layers stood between."""
    sizes = [width, 1024, 128, 64, 16, 1]
    return nn.ModuleDict({str(i): nn.Linear(a, b) for i, (a, b) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True)})


class AestheticReward(NeuralReward):
    """The LAION aesthetic predictor, about 1 to 10; the prompt is not read. path: its published head
    (sac+logos+ava1-l14-linearMSE), converted to safetensors; clip: OpenAI's ViT-L/14."""

    @options
    def __init__(
        self,
        path: str,
        clip: str = OPENAI_L,
        batch: int = 64,
        dtype: Dtype = "auto",
        device: str = "auto",
        offload: bool = False,
    ) -> None:
        super().__init__(path, batch, dtype, device, offload)
        check_exists(clip)
        self.clip = clip

    def load(self) -> nn.Module:
        from transformers import CLIPVisionModelWithProjection

        where, tower = resolve(self.path), resolve(self.clip)
        self.images = ImageProcessor.of(read_json(tower / "preprocessor_config.json"), "clip")
        state = {k: v for k, v in read_state(tower).items() if k.startswith(("vision_model.", "visual_projection."))}
        state.pop("vision_model.embeddings.position_ids", None)
        config = _vision_config(read_json(tower / "config.json"))
        layers = {k.removeprefix("layers."): v for k, v in read_state(where).items()}
        # Five small products, in float32: bfloat16 is too coarse for a score of 1 to 10.
        self.head = load_strict(linear_head(config.projection_dim), layers, where).to(self.device)
        return load_strict(CLIPVisionModelWithProjection(config), state, tower)

    def judge(self, samples: Tensor, prompts: Sequence[Prompt], fps: float | None) -> dict[str, Tensor]:
        model = self.module
        pixels = self.images(middle_frame(samples)).to(self.dtype)
        features = F.normalize(model(pixel_values=pixels).image_embeds.float(), dim=-1)
        for layer in self.head.values():
            features = layer(features)
        return {"score": features.squeeze(-1)}


def _vision_config(config: dict) -> Any:
    """The vision part of a published CLIP's config.json, with the projection's size in it."""
    from transformers import CLIPConfig

    whole: Any = CLIPConfig(**config)
    whole.vision_config.projection_dim = whole.projection_dim
    return whole.vision_config


def open_clip_config(state: Mapping[str, Tensor], vision_head: int = 80, text_head: int = 64) -> Any:
    """The sizes of an open_clip checkpoint, read from its tensors; heads are as wide as ViT-H/14's, activations GELU.

    Raises ConfigError where the checkpoint is not one of open_clip.
    """
    from transformers import CLIPConfig

    try:
        vision_width, text_width = state["visual.class_embedding"].shape[0], state["ln_final.weight"].shape[0]
        patch = state["visual.conv1.weight"].shape[-1]
        depth = {
            tower: 1 + max(int(m[1]) for k in state if (m := re.match(tower + r"transformer\.resblocks\.(\d+)\.", k)))
            for tower in ("visual.", "")
        }
        vision = {
            "hidden_size": vision_width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth["visual."],
            "num_attention_heads": vision_width // vision_head,
            "image_size": round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5) * patch,
            "patch_size": patch,
            "hidden_act": "gelu",
        }
        vocabulary = state["token_embedding.weight"].shape[0]
        text = {
            "hidden_size": text_width,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth[""],
            "num_attention_heads": text_width // text_head,
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "vocab_size": vocabulary,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "hidden_act": "gelu",
        }
        projection = state["text_projection"].shape[1]
    except (KeyError, ValueError) as error:
        raise ConfigError(f"path: not a checkpoint in open_clip's layout: {error} is missing") from None
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)


_BLOCKS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OTHERS = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's tensors under transformers' CLIPModel names; a key it does not know keeps its name."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        block = re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)\.?(in_proj_)?(weight|bias)$", key)
        if key in ("visual.proj", "text_projection"):
            found["visual_projection.weight" if key == "visual.proj" else "text_projection.weight"] = tensor.T.clone()
        elif block:
            tower = "vision_model" if block[1] else "text_model"
            layer = f"{tower}.encoder.layers.{block[2]}"
            if block[4]:
                for name, part in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{layer}.self_attn.{name}_proj.{block[5]}"] = part.clone()
            else:
                found[f"{layer}.{_BLOCKS.get(block[3], block[3])}.{block[5]}"] = tensor
        else:
            stem, _, leaf = key.rpartition(".")
            name = _OTHERS.get(key) or (f"{_OTHERS[stem]}.{leaf}" if stem in _OTHERS else key)
            found[name] = tensor
    return found
