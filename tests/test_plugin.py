"""A package that adds a family, a reward and a prompt source is installed, and everything works with them: fastgrpo
itself is not touched."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastgrpo import data, models, rewards
from fastgrpo.commands.main import app, main
from fastgrpo.config import load_config

SOURCE = Path(__file__).parent / "support" / "plugin"
CONFIG = """
run: {{dir: {run}, seed: 3}}
model: {{family: aura_flow, path: {model}, height: 32, width: 32, guidance: 3.0, max_sequence_length: 8}}
prompts: {{train: "animals:4", heldout: "animals:6"}}
rewards: [{{name: contrast, options: {{scale: 2.0}}}}]
rollout:
  {{prompts_per_iteration: 2, group_size: 2, steps: 3, forward_batch: 4, decode_batch: 4, shift: pipeline,
   trained: {{kind: window, size: 2, start: 0}}}}
update: {{optimizer: {{lr: 1.0e-3}}}}
train: {{iterations: 2}}
eval: {{every: 2, images: 4}}
telemetry: {{progress: false}}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package in it, as pip installs it."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(SOURCE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--target", str(folder / "site"), str(folder / "source")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture
def config_file(installed, tmp_path, monkeypatch):
    """A config that names the package's parts, over a tiny AuraFlow; the package can be imported."""
    monkeypatch.syspath_prepend(str(installed))
    from fastgrpo_aura.tiny import build_pipeline  # pyright: ignore[reportMissingImports]

    build_pipeline().save_pretrained(tmp_path / "model")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(run=tmp_path / "run", model=tmp_path / "model"))
    yield path
    for name in [name for name in sys.modules if name.split(".")[0] == "fastgrpo_aura"]:
        del sys.modules[name]


def command(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_what_the_package_offers_is_listed(installed, monkeypatch):
    before = models.available(), rewards.available(), data.available()
    monkeypatch.syspath_prepend(str(installed))
    after = models.available(), rewards.available(), data.available()
    assert [sorted({*b} ^ {*a}) for b, a in zip(before, after, strict=True)] == [
        ["aura_flow"],
        ["contrast"],
        ["animals:"],
    ]


def test_it_trains_plans_evaluates_and_exports(config_file, tmp_path):
    import diffusers

    assert "animals:4: 4 prompts" in command("train", config_file, "--check")
    planned = command("plan", config_file, "--gpu", "h100", "--world", 1)
    assert "rollout" in planned
    command("train", config_file)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1]
    assert all(line["reward/contrast"] > 0 and line["samples/failed"] == 0 for line in lines)
    assert lines[0]["ratio/first_max_deviation"] == 0

    assert "contrast" in command("eval", tmp_path / "run", "--images", 4)
    command("export", tmp_path / "run", tmp_path / "exported")
    base, tuned = (
        diffusers.AuraFlowPipeline.from_pretrained(path).transformer.state_dict()
        for path in (tmp_path / "model", tmp_path / "exported")
    )
    assert base.keys() == tuned.keys()
    assert any(not torch.equal(base[name], tuned[name]) for name in base)


def test_its_images_are_those_of_its_pipeline(config_file):
    """What every family of ours is held to, in tests/models/test_images.py."""
    import diffusers
    from support.tiny_images import drawn, initial

    config = load_config(config_file)
    family = models.load_family(config.model, torch.device("cpu"))
    prompts = data.load_prompts("animals:3")
    pipeline = diffusers.AuraFlowPipeline.from_pretrained(config.model.path)
    pipeline.set_progress_bar_config(disable=True)
    draw: Any = pipeline
    theirs = [
        draw(
            prompt.text, negative_prompt="", height=32, width=32, num_inference_steps=3, guidance_scale=3.0,
            latents=initial(family, [i]), output_type="pt", max_sequence_length=8,
        ).images
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    assert (drawn(family, config, prompts) - torch.cat(theirs)).abs().max() <= 1e-4


def test_without_the_package_the_same_config_is_one_line(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(run=tmp_path / "run", model=tmp_path / "model"))
    assert main(["train", str(path), "--check"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: model\.family: unknown family 'aura_flow'; .*\(one of: flux, .*\)\n", said)
    assert all(line.startswith(("error: ", "missing: ")) for line in said.splitlines())
