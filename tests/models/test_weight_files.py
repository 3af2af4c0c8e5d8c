"""Directories that are not whole: one line that names the file, whether weights are loaded whole or by shards."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_config
from support.tiny_images import build, image_config

from fastgrpo.errors import ConfigError
from fastgrpo.models import load_family
from fastgrpo.preflight.checks import preflight

CPU = torch.device("cpu")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SINGLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pipeline in one file a component, in shards, and in a variant's files."""
    pipeline, folder = build("sd_v"), tmp_path_factory.mktemp("pipelines")
    pipeline.save_pretrained(folder / "one")
    pipeline.save_pretrained(folder / "shards", max_shard_size="300KB")
    pipeline.save_pretrained(folder / "fp16", variant="fp16")
    pipeline.save_pretrained(folder / "fp16 shards", variant="fp16", max_shard_size="300KB")
    assert len(list((folder / "shards" / "unet").glob("*.safetensors"))) > 1
    return folder


def relist(folder: Path, **entries):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **entries}))


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def first(folder: Path, component: str) -> Path:
    return min((folder / component).glob("*.safetensors"))


def point(component: str):
    return lambda folder: (folder / component / SINGLE).write_text(POINTER)


def pickled(folder: Path):
    (folder / "unet" / SINGLE).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def without_first(folder: Path):
    first(folder, "unet").unlink()


FIRST = r"there is no .*unet/.*-00001-of-\d+\.safetensors, which"
SHORT = r"bytes: it is cut short"
# Which pipeline is copied, what is done to the copy, and what is said of it.
DAMAGE = {
    "null vae": ("one", lambda f: relist(f, vae=[None, None]), r"model_index\.json of '.*' has no vae, which"),
    "null unet": ("one", lambda f: relist(f, unet=[None, None]), r"has no unet, which"),
    "null text encoder": ("one", lambda f: relist(f, text_encoder=[None, None]), r"has no text_encoder, which"),
    "no folder": ("one", lambda f: shutil.rmtree(f / "text_encoder"), r"lists text_encoder, and there is no folder"),
    "pointer": ("one", point("vae"), rf"vae/{SINGLE} is a git-lfs pointer"),
    "pointer, trained": ("one", point("unet"), rf"unet/{SINGLE} is a git-lfs pointer"),
    "cut": ("one", lambda f: cut(f / "unet" / SINGLE), rf"unet/{SINGLE} has [\d,]+ of [\d,]+ {SHORT}"),
    "empty": ("one", lambda f: (f / "unet" / SINGLE).write_bytes(b""), rf"unet/{SINGLE} is not a safetensors file"),
    "cut shard": ("shards", lambda f: cut(first(f, "unet")), rf"unet/.*-00001-of-.* {SHORT}"),
    "missing shard": ("shards", without_first, FIRST),
    "no weights": ("one", lambda f: (f / "unet" / SINGLE).unlink(), r"no weights in .*unet: no \.safetensors file"),
    "a pickle": ("one", pickled, r"unet/diffusion_pytorch_model\.bin is a pickle"),
    "variant": ("fp16", lambda f: None, r"has weights of variant fp16 alone; set model\.variant to it"),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", list(DAMAGE))
def test_one_line_names_the_file(whole, tmp_path, name, sharded):
    kind, damage, words = DAMAGE[name]
    folder = shutil.copytree(whole / kind, tmp_path / "copy")
    damage(folder)
    config = image_config(folder, "sd_v")
    with pytest.raises(ConfigError, match=words) as caught:
        load_family(config.model, CPU, sharded)
    assert [problem for problem in preflight(config).problems if re.search(words, problem)]
    assert str(caught.value).startswith("model.path: ")
    assert "\n" not in str(caught.value)


def test_a_variants_shards_are_looked_at_too(whole, tmp_path):
    folder = shutil.copytree(whole / "fp16 shards", tmp_path / "copy")
    first(folder, "unet").unlink()
    config = image_config(folder, "sd_v", model={"variant": "fp16"}).model
    for sharded in (False, True):
        with pytest.raises(ConfigError, match=r"there is no .*unet/.*fp16-00001-of-\d+\.safetensors, which"):
            load_family(config, CPU, sharded)


@pytest.mark.parametrize("kind", ["fp16", "fp16 shards"])
def test_a_variant_is_loaded_where_it_is_set(whole, kind):
    plain = load_family(image_config(whole / "one", "sd_v").model, CPU)
    config = image_config(whole / kind, "sd_v", model={"variant": "fp16"}).model
    found = load_family(config, CPU)
    for a, b in zip(plain.denoiser.parameters(), found.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    files = load_family(config, CPU, sharded=True).weight_files["unet"]
    assert set(files) == set(plain.denoiser.state_dict())
    assert all("fp16" in file.name for file in files.values())


def test_a_listed_safety_checker_without_folder_is_not_missed(whole, tmp_path):
    folder = shutil.copytree(whole / "one", tmp_path / "copy")
    relist(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert load_family(image_config(folder, "sd_v").model, CPU).pipeline.safety_checker is None


@pytest.mark.parametrize("length", [10**20, None, 0, "77", 9999])
def test_a_clip_tokenizer_cuts_texts_to_its_encoders_positions(whole, tmp_path, length):
    copy = shutil.copytree(whole / "one", tmp_path / "copy")
    file = copy / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": length}))
    with pytest.raises(ConfigError, match=r"the tokenizer of '.*' has model_max_length .*, but its text encoder takes"):
        load_family(image_config(copy, "sd_v").model, CPU)


COMPONENTS = {
    "misspelt": ("transformer", {"attention_head_dim": None, "attention_head_dims": 16},
                 r"/config\.json has 'attention_head_dims', which Flux\w+ does not take; is it attention_head_dim\?"),
    "axes": ("transformer", {"axes_dims_rope": [2, 2, 2]}, r"axes_dims_rope \[2, 2, 2\] does not add up to"),
    "no list": ("transformer", {"axes_dims_rope": "x"}, r"axes_dims_rope x does not add up to attention_head_dim"),
    "left out": ("transformer", {"axes_dims_rope": None}, r"axes_dims_rope [\[(]16, 56, 56[\])] does not add up"),
    "no weights": ("vae", {"mid_block_add_attention": True},
                   r"vae has no weights for \S*mid_block\.attentions\S+ \(\d+ in all\), which its config\.json"),
    "blocks left out": ("vae", {"up_block_types": None},
                        r"vae has weights of decoder\.up_blocks\.1\.\S+, which its config\.json does not ask for"),
    "an encoder's layers": ("text_encoder_2", {"num_layers": 500, "d_ff": 10**6},
                            r"text_encoder_2 has no weights for encoder\.block\.\S+ \(\d+ in all\), which its config"),
    "an encoder's width": ("text_encoder_2", {"d_ff": 10**6},
                           r"text_encoder_2: the weights of \S+ are \[\S+, \S+\] where its config\.json asks for \["),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COMPONENTS))
def test_a_component_that_does_not_fit_itself_is_one_line(tiny_flux, tmp_path, name):
    component, settings, words = COMPONENTS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_flux, folder)
    file = folder / component / "config.json"
    data = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    with pytest.raises(ConfigError, match=words):
        load_family(tiny_config(folder).model, CPU)
