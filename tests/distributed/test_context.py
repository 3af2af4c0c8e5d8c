"""Context parallelism: two ranks that share every sample's tokens give the samples and gradients of one. gloo."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import tiny_images
from support.processes import run_ranks
from support.tiny import tiny_config
from support.tiny_images import image_config
from support.tiny_video import build, video_config

from fastgrpo.algorithms.layout import lay_out, rank_samples
from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.config import Config
from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.activation import checkpoint_activations
from fastgrpo.distributed.ulysses import split_tokens
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models import FAMILIES, Conditioning, ModelFamily, check_parts, family_class
from fastgrpo.models.attention import set_backend
from fastgrpo.models.context import check_context, split_lengths
from fastgrpo.models.trainable import make_trainable
from fastgrpo.rollout.sampler import rollout
from fastgrpo.shapes.editing_world import all_prompts, image_name

CPU = torch.device("cpu")
KINDS = (
    "flux", "flux_kontext", "flux2", "qwen_image", "qwen_edit", "qwen_edit_plus", "qwen_2_1", "z_image", "wan",
    "hunyuan_video", "hunyuan_15", "skyreels",
)  # fmt: skip

# Texts that two ranks do not divide; a text that one of them has nothing of, beside an image whose padding is shorter
# than a rank's part.
SIZES = {
    "qwen_image": {"max_sequence_length": 13},
    "qwen_edit": {"max_sequence_length": 47},
    "z_image": {"height": 128, "width": 96, "max_sequence_length": 40},
}


def family_of(kind: str) -> tuple[Config, ModelFamily]:
    if kind in ("flux", "flux_kontext"):
        from fastgrpo.shapes import world
        from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline

        sizes = TinyFluxSizes(task="text" if kind == "flux" else "edit")
        config, pipeline = (
            tiny_config(Path("unused"), model={"family": kind}),
            build_pipeline(world.vocabulary(), sizes, 0),
        )
        torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.3)
    elif kind in tiny_images.MODELS:
        config, pipeline = image_config("unused", kind, model=SIZES.get(kind, {})), tiny_images.build(kind)
    else:
        config, pipeline = video_config("unused", kind), build(kind)
    return config, family_class(config.model.family)(pipeline, config.model, CPU)


def conditioning_of(kind: str, family: ModelFamily) -> Conditioning:
    texts = ("red circle left", "blue square moves right")
    if kind != "skyreels":
        edits = all_prompts()[:2]
        return family.encode([Prompt(text, image=image_name(edit, 0)) for text, edit in zip(texts, edits, strict=True)])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoded = super(type(family), family).encode_prompts([Prompt(text) for text in texts])  # pyright: ignore
        channels, _, height, width = family.latent_shape
        encoded["first_frame"] = torch.randn(2, channels, 1, height, width)
    negative = {f"negative_{name}": tensor.flip(0) for name, tensor in encoded.items()}
    return family.condition(encoded | (negative if family.guided else {}))


def sampled(kind: str, split: bool) -> list[torch.Tensor]:
    """Final latents of a rollout, and the gradients of a weighted sum of the model's output."""
    torch.manual_seed(0)
    config, family = family_of(kind)
    conditioning = conditioning_of(kind, family)
    if split:
        for module in family.modules.values():
            split_tokens(module, family.context_plan(module), split_lengths(family), 2, 2, "cpu")
    make_trainable(family)
    if split:
        # Blocks that are run again in backward exchange again.
        for module in family.modules.values():
            checkpoint_activations(family.blocks(module), "all")
    schedule = schedule_steps(config.rollout, family.noise_levels(config.rollout.steps, "pipeline"), 4, 0, 0)
    layout = lay_out(
        schedule, config.rollout.model_copy(update={"group_size": 2}), rank_samples(4, 1, 1, 0).reshape(-1)
    )
    latents = rollout(family, schedule, layout, conditioning, config.rollout, 0, 0).latents
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *family.latent_shape, generator=generator)
    v = family.predict(x, torch.tensor([0.9, 0.4]), conditioning)
    (v * torch.randn(v.shape, generator=generator)).sum().backward()
    parameters = [p for p in family.policy.parameters() if p.grad is not None]
    grads = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    if split:
        dist.all_reduce(grads)
    return [latents, grads]


def main(out: str) -> None:
    dist.init_process_group("gloo")
    found = {}
    for kind in KINDS:
        whole, split = sampled(kind, False), sampled(kind, True)
        found[kind] = [float((a - b).norm() / a.norm()) for a, b in zip(whole, split, strict=True)]
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    out = tmp_path_factory.mktemp("context") / "differences.json"
    run_ranks(out.parent, main, str(out))
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_split_tokens_change_nothing(differences, kind):
    latents, gradients = differences[kind]
    assert latents < 1e-5
    assert gradients < 1e-5


