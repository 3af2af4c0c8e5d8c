"""Evaluation and export: what was trained is what others load, and what is reported is what was scored."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import tiny_config

from fastgrpo.commands.evaluate import Request, evaluate_target
from fastgrpo.commands.export import export_run
from fastgrpo.commands.runs import apply_checkpoint, open_run
from fastgrpo.commands.train import train
from fastgrpo.config import dump
from fastgrpo.data.prompts import Prompt, load_prompts, open_image
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.evaluation.compare import diversity
from fastgrpo.evaluation.heldout import Evaluation, draw, heldout_prompts, record
from fastgrpo.evaluation.statistics import distance_by_unit, mean_interval, overall_distance
from fastgrpo.models import load_family
from fastgrpo.observe.media import beside_sources, read_tiles, write_grid
from fastgrpo.rewards import Scores
from fastgrpo.shapes.world import CATEGORIES

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
    summary = evaluate_target(trained_run, Request(images=8))
    written = json.loads((trained_run / "summary.json").read_text())
    assert written["base"]["rewards"] == summary["base"]["rewards"]
    assert summary["base"]["images"] == summary["tuned"]["images"] == 8
    assert summary["iteration"] == 2
    assert 0 <= summary["base"]["strict_pass"] <= 1
    gain = summary["tuned"]["rewards"]["shapes"] - summary["base"]["rewards"]["shapes"]
    assert summary["difference"]["shapes"]["mean"] == pytest.approx(gain)
    assert set(summary["base"]["by_category"]) <= {
        "single_object", "two_object", "counting", "colors", "position", "color_attribution"
    }  # fmt: skip
    for file in ("table.md", "final/side-by-side.png", "final/eval/000000.png", "final/eval/000002.png"):
        assert (trained_run / file).is_file()
    again = evaluate_target(trained_run, Request(images=8))
    assert again["base"] == summary["base"]
    assert again["tuned"] == summary["tuned"]


class Redness:
    """How red an image is; every third one fails."""

    def score(self, samples, prompts, fps):
        values = samples[:, 0].mean(dim=(1, 2)).double().numpy()
        return Scores(values, np.arange(len(values)) % 3 != 2)


class Broken:
    def score(self, samples, prompts, fps):
        raise RuntimeError("no")


def test_any_rewards_on_any_prompts_with_several_samples_of_each(tiny_flux, tmp_path):
    train(tiny_config(tiny_flux, tmp_path / "run", train={"iterations": 1}))
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    names = ("test_evaluate:Redness", "test_evaluate:Broken", "clip=shapes:clip")
    request = Request(12, prompts=str(tmp_path / "two.txt"), rewards=names, samples=6, out=tmp_path / "out")
    notes = []
    summary = evaluate_target(tmp_path / "run", request, notes.append)
    assert any("'test_evaluate:Broken' failed for 12 samples" in note for note in notes)
    assert set(summary["difference"]) == set(names[:2]) | {"clip"}
    assert np.isnan(summary["base"]["rewards"]["test_evaluate:Broken"])
    assert 0 <= summary["win_rate"]["clip"]["mean"] <= 1
    spread = summary["diversity"]
    assert 0 < spread["within_prompt"]["base"] <= 2
    low, high = spread["difference"]["overall"]["interval95"]
    assert low <= spread["overall"]["tuned"] - spread["overall"]["base"] <= high
    values = json.loads((tmp_path / "out" / "final" / "eval" / "000000.json").read_text())["values"]
    assert [v is None for v in values["test_evaluate:Redness"]] == [False, False, True] * 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_base_model_is_evaluated_by_its_config(tiny_flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump(tiny_config(tiny_flux)))
    (tmp_path / "rewards.yaml").write_text("rewards: [{name: shapes, label: ours}]")
    summary = evaluate_target(tmp_path / "recipe.yaml", Request(4, prompts="set:geneval", rewards=["rewards.yaml"]))
    assert "tuned" not in summary
    assert list(summary["base"]["rewards"]) == ["ours", "ours.strict"]
    assert Path(summary["directory"]) == Path("runs/recipe/evaluations/set-geneval")
    with pytest.raises(ConfigError, match="unknown reward 'shape'"):
        evaluate_target(tmp_path / "recipe.yaml", Request(4, rewards=["shape"]))
    with pytest.raises(UserError, match="'shapes' is named twice"):
        evaluate_target(tmp_path / "recipe.yaml", Request(4, rewards=["shapes", "shapes"]))


def test_diversity_is_the_mean_of_all_pairs_and_shows_a_collapse():
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(12, 5))
    spread /= np.linalg.norm(spread, axis=1, keepdims=True)
    unit = np.arange(4).repeat(3)
    pairs = [1 - spread[i] @ spread[j] for i in range(12) for j in range(i)]
    assert overall_distance(spread) == pytest.approx(np.mean(pairs))
    inner = [[1 - spread[3 * u + i] @ spread[3 * u + j] for i in range(3) for j in range(i)] for u in range(4)]
    assert distance_by_unit(spread, unit) == pytest.approx(np.mean(inner, axis=1))
    result = diversity({"base": spread, "tuned": np.repeat(spread[:1], 12, axis=0)}, unit)
    assert result["overall"]["tuned"] == pytest.approx(0)
    assert result["difference"]["overall"]["interval95"][1] < 0
    assert result["difference"]["within_prompt"]["interval95"][1] < 0


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


def test_an_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    low, high = mean_interval(rng.normal(0.3, 1.0, 500))
    assert 0.1 < low < 0.3 < high < 0.5
    assert mean_interval(np.full(10, 0.25)) == (0.25, 0.25)
    assert mean_interval(np.array([0.25, np.nan])) == (0.25, 0.25)


def test_a_sheet_shows_the_source_beside_the_result(tmp_path):
    prompts = load_prompts("editing:heldout")[:3]
    results = torch.linspace(0, 1, 3).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    record(Evaluation(prompts, {"editing": np.zeros(3)}, results), tmp_path, 0, grid=3)
    with Image.open(tmp_path / "eval" / "000000.png") as sheet:
        pixels = np.asarray(sheet)
    # Three pairs in a row, enlarged three times, with margins of 4.
    assert pixels.shape == (96 + 8, 3 * (192 + 4) + 4, 3)
    for place, prompt in enumerate(prompts):
        left = 4 + place * 196
        shown = pixels[4:100:3, left : left + 192 : 3]
        np.testing.assert_array_equal(shown[:, :32], np.asarray(open_image(prompt.image or "")))
        assert set(shown[:, 32:].ravel().tolist()) == {round(255 * place / 2)}
    tiles = read_tiles(tmp_path / "eval" / "000000.png", 3, 256)
    assert all(Image.open(io.BytesIO(tile)).size == (192, 96) for _, tile in tiles)
    plain = [Prompt("a circle")] * 3
    assert beside_sources(plain, results).shape == (3, 3, 32, 32)
    assert beside_sources(prompts, results, results).shape == (3, 3, 32, 96)


def test_grid_shows_every_image_at_its_place(tmp_path):
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    write_grid(images, tmp_path / "grid.png", columns=3, margin=2, smallest=16)
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    assert [int(pixels[10, 10 + 18 * i, 0]) for i in range(3)] == [0, 64, 128]
    assert [int(pixels[28, 10 + 18 * i, 0]) for i in range(3)] == [191, 255, 255]
