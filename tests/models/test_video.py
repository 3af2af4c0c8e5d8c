"""The video families: what the pipeline draws, ratio 1, a right gradient, inputs refused in one line."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.tiny_images import drawn, initial
from support.tiny_video import MODELS, build, video_config
from support.updates import run_update

from fastgrpo.algorithms.layout import lay_out
from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.commands.export import save_lora
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt, load_prompts, open_image
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError
from fastgrpo.models import ModelFamily, load_family
from fastgrpo.models.resized import resized
from fastgrpo.models.trainable import make_trainable
from fastgrpo.rollout.decode import decode
from fastgrpo.rollout.sampler import initial_noise, rollout
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.trainer import Trainer
from fastgrpo.training.update import Updater

CPU = torch.device("cpu")
KINDS = list(MODELS)
# Its image to video takes all that it takes.
HUNYUAN_15 = pytest.param("hunyuan_15", marks=pytest.mark.full)
FROM_IMAGE = ("skyreels", "wan_i2v", "wan_5b_i2v", "wan_two_i2v", "hunyuan_15_i2v")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Directories that diffusers wrote, one a kind, and the pipelines they came from."""
    built: dict[str, tuple[Any, Any]] = {}

    def get(kind: str):
        if kind not in built:
            pipeline, path = build(kind), tmp_path_factory.mktemp(kind)
            pipeline.save_pretrained(path)
            pipeline.set_progress_bar_config(disable=True)
            built[kind] = path, pipeline
        return built[kind]

    return get


@pytest.fixture(scope="module")
def families(saved):
    loaded: dict[str, ModelFamily] = {}

    def get(kind: str) -> ModelFamily:
        if kind not in loaded:
            loaded[kind] = load_family(video_config(saved(kind)[0], kind).model, CPU)
        return loaded[kind]

    return get


def prompts_of(*captions: str) -> list[Prompt]:
    return [Prompt(text, image=f"moving:{i}:{text}") for i, text in enumerate(captions)]


# Of several lengths.
PROMPTS = prompts_of("a red circle stands", "a blue square moves up, a green cross moves left")
# A negative prompt, and words that are to be written.
NEGATIVE = Prompt(
    'a red circle says "left" and "up"', negative="a blue square moves", image="moving:3:a red circle stands"
)


