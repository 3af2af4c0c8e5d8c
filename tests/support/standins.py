"""Tiny stand-ins of what is published, under its own names and in its own layout: a hub, an empty cache of it, Slurm's
commands. What the runbooks' commands are run with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from fastgrpo.shapes import weights_path
from support.hub import serve_hub
from support.tiny_video import build

# `sbatch … script arguments`: the script as one node runs it, with two tasks.
SBATCH = """#!/bin/bash
while [[ $1 == --* ]]; do shift 2; done
export SLURM_JOB_NODELIST=a SLURM_JOB_ID=$((RANDOM % 9000)) SLURM_NTASKS=2 SLURM_CPUS_PER_TASK=1
exec bash "$@"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
done
worst=0
for job in $(jobs -p); do wait "$job"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1
exit 0
"""


def open_clip_shapes(vision, text, depth, patch, side, embedding, vocabulary, length):
    """The tensors of an open_clip checkpoint; depth: layers of the vision and of the text tower."""
    shapes = {
        "positional_embedding": (length, text), "text_projection": (text, embedding), "logit_scale": (),
        "visual.class_embedding": (vision,), "visual.positional_embedding": (side * side + 1, vision),
        "visual.proj": (vision, embedding), "visual.conv1.weight": (vision, 3, patch, patch),
        "token_embedding.weight": (vocabulary, text),
    }  # fmt: skip
    norms = {"visual.ln_pre": vision, "visual.ln_post": vision, "ln_final": text}
    linear = {"attn.in_proj_": (3, 1), "attn.out_proj.": (1, 1), "mlp.c_fc.": (4, 1), "mlp.c_proj.": (1, 4)}
    for prefix, width, layers in (("visual.transformer", vision, depth[0]), ("transformer", text, depth[1])):
        for block in (f"{prefix}.resblocks.{i}" for i in range(layers)):
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            for name, (out, into) in linear.items():
                shapes |= {f"{block}.{name}weight": (out * width, into * width), f"{block}.{name}bias": (out * width,)}
    for name, width in norms.items():
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def repositories(folder: Path) -> dict[str, Path]:
    """Directories that stand for what the runbooks download."""
    hps, video_reward, wan = folder / "hps", folder / "video-reward", folder / "wan"
    hps.mkdir(parents=True)
    clip = weights_path("flux").parent / "clip"
    words = json.loads((clip / "config.json").read_text())["text_config"]
    generator = torch.Generator().manual_seed(1)
    shapes = open_clip_shapes(
        160, 128, (2, 2), 8, 4, 24, words["vocab_size"], words["max_position_embeddings"]
    )  # fmt: skip
    state = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    torch.save({"state_dict": state}, hps / "HPS_v2.1_compressed.pt")
    (video_reward / "checkpoint-11352").mkdir(parents=True)
    torch.save({"model": {"a": torch.ones(2)}}, video_reward / "checkpoint-11352" / "model.pth")
    (video_reward / "model_config.json").write_text("{}")
    (video_reward / "prompt_template.py").write_text('DETAILED_PROMPT_WITH_SPECIAL_TOKEN = "watch {text_prompt}"\n')
    build("wan").save_pretrained(wan)
    return {
        "black-forest-labs/FLUX.1-dev": weights_path("flux"),
        "CompVis/stable-diffusion-v1-4": weights_path("stable_diffusion"),
        "hunyuanvideo-community/HunyuanVideo": weights_path("hunyuan_video"),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan,
        "xswu/HPSv2": hps,
        "KwaiVGI/VideoReward": video_reward,
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": clip,
        "openai/clip-vit-large-patch14": clip,
        "yuvalkirstain/PickScore_v1": clip,
    }


@contextmanager
def stand_ins(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that serves the stand-ins, an empty cache, a token, and Slurm's commands, for this process and those it
    starts."""
    there, commands = repositories(folder / "published"), folder / "commands"
    commands.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    cache = folder / "cache"
    with serve_hub(there) as address:
        for name, value in {
            "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_TOKEN": "hf_x",
            "HF_HUB_DISABLE_XET": "1", "FASTGRPO_REWARD_TOKEN": "t" * 32, "MASTER_ADDR": "127.0.0.1",
            "VIDEOALIGN": f"{address}/KwaiVGI/VideoReward/resolve/main",
            "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield
