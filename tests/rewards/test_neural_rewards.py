"""Neural rewards: tiny random checkpoints in the published layouts, processors against PIL's, loading whole or not."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.neural import SIZES, samples
from support.standins import open_clip_shapes

from fastgrpo.config import RewardSpec
from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.clip import from_open_clip, open_clip_config
from fastgrpo.rewards.images import ImageProcessor, to_pil
from fastgrpo.shapes.tiny_clip import build_clip, save

PROMPTS = [Prompt(t) for t in ("a red circle", "two blue squares", "a red circle", "a cross left of a square")]


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    save(build_clip(SIZES, seed=0), SIZES, path)
    return path


@pytest.fixture(scope="module")
def hps_path(tmp_path_factory):
    """HPS-v2.1's layout and key names, tiny: heads of 80 and 64, converted to safetensors."""
    path = tmp_path_factory.mktemp("hps") / "HPS_v2.1_compressed.safetensors"
    generator = torch.Generator().manual_seed(1)
    shapes = open_clip_shapes(160, 128, (2, 2), 8, 2, 24, 37, 10)
    save_file({k: torch.randn(v, generator=generator) * 0.1 for k, v in shapes.items()}, path)
    return path


@pytest.mark.parametrize("height, width", [(48, 40), (224, 224), (333, 501), (20, 24)])
def test_the_clip_processor_equals_pils(clip_path, height, width):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = samples(height, width)
    theirs = CLIPImageProcessorPil.from_pretrained(clip_path)(to_pil(images), return_tensors="pt")["pixel_values"]
    ours = ImageProcessor.of(json.loads((clip_path / "preprocessor_config.json").read_text()), "processor")(images)
    # In units of the 256 levels: normalised by 0.5.
    assert ((ours - theirs).abs() * 127.5).max() <= 2.01
    reward: Any = load_reward(RewardSpec(name="clip", path=str(clip_path)))
    embeddings = []
    for pixels in (ours, theirs):
        assert reward.module is not None
        reward.images = lambda _, pixels=pixels: pixels
        embeddings.append(reward.encode_images(images))
    assert (embeddings[0] - embeddings[1]).abs().max() < 2e-3


def test_clip_score_is_transformers_own_cosine_batched_or_single(clip_path):
    from transformers import AutoTokenizer, CLIPModel

    images, texts = samples(32, 32), [p.text for p in PROMPTS]
    reward: Any = load_reward(RewardSpec(name="clip", path=str(clip_path), options={"batch": 3}))
    assert reward._module is None
    scores = reward.score(images, PROMPTS, None)
    model = CLIPModel.from_pretrained(clip_path, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(clip_path)(texts, padding=True, return_tensors="pt")
    pixels = (images * 255).round() / 127.5 - 1
    with torch.no_grad():
        output = model(pixel_values=pixels, **{k: tokens[k] for k in ("input_ids", "attention_mask")})
    expected = (output.image_embeds * output.text_embeds).sum(-1)
    assert scores.values == pytest.approx(expected.numpy(), abs=1e-5)
    single = [reward.score(images[i : i + 1], PROMPTS[i : i + 1], None).values[0] for i in range(4)]
    assert scores.values == pytest.approx(single, abs=1e-6)


def test_text_is_encoded_once_for_each_prompt(clip_path):
    reward: Any = load_reward(RewardSpec(name="clip", path=str(clip_path)))
    encoded = []
    inner = reward.texts.encode
    reward.texts.encode = lambda texts: encoded.extend(texts) or inner(texts)
    reward.texts.size = 2
    for _ in range(2):
        reward.score(samples(32, 32), PROMPTS, None)
    assert encoded[:3] == ["a red circle", "two blue squares", "a cross left of a square"]
    assert "a red circle" not in encoded[3:] or len(reward.texts.rows) <= 2


def test_weights_are_offloaded_between_phases_and_bfloat16_is_close(clip_path):
    images = samples(32, 32)
    exact = load_reward(RewardSpec(name="clip", path=str(clip_path))).score(images, PROMPTS, None)
    reward: Any = load_reward(
        RewardSpec(name="clip", path=str(clip_path), options={"dtype": "bfloat16", "offload": True})
    )
    first = reward.score(images, PROMPTS, None)
    reward.release()
    assert reward._away
    assert np.array_equal(reward.score(images, PROMPTS, None).values, first.values)
    assert not reward._away
    assert first.values == pytest.approx(exact.values, abs=0.02)


def test_hps_reads_open_clips_names(hps_path, clip_path):
    reward = load_reward(RewardSpec(name="hps", path=str(hps_path), options={"processor": str(clip_path)}))
    scores = reward.score(samples(), PROMPTS, None)
    assert scores.valid.all()
    assert len(set(scores.values)) == 4
    assert (np.abs(scores.values) <= 1).all()


def test_open_clips_names_map_to_the_same_numbers(hps_path):
    """One attention block of open_clip's, written with torch's own module, against the mapped transformers one."""
    from transformers import CLIPModel

    state = load_file(hps_path)
    model = CLIPModel(open_clip_config(state)).eval()
    model.load_state_dict(from_open_clip(state))
    prefix = "visual.transformer.resblocks.1."
    block = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    attention = torch.nn.MultiheadAttention(160, 2, batch_first=True)
    attention.load_state_dict({k.removeprefix("attn."): v for k, v in block.items() if k.startswith("attn.")})
    x = torch.randn(2, 5, 160, generator=torch.Generator().manual_seed(2))
    norm = lambda x, n: torch.nn.functional.layer_norm(x, (160,), block[f"{n}.weight"], block[f"{n}.bias"])  # noqa: E731
    linear = lambda x, n: torch.nn.functional.linear(x, block[f"{n}.weight"], block[f"{n}.bias"])  # noqa: E731
    with torch.no_grad():
        h = norm(x, "ln_1")
        mid = x + attention(h, h, h)[0]
        expected = mid + linear(torch.nn.functional.gelu(linear(norm(mid, "ln_2"), "mlp.c_fc")), "mlp.c_proj")
        ours = model.vision_model.encoder.layers[1](x, attention_mask=None)
        ours = ours[0] if isinstance(ours, tuple) else ours
    assert torch.allclose(ours, expected, atol=1e-5)
    assert torch.equal(model.visual_projection.weight, state["visual.proj"].T)


def test_hps_at_its_real_size_has_a_place_for_every_key():
    from transformers import CLIPModel

    shapes = open_clip_shapes(1280, 1024, (32, 24), 14, 16, 1024, 49408, 77)
    with torch.device("meta"):
        state = {k: torch.empty(v) for k, v in shapes.items()}
        config = open_clip_config(state)
        model = CLIPModel(config)
    mapped = from_open_clip(state)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)
    assert sum(p.numel() for p in model.parameters()) == 986_109_441


