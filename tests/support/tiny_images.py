"""Tiny random image pipelines of the real classes, what their own pipelines draw, and configs over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrpo.algorithms.layout import lay_out
from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt, open_image
from fastgrpo.models import ModelFamily, family_class
from fastgrpo.rollout.decode import decode
from fastgrpo.rollout.sampler import rollout
from fastgrpo.shapes import editing_world, world
from fastgrpo_kernels import noise
from support.tiny import tiny_config

# sd_epsilon's own scheduler is that of Stable Diffusion 1.5; flux_plain is FLUX without embedded guidance (schnell).
MODELS: dict[str, dict[str, Any]] = {
    "flux": {"family": "flux", "guidance": 3.5, "max_sequence_length": 10},
    "flux_plain": {"family": "flux", "guidance": 3.5, "max_sequence_length": 10},
    "flux_true_cfg": {"family": "flux", "guidance": 3.5, "max_sequence_length": 10, "true_cfg": 2.0},
    "flux_kontext": {"family": "flux_kontext", "guidance": 2.5, "max_sequence_length": 10},
    "flux_kontext_true_cfg": {"family": "flux_kontext", "guidance": 2.5, "max_sequence_length": 10, "true_cfg": 2.0},
    "sd_epsilon": {"family": "stable_diffusion", "guidance": 3.0},
    "sd_v": {"family": "stable_diffusion", "guidance": 3.0},
    "sdxl": {"family": "stable_diffusion", "guidance": 3.0},
    "sd3": {"family": "sd3", "guidance": 3.0, "max_sequence_length": 10},
    "sd3_without_t5": {"family": "sd3", "guidance": 3.0, "max_sequence_length": 10},
    "qwen_image": {"family": "qwen_image", "guidance": 3.0, "max_sequence_length": 14},
    "qwen_2_1": {"family": "qwen_image_2_1", "guidance": 3.0, "max_sequence_length": 32},
    "qwen_edit": {"family": "qwen_image_edit", "guidance": 3.0, "max_sequence_length": 48},
    "qwen_edit_plus": {"family": "qwen_image_edit", "guidance": 3.0, "max_sequence_length": 48},
    "flux2": {"family": "flux2", "guidance": 3.0, "max_sequence_length": 28},
    "flux2_distilled": {"family": "flux2", "guidance": 3.0, "max_sequence_length": 28},
    "z_image": {"family": "z_image", "guidance": 2.0, "max_sequence_length": 18},
}
CLASSES = {
    "flux": "FluxPipeline", "flux_plain": "FluxPipeline", "flux_true_cfg": "FluxPipeline",
    "flux_kontext": "FluxKontextPipeline", "flux_kontext_true_cfg": "FluxKontextPipeline",
    "sd_epsilon": "StableDiffusionPipeline",
    "sd_v": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline",
    "sd3_without_t5": "StableDiffusion3Pipeline", "qwen_image": "QwenImagePipeline", "z_image": "ZImagePipeline",
    "qwen_2_1": "QwenImage21Pipeline", "qwen_edit": "QwenImageEditPipeline",
    "qwen_edit_plus": "QwenImageEditPlusPipeline", "flux2": "Flux2KleinPipeline",
    "flux2_distilled": "Flux2KleinPipeline",
}  # fmt: skip
# What the families of edits start from; the others do not look at it.
SOURCES = [editing_world.image_name(edit, seed) for seed, edit in enumerate(editing_world.all_prompts()[::900])]
# Of Qwen-Image-Edit.
EDITS = ("qwen_edit", "qwen_edit_plus")
# Texts of several lengths, the last longer than any pipeline here takes; two with negative prompts of their own.
PROMPTS = [
    Prompt("circle", image=SOURCES[0]),
    Prompt("a red circle", negative="a blue square", image=SOURCES[1]),
    Prompt("a red circle left of a green square", image=SOURCES[2]),
    Prompt(
        "a red circle left of a green square left of a blue triangle",
        negative="a red circle left of a square",
        image=SOURCES[3],
    ),
]


def build(kind: str, seed: int = 0) -> Any:
    """A random pipeline that knows the words of the shapes world."""
    words = world.vocabulary()
    if kind.startswith("flux") and not kind.startswith("flux2"):
        from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline

        task = "edit" if "kontext" in kind else "text"
        words = editing_world.vocabulary() if task == "edit" else words
        # Kontext's pipeline takes an image of as many channels as its latents have for latents.
        sizes = TinyFluxSizes(single_layers=1, task=task, latent_channels=4 if task == "edit" else 3)
        pipeline = build_pipeline(words, sizes, seed)
        if kind == "flux_plain":
            settings = {**pipeline.transformer.config, "guidance_embeds": False}
            pipeline.transformer = type(pipeline.transformer).from_config(settings).eval()
        return pipeline
    if kind in ("sd_epsilon", "sd_v"):
        from fastgrpo.shapes.tiny_stable_diffusion import TinyStableDiffusionSizes, build_pipeline

        sizes = TinyStableDiffusionSizes(prediction="epsilon" if kind == "sd_epsilon" else "v_prediction")
        pipeline = build_pipeline(words, sizes, seed)
        if kind == "sd_epsilon":
            pipeline.scheduler = scheduler_of_15()
        return pipeline
    if kind == "sdxl":
        return build_sdxl(words, seed)
    if kind == "qwen_image":
        from fastgrpo.shapes.tiny_qwen_image import TinyQwenImageSizes, build_pipeline

        return build_pipeline(words, TinyQwenImageSizes(layers=2), seed)
    if kind == "qwen_2_1":
        from fastgrpo.shapes import tiny_qwen_image_2_1

        return tiny_qwen_image_2_1.build_pipeline(words, seed)
    if kind in EDITS:
        from fastgrpo.shapes import tiny_qwen_image_edit

        shrink_sources()
        pipeline = tiny_qwen_image_edit.build_pipeline(words, seed, plus=kind == "qwen_edit_plus")
        if kind == "qwen_edit_plus":
            # As Qwen-Image-Edit-2511 has it: the source is told that it is clean.
            settings = {**pipeline.transformer.config, "zero_cond_t": True}
            pipeline.transformer = type(pipeline.transformer).from_config(settings).eval()
        return pipeline
    if kind in ("flux2", "flux2_distilled"):
        from fastgrpo.shapes.tiny_flux2 import TinyFlux2Sizes, build_pipeline

        return build_pipeline(words, TinyFlux2Sizes(distilled=kind == "flux2_distilled"), seed)
    if kind == "z_image":
        from fastgrpo.shapes.tiny_z_image import TinyZImageSizes, build_pipeline

        return build_pipeline(words, TinyZImageSizes(layers=2), seed)
    from fastgrpo.shapes.tiny_sd3 import TinySD3Sizes, build_pipeline

    return build_pipeline(words, TinySD3Sizes(layers=2, t5=kind == "sd3"), seed)


def scheduler_of_15() -> Any:
    """Stable Diffusion 1.5's own: not DDIM, and silent about clipping."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip


