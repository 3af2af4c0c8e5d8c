"""Pretraining: one recipe for every family with a tiny pipeline, reproducible, on training prompts alone."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file

from fastgrpo.commands.pretrain import autoencoder, denoiser, main
from fastgrpo.commands.pretrain.empty_channels import with_empty_channels
from fastgrpo.commands.pretrain.recipe import MOVING, STILL, TINY, PretrainConfig, as_prompts
from fastgrpo.config import RewardSpec
from fastgrpo.config.sections import load_settings
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models import load_family
from fastgrpo.rewards import load_reward
from fastgrpo.shapes import moving_verifier, weights_path
from fastgrpo.training.learning_rate import cosine_rate

CONFIGS = Path(__file__).parents[2] / "configs"
FLUX = CONFIGS / "pretrain-shapes-flux.yaml"
SHORT = ["denoiser.steps=3", "denoiser.batch=8", "denoiser.pool=32", "eval.every=2", "eval.images=6"]
SHORT += ["eval.final_images=12", "eval.steps=2", "threads=1"]
STAGE_ONE = ["autoencoder.steps=2", "autoencoder.batch=4"]


def recipe_of(family: str, **changes: Any) -> PretrainConfig:
    """The FLUX recipe for another family, at that family's own sizes."""
    return load_settings(PretrainConfig, FLUX, [*chosen(family), *(f"{k}={v}" for k, v in changes.items())])


def chosen(family: str) -> list[str]:
    """The overrides that make the FLUX recipe another family's; other worlds have other categories."""
    return [f"family={family}", *(["denoiser.shares={}"] if TINY[family].world is not STILL else [])]


# The others differ by their pipelines alone.
SOON = ("flux", "hunyuan_video")


