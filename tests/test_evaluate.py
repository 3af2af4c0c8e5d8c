"""Evaluation and export: what was trained is what others load, and what is reported is what was scored."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from fastgrpo.errors import UserError
from fastgrpo.evaluate import (
    apply_checkpoint,
    draw,
    evaluate_run,
    heldout_prompts,
    open_run,
    paired_interval,
)
from fastgrpo.export import export_run
from fastgrpo.models import load_family
from fastgrpo.parallel import World
from fastgrpo.pictures import write_grid
from fastgrpo.shapes.world import CATEGORIES
from fastgrpo.trainer import train

ALONE = World(0, 1, torch.device("cpu"))
VARIANTS = {
    "full": {},
    "ema": {"update": {"ema_decay": 0.5, "optimizer": {"lr": 1e-3}}},
    "lora": {"model": {"lora": {"rank": 4, "alpha": 16.0}}, "update": {"optimizer": {"lr": 1e-2}}},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def trained_run(request, tiny_flux, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp(request.param)
    run_dir.rmdir()
    train(tiny_config(tiny_flux, run_dir, **VARIANTS[request.param]))
    return run_dir


def images_of(run_dir, load_into=None):
    """Held-out images by our own rollout, with the run's weights."""
    config, store, iteration = open_run(run_dir)
    family = load_family(config.model, ALONE.device)
    apply_checkpoint(family, config, store, iteration)
    return draw(family, heldout_prompts(config, 4), config, ALONE), config, family


@pytest.mark.parametrize("merge", [False, True])
def test_the_export_draws_the_same_images_in_diffusers(trained_run, tmp_path, merge, tiny_flux):
    from diffusers import FluxPipeline

    ours, config, _ = images_of(trained_run)
    out = export_run(trained_run, tmp_path / "out", merge=merge)
    lora = config.model.lora is not None and not merge
    pipe = FluxPipeline.from_pretrained(tiny_flux if lora else out)
    if lora:
        pipe.load_lora_weights(str(out))
    base = load_family(config.model, ALONE.device)
    untouched = draw(base, heldout_prompts(config, 4), config, ALONE)
    base.modules["transformer"] = pipe.transformer
    theirs = draw(base, heldout_prompts(config, 4), config, ALONE)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - untouched).abs().max() > 1e-4
    card = (out / "README.md").read_text()
    assert ("load_lora_weights" in card) is lora


def test_an_export_does_not_overwrite(trained_run, tmp_path):
    (tmp_path / "something").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        export_run(trained_run, tmp_path)


def test_summary_compares_base_and_tuned_on_the_same_noise(trained_run):
    summary = evaluate_run(trained_run, images=8)
    assert summary == json.loads((trained_run / "summary.json").read_text()) | {"difference": summary["difference"]}
    assert summary["base"]["images"] == summary["tuned"]["images"] == 8
    assert summary["iteration"] == 2
    assert 0 <= summary["base"]["strict_pass"] <= 1
    gain = summary["tuned"]["rewards"]["shapes"] - summary["base"]["rewards"]["shapes"]
    assert summary["difference"]["shapes"]["mean"] == pytest.approx(gain)
    assert set(summary["base"]["by_category"]) <= {
        "single_object", "two_object", "counting", "colors", "position", "color_attribution"
    }  # fmt: skip
    again = evaluate_run(trained_run, images=8)
    assert again["base"] == summary["base"]
    assert again["tuned"] == summary["tuned"]


def test_held_out_prompts_are_spread_and_fixed(tiny_flux):
    config = tiny_config(tiny_flux)
    few, many = heldout_prompts(config, 24), heldout_prompts(config, 1200)
    assert many[:24] == few
    assert len({p.metadata["category"] for p in few}) >= 4
    # 960 balanced prompts, then a second permutation of them.
    assert Counter(p.metadata["category"] for p in many[:960]) == dict.fromkeys(CATEGORIES, 160)
    assert Counter(p.text for p in many[960:]) <= Counter(p.text for p in many[:960])


@pytest.mark.parametrize("name, message", [("7", "no checkpoint '7'"), ("newest", "one of: latest, best, 2")])
def test_an_unknown_checkpoint(trained_run, name, message):
    with pytest.raises(UserError, match=message):
        open_run(trained_run, name)


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        open_run(tmp_path)


def test_paired_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    low, high = paired_interval(rng.normal(0.3, 1.0, 500))
    assert 0.1 < low < 0.3 < high < 0.5
    assert paired_interval(np.full(10, 0.25)) == (0.25, 0.25)


def test_grid_shows_every_image_at_its_place(tmp_path):
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    write_grid(images, tmp_path / "grid.png", columns=3, margin=2, smallest=16)
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    assert [int(pixels[10, 10 + 18 * i, 0]) for i in range(3)] == [0, 64, 128]
    assert [int(pixels[28, 10 + 18 * i, 0]) for i in range(3)] == [191, 255, 255]
