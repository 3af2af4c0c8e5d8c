"""A CLIP of a million parameters that has seen the shapes world: transformers' CLIPModel, trained from scratch.

Contrastive (arXiv 2103.00020), each batch holding prompts and their near misses (one word changed, or two words
swapped), which is what alignment is about. `python -m fastgrpo.shapes.tiny_clip configs/pretrain-shapes-clip.yaml`
writes what `CLIPModel.from_pretrained` loads; prompts of the held-out split are for its evaluation alone.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fastgrpo.errors import UserError
from fastgrpo.settings import Section, dump_settings, load_settings
from fastgrpo.shapes import render, world
from fastgrpo.shapes.pretrain import Progress, cosine_lr, images_to_tensor
from fastgrpo.shapes.tiny_parts import END, PAD, SPECIAL_TOKENS, START, build_tokenizer


class TinyClipSizes(Section):
    """Sizes of the tiny CLIP; the defaults are those of the shipped weights."""

    image_size: int = 32
    patch: int = 8
    text_length: int = 10
    width: int = Field(default=96, multiple_of=16)
    vision_layers: int = 4
    text_layers: int = 2
    embedding: int = 64


class ClipConfig(Section):
    """Every setting of a training run."""

    seed: int
    threads: int = Field(ge=1)
    out: str
    sizes: TinyClipSizes = TinyClipSizes()
    steps: int = Field(ge=1)
    pairs: int = Field(ge=2, multiple_of=2)  # images of a step; every second prompt is a near miss of the one before
    lr: float = Field(gt=0)
    warmup: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    bfloat16: bool
    eval_images: int = Field(ge=6)


def build_clip(sizes: TinyClipSizes, seed: int) -> CLIPModel:
    """An untrained CLIPModel in float32; resets torch's global seed."""
    torch.manual_seed(seed)
    tower = {
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_attention_heads": sizes.width // 16,
    }
    text = {
        **tower,
        "vocab_size": len(SPECIAL_TOKENS) + len(world.vocabulary()),
        "max_position_embeddings": sizes.text_length,
        "num_hidden_layers": sizes.text_layers,
        "pad_token_id": PAD,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    vision = {
        **tower,
        "image_size": sizes.image_size,
        "patch_size": sizes.patch,
        "num_hidden_layers": sizes.vision_layers,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes.embedding)
    return CLIPModel(config)


def near_misses(prompts: Sequence[world.ShapesPrompt]) -> dict[str, list[world.ShapesPrompt]]:
    """By text: the prompts of the same category that mean something else by one word changed, or two swapped."""
    words = [p.text.split() for p in prompts]
    misses: dict[str, list[world.ShapesPrompt]] = {p.text: [] for p in prompts}
    for category in world.CATEGORIES:
        for count in {len(w) for w, p in zip(words, prompts, strict=True) if p.category == category}:
            members = [p for w, p in zip(words, prompts, strict=True) if p.category == category and len(w) == count]
            index = {word: i for i, word in enumerate(world.vocabulary())}
            table = np.array([[index[word] for word in p.text.split()] for p in members])
            differ = (table[:, None] != table[None]).sum(axis=2)
            same_words = (np.sort(table)[:, None] == np.sort(table)[None]).all(axis=2)
            for i, j in np.argwhere((differ == 1) | (same_words & (differ == 2))):
                if members[i].meaning != members[j].meaning:
                    misses[members[i].text].append(members[j])
    return misses


def draw_pairs(
    prompts: Sequence[world.ShapesPrompt],
    misses: dict[str, list[world.ShapesPrompt]],
    count: int,
    rng: np.random.Generator,
) -> list[world.ShapesPrompt]:
    """`count` prompts, categories equally often; every second one a near miss of the one before it, if it has any."""
    members = [[p for p in prompts if p.category == c] for c in world.CATEGORIES]
    drawn = []
    for category in rng.integers(len(members), size=count // 2):
        first = members[category][int(rng.integers(len(members[category])))]
        others = misses[first.text] or members[category]
        drawn += [first, others[int(rng.integers(len(others)))]]
    return drawn


def tokens(texts: Sequence[str], sizes: TinyClipSizes) -> dict[str, Tensor]:
    """Token ids and mask of prompts, padded to the model's length."""
    return dict(_tokenizer(sizes.text_length)(list(texts), padding="max_length", return_tensors="pt"))


@functools.cache
def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    return build_tokenizer(world.vocabulary(), length, start=True)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, prompts: Sequence[world.ShapesPrompt]) -> Tensor:
    """The symmetric InfoNCE loss of normalised features [N, D]; pairs of the same meaning are no negatives."""
    meanings = {meaning: i for i, meaning in enumerate(dict.fromkeys(p.meaning for p in prompts))}
    ids = torch.tensor([meanings[p.meaning] for p in prompts])
    same = (ids[:, None] == ids[None]) & ~torch.eye(len(ids), dtype=torch.bool)
    logits = (scale.exp() * images @ texts.T).masked_fill(same, float("-inf"))
    target = torch.arange(len(ids))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def features(model: CLIPModel, images: np.ndarray, texts: Sequence[str], sizes: TinyClipSizes) -> tuple[Tensor, Tensor]:
    """Normalised image and text features [N, D] of uint8 images [N, H, W, 3] and their prompts."""
    output = model(pixel_values=images_to_tensor(images), **tokens(texts, sizes))
    return output.image_embeds, output.text_embeds


def train(model: CLIPModel, config: ClipConfig) -> None:
    """Trains `model` in place on fresh renders."""
    prompts = world.split()[0]
    misses, rng = near_misses(prompts), np.random.default_rng((config.seed, 0))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)
    progress = Progress("clip", config.steps)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_lr(step, config.steps, config.lr, config.warmup)
        batch = draw_pairs(prompts, misses, config.pairs, rng)
        pixels = render.render_batch(batch, rng, config.sizes.image_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            images, texts = features(model, pixels, [p.text for p in batch], config.sizes)
        loss = contrastive_loss(images.float(), texts.float(), model.logit_scale, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        progress(step + 1, loss=loss.detach())


@torch.no_grad()
def evaluate(model: CLIPModel, config: ClipConfig, prompts: Sequence[world.ShapesPrompt]) -> dict[str, float]:
    """How often a render is nearer to its own prompt than to a near miss of it, over all and by category."""
    rng = np.random.default_rng((config.seed, 1))
    misses = near_misses(world.all_prompts())
    drawn = draw_pairs(prompts, misses, 2 * config.eval_images, rng)
    own, other = drawn[::2], drawn[1::2]
    pixels = render.render_batch(own, rng, config.sizes.image_size)
    images, right = features(model, pixels, [p.text for p in own], config.sizes)
    _, wrong = features(model, pixels, [p.text for p in other], config.sizes)
    nearer = (images * (right - wrong)).sum(dim=1) > 0
    rates = {"all": float(nearer.float().mean())}
    for category in world.CATEGORIES:
        rates[category] = float(nearer[[p.category == category for p in own]].float().mean())
    return rates


def save(model: CLIPModel, sizes: TinyClipSizes, path: Path) -> None:
    """Writes model (float16), tokenizer and image processor, as a published CLIP has them."""
    model.half().save_pretrained(path)
    _tokenizer(sizes.text_length).save_pretrained(path)
    side = {"height": sizes.image_size, "width": sizes.image_size}
    half = [0.5, 0.5, 0.5]
    CLIPImageProcessorPil(
        size={"shortest_edge": sizes.image_size}, crop_size=side, image_mean=half, image_std=half
    ).save_pretrained(path)


def main(config_path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs the recipe of a YAML file; returns the directory of the trained model."""
    config = load_settings(ClipConfig, config_path, overrides)
    torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(dump_settings(config))
    model = build_clip(config.sizes, config.seed)
    train(model, config)
    save(model, config.sizes, out / "final")
    written = CLIPModel.from_pretrained(out / "final", dtype=torch.float32)
    train_prompts, heldout = world.split()
    rates = {"train": evaluate(written, config, train_prompts), "heldout": evaluate(written, config, heldout)}
    (out / "eval.json").write_text(json.dumps(rates, indent=1))
    print(json.dumps(rates), flush=True)
    return out / "final"


if __name__ == "__main__":
    try:
        print(main(sys.argv[1], sys.argv[2:]))
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
