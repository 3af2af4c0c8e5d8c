"""Exports of every family: the card's snippet runs and has the trained weights and levels; other readers agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support import tiny_images, tiny_video
from support.exports import config_of, written_run

from fastgrpo.commands.export import comfyui_lora, export_run, lora_layers
from fastgrpo.data.prompts import load_prompts
from fastgrpo.errors import UserError
from fastgrpo.models import ModelFamily, family_class, load_family
from fastgrpo.models.trainable import make_trainable

CPU = torch.device("cpu")
# A family each, in the dtype and the way that it is exported in; alpha is not the rank.
CASES = {
    "flux": ("bfloat16", "lora"),
    "flux_kontext": ("bfloat16", "lora"),
    "sd_v": ("float32", "lora"),
    "sd3": ("bfloat16", "full"),
    "qwen_image": ("float32", "lora"),
    "z_image": ("bfloat16", "lora"),
    "flux2": ("float32", "lora"),
    "hunyuan_video": ("bfloat16", "lora"),
    "hunyuan_15": ("float32", "merge"),
    "ltx2": ("float32", "lora"),
    "skyreels": ("float32", "lora"),
    "wan_two": ("bfloat16", "lora"),
    "wan_i2v": ("float32", "merge"),
}
FULL = {"sdxl": ("bfloat16", "lora"), "wan": ("float32", "full"), "wan_5b_i2v": ("float32", "lora"),
        "hunyuan_15_i2v": ("float32", "merge"), "qwen_2_1": ("float32", "lora"), "qwen_edit": ("float32", "full"),
        "qwen_edit_plus": ("bfloat16", "lora")}  # fmt: skip


def snippet_of(out: Path) -> str:
    return (out / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def outputs(family: ModelFamily, module: str) -> torch.Tensor:
    """What a component answers for a prompt of its training set, at random latents."""
    edits = family.image_encoding == "source"
    source = "moving:train" if family.config.frames > 1 else "editing:train" if edits else "shapes:train"
    condition = family.encode(load_prompts(source)[:1])
    x = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    time = torch.tensor([0.6 if family.paradigm == "flow" else 600.0])
    with torch.no_grad():
        return family.predict(x, time, condition, family.modules[module]).float()


@pytest.mark.parametrize(
    "kind", [*CASES, *(pytest.param(kind, marks=pytest.mark.full) for kind in FULL)]
)  # fmt: skip
def test_the_cards_snippet_runs_and_has_what_was_trained(tmp_path, monkeypatch, kind):
    dtype, weights = {**CASES, **FULL}[kind]
    config, trained = written_run(tmp_path, kind, dtype, weights)
    out = export_run(tmp_path / "run", tmp_path / "out", merge=weights == "merge")
    monkeypatch.chdir(out)
    for name in ("first_frame.png", "source.png"):
        Image.new("RGB", (32, 32), "red").save(name)
    namespace: dict[str, Any] = {}
    exec(snippet_of(out), namespace)
    with Image.open("sample.gif" if config.model.frames > 1 else "sample.png") as drawn:
        assert drawn.size == (32, 32)
        assert getattr(drawn, "n_frames", 1) == config.model.frames

    plain = config.model.model_copy(update={"lora": None})
    loaded = family_class(config.model.family)(namespace["pipe"], plain, CPU)
    untouched = load_family(config.model, CPU)
    for family in (trained, untouched):
        # Float32 masters, which training computes with in model.dtype.
        family.policy.to(family.dtype)
    assert list(loaded.modules) == list(trained.modules)
    for module in trained.modules:
        ours, theirs, base = (outputs(family, module) for family in (trained, loaded, untouched))
        apart = (ours - theirs).abs().max()
        # In bfloat16 a LoRA adds to what is rounded already, a merged one is rounded with its weight.
        assert apart <= (1e-5 if dtype == "float32" else 0.05) * ours.abs().max()
        assert apart < 0.3 * (ours - base).abs().max()
    # Its scheduler, as it is, has the levels that were trained.
    roll = config.rollout
    levels = loaded.noise_levels(roll.steps, "pipeline")
    assert levels.start == pytest.approx(trained.noise_levels(roll.steps, roll.shift).start, abs=1e-6)
    if roll.shift != "pipeline":
        assert levels.start != pytest.approx(untouched.noise_levels(roll.steps, "pipeline").start, abs=1e-3)


def delta(matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    return matrices["B"].flatten(1).double() @ matrices["A"].flatten(1).double()


@pytest.mark.parametrize("kind", ["flux", "sd_v", "wan_two"])
def test_a_reader_that_knows_no_alpha_applies_the_whole_update(tmp_path, kind):
    """W + B·A, each file's keys alone, is the weight that the run has merged."""
    _, trained = written_run(tmp_path, kind)
    out = export_run(tmp_path / "run", tmp_path / "out")
    for name, module in trained.modules.items():
        second = "" if name == trained.trained[0] else f"_{name}"
        written = load_file(out / f"pytorch_lora_weights{second}.safetensors")
        assert all(key.startswith(f"{trained.trained[0]}.") for key in written)
        before = {n.replace(".base_layer", ""): p.clone() for n, p in module.named_parameters()}
        merged: Any = module
        merged.fuse_lora()
        merged.unload_lora()
        after, changed = dict(merged.named_parameters()), 0
        for key in written:
            if ".lora_A." not in key:
                continue
            layer = key.removeprefix(f"{trained.trained[0]}.").removesuffix(".lora_A.weight")
            update = delta({"A": written[key], "B": written[key.replace("lora_A", "lora_B")]})
            weight = f"{layer}.weight"
            assert torch.allclose(
                before[weight].flatten(1).double() + update, after[weight].flatten(1).double(), atol=1e-6
            )
            changed += update.abs().max().item() > 1e-3
        assert changed > 2