def build_sdxl(words: tuple[str, ...], seed: int) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    from fastgrpo.shapes import tiny_parts

    torch.manual_seed(seed)
    vocabulary = len(tiny_parts.SPECIAL_TOKENS) + len(words)
    vae = tiny_parts.build_autoencoder(32, 3, [16, 32, 48])
    vae.register_to_config(shift_factor=None)
    blocks: Any = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                   "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (1, 2)}  # fmt: skip
    unet = UNet2DConditionModel(
        **blocks, sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32, use_linear_projection=True,
    )  # fmt: skip
    parts: Any = {
        "text_encoder": tiny_parts.build_clip(32, 2, 10, vocabulary),
        "text_encoder_2": tiny_parts.build_projected_clip(32, 2, 10, vocabulary),
        "tokenizer": tiny_parts.build_tokenizer(words, 10, start=True),
        "tokenizer_2": tiny_parts.build_tokenizer(words, 10, start=True),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
            timestep_spacing="leading",
        ),
        "vae": vae, "unet": unet,
    }  # fmt: skip
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def image_config(path: Path | str, kind: str, run_dir: Path | str = "runs/none", **sections: Any) -> Config:
    """A valid config over a pipeline directory; keyword arguments update whole sections."""
    model = {"height": 32, "width": 32, **MODELS[kind], **sections.pop("model", {})}
    rollout_section = {"shift": "pipeline", **sections.pop("rollout", {})}
    if family_class(model["family"]).paradigm == "diffusion":
        rollout_section["sampler"] = "ddim"
    if family_class(model["family"]).image_pipelines:
        prompts = {"train": "editing:train", "heldout": "editing:heldout"}
        sections = {"prompts": prompts, "rewards": [{"name": "editing"}], **sections}
    return tiny_config(Path(path), run_dir, model=model, rollout=rollout_section, **sections)


