"""A run's weights as others load them: a LoRA for `pipe.load_lora_weights`, or a whole pipeline directory.

The scale alpha / rank is in the weights, because other readers do not know it; the scheduler that was trained with is
in `scheduler/`; README.md is a model card whose snippet samples as training did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.commands.runs import apply_checkpoint, open_run
from fastgrpo.config import Config
from fastgrpo.data.prompts import is_named, load_prompts
from fastgrpo.errors import UserError
from fastgrpo.models import ModelFamily, load_family
from fastgrpo.models.trainable import LORA_FILE, lora_file


def export_run(
    run_dir: str | Path, out_dir: str | Path, checkpoint: str = "latest", merge: bool = False, comfyui: bool = False
) -> Path:
    """Writes a checkpoint with a model card.

    Full fine-tuning gives a diffusers pipeline directory in model.dtype, a LoRA its safetensors and the scheduler.

    Args:
        run_dir: The directory of the run.
        out_dir: The directory to write, which is made; it must not hold anything.
        checkpoint: `latest`, `best` or the number of an iteration.
        merge: Merges a LoRA into its base, and writes a pipeline.
        comfyui: Writes a LoRA under ComfyUI's names too.

    Returns:
        The directory.

    Raises:
        UserError: `out_dir` holds something, there is no such checkpoint, or the settings do not go together.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir}: is not empty; name a new directory")
    config, store, iteration = open_run(run_dir, checkpoint)
    lora = config.model.lora is not None and not merge
    if comfyui and not lora:
        raise UserError(
            f"--comfyui: writes a LoRA, and {run_dir} "
            + ("is merged into a pipeline; leave out --merge" if merge else "trained full weights")
        )
    # With a cache of embeddings the text encoders would stay out of what is written; a LoRA is merged into the weights
    # that its base was quantized from.
    whole = config.model.model_copy(update={"embedding_cache": None, "quantize": None})
    family = load_family(whole, torch.device("cpu"))
    apply_checkpoint(family, config, store, iteration)
    scheduler = family.sampling_scheduler(config.rollout.shift)
    out_dir.mkdir(parents=True, exist_ok=True)
    if lora:
        save_lora(family, out_dir)
        if comfyui:
            save_comfyui_lora(family, out_dir)
        scheduler.save_pretrained(out_dir / "scheduler")
    else:
        for module in family.modules.values():
            if config.model.lora:
                tuned: Any = module
                tuned.fuse_lora()
                tuned.unload_lora()
            module.to(family.dtype)
        family.pipeline.register_modules(scheduler=scheduler)
        family.pipeline.save_pretrained(out_dir, safe_serialization=True)
    card = model_card(config, iteration, family, type(scheduler).__name__ if lora else None)
    (out_dir / "README.md").write_text(card, encoding="utf-8")
    return out_dir


