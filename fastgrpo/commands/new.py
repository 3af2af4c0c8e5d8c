"""`fastgrpo new DIR`: a config, a reward and prompts to begin from, and a script that loads the result in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgrpo.config import validate
from fastgrpo.config.overrides import load_data
from fastgrpo.config.yaml import dump_yaml
from fastgrpo.data.prompts import is_named, load_prompts
from fastgrpo.errors import UserError
from fastgrpo.models import family_class

REWARD = '''"""A reward of your own: how warm the colours of a sample are, red minus blue. Replace it by yours.

samples: float32 [B, 3, height, width] in [0, 1], of videos [B, 3, frames, height, width]; prompts: B, each with .text
and .metadata; fps: of videos, else None. Return one number for each sample, more is better, None for no score.
Groups in which all samples score alike teach nothing: prefer a number that grades to one that only passes or fails.
"""


def warmth(samples, prompts, fps):
    red, blue = samples[:, 0].flatten(1), samples[:, 2].flatten(1)
    return red.mean(1) - blue.mean(1)
'''

DRAW = '''"""Exports the run beside this file, and draws with it by diffusers alone: the snippet of the model card.

python {folder}/draw.py
"""

import os
from pathlib import Path

import fastgrpo

here = Path(__file__).resolve().parent
exported = here / "exported"
if not exported.exists():
    fastgrpo.export(here / "run", exported)
card = (exported / "README.md").read_text()
os.chdir(exported)
exec(card.split("```python\\n")[1].split("```")[0])
print(*sorted(str(path) for path in exported.glob("sample.*")))
'''

# A LoRA on the embedded FLUX: minutes on a laptop.
EMBEDDED: dict[str, Any] = {
    "run": {"seed": 0},
    "model": {
        "family": "flux", "path": "shapes:flux", "height": 32, "width": 32, "max_sequence_length": 10,
        "lora": {"rank": 16, "alpha": 32},
    },
    "rollout": {
        "prompts_per_iteration": 8, "group_size": 8, "steps": 5, "eta": 1.5,
        "trained": {"kind": "window", "size": 1, "move": "random", "every": 1}, "forward_batch": 32,
    },
    "prompts": {"train": "shapes:train", "heldout": "shapes:heldout"},
    "objective": {"clip_low": 1e-3, "clip_high": 1e-3},
    "update": {"optimizer": {"lr": 1e-3, "weight_decay": 0.0}},
    "train": {"iterations": 60},
    "eval": {"every": 20, "images": 32},
    "checkpoint": {"every": 20},
}  # fmt: skip
# Prompts that are written to a new folder: for training, and held out.
COUNTS = (96, 24)


def new(folder: Path, recipe: Path | None = None) -> list[Path]:
    """Writes config.yaml, reward.py, prompts.txt, heldout.txt and draw.py.

    Args:
        folder: A new directory, or an empty one.
        recipe: A config whose model, sizes and steps are taken; None: a LoRA on the embedded FLUX.

    Returns:
        The files.

    Raises:
        UserError: For a directory that holds something; ConfigError for a recipe that is not one.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; name a new directory")
    data = dict(EMBEDDED) if recipe is None else load_data(recipe)
    data["run"] = {**data.get("run", {}), "dir": str(folder / "run")}
    given = data.get("prompts", {})
    data["prompts"] = {
        **given, "train": str(folder / "prompts.txt"), "heldout": str(folder / "heldout.txt")
    }  # fmt: skip
    data["rewards"] = [{"name": f"{folder / 'reward.py'}:warmth"}]
    config = validate(data)
    video = config.model.frames > 1
    family = family_class(config.model.family)
    if set(family.pipeline_classes) <= set(family.image_pipelines):
        need, page = ("first frames", "video") if video else ("source images", "editing")
        raise UserError(f"{recipe}: its prompts need {need}, which text files have none of; docs/{page}.md")
    name = "set:videos" if video else "set:images"
    sources = given.get("train"), given.get("heldout")
    # A recipe's own, where they are of this package: an embedded model knows no other words.
    if not all(text and is_named(text) and not text.startswith("hf:") for text in sources):
        sources = name, f"{name}-heldout"
    source = f"from {recipe}" if recipe else "a LoRA on the embedded FLUX, minutes on a laptop"
    header = (
        f"# {source}, with a reward of your own.\n"
        f"# fastgrpo train {folder / 'config.yaml'}; every setting is described by: fastgrpo config KEY\n"
    )
    texts = {
        "config.yaml": header + dump_yaml(data),
        "reward.py": REWARD,
        "prompts.txt": _some(sources[0], COUNTS[0]),
        "heldout.txt": _some(sources[1], COUNTS[1]),
        "draw.py": DRAW.format(folder=folder),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in texts]


def _some(source: str, count: int) -> str:
    """Prompts spread evenly over a source, one a line."""
    texts = list(dict.fromkeys(prompt.text for prompt in load_prompts(source)))
    step = max(1, len(texts) // count)
    return "".join(f"{text}\n" for text in texts[::step][:count])
