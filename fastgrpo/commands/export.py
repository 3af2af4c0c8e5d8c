"""A run's weights as others load them: a LoRA for `pipe.load_lora_weights`, or a whole pipeline directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgrpo.commands.runs import apply_checkpoint, open_run
from fastgrpo.config import Config
from fastgrpo.errors import UserError
from fastgrpo.models import ModelFamily, load_family


def export_run(run_dir: str | Path, out_dir: str | Path, checkpoint: str = "latest", merge: bool = False) -> Path:
    """Writes a checkpoint to `out_dir` with a model card.

    Full fine-tuning, or `merge`: a diffusers pipeline directory in model.dtype. LoRA: its safetensors alone.
    Raises UserError for a directory that already holds something.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir}: is not empty; name a new directory")
    config, store, iteration = open_run(run_dir, checkpoint)
    # With a cache of embeddings the text encoders would stay out of what is written; a LoRA is merged into the weights
    # that its base was quantized from.
    whole = config.model.model_copy(update={"embedding_cache": None, "quantize": None})
    family = load_family(whole, torch.device("cpu"))
    apply_checkpoint(family, config, store, iteration)
    out_dir.mkdir(parents=True, exist_ok=True)
    if config.model.lora and not merge:
        save_lora(family, out_dir)
    else:
        for module in family.modules.values():
            if config.model.lora:
                tuned: Any = module
                tuned.fuse_lora()
                tuned.unload_lora()
            module.to(family.dtype)
        family.pipeline.save_pretrained(out_dir, safe_serialization=True)
    (out_dir / "README.md").write_text(model_card(config, iteration, merge), encoding="utf-8")
    return out_dir


def save_lora(family: ModelFamily, out_dir: Path) -> None:
    """The LoRA in diffusers' format, with its rank and alpha, which the pipeline's own `load_lora_weights` reads."""
    from peft import get_peft_model_state_dict

    layers: dict[str, Any] = {}
    for name, module in family.modules.items():
        tuned: Any = module
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(tuned)
        layers[f"{name}_lora_adapter_metadata"] = tuned.peft_config["default"].to_dict()
    family.pipeline.save_lora_weights(out_dir, **layers)


def model_card(config: Config, iteration: int, merged: bool) -> str:
    """README.md in the hub's form: what was trained, on what, how to load it."""
    lora = config.model.lora is not None and not merged
    load = (
        'pipe.load_lora_weights("THIS_DIRECTORY")'
        if lora
        else 'pipe = DiffusionPipeline.from_pretrained("THIS_DIRECTORY")'
    )
    base = f'pipe = DiffusionPipeline.from_pretrained("{config.model.path}")\n' if lora else ""
    rewards = ", ".join(f"{spec.key} (weight {spec.weight:g})" for spec in config.scored)
    return f"""---
base_model: {config.model.path}
library_name: diffusers
tags: [fastgrpo, grpo, {"lora" if lora else "full-fine-tuning"}]
---

# {config.model.family} aligned by GRPO

Trained with fastgrpo from `{config.model.path}`: {iteration} iterations of
{config.rollout.prompts_per_iteration} prompts × {config.rollout.group_size} samples,
sampler {config.rollout.sampler} (η = {config.rollout.eta:g}), rewards: {rewards}.

```python
from diffusers import DiffusionPipeline

{base}{load}
```

Sampling as in training: {config.rollout.steps} steps, guidance scale {config.model.guidance:g},
{config.model.height} × {config.model.width} pixels.
"""