def shrink_sources(area: int = 32 * 32) -> None:
    """Makes Qwen-Image-Edit's pipelines take sources of so many pixels, where the published ones take 1024 × 1024."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    plus: Any = pipeline_qwenimage_edit_plus
    plus.CONDITION_IMAGE_SIZE = plus.VAE_IMAGE_SIZE = area
    edit: Any = pipeline_qwenimage_edit
    edit.calculate_dimensions = lambda _, ratio: (*plus.calculate_dimensions(area, ratio), None)


def initial(family: ModelFamily, seeds: Sequence[int]) -> torch.Tensor:
    """The initial noise of samples of groups of one."""
    key = noise.noise_key(7, torch.tensor(list(seeds)), 0, 0, noise.STREAM_INITIAL, torch.device("cpu"))
    return noise.normal(key, family.latent_shape)


def drawn(family: ModelFamily, config: Config, prompts: list[Prompt], steps: int = 3) -> torch.Tensor:
    """What deterministic rollout makes of `prompts`."""
    single = config.rollout.model_copy(update={"group_size": 1, "shared_noise": False, "steps": steps})
    schedule = schedule_steps(single, family.noise_levels(steps, "pipeline"), len(prompts), 0, 7, deterministic=True)
    layout = lay_out(schedule, single, np.arange(len(prompts)))
    final = rollout(family, schedule, layout, family.encode(prompts), single, 7, 0).latents
    return decode(family, final, config.rollout.decode_batch)


def by_pipeline(pipeline: Any, family: ModelFamily, prompts: list[Prompt], steps: int = 3) -> torch.Tensor:
    """The same images by the diffusers pipeline, one prompt at a time."""
    images, name, model = [], type(pipeline).__name__, family.config
    for i, prompt in enumerate(prompts):
        settings: dict[str, Any] = {
            "prompt": prompt.text, "height": model.height, "width": model.width, "num_inference_steps": steps,
            "output_type": "pt", "latents": initial(family, [i]),
        }  # fmt: skip
        settings["true_cfg_scale" if "Qwen" in name else "guidance_scale"] = model.guidance
        flux = name in ("FluxPipeline", "FluxKontextPipeline")
        if "Flux2" in name and family.guided:
            negative = prompt.negative if prompt.negative is not None else model.negative_prompt
            settings["negative_prompt_embeds"] = family.encode_prompts([Prompt(negative)])["text"]
        elif flux and model.true_cfg > 1:
            settings |= {"negative_prompt": prompt.negative or "", "true_cfg_scale": model.true_cfg}
        elif "Flux" not in name:
            settings["negative_prompt"] = (prompt.negative or "") if "Qwen" in name else prompt.negative
        if "Kontext" in name:
            assert prompt.image is not None
            settings["image"] = open_image(prompt.image).resize((model.width, model.height), 1)
            settings |= {"max_area": model.height * model.width, "_auto_resize": False}
        if "Edit" in name:
            assert prompt.image is not None
            settings["image"] = open_image(prompt.image).resize((model.width, model.height), 1)
        if not name.startswith(("StableDiffusionP", "StableDiffusionX", "QwenImage21")):
            settings["max_sequence_length"] = family.config.max_sequence_length
        images.append(pipeline(**settings).images)
    drawn = torch.cat(images)
    # Over white, where they have a fourth channel.
    return drawn[:, :3] * drawn[:, 3:] + (1 - drawn[:, 3:]) if drawn.shape[1] == 4 else drawn


def use_ddim(pipeline: Any) -> Any:
    """The pipeline, with DDIM in place of another diffusion scheduler: equality is measured against its step."""
    from diffusers import DDIMScheduler

    if not type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
