"""Trains the tiny CLIP: contrastive (arXiv 2103.00020), each batch holding prompts and their near misses (one word
changed, or two words swapped), which is what alignment is about. Held-out prompts are for its evaluation alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from transformers import CLIPModel

from fastgrpo.config.sections import Section, dump_settings, validate_settings
from fastgrpo.observe.progress import Progress
from fastgrpo.shapes import render, world
from fastgrpo.shapes.tiny_clip import TinyClipSizes, build_clip, save, tokens
from fastgrpo.training.learning_rate import cosine_rate


class ClipConfig(Section):
    """Every setting of a training run."""

    family: Literal["clip"]
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
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    output = model(pixel_values=pixels, **tokens(texts, sizes))
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
    progress = Progress(config.steps, unit="clip step")
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine_rate(step, config.steps, config.lr, config.warmup)
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
        progress.update(step + 1, {"loss": loss.detach()})
    progress.close()


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


def run(data: dict[str, Any]) -> Path:
    """Runs a recipe from plain data; returns the directory of the trained model. Raises ConfigError."""
    config = validate_settings(ClipConfig, data)
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
