"""Scheduler classes × families: the levels and timesteps of diffusers' own pipeline, or one line with the class."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_images, tiny_video
from support.tiny_images import image_config
from support.tiny_video import video_config

from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.errors import ConfigError
from fastgrpo.models import ModelFamily, family_class

CPU = torch.device("cpu")
STEPS = 4
KINDS = (
    *(
        "flux",
        "flux_kontext",
        "flux2",
        "flux2_distilled",
        "sd3",
        "qwen_image",
        "qwen_2_1",
        "qwen_edit",
        "qwen_edit_plus",
        "z_image",
    ),
    *("hunyuan_video", "hunyuan_15", "hunyuan_15_i2v", "ltx2", "ltx2_3", "skyreels", "wan", "wan_i2v", "wan_two"),
)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# Of each scheduler: its class, its settings, and whether its levels are those of a flow that falls to 0.
SCHEDULERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "shift": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, True),
    "plain": ("FlowMatchEulerDiscreteScheduler", {}, True),
    "dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "max_shift": 1.3}, True),
    "terminal": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.02}, True),
    "karras": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}, True),
    "exponential": ("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}, True),
    "beta": ("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}, True),
    "inverted": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, False),
    "lcm": ("FlowMatchLCMScheduler", {"shift": 3.0}, True),
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, False),
    "unipc": ("UniPCMultistepScheduler", {"flow_shift": 3.0, **FLOW}, True),
    "dpm": ("DPMSolverMultistepScheduler", {"flow_shift": 3.0, **FLOW}, True),
    "deis": ("DEISMultistepScheduler", {"flow_shift": 3.0, **FLOW}, False),
    "unipc, not of a flow": ("UniPCMultistepScheduler", {}, False),
    "ddim": ("DDIMScheduler", {}, False),
    "euler": ("EulerDiscreteScheduler", {}, False),
    "edm": ("EDMEulerScheduler", {}, False),
}


class ReachedError(Exception):
    """The pipeline has set its timesteps and asks its model."""


@pytest.fixture(scope="module")
def families():
    built: dict[str, ModelFamily] = {}

    def get(kind: str) -> ModelFamily:
        if kind not in built:
            video = kind in tiny_video.MODELS
            config = video_config("x", kind) if video else image_config("x", kind)
            pipeline = (tiny_video if video else tiny_images).build(kind)
            pipeline.set_progress_bar_config(disable=True)
            built[kind] = family_class(config.model.family)(pipeline, config.model, CPU)
        return built[kind]

    return get


def asked(family: ModelFamily, shift: float | str) -> tuple[NoiseLevels | None, str]:
    """The family's levels, or its error."""
    try:
        return family.noise_levels(STEPS, shift), ""
    except ConfigError as error:
        return None, str(error)


