"""The image families: what the pipeline draws, words that matter, ratio 1, a right gradient, weights others load."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_images import (
    EDITS,
    MODELS,
    PROMPTS,
    SOURCES,
    build,
    by_pipeline,
    drawn,
    image_config,
    shrink_sources,
    use_ddim,
)
from support.updates import advantages, prepare, run_update, textbook_loss

from fastgrpo.commands.export import save_lora
from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError
from fastgrpo.models import Conditioning, ModelFamily, check_family, family_class, load_family
from fastgrpo.models.trainable import make_trainable
from fastgrpo.shapes import world
from fastgrpo.training.optimizer import OptimizerState
from fastgrpo.training.update import Updater

CPU = torch.device("cpu")
KINDS = list(MODELS)
# Guided by an embedded scale, or not at all.
ONE_BRANCH = ("flux", "flux_plain", "flux_kontext", "flux2_distilled")
# Those that encode prompts as no other does.
WORDED = [k for k in KINDS if k not in ("flux_plain", "flux_true_cfg", "flux_kontext_true_cfg", "flux2_distilled")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Directories that diffusers wrote, one a kind, and the pipelines they came from."""
    built: dict[str, tuple[Any, Any]] = {}

    def get(kind: str):
        if kind not in built:
            pipeline, path = build(kind), tmp_path_factory.mktemp(kind)
            pipeline.save_pretrained(path)
            built[kind] = path, use_ddim(pipeline)
        return built[kind]

    return get


@pytest.fixture(scope="module")
def families(saved):
    loaded: dict[str, ModelFamily] = {}

    def get(kind: str) -> ModelFamily:
        if kind not in loaded:
            loaded[kind] = load_family(image_config(saved(kind)[0], kind).model, CPU)
        return loaded[kind]

    return get


@pytest.mark.parametrize("guidance", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rollout_is_the_pipelines_image(saved, families, kind, guidance):
    path, pipeline = saved(kind)
    plain = family_class(MODELS[kind]["family"]).unguided_scale
    model = MODELS[kind] if guidance else {**MODELS[kind], "guidance": plain, "true_cfg": 1.0}
    config = image_config(path, kind, model=model)
    family = families(kind) if guidance else load_family(config.model, CPU)
    assert family.guided is (guidance and kind not in ONE_BRANCH)
    ours, theirs = drawn(family, config, PROMPTS), by_pipeline(pipeline, family, PROMPTS)
    assert ours.shape == theirs.shape == (4, 3, 32, 32)
    assert (ours - theirs).abs().max() <= 1e-4
    # The images differ, and not by their noise alone.
    assert ours.std() > 0.01
    same_noise = drawn(family, config, [PROMPTS[2], *PROMPTS[1:]])
    assert (same_noise[0] - ours[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["flux", "sd_v", "sdxl", "sd3", "qwen_image", "qwen_2_1", "z_image", "flux2"])
def test_another_size_is_the_pipelines_too(saved, kind):
    path, pipeline = saved(kind)
    height, width = (32, 64) if kind == "qwen_2_1" else (24, 48)
    config = image_config(path, kind, model={"height": height, "width": width})
    family = load_family(config.model, CPU)
    ours, theirs = drawn(family, config, PROMPTS[1:2]), by_pipeline(pipeline, family, PROMPTS[1:2])
    assert ours.shape == theirs.shape == (1, 3, height, width)
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ONE_BRANCH])
def test_a_prompts_own_negative_and_the_configs_are_the_pipelines(saved, kind):
    """model.negative_prompt stands in where a prompt has none."""
    path, pipeline = saved(kind)
    config = image_config(path, kind, model={"negative_prompt": "a blue square"})
    family = load_family(config.model, CPU)
    theirs = by_pipeline(pipeline, family, [replace(p, negative="a blue square") for p in PROMPTS[:1]])
    assert (drawn(family, config, PROMPTS[:1]) - theirs).abs().max() <= 1e-4
    plain = load_family(image_config(path, kind).model, CPU)
    assert (drawn(plain, config, PROMPTS[:1]) - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["flux_kontext", "flux_kontext_true_cfg", *EDITS])
def test_an_edit_at_another_size_is_the_pipelines_image(saved, kind, request):
    """Its source is resized as the pipeline's image processor does, and changes the image."""
    path, pipeline = saved(kind)
    height, width = (32, 64) if kind in EDITS else (48, 32)
    if kind in EDITS:
        request.addfinalizer(shrink_sources)
        shrink_sources(height * width)
    config = image_config(path, kind, model={"height": height, "width": width})
    family = load_family(config.model, CPU)
    ours = drawn(family, config, PROMPTS)
    assert ours.shape == (4, 3, height, width)
    assert (ours - by_pipeline(pipeline, family, PROMPTS)).abs().max() <= 1e-4
    other = drawn(family, config, [replace(PROMPTS[0], image=SOURCES[5]), *PROMPTS[1:]])
    assert (other[0] - ours[0]).abs().max() > 1e-3
    assert torch.equal(other[1:], ours[1:])