@pytest.mark.parametrize("family", [f if f in SOON else pytest.param(f, marks=pytest.mark.full) for f in TINY])
def test_every_tiny_family_pretrains_and_its_weights_load(family, tmp_path):
    final = main(FLUX, [*chosen(family), *STAGE_ONE, *SHORT, "eval.every=3", f"out={tmp_path / 'run'}"])
    rates = [json.loads(line) for line in (tmp_path / "run" / "eval.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rates] == [3]
    assert {"strict", "score", *TINY[family].world.categories} <= rates[0].keys()
    assert (tmp_path / "run" / "grids" / "final.png").is_file()
    if family not in ("sd3", "qwen_image"):
        # What is shipped stays small.
        assert sum(f.stat().st_size for f in final.rglob("*") if f.is_file()) <= 4_000_000
    loaded = load_family(recipe_of(family).model(str(final), 1.0), torch.device("cpu"))
    part = loaded.trained[0]
    earlier = TINY[family].build(recipe_of(family))
    before, after = getattr(earlier, part).state_dict(), getattr(loaded.pipeline, part).state_dict()
    assert any(not torch.equal(before[name].bfloat16().float(), after[name].float()) for name in before)


def test_a_recipe_is_reproducible_and_continues_from_an_autoencoder(tmp_path):
    first = main(FLUX, [*STAGE_ONE, *SHORT, f"out={tmp_path / 'a'}"])
    # The second run takes the first one's autoencoder and must arrive at the same weights.
    taken = ["autoencoder=null", f"init={tmp_path / 'a' / 'autoencoder'}"]
    second = main(FLUX, [*taken, *SHORT, f"out={tmp_path / 'b'}"])
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (a,), (b,) = ([*(path / part).glob("*.safetensors")] for path in (first, second))
        assert a.read_bytes() == b.read_bytes(), part
    trained = load_file(next((first / "transformer").glob("*.safetensors")))
    earlier = load_file(next((tmp_path / "a" / "step-000002" / "transformer").glob("*.safetensors")))
    assert any(not torch.equal(trained[k], earlier[k]) for k in trained)
    assert len((tmp_path / "a" / "eval.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_diffusion_target_and_its_latents_give_the_clean_ones_back(prediction):
    config = recipe_of("stable_diffusion").model_copy(update={"sizes": {"prediction": prediction}})
    family: Any = denoiser.open_family(TINY["stable_diffusion"].build(config), config)
    x0 = torch.randn(64, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    x, time, target = denoiser.noised(family, x0, torch.Generator().manual_seed(1))
    alpha = family.pipeline.scheduler.alphas_cumprod[time.long()].view(-1, 1, 1, 1)
    clean = {
        "epsilon": (x - (1 - alpha).sqrt() * target) / alpha.sqrt(),
        "v_prediction": alpha.sqrt() * x - (1 - alpha).sqrt() * target,
        "sample": target,
    }[prediction]
    torch.testing.assert_close(clean, x0, rtol=1e-4, atol=2e-4)


def test_a_flow_is_trained_on_what_it_is_told():
    config = recipe_of("flux")
    family = denoiser.open_family(TINY["flux"].build(config), config)
    x0 = torch.randn(64, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    x, sigma, velocity = denoiser.noised(family, x0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(x - sigma.view(-1, 1, 1) * velocity, x0, rtol=1e-5, atol=1e-5)
    # Shifted towards noise, and spread over all levels.
    assert sigma.median() == pytest.approx(0.75, abs=0.1)
    assert sigma.min() < 0.4


@pytest.mark.parametrize("family, shape", [("flux", (16, 12)), ("stable_diffusion", (3, 8, 8))])
def test_a_pool_holds_training_prompts_of_the_shares(family, shape):
    config = recipe_of(family, **{"denoiser.pool": 3000})
    pool, prompts = denoiser.latent_pool(denoiser.open_family(TINY[family].build(config), config), config)
    assert {p.text for p in prompts} <= {p.text for p in STILL.prompts[0]}
    drawn = [sum(p.metadata["category"] == c for p in prompts) / len(prompts) for c in STILL.categories]
    assert config.denoiser.shares == {"position": 2.0, "color_attribution": 2.0}
    assert drawn == pytest.approx([1 / 8, 1 / 8, 1 / 8, 1 / 8, 2 / 8, 2 / 8], abs=0.03)
    assert pool["x0"].shape == (3000, *shape)


def test_a_recipe_can_be_of_some_categories_alone():
    config = recipe_of("hunyuan_video", **{"denoiser.pool": 16, "categories": "[stand,speed]"})
    train, held_out = config.world.prompts
    assert {p.category for p in train} == {p.category for p in held_out} == {"stand", "speed"}
    _, prompts = denoiser.latent_pool(denoiser.open_family(TINY["hunyuan_video"].build(config), config), config)
    assert {p.metadata["category"] for p in prompts} == {"stand", "speed"}
    assert {p.text for p in prompts} <= {p.text for p in train}
    assert config.evaluation("x", 1.0).prompts.heldout == "moving:heldout:stand,speed"


def test_a_video_autoencoder_that_starts_from_an_image_one_shows_the_objects():
    sizes = {"sizes.vae_channels": "[16,32,48]", "sizes.spatial_factor": 4, "sizes.latent_channels": 5}
    config = recipe_of("hunyuan_video", **sizes, **{"sizes.frames": 5})
    world, vae = config.world, TINY["hunyuan_video"].build(config).vae
    prompts = [p for p in world.prompts[1] if p.category == "stand"][:12]
    video = world.render(prompts, np.random.default_rng(0), config.checked_sizes) * 2 - 1

    @torch.no_grad()
    def objects() -> float:
        decoded = vae.decode(vae.encode(video).latent_dist.mean).sample
        return float(moving_verifier.verify((decoded / 2 + 0.5).clamp(0, 1), prompts).objects.mean())

    before = objects()
    autoencoder.inflate(vae, "shapes:flux")
    kernel = vae.encoder.down_blocks[1].resnets[0].conv1.conv.weight
    assert kernel[:, :, :-1].abs().max() == 0 < kernel[:, :, -1].abs().max()
    assert before < 0.2
    assert objects() > 0.8


def test_an_image_autoencoder_of_other_channels_does_not_fit():
    vae = TINY["hunyuan_video"].build(recipe_of("hunyuan_video")).vae
    with pytest.raises(ConfigError, match=r"autoencoder\.inflate: shapes:flux does not fit at"):
        autoencoder.inflate(vae, "shapes:flux")


def test_squared_error_draws_an_autoencoder_to_the_mean():
    # Most pixels are background: absolute error alone leaves the rare bright ones for last.
    errors = []
    for weight in (0.0, 20.0):
        changes = {"autoencoder.steps": 12, "autoencoder.batch": 4, "autoencoder.warmup": 1}
        config = recipe_of("flux", **changes, **{"autoencoder.squared_weight": weight})
        vae = TINY["flux"].build(config).vae
        autoencoder.train(vae, config)
        pixels = config.world.render(config.world.prompts[0][:32], np.random.default_rng(0), config.checked_sizes)
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels * 2 - 1).latent_dist.mode()).sample
        errors.append(float((decoded - (pixels * 2 - 1)).square().mean()))
    assert errors[1] < errors[0]


def test_a_first_frame_is_that_of_its_video_and_what_the_family_encodes():
    config = recipe_of("skyreels", **{"denoiser.pool": 6})
    family: Any = denoiser.open_family(TINY["skyreels"].build(config), config)
    pool, prompts = denoiser.latent_pool(family, config)
    assert pool["x0"].shape == (6, *family.latent_shape)
    pictured = [Prompt(p.text, image=f"moving:{i}:{p.text}") for i, p in enumerate(prompts)]
    encoded = family.encode_prompts(pictured)
    assert encoded["first_frame"].shape == pool["first_frame"].shape
    texts = family.encode_texts(prompts)
    assert "first_frame" not in texts
    torch.testing.assert_close(texts["text"], encoded["text"])


def test_a_source_image_is_that_of_its_edit_and_what_the_family_encodes():
    config = recipe_of("flux_kontext", **{"denoiser.pool": 6})
    family: Any = denoiser.open_family(TINY["flux_kontext"].build(config), config)
    pool, prompts = denoiser.latent_pool(family, config)
    assert pool["x0"].shape == pool["source"].shape == (6, *family.latent_shape)
    world, sizes, rng = config.world, config.checked_sizes, np.random.default_rng(0)
    source, result = world.render_pairs(world.prompts[0][:6], rng, sizes)
    assert source is not None
    # One object differs, and no more.
    assert 0.01 < ((source - result).abs().amax(1) > 0.05).float().mean() < 0.4
    truth, asked = world.truth(world.prompts[1][:8], rng, sizes)
    encoded = family.encode_prompts(asked[:1])
    assert encoded["source"].shape[1:] == pool["source"].shape[1:]
    texts = family.encode_texts(prompts)
    assert "source" not in texts
    scores = load_reward(RewardSpec(name="editing")).score(truth, asked, None)
    assert scores.components["strict"].mean() == 1


def test_empty_channels_change_nothing():
    config = recipe_of("flux_kontext", **{"empty_channels": 1})
    few = TINY["flux_kontext"].build(config)
    few.vae.register_to_config(scaling_factor=1.5, shift_factor=0.25)
    wide: Any = with_empty_channels(few, config)
    assert (wide.vae.config.latent_channels, wide.vae.config.scaling_factor) == (4, 1.5)
    generator = torch.Generator().manual_seed(0)
    pixels, z = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1, torch.randn(2, 4, 8, 8, generator=generator)
    x, text = torch.randn(2, 32, 16, generator=generator), torch.randn(2, 10, 64, generator=generator)
    with torch.no_grad():
        theirs, ours = (vae.encode(pixels).latent_dist for vae in (few.vae, wide.vae))
        torch.testing.assert_close(ours.mean[:, :3], theirs.mean)
        torch.testing.assert_close(ours.std[:, :3], theirs.std)
        assert ours.mean[:, 3].abs().max() == 0
        assert ours.std[:, 3].max() < 1e-4
        torch.testing.assert_close(wide.vae.decode(z).sample, few.vae.decode(z[:, :3]).sample)
        told: Any = {
            "encoder_hidden_states": text, "pooled_projections": text[:, 0], "timestep": torch.tensor([0.2, 0.7]),
            "guidance": torch.tensor([2.5, 2.5]), "txt_ids": torch.zeros(10, 3), "img_ids": torch.zeros(32, 3),
        }  # fmt: skip
        seen = wide.transformer(hidden_states=x, **told).sample
        torch.testing.assert_close(seen[..., :12], few.transformer(hidden_states=x[..., :12], **told).sample)
        assert seen[..., 12:].abs().max() == 0
    # Channels of a packed token, in the order of the pipeline: a latent's four pixels beside each other.
    packed = wide._pack_latents(z, *z.shape)
    torch.testing.assert_close(packed[..., :12], few._pack_latents(z[:, :3], 2, 3, 8, 8))


def test_a_denoiser_starts_from_the_weights_that_there_are(tmp_path):
    few = TINY["flux"].build(recipe_of("flux"))
    few.save_pretrained(tmp_path)
    config = recipe_of("flux_kontext")
    pipeline: Any = TINY["flux_kontext"].build(config)
    words = pipeline.text_encoder.get_input_embeddings().weight.detach().clone()
    denoiser.start_from(denoiser.learned(denoiser.open_family(pipeline, config)), str(tmp_path))
    assert torch.equal(pipeline.transformer.x_embedder.weight, few.transformer.x_embedder.weight)
    known = few.text_encoder.get_input_embeddings().weight
    learned = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(learned[: len(known)], known)
    assert torch.equal(learned[len(known) :], words[len(known) :])
    assert len(words) > len(known)
    smaller: Any = TINY["flux"].build(recipe_of("flux", **{"sizes.single_layers": 1}))
    with pytest.raises(ConfigError, match=r"denoiser\.init: .* does not fit at transformer\.single_transformer_blocks"):
        denoiser.start_from({"transformer": smaller.transformer}, str(tmp_path))


@pytest.mark.parametrize("family", ["flux", "flux2", "stable_diffusion", "hunyuan_video"])
def test_normalised_latents_have_deviation_one(family):
    config = recipe_of(family)
    pipeline = TINY[family].build(config)
    pixels = config.world.render(config.world.prompts[0][:32], np.random.default_rng(0), config.checked_sizes)
    generator = torch.Generator().manual_seed(0)
    autoencoder.normalise(pipeline.vae, autoencoder.raw_latents(pipeline.vae, pixels, generator))
    again = torch.Generator().manual_seed(0)
    latents = denoiser.open_family(pipeline, config).encode_images(pixels, again)
    # FLUX.2's batch norm adds 1e-4 to each variance, of random weights a small one.
    assert latents.square().mean().sqrt() == pytest.approx(1.0, abs=2e-3)


def test_an_autoencoder_of_the_same_layers_is_taken_and_what_normalises_its_latents_measured(tmp_path):
    config = recipe_of("flux2", autoencoder="null", init="shapes:flux")
    pipeline = TINY["flux2"].build(config)
    autoencoder.take(pipeline.vae, config)
    pixels = config.world.render(config.world.prompts[0][::4], np.random.default_rng(1), config.checked_sizes)
    latents = denoiser.open_family(pipeline, config).encode_images(pixels, torch.Generator().manual_seed(1))
    # Every channel of a patch by itself, of renders that it was not measured on.
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=0.1)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(12), rtol=0, atol=0.1)
    given = AutoencoderKL.from_pretrained(weights_path("flux"), subfolder="vae", torch_dtype=torch.float32)
    assert all(torch.equal(value, pipeline.vae.state_dict()[name]) for name, value in given.state_dict().items())
    # Of its own class the statistics are taken as they are.
    pipeline.vae.bn.running_mean.fill_(0.25)
    other = TINY["flux2"].build(config).vae
    pipeline.vae.save_pretrained(tmp_path / "vae")
    autoencoder.take(other, config.model_copy(update={"init": str(tmp_path)}))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in pipeline.vae.state_dict().items())


def test_an_autoencoder_that_does_not_fit_is_refused_in_one_line():
    config = recipe_of("flux2", autoencoder="null", init="shapes:flux", **{"sizes.latent_channels": 4})
    with pytest.raises(ConfigError, match="init: the autoencoder of shapes:flux does not fit; give both the same"):
        autoencoder.take(TINY["flux2"].build(config).vae, config)


def test_prompts_are_dropped_for_the_unconditional_branch(tmp_path, monkeypatch):
    seen: list[str] = []
    family = "stable_diffusion"
    kind = type(denoiser.open_family(TINY[family].build(recipe_of(family)), recipe_of(family)))
    encode = kind.encode_texts
    monkeypatch.setattr(kind, "encode_texts", lambda self, ps: seen.extend(p.text for p in ps) or encode(self, ps))
    main(FLUX, [*chosen(family), *STAGE_ONE, *SHORT, "denoiser.drop=0.5", f"out={tmp_path / 'run'}"])
    assert 4 <= seen[:24].count("") <= 20


def test_worlds_draw_pictures_that_their_verifiers_pass():
    for world, family in ((STILL, "flux"), (MOVING, "hunyuan_video")):
        sizes = recipe_of(family).checked_sizes
        rng = np.random.default_rng(0)
        drawn = world.draw(world.prompts[0], 24, rng)

        scores = load_reward(RewardSpec(name=world.reward)).score(
            world.render(drawn, rng, sizes), as_prompts(drawn), 8.0
        )
        assert scores.components["strict"].mean() == 1


def test_learning_rate_warms_up_and_decays():
    rates = [cosine_rate(step, 100, 2.0, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1 + math.cos(math.pi / 2))
    assert rates[100] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    "override, message",
    [
        ("denoiser.shares.colours=2.0", r"denoiser\.shares\.colours: unknown category; did you mean 'colors'"),
        ("family=fluxx", r"family: unknown family 'fluxx'; did you mean 'flux'"),
        ("sizes.text_widht=32", r"sizes\.text_widht"),
        ("init=shapes:flux", "one of the two"),
        ("categories=[colours]", r"categories\.colours: unknown category; did you mean 'colors'"),
        ("empty_channels=-1", r"empty_channels"),
        ("autoencoder.inflate=shapes:flux", r"autoencoder\.inflate: flux draws no videos"),
    ],
)
def test_a_recipe_that_cannot_run_is_refused_in_one_line(override, message):
    with pytest.raises(ConfigError, match=message):
        load_settings(PretrainConfig, FLUX, [override])
