"""`fastgrpo train --check`: all that can be known without weights, at once; what a run says when it starts."""

import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.runs import finished
from support.tiny import tiny_config

from fastgrpo.commands.main import main
from fastgrpo.config import dump
from fastgrpo.errors import ConfigError
from fastgrpo.training.setup import load_callback

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(tiny_flux, tmp_path, capsys, monkeypatch):
    """Checks the tiny config with overrides: (exit code, lines on stderr, stdout)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(dump(tiny_config(tiny_flux, tmp_path / "run")))

    def run(*overrides, ranks=1, path="c.yaml"):
        code = main(["train", path, "--check", "--ranks", str(ranks), "--", *overrides])
        said = capsys.readouterr()
        assert not (tmp_path / "run").exists()
        return code, said.err.splitlines(), said.out

    return run


def test_a_run_that_can_start_is_its_arithmetic(check):
    code, errors, out = check()
    assert (code, errors) == (0, [])
    assert "shapes:train: 960 prompts" in out
    assert "One iteration on 1 rank:" in out


def test_a_number_of_ranks_that_is_none_is_one_line(tiny_flux, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(dump(tiny_config(tiny_flux, tmp_path / "run")))
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["train", str(tmp_path / "c.yaml"), "--check"]) == 2
    assert capsys.readouterr().err == "error: WORLD_SIZE: 'two' is not a number; torchrun sets it\n"


def test_every_problem_is_there_at_once(check, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "image": "gone.png"}\n')
    code, errors, out = check(
        "model.height=33", "model.width=30", "prompts.train=p.jsonl", "prompts.heldout=gone.txt",
        "rewards=[{name: shape}, {name: 'nothing:Here'}, {name: clip, path: gone.safetensors}]",
        "callbacks=['nothing:Callback']", ranks=4,
    )  # fmt: skip
    assert code == 2
    assert out == ""
    for words in (
        "model.height: 33 is not a multiple of 8; the nearest is 32", "model.width: 30 is not a multiple of 8",
        "6 samples an iteration do not divide over 4 ranks", "unknown reward 'shape'; did you mean 'shapes'",
        "rewards.nothing:Here: there is no module 'nothing'", "there is nothing at gone.safetensors",
        "'image': no such file: gone.png",
        "gone.txt: cannot read the prompts", "callbacks: there is no module 'nothing'",
    ):  # fmt: skip
        (line,) = [line for line in errors if words in line]
        assert line.startswith("error: ")
    assert len(errors) == 9


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.path=/no/such/place", "model.path: there is no directory '/no/such/place'"),
        ("model.path=nowhere", "model.path: there is no directory 'nowhere'"),
        ("model.path=shapes:stable_diffusion", "is a StableDiffusionPipeline, not a FluxPipeline"),
        ("model.family=sd3", "is a FluxPipeline, not a StableDiffusion3Pipeline"),
        ("model.path=Qwen/Qwen-Image", "is a QwenImagePipeline, not a FluxPipeline"),
    ],
)
def test_another_model_than_the_familys_is_found(check, override, words):
    code, (line,), _ = check(override)
    assert code == 2
    assert words in line


def test_settings_that_cannot_be_are_all_named(check):
    code, errors, _ = check("update.lr=1", "rollout.stepz=3", "train.iterations=0")
    assert code == 2
    assert sorted(" ".join(line.split()[:2]) for line in errors) == [
        "error: rollout.stepz:", "error: train.iterations:", "error: update.lr:"
    ]  # fmt: skip


def test_a_hub_id_that_was_not_checked_is_said(check):
    code, errors, _ = check("model.path=someone/model")
    assert code == 0
    assert errors == [
        "warning: model.path: 'someone/model' is no directory here, and as a hub id it was not checked",
        "missing: model.path: someone/model is absent; fastgrpo assets c.yaml --download",
    ]


def test_the_ranks_of_a_recipe_are_in_its_name(check, tmp_path):
    text = (tmp_path / "c.yaml").read_text()
    (tmp_path / "tiny-try-4xh100.yaml").write_text(text)
    assert main(["train", "tiny-try-4xh100.yaml", "--check"]) == 2
    assert main(["train", "tiny-try-4xh100.yaml", "--check", "--ranks", "2"]) == 0


def test_groups_of_the_best_of_n_stay_whole(check):
    best = ["rollout.best_of=6", "rollout.group_size=4"]
    assert check(*best)[0] == 0
    code, errors, _ = check(*best, "rollout.prompts_per_iteration=3", ranks=2)
    assert code == 2
    assert errors == [
        "error: rollout.best_of: groups of 6 stay whole, and 3 prompts an iteration do not divide over 2 (ranks × "
        "update.optimizer_steps)"
    ]


def test_first_frames_are_there_and_can_be_read(check, tmp_path):
    for size, name in (((32, 32), "whole.png"), ((64, 32), "wide.png")):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    config = str(ROOT / "configs" / "shapes-skyreels.yaml")
    rows = [{"prompt": "a red circle moves right", "image": "cut.png"}, {"prompt": "a cross stands"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, errors, _ = check("prompts.train=p.jsonl", path=config)
    assert code == 2
    assert len(errors) == 2
    assert "1 of 2 prompts have no image, such as 'a cross stands'; HunyuanSkyreelsImageToVideoPipeline" in errors[0]
    assert "cut.png: cannot read the image" in errors[1]
    rows = [{"prompt": "a red circle moves right", "image": name} for name in ("whole.png", "wide.png")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, (line,), out = check("prompts.train=p.jsonl", path=config)
    assert code == 0
    assert "1 of 2 images are not of the shape 32:32 and will be stretched, such as wide.png (64×32)" in line
    assert "p.jsonl: 2 prompts, 2 pictures" in out


LONG = " ".join(["a red circle above a blue square"] * 30)


def test_what_a_run_would_do_in_silence_is_said_with_counts(check, tmp_path, tiny_flux):
    rows = [{"prompt": "a red circle", "negative_prompt": "blur", "kind": "x"}, {"prompt": LONG}, {"prompt": "a cross"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rewards = [
        {"name": "shapes", "when": {"kind": ["y"]}},
        {"name": "shapes", "label": "seen", "when": {"kind": ["x"]}},
        {"name": "shapes", "label": "held", "weight": 0.0, "when": {"category": ["z"]}},
    ]
    code, errors, _ = check("prompts.train=p.jsonl", f"rewards={json.dumps(rewards)}")
    assert code == 0
    assert [line.partition(" matches ")[0] for line in errors[:2]] == [
        "warning: rewards.shapes: is trained, but its when (kind: ['y'])",
        "warning: rewards.held: is watched, but its when (category: ['z'])",
    ]
    assert errors[0].endswith("none of the 3 prompts of p.jsonl; their kind is x")
    assert errors[1].endswith("none of the 3 prompts of p.jsonl; none has category")
    unused = "1 of 3 prompts have a negative prompt, unused: model.true_cfg 1 is not above 1"
    assert errors[2] == f"warning: p.jsonl: {unused}"
    long = (
        "p.jsonl: 1 of 3 prompts are longer than the 10 tokens that the text encoder takes and will be cut, the longest"
    )
    assert errors[3].startswith(f"warning: {long} of 2")
    assert len(errors) == 4
    # A run says the same when it starts.
    finished(
        tiny_config(
            tiny_flux, tmp_path / "run", prompts={"train": "p.jsonl"}, train={"iterations": 1}, rewards=rewards[1:2]
        )
    )
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    said = [e["text"] for e in events if e["event"] == "note" and e["text"].startswith("warning")]
    assert said == errors[2:]


def test_guidance_that_uses_no_negative_prompt_is_said(check, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na red circle,blur\na cross,\n")
    config = str(ROOT / "configs" / "shapes-stable-diffusion.yaml")
    settings = ["prompts.train=p.csv", "prompts.heldout=p.csv"]
    assert check(*settings, "model.guidance=4", path=config)[1] == []
    (line,) = check(*settings, "model.guidance=1", path=config)[1]
    assert line == ("warning: p.csv: 1 of 2 prompts have a negative prompt, unused: model.guidance 1 is not above 1")


def test_a_picture_that_cannot_be_read_ends_a_run_before_its_weights_load(tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cross stands", "image": "bad.png"}')
    settings = [f"prompts.train={tmp_path / 'p.jsonl'}", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", str(ROOT / "configs" / "shapes-skyreels.yaml"), *settings]) == 2
    assert "bad.png: cannot read the image: not a picture" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "run")


CALLBACKS = """
from fastgrpo import Callback