def test_an_edit_without_a_source_is_refused_in_one_line(families):
    with pytest.raises(ConfigError, match="'a red circle' has no image; flux_kontext starts from a picture"):
        families("flux_kontext").encode([Prompt("a red circle")])


def test_a_second_guidance_is_for_families_that_have_one(saved):
    config = image_config(saved("sd3")[0], "sd3", model={"true_cfg": 2.0})
    with pytest.raises(ConfigError, match=r"model\.true_cfg: 2, but sd3 has no second guidance"):
        check_family(config)
    check_family(image_config(saved("flux")[0], "flux", model={"true_cfg": 2.0}))


@pytest.mark.parametrize("kind", WORDED)
def test_every_word_changes_every_embedding(families, kind):
    family, rng, words = families(kind), np.random.default_rng(0), world.vocabulary()
    for text in rng.choice([p.text for p in world.all_prompts()], 5, replace=False):
        parts = str(text).split()
        changed = [[*parts[:i], str(rng.choice([w for w in words if w != part])), *parts[i + 1 :]]
                   for i, part in enumerate(parts)]  # fmt: skip
        encoded = family.encode([Prompt(" ".join(p), image=SOURCES[0]) for p in (parts, *changed)])
        texts = [n for n, t in encoded.items() if t.is_floating_point() and not n.startswith("negative")]
        for name in (n for n in texts if n != family.image_encoding):
            for row in range(1, len(changed) + 1):
                apart = (encoded[name][row] - encoded[name][0]).abs().max()
                assert apart > 1e-6, (text, changed[row - 1], name)


@pytest.mark.parametrize("kind", WORDED)
def test_an_embedding_is_the_same_whatever_was_encoded_with_it(saved, families, kind):
    texts = [p.text for p in world.all_prompts()[:13]]
    together = families(kind).encode([Prompt(t, image=SOURCES[i % 4]) for i, t in enumerate(texts)])
    alone = load_family(image_config(saved(kind)[0], kind).model, CPU)
    for row in (0, 7, 12):
        one = alone.encode([Prompt(texts[row], image=SOURCES[row % 4])])
        assert all(torch.equal(one[name][0], together[name][row]) for name in one)


@pytest.mark.parametrize("kind", [k for k in WORDED if k != "sd3_without_t5"])
def test_the_first_ratio_is_one_and_the_gradient_a_finite_difference(saved, kind):
    """Autograd through rollout rows and kernels, against differences of the textbook loss in float64."""
    wide = {"clip_low": 0.05, "clip_high": 0.05}
    config = image_config(saved(kind)[0], kind, rollout={"group_size": 2}, objective=wide)
    family, schedule, trajectory, conditioning, updater = prepare(config)
    A = advantages(config)
    result = run_update(updater, schedule, trajectory, conditioning, A)
    assert result.statistics.max_deviation.item() == 0

    exact = copy.deepcopy(family.denoiser).double().requires_grad_(False)
    family.dtype = torch.float64
    [ours] = updater.optimizer.seen
    largest = max(float(g.abs().max()) for g in ours if g is not None)
    # Of a few weights, spread over the depth, those with the largest gradients.
    known = [i for i, g in enumerate(ours) if g is not None and g.ndim > 1 and float(g.abs().max()) > largest / 100]
    assert largest > 1e-5
    assert len(known) >= 4
    parameters = list(exact.parameters())
    for i in known[:: len(known) // 4][:4]:
        # By its indices: a convolution's weights need not lie in order.
        place, weight = np.unravel_index(int(ours[i].abs().argmax()), ours[i].shape), parameters[i]
        # Z-Image and Qwen-Image 2.1 round what they rotate to float32.
        step = 1e-3 if kind in ("z_image", "qwen_2_1") else 1e-4
        values = []
        for sign in (1, -1):
            weight[place] += sign * step
            values.append(float(textbook_loss(exact, family, schedule, trajectory, conditioning, A, config)))
            weight[place] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(ours[i][place]), rel=2e-3, abs=1e-5 * largest)


