"""The tiny FLUX is a real pipeline, its text encoders see every word, and what is shipped draws."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

from fastgrpo.commands.pretrain import autoencoder, denoiser
from fastgrpo.commands.pretrain.recipe import PretrainConfig
from fastgrpo.config.sections import load_settings, validate_settings
from fastgrpo.errors import ConfigError
from fastgrpo.shapes import weights_path, world
from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline
from fastgrpo.shapes.tiny_parts import END, PAD, START, UNKNOWN

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain-shapes-flux.yaml"
# A pipeline directory may weigh this much, all files together.
SIZE_LIMIT = 4_000_000


@pytest.fixture(scope="module")
def untrained() -> FluxPipeline:
    pipeline = build_pipeline(world.vocabulary(), TinyFluxSizes(), seed=0)
    assert isinstance(pipeline, FluxPipeline)
    return pipeline


@pytest.fixture(scope="module")
def shipped() -> FluxPipeline:
    return FluxPipeline.from_pretrained(weights_path("flux"), torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def recipe() -> PretrainConfig:
    return load_settings(PretrainConfig, CONFIG)


def sample(pipeline: FluxPipeline, texts: list[str], seed: int, **settings) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 10, "output_type": "pt", "guidance_scale": 3.5, **settings}
    generator = torch.Generator().manual_seed(seed)
    found: Any = pipeline(texts, height=32, width=32, max_sequence_length=10, generator=generator, **settings)
    return found.images


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
    denoiser.save_bfloat16(untrained, tmp_path)
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


@pytest.mark.parametrize(
    "sizes, message",
    [({"rope_axes": [4, 10, 8]}, "rope_axes.*22.*24"), ({"text_width": 60}, "text_width: 60.*16")],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        validate_settings(TinyFluxSizes, sizes)


def test_shipped_autoencoder_keeps_what_the_verifier_reads(shipped, recipe):
    family, prompts = denoiser.open_family(shipped, recipe), world.eval_set(world.split()[1], 240, seed=5)
    pixels = recipe.world.render(prompts, np.random.default_rng(5), recipe.checked_sizes)
    latents = family.encode_images(pixels, torch.Generator().manual_seed(5))
    assert abs(latents.mean()) < 0.1
    assert abs(latents.std() - 1) < 0.1
    assert autoencoder.strict_rate(shipped.vae, recipe, 480) >= 0.98


def test_unknown_weights_are_named():
    with pytest.raises(ValueError, match=r"no shipped pipeline named 'fluxx' \(shipped: .*flux"):
        weights_path("fluxx")


def test_package_import_is_light():
    code = "import sys, fastgrpo.shapes; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