class Quick(Callback): ...

class Broken(Callback):
    def __init__(self):
        raise RuntimeError("no socket")
"""


@pytest.mark.parametrize(
    "name, words",
    [
        ("own_callback.py:Quick", None),
        ("own_callback:Quick", None),
        ("own_callback.py:Quik", r"'Quik' is not in .*own_callback.py; did you mean 'Quick'"),
        ("own_callback.py:Broken", "cannot be made without arguments: RuntimeError: no socket; traceback: "),
        ("own_callback.py:CALLBACKS", "is not in"),
        ("json:dumps", "'json:dumps' is not a subclass of"),
        ("raises.py:Quick", "'raises.py' cannot be imported: ZeroDivisionError: .*; traceback: "),
        (".own_callback:Quick", "'.own_callback' cannot be imported: TypeError: "),
    ],
)
def test_a_callback_is_found_as_a_reward_is(tmp_path, monkeypatch, name, words):
    (tmp_path / "own_callback.py").write_text(CALLBACKS)
    (tmp_path / "raises.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "own_callback", raising=False)
    if words is None:
        assert type(load_callback(name)).__name__ == "Quick"
        return
    with pytest.raises(ConfigError, match=words) as caught:
        load_callback(name)
    assert str(caught.value).startswith("callbacks: ")
    assert "\n" not in str(caught.value)