@pytest.mark.parametrize("kind", [kind for kind in WORDED if kind != "sd3_without_t5"])
def test_the_first_ratio_is_one_in_bfloat16(saved, kind):
    config = image_config(saved(kind)[0], kind, model={"dtype": "bfloat16"}, rollout={"group_size": 2})
    _, schedule, trajectory, conditioning, updater = prepare(config)
    result = run_update(updater, schedule, trajectory, conditioning, advantages(config))
    assert trajectory.v_old.dtype == torch.bfloat16
    assert result.statistics.max_deviation.item() == 0
    assert any(g is not None and g.abs().max() > 0 for g in updater.optimizer.seen[0])


@pytest.mark.parametrize("kind", ["sd_v", "qwen_image", "z_image", "flux2", "flux_kontext", "qwen_2_1", *EDITS])
def test_an_update_moves_the_weights(saved, kind):
    config = image_config(saved(kind)[0], kind)
    family, schedule, trajectory, conditioning, _ = prepare(config)
    before = [p.detach().clone() for p in family.policy.parameters()]
    updater = Updater(family, config, World(0, 1, CPU), OptimizerState(family.policy, config.update, 1))
    A = advantages(config)
    run_update(updater, schedule, trajectory, conditioning, A)
    moved = [not torch.equal(a, b) for a, b in zip(before, family.policy.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 3


@pytest.mark.parametrize(
    "kind", ["flux", "flux_kontext", "sd_v", "sdxl", "sd3", "qwen_image", "z_image", "flux2", "qwen_2_1", *EDITS]
)
def test_a_lora_loads_into_the_pipeline(saved, tmp_path, kind):
    path, pipeline = saved(kind)
    config = image_config(path, kind, model={"lora": {"rank": 2, "alpha": 4.0}})
    family = load_family(config.model, CPU)
    make_trainable(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in family.policy.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    save_lora(family, tmp_path)
    before = by_pipeline(pipeline, family, PROMPTS[1:2])
    pipeline.load_lora_weights(tmp_path)
    after = by_pipeline(pipeline, family, PROMPTS[1:2])
    pipeline.unload_lora_weights()
    assert (after - before).abs().max() > 1e-3
    assert (after - drawn(family, config, PROMPTS[1:2])).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["flux", "sd3", "qwen_image", "z_image", "flux2"])
def test_what_reaches_the_model(families, kind):
    """Noise level, text and its order, guidance."""
    family = families(kind)
    x = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = family.encode([Prompt("a red circle"), Prompt("two blue squares")])
    time = torch.tensor([0.7, 0.7])
    with torch.no_grad():
        v = family.predict(x, time, condition)
        assert v.shape == x.shape
        assert not torch.allclose(v, family.predict(x, time + 0.1, condition))
        assert not torch.allclose(v, family.predict(x, time, condition.rows(np.array([1, 0]))))
        other = load_family(family.config.model_copy(update={"guidance": 7.0}), CPU)
        assert not torch.allclose(v, other.predict(x, time, condition))


@pytest.mark.parametrize("kind", EDITS)
def test_the_source_reaches_the_model_by_both_its_ways(families, kind):
    """Its latents, and what the encoder sees of it; a prompt without one is refused."""
    family = families(kind)
    x, time = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    red, blue = (f"moving:0:a {color} circle stands" for color in ("red", "blue"))
    one, other = (family.encode([Prompt("a red circle", image=image)]) for image in (red, blue))
    with torch.no_grad():
        v = family.predict(x, time, one)
        for name in ("text", "source"):
            assert (one[name] - other[name]).abs().max() > 1e-3
            mixed = Conditioning({**one, name: other[name]})
            assert (family.predict(x, time, mixed) - v).abs().max() > 1e-5
    with pytest.raises(ConfigError, match="'a red circle' has no image; qwen_image_edit starts from a picture"):
        family.encode([Prompt("a red circle")])


@pytest.mark.parametrize("kind, kept", [("qwen_image", 8), ("qwen_2_1", 11), ("z_image", 11)])
def test_padding_of_a_text_is_never_attended_to(families, kind, kept):
    """kept: three words, and what the pipeline keeps of the template."""
    family = families(kind)
    x, time = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    condition = family.encode([Prompt("a red circle")])
    hidden = {n: torch.where(condition["mask"][..., None], t, 99.0) for n, t in condition.items() if n == "text"}
    with torch.no_grad():
        v = family.predict(x, time, condition)
        assert torch.equal(v, family.predict(x, time, Conditioning({**condition, **hidden})))
        shown = {"mask": torch.ones_like(condition["mask"])}
        assert not torch.allclose(v, family.predict(x, time, Conditioning({**condition, **hidden, **shown})))
    assert condition["mask"].sum() == kept