def by_pipeline(pipeline: Any, family: ModelFamily, prompts: list[Prompt], steps: int = 3) -> torch.Tensor:
    """The same videos by the diffusers pipeline, one prompt at a time."""
    kind, scale, videos = family.name, family.config.guidance, []
    for i, prompt in enumerate(prompts):
        settings: dict[str, Any] = {
            "prompt": prompt.text, "height": family.config.height, "width": family.config.width,
            "num_frames": family.config.frames,
            "num_inference_steps": steps, "latents": initial(family, range(i, i + 1)), "output_type": "pt",
            "max_sequence_length": family.config.max_sequence_length,
        }  # fmt: skip
        if prompt.image and "ImageToVideo" in type(pipeline).__name__:
            settings["image"] = open_image(prompt.image)
        if kind == "skyreels":
            settings |= {"true_cfg_scale": scale, "negative_prompt": prompt.negative or "", "guidance_scale": 1.0}
            settings["generator"] = [torch.Generator().manual_seed(0)]
        elif kind == "ltx2":
            flat, sound = settings["latents"], family.beside
            apart = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0, "guidance_scale": scale}
            settings |= apart | {f"audio_{name}": value for name, value in apart.items()}
            settings["frame_rate"] = float(family.config.fps)
            settings["latents"] = family.of_policy(flat).unflatten(1, (-1, pipeline.transformer.config.in_channels))
            # The pipeline takes sound as its autoencoder has it.
            vae, tokens = (
                pipeline.audio_vae,
                flat[:, -sound:].unflatten(1, (-1, pipeline.audio_vae.latents_std.numel())),
            )
            settings["audio_latents"] = tokens * vae.latents_std + vae.latents_mean
        elif kind == "hunyuan_video_1_5":
            pipeline.guider = pipeline.guider.new(guidance_scale=scale)
            for name in ("max_sequence_length", *(("height", "width") if "image" in settings else ())):
                del settings[name]
        else:
            settings["guidance_scale"] = scale
            if family.config.guidance_2 is not None:
                settings["guidance_scale_2"] = family.config.guidance_2
        if kind in ("wan", "hunyuan_video_1_5", "ltx2"):
            settings["negative_prompt"] = prompt.negative if prompt.negative is not None else ""
        videos.append(pipeline(**settings).frames)
    return torch.cat(videos).transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_is_the_pipelines_video(saved, families, kind, monkeypatch):
    path, pipeline = saved(kind)
    family = families(kind)
    if family.name == "wan":
        # It ships a multistep scheduler; at its own levels the step is Euler's.
        for one in (pipeline, family.pipeline):
            monkeypatch.setattr(one, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    ours = drawn(family, video_config(path, kind), PROMPTS)
    theirs = by_pipeline(pipeline, family, PROMPTS)
    assert ours.shape == theirs.shape == (2, 3, 9, 32, 32)
    assert (ours - theirs).abs().max() <= 1e-4
    assert ours.std() > 0.01
    assert (ours[0] - ours[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["skyreels", "wan", "wan_two", HUNYUAN_15, "hunyuan_15_i2v", "ltx2"])
def test_a_negative_prompt_is_the_pipelines_too(saved, families, kind, monkeypatch):
    path, pipeline = saved(kind)
    family = families(kind)
    if family.name == "wan":
        for one in (pipeline, family.pipeline):
            monkeypatch.setattr(one, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    ours, config = drawn(family, video_config(path, kind), [NEGATIVE]), video_config(path, kind)
    assert (ours - by_pipeline(pipeline, family, [NEGATIVE])).abs().max() <= 1e-4
    without = Prompt(NEGATIVE.text, image=NEGATIVE.image)
    assert (ours - drawn(family, config, [without])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["hunyuan_video", "wan", "wan_two", "hunyuan_15", "ltx2", *FROM_IMAGE])
def test_another_size_is_the_pipelines_too(saved, tmp_path, kind, monkeypatch):
    path, pipeline = saved(kind)
    height, width = (64, 32) if kind == "ltx2" else (48, 16) if kind == "hunyuan_15_i2v" else (48, 32)
    prompt = PROMPTS[0]
    if kind == "hunyuan_15_i2v":
        # Its pipeline's size is that of the picture's shape.
        assert prompt.image is not None
        open_image(prompt.image).resize((32, 96)).save(tmp_path / "tall.png")
        prompt = replace(prompt, image=str(tmp_path / "tall.png"))
    config = video_config(path, kind, model={**MODELS[kind], "height": height, "width": width, "frames": 5})
    family = load_family(config.model, CPU)
    if family.name == "wan":
        for one in (pipeline, family.pipeline):
            monkeypatch.setattr(one, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    ours, theirs = drawn(family, config, [prompt]), by_pipeline(pipeline, family, [prompt])
    assert ours.shape == theirs.shape == (1, 3, 5, height, width)
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["hunyuan_video", "skyreels", "wan", "hunyuan_15", "ltx2_3"])
def test_without_guidance_too(saved, kind, monkeypatch):
    path, pipeline = saved(kind)
    config = video_config(path, kind, model={**MODELS[kind], "guidance": 1.0})
    family = load_family(config.model, CPU)
    if kind == "wan":
        for one in (pipeline, family.pipeline):
            monkeypatch.setattr(one, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert (drawn(family, config, PROMPTS[:1]) - by_pipeline(pipeline, family, PROMPTS[:1])).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["hunyuan_video", "wan", "ltx2"])
def test_any_word_changes_the_conditioning(families, kind):
    family = families(kind)
    caption = "a red circle moves right, a blue square stands"
    words = {
        "red": "cyan",
        "circle": "cross",
        "right": "left",
        "blue": "green",
        "square": "triangle",
        "moves": "stands",
    }
    others = [caption.replace(word, other, 1) for word, other in words.items()]
    encoded = family.encode([Prompt(t) for t in (caption, *others)])
    for name in [name for name in encoded if not name.startswith("negative")]:
        tensor = encoded[name]
        for row in range(1, len(others) + 1):
            assert (tensor[row] - tensor[0]).abs().max() > 1e-4, (name, others[row - 1])


@pytest.mark.parametrize("kind", FROM_IMAGE)
def test_the_first_frame_changes_the_video(families, kind):
    family = families(kind)
    same = [Prompt("a red circle stands", image=f"moving:{seed}:a red circle stands") for seed in (0, 1)]
    encoded = family.encode(same)
    x = initial(family, range(2))
    x[1] = x[0]
    with torch.no_grad():
        v = family.predict(x, torch.full((2,), 0.6), encoded)
    assert (v[0] - v[1]).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="'a red circle stands' has no image"):
        family.encode([Prompt("a red circle stands")])


def test_sound_takes_euler_steps_beside_a_video_that_does_not(saved):
    """It stands with the video at each trained step, and no loss sees it."""
    config = video_config(saved("ltx2")[0], "ltx2", update={"optimizer": {"lr": 1e-4, "weight_decay": 0.0}})
    family = load_family(config.model, CPU)
    family.policy.requires_grad_(True)
    schedule, trajectory, conditioning = updated(family, config, PROMPTS)
    layout, sound = trajectory.layout, family.beside
    assert 0 < sound < family.latent_shape[0]
    before, after = (trajectory.layout.rows_of(step) for step in (1, 2))
    row = torch.from_numpy(layout.sample_prompt)
    x, v, y = trajectory.x[before][row], trajectory.v_old[before][row], trajectory.x[after]
    euler = x + (schedule.times[2] - schedule.times[1]) * v
    torch.testing.assert_close(y[:, -sound:], euler[:, -sound:], rtol=1e-5, atol=1e-6)
    assert (family.of_policy(y) - family.of_policy(euler)).abs().mean() > 0.1
    # A group's samples part in the video at the first trained step, and in what is heard of it after the second.
    assert torch.equal(y[0, -sound:], y[1, -sound:])
    assert not torch.equal(trajectory.latents[0, -sound:], trajectory.latents[1, -sound:])
    model: Any = family.denoiser
    heads = {name: getattr(model, name).weight.detach().clone() for name in ("proj_out", "audio_proj_out")}
    updater = Updater(family, config, World(0, 1, CPU), OptimizerState(family.policy, config.update, 1))
    run_update(updater, schedule, trajectory, conditioning, np.array([1.0, -1.0, 0.5, -0.5]))
    assert not torch.equal(model.proj_out.weight, heads["proj_out"])
    assert torch.equal(model.audio_proj_out.weight, heads["audio_proj_out"])


def test_texts_are_as_long_as_the_connectors_registers_allow(saved):
    family = load_family(
        video_config(saved("ltx2")[0], "ltx2", model={**MODELS["ltx2"], "max_sequence_length": 14}).model, CPU
    )
    with pytest.raises(ConfigError, match=r"model\.max_sequence_length: 14 is not a multiple of 4"):
        family.encode(PROMPTS)


def test_a_given_first_frame_of_the_5b_comes_out_as_it_went_in(families):
    family = families("wan_5b_i2v")
    config = video_config("unused", "wan_5b_i2v")
    schedule = schedule_steps(config.rollout, family.noise_levels(4, "pipeline"), 4, 0, 7)
    layout = lay_out(schedule, config.rollout, np.arange(4))
    conditioning = family.encode(PROMPTS)
    latents = rollout(family, schedule, layout, conditioning, config.rollout, 7, 0).latents
    wanted = conditioning["condition"][torch.from_numpy(layout.sample_prompt)]
    torch.testing.assert_close(latents[:, :, :1], wanted, rtol=1e-4, atol=1e-4)


def updated(family: ModelFamily, config: Config, prompts: list[Prompt]):
    samples = config.rollout.prompts_per_iteration * config.rollout.group_size
    levels = family.noise_levels(config.rollout.steps, config.rollout.shift)
    schedule = schedule_steps(config.rollout, levels, samples, 0, 7)
    layout = lay_out(schedule, config.rollout, np.arange(samples))
    conditioning = family.encode(prompts)
    trajectory = rollout(family, schedule, layout, conditioning, config.rollout, 7, 0)
    return schedule, trajectory, conditioning


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ratio_is_one_and_the_update_moves_the_weights(saved, kind):
    config = video_config(saved(kind)[0], kind)
    family = load_family(config.model, CPU)
    family.policy.requires_grad_(True)
    schedule, trajectory, conditioning = updated(family, config, PROMPTS)
    # A group shares its video noise from the first frame to the last.
    first = trajectory.layout.rows_of(schedule.first_stochastic)
    assert len(trajectory.x[first]) == 2
    before = [p.detach().clone() for p in family.policy.parameters()]
    updater = Updater(family, config, World(0, 1, CPU), OptimizerState(family.policy, config.update, 1))
    result = run_update(updater, schedule, trajectory, conditioning, np.array([1.0, -1.0, 0.5, -0.5]))
    assert float(result.first.max_deviation) == 0
    moved = [not torch.equal(a, b) for a, b in zip(before, family.policy.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 3


@pytest.mark.parametrize("kind", [HUNYUAN_15 if kind == "hunyuan_15" else kind for kind in KINDS])
def test_the_first_ratio_is_one_in_bfloat16(saved, kind):
    config = video_config(saved(kind)[0], kind, model={**MODELS[kind], "dtype": "bfloat16"})
    family = load_family(config.model, CPU)
    family.policy.to(torch.bfloat16).requires_grad_(True)
    schedule, trajectory, conditioning = updated(family, config, PROMPTS)
    updater = Updater(family, config, World(0, 1, CPU), OptimizerState(family.policy, config.update, 1))
    result = run_update(updater, schedule, trajectory, conditioning, np.array([1.0, -1.0, 0.5, -0.5]))
    assert trajectory.v_old.dtype == torch.bfloat16
    assert float(result.first.max_deviation) == 0


@pytest.mark.parametrize(
    "kind", ["hunyuan_video", "skyreels", "wan_two", "wan_5b_i2v", HUNYUAN_15, "hunyuan_15_i2v", "ltx2"]
)
def test_the_gradient_is_a_finite_difference(saved, kind):
    """Autograd against a central difference in float64; guidance is added in float32, so that much less exactly."""
    config = video_config(saved(kind)[0], kind)
    family = load_family(config.model, CPU)
    family.dtype = torch.float64
    family.denoiser.double().requires_grad_(True)
    conditioning = family.encode(PROMPTS)
    x, time = initial(family, range(2)).double(), torch.tensor([0.7, 0.4])
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    block = family.blocks(family.denoiser)[-1]
    weights = [p for p in block.parameters() if p.ndim > 1][:3]

    def loss() -> torch.Tensor:
        return (family.predict(x, time, conditioning).double() * target).mean()

    loss().backward()
    for weight in weights:
        place = int(weight.grad.abs().argmax())  # pyright: ignore[reportOptionalMemberAccess]
        with torch.no_grad():
            flat, step = weight.view(-1), 1e-3
            flat[place] += step
            high = float(loss())
            flat[place] -= 2 * step
            low = float(loss())
            flat[place] += step
        expected = float(weight.grad.view(-1)[place])  # pyright: ignore[reportOptionalMemberAccess]
        assert (high - low) / (2 * step) == pytest.approx(expected, rel=2e-2 if family.guided else 1e-4)


@pytest.mark.parametrize("kind", ["hunyuan_video", "hunyuan_15"])
def test_a_rows_bits_do_not_depend_on_the_texts_beside_it(families, kind):
    family = families(kind)
    long = prompts_of('a blue square moves up, a green cross says "left"')[0]
    x = initial(family, range(1)).expand(2, -1, -1, -1, -1)
    time = torch.full((2,), 0.5)
    with torch.no_grad():
        both = [family.predict(x, time, family.encode([PROMPTS[0], other])) for other in (PROMPTS[0], long)]
    assert torch.equal(both[0][0], both[1][0])


def test_checkpointed_attention_reads_its_own_lengths(saved):
    from fastgrpo.distributed.activation import checkpoint_activations

    grads = []
    for checkpointed in ("none", "all"):
        config = video_config(saved("hunyuan_video")[0], "hunyuan_video")
        family = load_family(config.model, CPU)
        family.denoiser.requires_grad_(True)
        checkpoint_activations(family.blocks(family.denoiser), checkpointed)
        x, time = initial(family, range(2)), torch.tensor([0.7, 0.4])
        family.predict(x, time, family.encode(PROMPTS)).square().mean().backward()
        grads.append([p.grad for p in family.denoiser.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["hunyuan_video", "wan"])
def test_levels_are_the_pipelines(saved, families, kind):
    scheduler = copy.deepcopy(saved(kind)[1].scheduler)
    if kind == "wan":
        scheduler.set_timesteps(10)
    else:
        scheduler.set_timesteps(sigmas=list(np.linspace(1.0, 0.0, 11)[:-1]))
    levels = families(kind).noise_levels(10, "pipeline")
    # A multistep scheduler starts 1e-6 below 1, for its own solver's sake.
    assert list(levels.start) == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=2e-6)
    assert levels.end[-1] == 0
    assert families(kind).noise_levels(10, 9.0).start[5] > levels.start[5]


def test_each_transformer_of_two_serves_its_side_of_the_boundary(families):
    levels = families("wan_two").noise_levels(10, "pipeline")
    assert {m for m, s in zip(levels.modules, levels.start, strict=True) if s >= 0.8} == {"transformer"}
    assert {m for m, s in zip(levels.modules, levels.start, strict=True) if s < 0.8} == {"transformer_2"}


def test_each_transformer_of_two_has_its_guidance_and_its_gradient(saved):
    """Of a step of its own: the other one's weights, and its scale, have no part in it."""
    family = load_family(video_config(saved("wan_two")[0], "wan_two").model, CPU)
    family.policy.requires_grad_(True)
    other = resized(family, family.config.model_copy(update={"guidance_2": 5.0}))
    conditioning, x, time = family.encode(PROMPTS), initial(family, range(2)), torch.tensor([0.7, 0.4])
    for name, module in family.modules.items():
        v = family.predict(x, time, conditioning, module)
        assert torch.equal(v, other.predict(x, time, conditioning, module)) is (name == "transformer")
        # A frozen copy is guided as what it was copied from.
        assert torch.equal(v, family.predict(x, time, conditioning, copy.deepcopy(module)))
        v.square().mean().backward()
        moved = {part for part, its in family.modules.items() if any(p.grad is not None for p in its.parameters())}
        assert moved == {name}
        module.zero_grad()


@pytest.mark.parametrize(
    "kind, model, message",
    [
        ("hunyuan_video", {"frames": 8}, r"model\.frames: 8 is not 4k \+ 1, .*nearest is 9"),
        ("hunyuan_video", {"height": 40}, r"model\.height: 40 is not a multiple of 16; the nearest are 32 and 48"),
        ("skyreels", {"width": 24}, r"model\.width: 24 is not a multiple of 16; the nearest are 16 and 32"),
        ("wan", {"frames": 1 + 2}, r"model\.frames: 3 is not 4k \+ 1"),
        ("wan", {"height": 40}, r"model\.height: 40 is not a multiple of 16"),
        ("wan", {"guidance_2": 3.0}, r"model\.guidance_2: 3, but '.*' has one transformer; leave it out"),
        ("ltx2", {"frames": 8}, r"model\.frames: 8 is not 2k \+ 1"),
        ("wan_i2v", {"max_sequence_length": 14}, r"model\.max_sequence_length: 14, but Wan 2\.1's image"),
    ],
)
def test_what_the_vae_cannot_take_is_refused_before_weights_load(saved, kind, model, message, monkeypatch):
    config = video_config(saved(kind)[0], kind, model={**MODELS[kind], **model})
    monkeypatch.setattr("fastgrpo.models.loading.load_pipeline", None)
    with pytest.raises(ConfigError, match=message) as caught:
        load_family(config.model, CPU)
    assert "\n" not in str(caught.value)


def test_fps_must_be_a_rate(saved):
    with pytest.raises(ConfigError, match="fps"):
        video_config(saved("wan")[0], "wan", model={**MODELS["wan"], "fps": 0})


def test_a_text_to_video_transformer_is_no_skyreels(saved, tmp_path):
    import json
    import shutil

    shutil.copytree(saved("hunyuan_video")[0], tmp_path / "t2v")
    index = json.loads((tmp_path / "t2v/model_index.json").read_text())
    index["_class_name"] = "HunyuanSkyreelsImageToVideoPipeline"
    (tmp_path / "t2v/model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"takes 8 channels, not 16 .*family of a text-to-video model is hunyuan_video"
    ):
        load_family(video_config(tmp_path / "t2v", "skyreels").model, CPU)


def test_chunked_decoding_is_the_whole_and_tiling_differs_by_its_blend(families):
    family = families("hunyuan_video")
    vae = family.pipeline.vae
    latents = torch.randn(3, 8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    whole = family.decode(latents)
    torch.testing.assert_close(decode(family, latents, 2), whole, rtol=1e-4, atol=1e-5)
    tiles = [family.decode(latents[..., :4, start : start + 4]) for start in (0, 2)]
    # Tiles of 32 pixels, every 16.
    size = {
        f"tile_sample_{kind}_{side}": n for kind, n in (("min", 32), ("stride", 16)) for side in ("height", "width")
    }
    vae.enable_tiling(**size)
    tiled = family.decode(latents)
    vae.enable_tiling(**dict.fromkeys(size, 48))
    one_tile = family.decode(latents)
    vae.disable_tiling()
    assert tiled.shape == whole.shape == (3, 3, 9, 48, 48)
    assert torch.equal(one_tile, whole)
    assert not torch.equal(tiled, whole)
    torch.testing.assert_close(tiled[..., :16, :16], tiles[0][..., :16, :16])
    # Where two tiles overlap, a blend of both.
    left, right, blend = tiles[0][..., :16, 16:], tiles[1][..., :16, :16], tiled[..., :16, 16:32]
    assert (blend <= torch.maximum(left, right) + 1e-5).all()
    assert (blend >= torch.minimum(left, right) - 1e-5).all()


def test_tiling_is_switched_on_by_the_config(saved):
    config = video_config(
        saved("hunyuan_video")[0], "hunyuan_video", model={**MODELS["hunyuan_video"], "vae_tiling": True}
    )
    assert load_family(config.model, CPU).pipeline.vae.use_tiling


@pytest.mark.parametrize(
    "kind", ["hunyuan_video", "skyreels", "wan_two", "wan_5b_i2v", HUNYUAN_15, "hunyuan_15_i2v", "ltx2"]
)
def test_encoded_prompts_and_first_frames_are_cached_on_disk(saved, tmp_path, kind, monkeypatch):
    model = {**MODELS[kind], "embedding_cache": str(tmp_path)}
    config = video_config(saved(kind)[0], kind, model=model)
    first = load_family(config.model, CPU).encode(PROMPTS)
    again = load_family(config.model, CPU)
    monkeypatch.setattr(type(again), "encode_prompts", None)
    second = again.encode(PROMPTS)
    assert again.pipeline.text_encoder is None
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {n: a.tolist() for n, a in first.host.items()} == {n: a.tolist() for n, a in second.host.items()}


@pytest.mark.full
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["wan_two", "hunyuan_15", "hunyuan_15_i2v", "ltx2"])
def test_three_iterations_of_random_weights_train(saved, tmp_path, kind, lora):
    """With prompts from a cache, from the command line's door to the last metrics."""
    model = {**MODELS[kind], "embedding_cache": str(tmp_path / "prompts"), "lora": lora}
    settings: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")}, "rewards": [{"name": "clip", "path": "shapes:clip"}],
        "train": {"iterations": 3}, "update": {"optimizer": {"lr": 1e-2}},
    }  # fmt: skip
    trainer = Trainer.from_config(video_config(saved(kind)[0], kind, model=model, **settings))
    weights = [p for p in trainer.family.policy.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(line["samples/trained"] == 4 for line in lines)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
    assert sum(moved) > len(moved) / 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_weights_load_into_the_pipeline(saved, tmp_path, dtype):
    """What we train and save with diffusers is what its pipeline draws."""
    from diffusers import HunyuanVideoPipeline

    config = video_config(saved("hunyuan_video")[0], "hunyuan_video")
    family = load_family(config.model, CPU)
    with torch.no_grad():
        for p in family.denoiser.parameters():
            p.mul_(1.05)
    family.pipeline.save_pretrained(tmp_path)
    loaded = HunyuanVideoPipeline.from_pretrained(tmp_path, torch_dtype=getattr(torch, dtype))
    loaded.set_progress_bar_config(disable=True)
    videos = by_pipeline(loaded, family, PROMPTS[:1])
    bound = 1e-4 if dtype == "float32" else 0.1
    assert (videos.float() - drawn(family, config, PROMPTS[:1])).abs().max() <= bound


@pytest.mark.parametrize("kind", ["hunyuan_video", "skyreels", "wan", "ltx2"])
def test_a_lora_loads_into_the_pipeline(saved, tmp_path, kind, monkeypatch):
    path, pipeline = saved(kind)
    config = video_config(path, kind, model={**MODELS[kind], "lora": {"rank": 2, "alpha": 4.0}})
    family = load_family(config.model, CPU)
    make_trainable(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in family.policy.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    save_lora(family, tmp_path)
    if kind == "wan":
        for one in (pipeline, family.pipeline):
            monkeypatch.setattr(one, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0))
    before = by_pipeline(pipeline, family, PROMPTS[:1])
    pipeline.load_lora_weights(tmp_path)
    after = by_pipeline(pipeline, family, PROMPTS[:1])
    pipeline.unload_lora_weights()
    assert (after - before).abs().max() > 0.01
    assert (after - drawn(family, config, PROMPTS[:1])).abs().max() <= 1e-4


def test_a_frozen_copy_attends_to_its_own_text(families):
    """The KL's reference model is a deep copy, evaluated between a forward and its backward."""
    family = families("hunyuan_video")
    frozen = copy.deepcopy(family.denoiser)
    x, time = initial(family, range(2)), torch.full((2,), 0.5)
    with torch.no_grad():
        one = family.predict(x, time, family.encode(PROMPTS))
        swapped = family.predict(x, time, family.encode(PROMPTS[::-1]), frozen)
        assert family.denoiser.text_trim.lengths == frozen.text_trim.lengths[::-1]  # pyright: ignore
        assert torch.equal(family.predict(x, time, family.encode(PROMPTS), frozen), one)
    assert not torch.allclose(swapped, one)


def test_a_groups_shared_noise_is_one_video_noise(families):
    family = families("hunyuan_video")
    roll = video_config("unused", "hunyuan_video").rollout
    schedule = schedule_steps(roll, family.noise_levels(4, "pipeline"), 4, 0, 7)
    layout = lay_out(schedule, roll, np.arange(4))
    x = initial_noise(layout, roll, family.latent_shape, 7, 0, CPU, True)
    assert x.shape == (4, 8, 3, 4, 4)
    assert torch.equal(x[0], x[1])
    assert torch.equal(x[2], x[3])
    assert not torch.equal(x[0], x[2])
    # Every frame has noise of its own.
    assert (x[:, :, 1:] - x[:, :, :-1]).abs().amax(dim=(1, 3, 4)).min() > 0.1
    single = roll.model_copy(update={"shared_noise": False})
    apart = initial_noise(lay_out(schedule, single, np.arange(4)), single, family.latent_shape, 7, 0, CPU, True)
    assert not torch.equal(apart[0], apart[1])


def test_moving_prompts_reach_the_families(families):
    prompts = load_prompts("moving:train")[:3]
    encoded = families("skyreels").encode(prompts)
    assert encoded["first_frame"].shape == (3, 8, 1, 4, 4)
    assert encoded.host["text_length"].tolist() == [len(p.text.replace(",", " ,").split()) + 1 for p in prompts]
