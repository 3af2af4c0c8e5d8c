"""Image pipelines from disk and hub, in any dtype and sharding; encoded prompts kept; wrong input in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.processes import run_ranks
from support.tiny_images import PROMPTS, build, by_pipeline, drawn, image_config, use_ddim

from fastgrpo.data.prompts import Prompt
from fastgrpo.errors import ConfigError
from fastgrpo.models import load_family
from fastgrpo.models.embeddings import EmbeddingCache, key_of
from fastgrpo.models.trainable import make_trainable

CPU = torch.device("cpu")
KINDS = ("flux", "sd_v", "sd3", "qwen_image", "z_image", "flux2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    paths: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in paths:
            paths[kind] = tmp_path_factory.mktemp(kind)
            build(kind).save_pretrained(paths[kind])
        return paths[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_bfloat16_directory_is_what_its_pipeline_loads(tmp_path, kind):
    import diffusers

    pipeline = build(kind).to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path, max_shard_size="500KB")
    assert list(tmp_path.glob("*/*-00002-of-*.safetensors"))
    theirs = use_ddim(diffusers.DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32))
    config = image_config(tmp_path, kind)
    family = load_family(config.model, CPU)
    assert {p.dtype for p in family.denoiser.parameters()} == {torch.float32}
    assert (drawn(family, config, PROMPTS[1:2]) - by_pipeline(theirs, family, PROMPTS[1:2])).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bfloat16_keeps_float32_masters_unless_only_a_lora_learns(saved, kind, lora):
    model = {"dtype": "bfloat16", "lora": {"rank": 2} if lora else None}
    family = load_family(image_config(saved(kind), kind, model=model).model, CPU)
    assert {p.dtype for p in family.denoiser.parameters()} == {torch.bfloat16 if lora else torch.float32}
    assert next(family.pipeline.text_encoder.parameters()).dtype == torch.bfloat16
    if lora:
        make_trainable(family)
        assert {p.dtype for p in family.denoiser.parameters() if p.requires_grad} == {torch.float32}
        x = torch.zeros(1, *family.latent_shape)
        assert family.predict(x, torch.tensor([0.5]), family.encode(PROMPTS[:1])).dtype == torch.bfloat16


@pytest.fixture
def on_the_hub(saved, tmp_path, monkeypatch):
    """A hub id whose snapshot stands in a cache of its own; nothing else can be reached."""

    def publish(kind: str) -> str:
        folder = tmp_path / "hub/models--tiny--pipeline"
        shutil.copytree(saved(kind), folder / "snapshots/0123abc")
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0123abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return "tiny/pipeline"

    return publish


@pytest.mark.parametrize("kind", ["sd_v", "sd3"])
def test_a_hub_id_loads_and_its_prompts_are_cached(saved, on_the_hub, tmp_path, kind):
    config = image_config(saved(kind), kind)
    model = config.model.model_copy(update={"path": on_the_hub(kind), "embedding_cache": str(tmp_path / "prompts")})
    family = load_family(model, CPU)
    assert family.pipeline.text_encoder is None
    ours = drawn(family, config, PROMPTS[1:2])
    assert (ours - drawn(load_family(config.model, CPU), config, PROMPTS[1:2])).abs().max() == 0
    again = load_family(model, CPU)
    assert torch.equal(drawn(again, config, PROMPTS[1:2]), ours)
    assert "encoder" not in vars(again)
    # Encoders that were never downloaded are not missed, and the prompts are still found.
    shutil.rmtree(tmp_path / "hub/models--tiny--pipeline/snapshots/0123abc/text_encoder")
    assert torch.equal(drawn(load_family(model, CPU), config, PROMPTS[1:2]), ours)


@pytest.mark.parametrize("kind", ["flux", "sdxl", "sd3", "sd3_without_t5", "qwen_image", "z_image", "flux2"])
def test_each_prompt_is_encoded_once_and_a_full_cache_needs_no_encoder(saved, tmp_path, kind, monkeypatch):
    model = {"embedding_cache": str(tmp_path)}
    config = image_config(saved(kind), kind, model=model)
    family, encoded = load_family(config.model, CPU), []
    encode = type(family).encode_prompts

    def counted(self, prompts):
        encoded.extend(dict.fromkeys(p.text for p in prompts))
        return encode(self, prompts)

    monkeypatch.setattr(type(family), "encode_prompts", counted)
    first = family.encode([*PROMPTS, *PROMPTS])
    family.encode(PROMPTS)
    assert len(encoded) == len(set(encoded))
    assert set(encoded) >= {p.text for p in PROMPTS}
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == len(encoded)

    monkeypatch.setattr(type(family), "encode_prompts", None)
    again = load_family(config.model, CPU)
    second = again.encode([*PROMPTS, *PROMPTS])
    assert all(getattr(again.pipeline, name, None) is None for name in again.encoders)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Without a cache: the same numbers.
    monkeypatch.setattr(type(family), "encode_prompts", encode)
    plain = load_family(image_config(saved(kind), kind).model, CPU).encode([*PROMPTS, *PROMPTS])
    assert all(torch.equal(first[name], plain[name]) for name in first)


def test_other_encoders_or_settings_have_embeddings_of_their_own(saved, tmp_path):
    cache = {"embedding_cache": str(tmp_path / "prompts")}
    shutil.copytree(saved("flux"), tmp_path / "copy")

    def folder(path: Path, **model) -> Path | None:
        return load_family(image_config(path, "flux", model={**cache, **model}).model, CPU).embeddings.directory

    folders = {folder(saved("flux")), folder(tmp_path / "copy"), folder(saved("flux"), max_sequence_length=8)}
    folders.add(folder(saved("flux"), dtype="bfloat16"))
    encoder = tmp_path / "copy/text_encoder/config.json"
    encoder.write_text(encoder.read_text() + "\n")
    folders.add(folder(tmp_path / "copy"))
    assert len(folders) == 5
    # What encoding does not depend on is shared.
    assert folder(saved("flux"), guidance=7.0) == folder(saved("flux"))


def share_a_cache(folder: Path) -> None:
    for turn in range(60):
        prompt = Prompt(f"prompt {turn % 5}")
        wanted = torch.full((64, 64), float(turn % 5))
        found = EmbeddingCache(folder).get(prompt)
        assert found is None or torch.equal(found["text"], wanted)
        EmbeddingCache(folder).put(prompt, {"text": wanted})


def test_several_processes_share_a_cache(tmp_path):
    """Every file is whole whenever it is read, and nothing is left over."""
    cache = tmp_path / "cache"
    run_ranks(tmp_path, share_a_cache, cache)
    assert len(list(cache.iterdir())) == 5
    found = EmbeddingCache(cache).get(Prompt("prompt 3"))
    assert found is not None
    assert found["text"].unique().tolist() == [3.0]
    assert key_of(Prompt("prompt 3")) == ("prompt 3", None)


@pytest.mark.parametrize(
    "kind, model, message",
    [
        ("flux", {"family": "fluks"}, r"model\.family: unknown family 'fluks'; did you mean 'flux'\? \(one of: flux, "),
        ("flux", {"path": "./nowhere"}, r"model\.path: there is no directory '\./nowhere'"),
        ("flux", {"path": "shapes:fluxx"}, r"model\.path: 'shapes:fluxx' is not shipped"),
        ("flux", {"family": "sd3"}, r"model\.path: '.*' is a FluxPipeline, not a StableDiffusion3Pipeline"),
        ("flux", {"height": 36}, r"model\.height: 36 is not a multiple of 8; the nearest are 32 and 40"),
        ("sd_v", {"width": 36}, r"model\.width: 36 is not a multiple of 8; the nearest are 32 and 40"),
        ("sd3", {"width": 36}, r"model\.width: 36 is not a multiple of 8; the nearest are 32 and 40"),
        ("qwen_image", {"height": 4}, r"model\.height: 4 is not a multiple of 8; the nearest is 8"),
        ("sd3", {"height": 128}, r"model\.height: 128, but the position embedding of '.*' ends at 64 pixels"),
        ("sd3", {"frames": 5}, r"model\.frames: 5, but sd3 makes images; set it to 1"),
        ("sd3", {"max_sequence_length": 513}, r"max_sequence_length: 513, but the pipeline of sd3 takes at most 512"),
        ("qwen_image", {"max_sequence_length": 2000}, r"model\.max_sequence_length: 2000, .* takes at most 1024"),
        ("z_image", {"height": 36}, r"model\.height: 36 is not a multiple of 8; the nearest are 32 and 40"),
        ("z_image", {"max_sequence_length": 99}, r"model\.max_sequence_length: 99, .* takes at most 68 text tokens"),
        ("flux2", {"width": 36}, r"model\.width: 36 is not a multiple of 8; the nearest are 32 and 40"),
        ("flux2", {"max_sequence_length": 513}, r"max_sequence_length: 513, but the pipeline of flux2 takes at most"),
        ("sd3", {"lora": {"targets": ["to_q", "to_w"]}}, r"model\.lora\.targets: 'to_w' matches no layer; did you"),
        ("sd_v", {"lora": {"targets": ["conv9"]}}, r"lora\.targets: 'conv9' matches no layer; .*\(layers end in: "),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_before_any_weight_loads(saved, kind, model, message, monkeypatch):
    config = image_config(saved(kind), kind).model.model_copy(update={"path": str(saved(kind))})
    config = type(config).model_validate({**config.model_dump(), **model})
    monkeypatch.setattr("fastgrpo.models.loading.load_pipeline", None)
    with pytest.raises(ConfigError, match=message) as caught:
        load_family(config, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_is_refused(saved, tmp_path, setting, monkeypatch):
    shutil.copytree(saved("sd_v"), tmp_path / "clips")
    file = tmp_path / "clips/scheduler/scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: True}))
    monkeypatch.setattr("fastgrpo.models.loading.load_pipeline", None)
    with pytest.raises(ConfigError, match=rf"the scheduler of '.*' asks for {setting}, .* set {setting} to false"):
        load_family(image_config(tmp_path / "clips", "sd_v").model, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_that_is_no_pipeline(tmp_path, kind):
    with pytest.raises(ConfigError, match=r"model\.path: '.*' does not load as a \w+Pipeline") as caught:
        load_family(image_config(tmp_path, kind).model, CPU)
    assert "\n" not in str(caught.value)