# A layer of each family, its name in ComfyUI, and whether it is joined with others there.
COMFYUI = {
    "flux": ("transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
    "sd3": ("transformer_blocks.0.attn.to_out.0", "transformer.transformer_blocks.0.attn.to_out.0"),
    "qwen_image": ("transformer_blocks.0.attn.to_v", "transformer.transformer_blocks.0.attn.to_v"),
    "z_image": ("layers.1.attention.to_v", "transformer.layers.1.attention.to_v"),
    "sd_v": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
    ),
    "wan": ("blocks.1.attn2.to_out.0", "diffusion_model.blocks.1.cross_attn.o"),
    "hunyuan_video": ("single_transformer_blocks.0.attn.to_k", "diffusion_model.single_blocks.0.linear1"),
}


@pytest.mark.parametrize("kind", list(COMFYUI))
def test_comfyui_reads_the_same_update(kind):
    """Of every matrix, joined ones too; where diffusers reads such files, by its own conversion."""
    video = kind in tiny_video.MODELS
    pipeline = (tiny_video if video else tiny_images).build(kind)
    config = config_of(kind, Path("x"), Path("y"), "float32", "lora").model
    family = family_class(config.family)(pipeline, config, CPU)
    make_trainable(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in family.policy.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    layers, written = lora_layers(family.denoiser), comfyui_lora(family, family.denoiser)
    layer, name = COMFYUI[kind]
    assert layer in layers
    pair = ("lora_down", "lora_up") if name.startswith("lora_unet_") else ("lora_A", "lora_B")
    keys = {key for key in written if key.startswith(f"{name}.")}
    assert {f"{name}.{half}.weight" for half in pair} <= keys
    read = 0
    for one in layers:
        key, joined = family.comfyui_layer(one)
        matrices = {"A": written[f"{key}.{pair[0]}.weight"], "B": written[f"{key}.{pair[1]}.weight"]}
        whole, row = delta(matrices), 0
        if f"{key}.alpha" in written:
            whole *= written[f"{key}.alpha"].item() / len(matrices["A"])
        for part in joined:
            width = cast(Any, family.denoiser.get_submodule(part)).out_features
            expected = delta(layers[part]) if part in layers else torch.zeros(1, dtype=torch.float64)
            assert torch.allclose(whole[row : row + width], expected, rtol=1e-6, atol=1e-9)
            row += width
        assert row == len(whole)
        read += 1
    assert read == len(layers) > 2
    if kind in ("sd_v", "wan"):
        converted = pipeline.lora_state_dict({key: tensor.clone() for key, tensor in written.items()})
        tensors = converted[0] if isinstance(converted, tuple) else converted
        assert len(tensors) == 2 * len(layers)


def test_comfyui_is_for_a_lora(tmp_path):
    written_run(tmp_path, "flux", weights="full")
    with pytest.raises(UserError, match=r"--comfyui: writes a LoRA, and .* trained full weights"):
        export_run(tmp_path / "run", tmp_path / "out", comfyui=True)


def test_comfyuis_file_stands_beside_the_lora(tmp_path):
    written_run(tmp_path, "wan_two")
    out = export_run(tmp_path / "run", tmp_path / "out", comfyui=True)
    assert {p.name for p in out.iterdir()} == {
        "README.md", "scheduler", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_transformer_2.safetensors",
        "comfyui.safetensors", "comfyui_transformer_2.safetensors",
    }  # fmt: skip
    assert all(
        key.startswith("diffusion_model.blocks.") for key in load_file(out / "comfyui_transformer_2.safetensors")
    )
