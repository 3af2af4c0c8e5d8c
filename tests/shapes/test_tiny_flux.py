"""The tiny FLUX is a real pipeline, its text encoders see every word, and its pretraining recipe is reproducible."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from safetensors.torch import load_file

from fastgrpo.errors import ConfigError
from fastgrpo.settings import load_settings, validate_settings
from fastgrpo.shapes import pretrain, render, verifier, weights_path, world
from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline
from fastgrpo.shapes.tiny_parts import END, PAD, START, UNKNOWN

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain-shapes-flux.yaml"
# A pipeline directory may weigh this much, all files together.
SIZE_LIMIT = 4_000_000


@pytest.fixture(scope="module")
def untrained() -> FluxPipeline:
    return build_pipeline(world.vocabulary(), TinyFluxSizes(), seed=0)


@pytest.fixture(scope="module")
def shipped() -> FluxPipeline:
    return FluxPipeline.from_pretrained(weights_path("flux"), torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def recipe() -> pretrain.PretrainConfig:
    return load_settings(pretrain.PretrainConfig, CONFIG)


def sample(pipeline: FluxPipeline, texts: list[str], seed: int, **settings) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 10, "output_type": "pt", "guidance_scale": 3.5, **settings}
    generator = torch.Generator().manual_seed(seed)
    return pipeline(texts, height=32, width=32, max_sequence_length=10, generator=generator, **settings).images


def test_tokenizers_know_every_prompt(untrained):
    texts = [p.text for p in world.all_prompts()]
    for tokenizer, start in ((untrained.tokenizer, [START]), (untrained.tokenizer_2, [])):
        ids = tokenizer(texts, padding="max_length", max_length=10, truncation=True, return_tensors="pt").input_ids
        assert ids.shape == (len(texts), 10)
        assert not (ids == UNKNOWN).any()
        # One token a word, then the end token, then padding: nothing is cut off.
        for text, row in zip(texts[::97], ids[::97].tolist(), strict=True):
            words = tokenizer.convert_tokens_to_ids(text.split())
            assert row == (start + words + [END] + [PAD] * 10)[:10]
            assert END in row
        assert len({tuple(row) for row in ids.tolist()}) == len(texts)
    assert untrained.tokenizer("a purple circle").input_ids.count(UNKNOWN) == 1


@pytest.mark.parametrize("text", ["two red circles", "a red circle left of a blue square"])
def test_changing_any_word_changes_both_embeddings(untrained, text):
    words = text.split()
    others = [
        " ".join([*words[:i], word, *words[i + 1 :]])
        for i in range(len(words))
        for word in world.vocabulary()
        if word != words[i]
    ]
    with torch.no_grad():
        embeddings, pooled, _ = untrained.encode_prompt([text, *others], None, max_sequence_length=10)
    for name, value in (("sequence", embeddings.flatten(1)), ("pooled", pooled)):
        distance = (value[1:] - value[:1]).norm(dim=1) / value[0].norm()
        nearest = int(distance.argmin())
        assert distance[nearest] > 1e-3, f"{name}: {others[nearest]!r} looks like {text!r}"


def test_saved_pipeline_is_small_plain_and_loads(untrained, tmp_path):
    pretrain.save_bfloat16(untrained, tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in files) <= SIZE_LIMIT
    loaded = FluxPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        before, after = getattr(untrained, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k].bfloat16().float(), after[k].float()) for k in before), name
    assert next(untrained.transformer.parameters()).dtype == torch.float32
    text = "a red circle and a blue square"
    assert loaded.tokenizer(text).input_ids == untrained.tokenizer(text).input_ids
    assert loaded.tokenizer.model_max_length == 10


def test_policy_predicts_what_the_pipeline_integrates(untrained, recipe):
    """One Euler step of FluxPipeline from sigma 1 is x - v, with the guidance, ids and timestep of training."""
    prompts = [p.text for p in world.all_prompts()[::500]]
    x = torch.randn(len(prompts), 16, 12, generator=torch.Generator().manual_seed(1))
    after = sample(untrained, prompts, 0, latents=x, num_inference_steps=1, output_type="latent")
    clip_ids, t5_ids = (
        tokenizer(prompts, padding="max_length", max_length=10, return_tensors="pt").input_ids
        for tokenizer in (untrained.tokenizer, untrained.tokenizer_2)
    )
    with torch.no_grad():
        velocity = pretrain.Policy(untrained, recipe.flow.guidance)(x, torch.ones(len(x)), clip_ids, t5_ids)
    torch.testing.assert_close(after, x - velocity, rtol=1e-5, atol=1e-5)


def test_pool_holds_training_prompts_of_every_category_only(untrained, recipe):
    small = recipe.model_copy(update={"flow": recipe.flow.model_copy(update={"pool": 3000})})
    pool = pretrain.latent_pool(untrained, small, torch.Generator().manual_seed(0))
    texts = untrained.tokenizer_2.batch_decode(pool["t5_ids"], skip_special_tokens=True)
    train, _ = world.split()
    assert set(texts) <= {p.text for p in train}
    assert recipe.flow.shares == {"position": 2.0, "color_attribution": 2.0}
    drawn = [sum(world.parse(t).category == c for t in texts) / len(texts) for c in world.CATEGORIES]
    assert drawn == pytest.approx([1 / 8, 1 / 8, 1 / 8, 1 / 8, 2 / 8, 2 / 8], abs=0.03)
    assert texts == untrained.tokenizer.batch_decode(pool["clip_ids"], skip_special_tokens=True)
    assert pool["x0"].shape == (3000, 16, 12)


def test_learning_rate_warms_up_and_decays():
    rates = [pretrain.cosine_lr(step, 100, 2.0, 10) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1 + math.cos(math.pi / 2))
    assert rates[100] == pytest.approx(0.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(
    "sizes, message",
    [({"rope_axes": [4, 10, 8]}, "rope_axes.*22.*24"), ({"text_width": 60}, "text_width: 60.*16")],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        validate_settings(TinyFluxSizes, sizes)


def test_unknown_category_is_refused():
    with pytest.raises(ConfigError, match=r"flow\.shares\.colours: unknown category; did you mean 'colors'"):
        load_settings(pretrain.PretrainConfig, CONFIG, ["flow.shares.colours=2.0"])


def test_recipe_is_reproducible_and_continues_from_an_autoencoder(tmp_path):
    overrides = [
        "autoencoder.steps=2",
        "autoencoder.batch=8",
        "flow.steps=3",
        "flow.batch=16",
        "flow.pool=64",
        "eval.every=2",
        "eval.images=12",
        "eval.final_images=24",
        "eval.steps=2",
        "threads=1",
    ]
    first = pretrain.main(CONFIG, [*overrides, f"out={tmp_path / 'a'}"])
    # The second run takes the first one's autoencoder and must arrive at the same weights.
    second = pretrain.main(CONFIG, [*overrides, f"out={tmp_path / 'b'}", f"init={tmp_path / 'a' / 'autoencoder'}"])
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (a,), (b,) = ([*(path / part).glob("*.safetensors")] for path in (first, second))
        assert a.read_bytes() == b.read_bytes(), part
    trained = load_file(next((first / "transformer").glob("*.safetensors")))
    earlier = load_file(next((tmp_path / "a" / "step-000002" / "transformer").glob("*.safetensors")))
    assert any(not torch.equal(trained[k], earlier[k]) for k in trained)
    assert len((tmp_path / "a" / "eval.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "a" / "grids" / "final.png").is_file()


def test_shipped_weights_are_small_and_plain():
    files = [f for f in weights_path("flux").rglob("*") if f.is_file()]
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in files) <= SIZE_LIMIT


def test_shipped_autoencoder_keeps_what_the_verifier_reads(shipped, recipe):
    prompts = world.eval_set(world.split()[1], 240, seed=5)
    images = render.render_batch(prompts, np.random.default_rng(5))
    vae: AutoencoderKL = shipped.vae
    latents = pretrain.encode(vae, images, torch.Generator().manual_seed(5))
    assert abs(latents.mean()) < 0.1
    assert abs(latents.std() - 1) < 0.1
    assert pretrain.reconstruction_strict(vae, recipe, 480) >= 0.98


def test_shipped_pipeline_draws_held_out_prompts(shipped):
    prompts = world.eval_set(world.split()[1], 96, seed=7)
    texts = [p.text for p in prompts]
    images = sample(shipped, texts, seed=7)
    assert images.shape == (96, 3, 32, 32)
    strict = verifier.verify(images.float(), prompts).strict.mean()
    assert strict >= 0.35
    # The same images against prompts of another meaning, of their own category: the pictures follow the words.
    others = prompts[6:] + prompts[:6]
    differ = [a.meaning != b.meaning for a, b in zip(prompts, others, strict=True)]
    assert sum(differ) >= 48
    assert verifier.verify(images.float(), others).strict[differ].mean() <= 0.1
    assert torch.equal(images[:6], sample(shipped, texts, seed=7)[:6])


def test_unknown_weights_are_named():
    with pytest.raises(ValueError, match=r"no shipped pipeline named 'fluxx' \(shipped: .*flux"):
        weights_path("fluxx")


def test_package_import_is_light():
    code = "import sys, fastgrpo.shapes; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
