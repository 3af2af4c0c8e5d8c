"""The FLUX family: levels as its scheduler has them, words that matter, wrong input in one line."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny_config

from fastgrpo.errors import ConfigError
from fastgrpo.models import Conditioning, load_family
from fastgrpo.prompts import Prompt
from fastgrpo.shapes import world

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def family(tiny_flux):
    return load_family(tiny_config(tiny_flux).model, CPU)


@pytest.mark.parametrize(
    "settings",
    [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}],
    ids=["static", "exponential", "linear"],
)
def test_noise_levels_are_the_schedulers(tiny_flux, settings):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    family = load_family(tiny_config(tiny_flux).model, CPU)
    scheduler = family.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    c = scheduler.config
    mu = calculate_shift(16, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    scheduler.set_timesteps(sigmas=list(np.linspace(1.0, 1 / 10, 10)), mu=mu)
    levels = family.noise_levels(10, "pipeline")
    assert [*levels.start, levels.end[-1]] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert levels.times == levels.start
    assert levels.end[:-1] == levels.start[1:]


def test_every_word_changes_both_embeddings(family):
    prompts = [p.text for p in world.all_prompts()]
    rng = np.random.default_rng(0)
    words = world.vocabulary()
    for text in rng.choice(prompts, 12, replace=False):
        parts = text.split()
        for place in range(len(parts)):
            other = rng.choice([w for w in words if w != parts[place]])
            changed = " ".join([*parts[:place], str(other), *parts[place + 1 :]])
            one, two = (family.encode([Prompt(t)]) for t in (text, changed))
            for name in ("text", "pooled"):
                assert not torch.allclose(one[name], two[name], atol=1e-6), (text, changed, name)


def test_an_embedding_is_the_same_whatever_was_encoded_with_it(tiny_flux):
    alone, among = (load_family(tiny_config(tiny_flux).model, CPU) for _ in range(2))
    texts = [p.text for p in world.all_prompts()[:13]]
    together = among.encode([Prompt(t) for t in texts])
    for row, text in enumerate(texts):
        one = alone.encode([Prompt(text)])
        assert torch.equal(one["text"][0], together["text"][row])
        assert torch.equal(one["pooled"][0], together["pooled"][row])


def test_kept_embeddings_are_bounded(family):
    family.encode([Prompt(p.text) for p in world.all_prompts()[:40]], keep=8)
    assert len(family.embeddings.memory) <= 40
    family.encode([Prompt("a red circle")], keep=8)
    assert len(family.embeddings.memory) == 8


def test_sigma_guidance_and_text_reach_the_model(family):
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = family.encode([Prompt("a red circle"), Prompt("two blue squares")])
    sigma = torch.tensor([0.7, 0.7])
    with torch.no_grad():
        v = family.predict(x, sigma, condition)
        assert v.shape == x.shape
        assert not torch.allclose(v, family.predict(x, sigma + 0.1, condition))
        assert not torch.allclose(v, family.predict(x, sigma, condition.rows(np.array([1, 0]))))
        other = load_family(family.config.model_copy(update={"guidance": 7.0}), CPU)
        assert not torch.allclose(v, other.predict(x, sigma, condition))


def test_conditioning_rows():
    rows = Conditioning({"a": torch.arange(6).reshape(3, 2)}).rows(np.array([2, 0, 2]))
    assert rows["a"].tolist() == [[4, 5], [0, 1], [4, 5]]


@pytest.mark.parametrize(
    "model, message",
    [
        ({"height": 36}, r"model\.height: 36 is not a multiple of 8; the nearest is 32"),
        ({"frames": 5}, r"model\.frames: 5, but flux makes images"),
        ({"family": "fluks"}, r"model\.family: unknown family 'fluks'; did you mean 'flux'"),
        ({"path": "./nowhere"}, r"model\.path: there is no directory '\./nowhere'"),
        ({"path": "shapes:fluxx"}, r"model\.path: 'shapes:fluxx' is not shipped"),
    ],
)
def test_wrong_input_is_one_line(tiny_flux, model, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_family(tiny_config(tiny_flux, model=model).model, CPU)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_pipeline(tmp_path):
    with pytest.raises(ConfigError, match="does not load as a FluxPipeline"):
        load_family(tiny_config(tmp_path).model, CPU)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ConfigError, match=r"is a StableDiffusionPipeline, not a FluxPipeline"):
        load_family(tiny_config(tmp_path).model, CPU)


def test_lora_targets_that_match_nothing_name_what_there_is(tiny_flux):
    family = load_family(tiny_config(tiny_flux, model={"lora": {"rank": 2, "targets": ["to_nothing"]}}).model, CPU)
    with pytest.raises(
        ConfigError, match=r"model\.lora\.targets: \['to_nothing'\] match no layer; layers end in: .*to_q"
    ):
        family.add_lora()


def test_trainable_parts_are_named_by_whole_dotted_parts(tiny_flux):
    parts = ["norm1.linear", "to_v"]
    family = load_family(tiny_config(tiny_flux, model={"trainable": parts}).model, CPU)
    family.make_trainable()
    trained = {name for name, p in family.transformer.named_parameters() if p.requires_grad}
    assert trained == {
        name for name, _ in family.transformer.named_parameters() if ".norm1.linear." in name or ".to_v." in name
    }
    assert trained
    wrong = load_family(tiny_config(tiny_flux, model={"trainable": ["norm1.liner"]}).model, CPU)
    with pytest.raises(ConfigError, match=r"model\.trainable: 'norm1.liner' matches no parameter"):
        wrong.make_trainable()


def test_lora_disabled_is_the_base(tiny_flux):
    family = load_family(tiny_config(tiny_flux, model={"lora": {"rank": 2}}).model, CPU)
    x, sigma = torch.randn(1, *family.latent_shape), torch.tensor([0.5])
    condition = family.encode([Prompt("a red circle")])
    with torch.no_grad():
        before = family.predict(x, sigma, condition)
        family.add_lora()
        trained = [p for p in family.transformer.parameters() if p.requires_grad]
        assert trained
        for p in trained:
            p.add_(0.05)
        assert not torch.allclose(before, family.predict(x, sigma, condition))
        with family.lora_disabled():
            assert torch.equal(before, family.predict(x, sigma, condition))
        assert all(p.requires_grad for p in trained)