def of_pipeline(family: ModelFamily, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """The sigmas and the timesteps that the pipeline has when it first asks its model."""

    def reached(*_: Any, **__: Any) -> Any:
        raise ReachedError

    source = {"image": Image.new("RGB", (32, 32), "red")} if family.takes_image else {}
    monkeypatch.setattr(family.pipeline, "scheduler", scheduler)
    monkeypatch.setattr(family.denoiser, "forward", reached)
    with pytest.raises(ReachedError):
        family.pipeline(prompt="a red circle", output_type="latent", **source, **family.pipeline_arguments(STEPS))
    return scheduler.sigmas.numpy(), scheduler.timesteps.numpy()


@pytest.mark.parametrize("shift", ["pipeline", 5.0], ids=str)
@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_is_followed_or_refused_by_name(families, kind, name, shift, monkeypatch):
    family = families(kind)
    cls, settings, flows = SCHEDULERS[name]
    monkeypatch.setattr(family.pipeline, "scheduler", getattr(diffusers, cls)(**settings))
    levels, refusal = asked(family, shift)
    if levels is None:
        assert cls in refusal
        assert "\n" not in refusal
        # Those of a flow are refused where the pipeline itself cannot use them.
        if flows:
            with pytest.raises((ValueError, AssertionError, TypeError)):
                of_pipeline(family, getattr(diffusers, cls)(**settings), monkeypatch)
        return
    assert flows
    sigmas, timesteps = of_pipeline(family, family.sampling_scheduler(shift), monkeypatch)
    assert np.abs(np.array([*levels.start, levels.end[-1]]) - sigmas).max() <= 3e-6
    assert np.abs(1000 * np.array(levels.times) - timesteps).max() <= 1e-3
    if shift == 5.0 and name in ("shift", "dynamic", "terminal"):
        # What else moved the levels is off.
        plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
        assert np.abs(of_pipeline(family, plain, monkeypatch)[0] - sigmas).max() <= 1e-6


def test_every_flow_scheduler_serves_some_family(families, monkeypatch):
    served = set()
    for kind in ("flux", "wan"):
        for name, (cls, settings, _) in SCHEDULERS.items():
            monkeypatch.setattr(families(kind).pipeline, "scheduler", getattr(diffusers, cls)(**settings))
            if asked(families(kind), "pipeline")[0] is not None:
                served.add(name)
    assert served == {name for name, (_, _, flows) in SCHEDULERS.items() if flows}


def test_levels_of_a_plain_shift_are_not_rounded(families, monkeypatch):
    family = families("flux")
    monkeypatch.setattr(family.pipeline, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert family.noise_levels(7, "pipeline").start[3] == 3 * (4 / 7) / (1 + 2 * (4 / 7))


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    "cls, settings, words",
    [
        ("EDMEulerScheduler", {}, "is a EDMEulerScheduler, which has no betas"),
        ("EDMDPMSolverMultistepScheduler", {}, "is a .*, which has no betas"),
        ("FlowMatchEulerDiscreteScheduler", {}, "is a .*, which has no betas"),
        ("NobodysScheduler", {}, "is a NobodysScheduler, which has no betas"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "asks for use_flow_sigmas"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "asks for use_karras_sigmas"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "asks for use_beta_sigmas"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "has prediction_type flow_prediction"),
        ("DDIMScheduler", {"clip_sample": True}, "asks for clip_sample"),
    ],
)
def test_what_ddim_cannot_follow_is_refused_before_weights_load(cls, settings, words):
    config = image_config("somewhere", "sd_v").model
    parts = {"vae": {"block_out_channels": [8, 8]}, "unet": {"block_out_channels": [8, 8]}}
    with pytest.raises(ConfigError, match=f"model.path: the scheduler of 'somewhere' {words}"):
        family_class("stable_diffusion").check(config, {**parts, "scheduler": {"_class_name": cls, **settings}})


@pytest.mark.parametrize("cls", ["DDIM", "PNDM", "EulerAncestralDiscrete", "DPMSolverMultistep", "LMSDiscrete"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_betas_of_any_diffusion_scheduler_are_ddims(cls, prediction):
    config = image_config("somewhere", "sd_v").model
    family = family_class("stable_diffusion")(tiny_images.build("sd_v"), config, CPU)
    family.pipeline.scheduler = getattr(diffusers, f"{cls}Scheduler")(prediction_type=prediction, **BETAS)
    own: Any = diffusers.DDIMScheduler.from_config(family.pipeline.scheduler.config, clip_sample=False)
    own.set_timesteps(STEPS)
    levels = family.noise_levels(STEPS, "pipeline")
    assert list(levels.times) == own.timesteps.tolist()
    assert list(levels.start) == own.alphas_cumprod.double()[own.timesteps].tolist()
    assert levels.prediction == prediction


@pytest.mark.parametrize("prediction, refused", [("epsilon", True), ("v_prediction", False)])
def test_no_signal_at_all_is_for_v_prediction_alone(prediction, refused):
    config = image_config("somewhere", "sd_v").model
    family = family_class("stable_diffusion")(tiny_images.build("sd_v"), config, CPU)
    family.pipeline.scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing", **BETAS
    )  # fmt: skip
    if not refused:
        assert family.noise_levels(STEPS, "pipeline").start[0] == 0
        return
    with pytest.raises(ConfigError, match="starts at ᾱ = 0, where a model of epsilon"):
        family.noise_levels(STEPS, "pipeline")


def test_statistics_of_xls_vae_are_applied_as_its_pipeline_does(monkeypatch):
    config = image_config("somewhere", "sdxl").model
    pipeline = tiny_images.build("sdxl")
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3], latents_std=[2.0, 0.5, 1.5])
    family = family_class("stable_diffusion")(pipeline, config, CPU)
    x = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, **given: seen.append(z) or decode(z, **given))
    family.decode(x)
    mean, std = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([2.0, 0.5, 1.5])
    expected = x * std.view(1, -1, 1, 1) / pipeline.vae.config.scaling_factor + mean.view(1, -1, 1, 1)
    assert torch.allclose(seen[0], expected, rtol=1e-5, atol=1e-6)