def test_missing_and_unexpected_keys_are_errors_that_name_them(hps_path, clip_path, tmp_path):
    state = load_file(hps_path)
    del state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    state["score_predictor.weight"] = torch.zeros(1)
    state["ln_final.bias"] = torch.zeros(3)
    path = tmp_path / "broken.safetensors"
    save_file(state, path)
    reward = load_reward(RewardSpec(name="hps", path=str(path), options={"processor": str(clip_path)}))
    with pytest.raises(ConfigError) as error:
        reward.score(samples(), PROMPTS, None)
    for part in (
        "3 missing (vision_model.encoder.layers.1.self_attn.k_proj.weight",
        "1 unexpected (score_predictor.weight)",
        "1 of another shape (text_model.final_layer_norm.bias [3] for [128])",
    ):
        assert part in str(error.value)

    broken = tmp_path / "clip"
    broken.mkdir()
    for file in clip_path.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    state = load_file(broken / "model.safetensors")
    state["extra.weight"] = state.pop("visual_projection.weight")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing \(visual_projection.weight\); 1 unexpected \(extra.weight\)"):
        load_reward(RewardSpec(name="clip", path=str(broken))).score(samples(), PROMPTS, None)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ({"name": "clip"}, "rewards.clip: 'clip' does not take its options: missing a required argument: 'path'"),
        ({"name": "clip", "path": "no/where/at/all"}, "rewards.clip: path: there is nothing at no/where/at/all"),
        ({"name": "hps", "path": "HPS_v2.1_compressed.pt"}, "fastgrpo convert-reward HPS_v2.1_compressed.pt OUT"),
        ({"name": "clip", "path": "a/b", "options": {"batch": "many"}}, "rewards.clip: batch: 'many' is not valid"),
        (
            {"name": "clip", "path": "a/b", "options": {"bacth": 1}},
            "keyword argument 'bacth'; did you mean 'batch'?",
        ),
        ({"name": "clip", "path": "a/b", "options": {"dtype": "fp8"}}, "rewards.clip: dtype: 'fp8' is not valid"),
    ],
)
def test_options_that_cannot_be_used_are_named(spec, expected):
    with pytest.raises(ConfigError) as error:
        load_reward(RewardSpec(**spec))
    assert expected in str(error.value)


def test_the_aesthetic_predictor_is_its_published_layers_on_normalised_features(clip_path, tmp_path):
    from transformers import CLIPModel

    sizes = [SIZES.embedding, 1024, 128, 64, 16, 1]
    generator = torch.Generator().manual_seed(3)
    state = {}
    for index, (a, b) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        state[f"layers.{index}.weight"] = torch.randn(b, a, generator=generator) / a**0.5
        state[f"layers.{index}.bias"] = torch.randn(b, generator=generator)
    save_file(state, tmp_path / "head.safetensors")
    reward = load_reward(
        RewardSpec(name="aesthetic", path=str(tmp_path / "head.safetensors"), options={"clip": str(clip_path)})
    )
    images = samples(32, 32)
    scores = reward.score(images, PROMPTS, None)
    model = CLIPModel.from_pretrained(clip_path, dtype=torch.float32)
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=(images * 255).round() / 127.5 - 1).pooler_output
        x = torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)
        for index in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{index}.weight"].T + state[f"layers.{index}.bias"]
    assert scores.values == pytest.approx(x[:, 0].numpy(), abs=1e-4)
    save_file({k: v for k, v in state.items() if "6" not in k}, tmp_path / "short.safetensors")
    with pytest.raises(ConfigError, match=r"2 missing \(6.bias, 6.weight\)"):
        load_reward(
            RewardSpec(name="aesthetic", path=str(tmp_path / "short.safetensors"), options={"clip": str(clip_path)})
        ).score(images, PROMPTS, None)