def test_what_does_not_divide_is_one_line():
    _, family = family_of("flux")
    with pytest.raises(ConfigError, match=r"parallel\.context: 5 does not divide the model's \d+ attention heads"):
        split_tokens(family.denoiser, family.context_plan(family.denoiser), [10], 10, 5, "cpu")
    with pytest.raises(ConfigError, match=r"parallel\.context: 2 does not divide the 9 tokens of a sample"):
        split_tokens(family.denoiser, family.context_plan(family.denoiser), [16, 9], 2, 2, "cpu")
    with pytest.raises(ConfigError, match="Linear has no plan to split its tokens"):
        split_tokens(torch.nn.Linear(1, 1), None, [2], 2, 2, "cpu")


@pytest.mark.parametrize(
    "model, parallel, said",
    [
        ({}, {"context": 3}, "parallel.context: 3 does not divide the model's 4 attention heads"),
        ({"max_sequence_length": 9}, {"context": 2}, "parallel.context: 2 does not divide the 9 tokens of a sample"),
        ({}, {"context": 2, "context_kind": "ring"}, "parallel.context_kind: ring attention needs GPUs"),
        ({"attention_backend": "flas"}, {}, "model.attention_backend: unknown backend 'flas'; did you mean 'flash'?"),
        ({"attention_backend": "_flash_3"}, {}, "model.attention_backend: _flash_3: Flash Attention 3 backend"),
        ({"attention_backend": "flex"}, {"context": 2}, "model.attention_backend: flex cannot split tokens"),
    ],
    ids=str,
)
def test_what_a_model_cannot_have_is_one_line_before_weights_load(tmp_path, tiny_flux, model, parallel, said):
    """The directory has no weights."""
    path = tmp_path / "model"
    shutil.copytree(tiny_flux, path, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_parts(tiny_config(path, model=model, parallel=parallel), "cpu")


def test_a_missing_backend_package_names_its_extra(tiny_flux, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model\.attention_backend: flash: needs the package 'flash_attn'.*flash-attn"):
        check_parts(tiny_config(tiny_flux, model={"attention_backend": "flash"}), "cpu")


def test_families_whose_tokens_cannot_be_split_say_so_and_the_document_names_the_others():
    able = {name for name in FAMILIES.built_in if family_class(name).context_kinds}
    document = Path("docs/scale.md").read_text()
    (line,) = re.findall(r"^\| `parallel\.context` \| .*: (.*) \|$", document, re.MULTILINE)
    assert set(re.findall("`([a-z0-9_]+)`", line)) == able
    config = tiny_config("unused", parallel={"context": 2})
    for name in set(FAMILIES.built_in) - able:
        said = f"parallel.context: 2, but the tokens of {name} cannot be split by ulysses; leave it at 1"
        with pytest.raises(ConfigError, match=re.escape(said)):
            check_context(config, family_class(name), {}, "cpu")
        assert f"`{name}`" in document


@pytest.mark.parametrize("kind", KINDS)
def test_token_lengths_are_those_that_a_block_sees(kind):
    _, family = family_of(kind)
    seen = []

    def watch(_, inputs, named):
        seen.append(named["hidden_states"] if "hidden_states" in named else inputs[0])

    family.blocks(family.denoiser)[0].register_forward_pre_hook(watch, with_kwargs=True)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    family.predict(x, torch.tensor([0.9, 0.4]), conditioning_of(kind, family))
    lengths = split_lengths(family)
    # One stream of Qwen-Image 2.1 has both.
    assert seen[0].shape[1] == (sum(lengths) if kind == "qwen_2_1" else lengths[0])


def test_a_backend_is_what_every_attention_uses(monkeypatch):
    from diffusers.models import attention_dispatch as dispatch

    _, family = family_of("flux")
    set_backend(family.denoiser, "_native_math")
    seen = []
    run = dispatch._AttentionBackendRegistry._backends[dispatch.AttentionBackendName._NATIVE_MATH]
    monkeypatch.setitem(
        dispatch._AttentionBackendRegistry._backends,
        dispatch.AttentionBackendName._NATIVE_MATH,
        lambda **settings: (seen.append(1), run(**settings))[1],
    )
    conditioning = conditioning_of("flux", family)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(1))
    family.predict(x, torch.tensor([0.9, 0.4]), conditioning)
    assert len(seen) == len(family.blocks(family.denoiser))
    with pytest.raises(ConfigError, match="Linear takes no backend of diffusers"):
        set_backend(torch.nn.Linear(1, 1), "native")