def lora_layers(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The matrices A [rank, in] and B [out, rank] of each layer of a component's LoRA, by layer, on the host.

    B has the LoRA's scale, so that alpha is the rank: what readers take that find none.
    """
    from peft import get_peft_model_state_dict

    tuned: Any = module
    settings = tuned.peft_config["default"]
    scale, layers = settings.lora_alpha / settings.r, {}
    for key, tensor in get_peft_model_state_dict(tuned).items():
        layer, _, which = key.removesuffix(".weight").rpartition(".lora_")
        tensor = tensor.detach().cpu()
        layers.setdefault(layer, {})[which] = tensor * scale if which == "B" else tensor
    return layers


def save_lora(family: ModelFamily, out_dir: Path) -> None:
    """The LoRA in diffusers' format, a file for each component, which the pipeline's `load_lora_weights` reads."""
    for name, module in family.modules.items():
        tensors = {
            f"{layer}.lora_{which}.weight": tensor
            for layer, matrices in lora_layers(module).items()
            for which, tensor in matrices.items()
        }
        # A second component's file has the names of a first one's: the pipeline is told where to load it.
        family.pipeline.save_lora_weights(
            out_dir, **{f"{family.trained[0]}_lora_layers": tensors}, weight_name=lora_file(family.modules, name)
        )


def save_comfyui_lora(family: ModelFamily, out_dir: Path) -> None:
    """`comfyui.safetensors`, and `comfyui_<component>.safetensors` of further ones, under the names ComfyUI reads."""
    from safetensors.torch import save_file

    for name, module in family.modules.items():
        file = lora_file(family.modules, name).replace(Path(LORA_FILE).stem, "comfyui")
        save_file(comfyui_lora(family, module), out_dir / file)


def comfyui_lora(family: ModelFamily, module: nn.Module) -> dict[str, Tensor]:
    """A component's LoRA by ComfyUI's keys. Layers that are one matrix there are joined: B is block-diagonal."""
    layers, tensors, done = lora_layers(module), {}, set()
    for layer in layers:
        key, joined = family.comfyui_layer(layer)
        if key in done:
            continue
        done.add(key)
        down, up = _joined(module, joined, layers) if len(joined) > 1 else (layers[layer]["A"], layers[layer]["B"])
        if key.startswith("lora_unet_"):
            # kohya's form.
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))
        else:
            tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _joined(module: nn.Module, parts: Sequence[str], layers: Mapping[str, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """A and B of one matrix that stacks the outputs of several linear layers; those without a LoRA get zeros."""
    down = torch.cat([layers[part]["A"] for part in parts if part in layers])
    widths = [int(module.get_submodule(part).out_features) for part in parts]  # pyright: ignore
    up, row, column = down.new_zeros(sum(widths), len(down)), 0, 0
    for part, width in zip(parts, widths, strict=True):
        if part in layers:
            matrix = layers[part]["B"]
            up[row : row + width, column : column + matrix.shape[1]] = matrix
            column += matrix.shape[1]
        row += width
    return down, up


def model_card(config: Config, iteration: int, family: ModelFamily, scheduler: str | None) -> str:
    """README.md in the hub's form: what was trained, on what, and a snippet that samples as training did.

    scheduler: the class of the scheduler beside a LoRA; None: a whole pipeline was written.
    """
    rewards = ", ".join(f"{spec.key} (weight {spec.weight:g})" for spec in config.scored)
    roll, shift = config.rollout, config.rollout.shift
    return f"""---
base_model: {config.model.path}
library_name: diffusers
tags: [fastgrpo, grpo, {"lora" if scheduler else "full-fine-tuning"}]
---

# {config.model.family} aligned by GRPO

Trained with fastgrpo from `{config.model.path}`: {iteration} iterations of
{roll.prompts_per_iteration} prompts × {roll.group_size} samples,
sampler {roll.sampler} (η = {roll.eta:g}), rewards: {rewards}.

```python
{_snippet(config, family, scheduler)}
```

Sampled as in training, without its noise between the steps: {roll.steps} steps, shift {shift}
(`scheduler/` has it), guidance scale {config.model.guidance:g}, {config.model.height} × {config.model.width} pixels.
"""


def _snippet(config: Config, family: ModelFamily, scheduler: str | None) -> str:
    model, video = config.model, config.model.frames > 1
    imports = ["from diffusers import DiffusionPipeline" + (f", {scheduler}" if scheduler else "")]
    if utils := (["export_to_gif"] if video else []) + (["load_image"] if family.takes_image else []):
        imports.append(f"from diffusers.utils import {', '.join(utils)}")
    base = f'"{model.path}"'
    if model.path.startswith("shapes:"):
        imports.append("from fastgrpo.shapes import weights_path")
        base = f'weights_path("{model.path.removeprefix("shapes:")}")'
    source = "here"
    if scheduler:
        source = base + (f', variant="{model.variant}"' if model.variant else "")
    lines = [
        "import torch",
        *imports,
        "",
        "# This directory, or its name on the hub.",
        'here = "."',
        f"pipe = DiffusionPipeline.from_pretrained({source}, dtype=torch.{model.dtype})",
    ]
    for name in family.modules if scheduler else ():
        second = f", load_into_{name}=True" if name != family.trained[0] else ""
        lines.append(f'pipe.load_lora_weights(here, weight_name="{lora_file(family.modules, name)}"{second})')
    if scheduler:
        lines.append(f'pipe.scheduler = {scheduler}.from_pretrained(here, subfolder="scheduler")')
    lines += family.pipeline_settings()
    prompt = "a photo of a cat"
    if model.path.startswith("shapes:"):
        # An embedded model knows the words of its own world alone.
        prompt = load_prompts(config.prompts.train)[0].text if is_named(config.prompts.train) else "a red circle"
    called = family.pipeline_arguments(config.rollout.steps)
    arguments = [f"prompt={prompt!r}", *(f"{key}={value!r}" for key, value in called.items())]
    if family.takes_image:
        size = f".resize(({model.width}, {model.height}))"
        arguments.insert(1, 'image=load_image("first_frame.png")' if video else f'image=load_image("source.png"){size}')
    if video:
        arguments.append('output_type="pil"')
    lines += [
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
        "output = pipe(",
        *(f"    {argument}," for argument in arguments),
        ")",
        f'export_to_gif(output.frames[0], "sample.gif", fps={round(model.fps)})' if video
        else 'output.images[0].save("sample.png")',
    ]  # fmt: skip
    return "\n".join(lines)
