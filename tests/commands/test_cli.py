"""The command line: what it prints, its exit codes, its start-up time, and every command on one tiny run."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.processes import command_line, ended, start_ranks
from support.tiny import tiny_config

from fastgrpo.commands.main import _print_comparison, main
from fastgrpo.config import dump
from fastgrpo.errors import ConfigError, UserError

COMMANDS = ("train", "eval", "sample", "export", "report", "doctor", "pretrain")


@pytest.fixture
def recipe(tiny_flux, tmp_path):
    """A config file of two iterations that write everything a run writes."""
    config = tiny_config(
        tiny_flux, tmp_path / "run", eval={"every": 1, "images": 6, "grid": 6}, telemetry={"progress": True}
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(config))
    return path


def test_help_names_every_command_and_imports_no_torch():
    code = (
        "import sys; from fastgrpo.commands.main import main; code = main(['--help']); "
        "heavy = {'torch', 'numpy', 'pydantic', 'diffusers', 'matplotlib'} & set(sys.modules); "
        "assert code == 0 and not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f" {command} " in done.stdout for command in COMMANDS)


def test_help_answers_in_under_a_second():
    # Processor time: on a machine that does nothing else it is the time that a person waits.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "fastgrpo", "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_its_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"Usage: fastgrpo {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["eval", "x", "--images", "many"], ["train", "--nope"],
    ["sample", "x", "y", "--seed", str(2**63)]])  # fmt: skip
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ConfigError("run.dir: no"), 2, "error: run.dir: no\n"),
        (UserError("two\n lines"), 2, "error: two lines\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x/metrics.jsonl"), 2, None),
        (ModuleNotFoundError("No module named 'peft'", name="peft.tuners"), 2, None),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_user_can_mend_is_one_line_without_a_traceback(recipe, monkeypatch, capsys, error, code, line):
    def fail(config):
        raise error

    monkeypatch.setattr("fastgrpo.commands.train.train", fail)
    assert main(["train", str(recipe)]) == code
    said = capsys.readouterr().err
    expected = {
        OSError: "error: x/metrics.jsonl: No space left on device\n",
        ModuleNotFoundError: "error: this needs the package 'peft'; install it with: pip install 'fastgrpo[train]'\n",
    }
    assert said == (line if line is not None else expected[type(error)])


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("x", name="fastgrpo.nope"), OSError("?")])
def test_a_bug_keeps_its_traceback(recipe, monkeypatch, error):
    def fail(config):
        raise error

    monkeypatch.setattr("fastgrpo.commands.train.train", fail)
    with pytest.raises(type(error)):
        main(["train", str(recipe)])


def test_one_of_several_ranks_names_a_wrong_setting(tmp_path, monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", str(tmp_path / "none.yaml")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_check_prints_the_arithmetic_of_all_ranks_and_runs_nothing(recipe, capsys):
    assert main(["train", str(recipe), "--check", "rollout.prompts_per_iteration=4", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "12  = 4 prompts × 3 of each group" in printed
    assert "2 ranks (6 samples each)" in printed
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.family=fluks", "did you mean 'flux'?"),
        ("rewards.0.name=shape", "did you mean 'shapes'?"),
        ("prompts.train=shapes:trane", "did you mean 'shapes:train'?"),
    ],
)
def test_check_finds_names_that_do_not_exist(recipe, capsys, override, words):
    assert main(["train", str(recipe), "--check", override]) == 2
    assert words in capsys.readouterr().err


def test_a_long_name_or_one_in_brackets_leaves_the_numbers_of_an_evaluation(capsys):
    name = f"[/red]{'long' * 30}.py:Bright"
    base = {"images": 6, "rewards": {name: 0.5}, "interval95": {name: [0.25, 0.75]}}
    spread = {"overall": {"base": 0.125}, "within_prompt": None}
    _print_comparison({"base": base, "diversity": spread, "directory": "runs/[/b]"})
    said = capsys.readouterr().out
    assert "0.500" in said
    assert "0.750" in said
    assert "[/red]" in said
    assert "written to runs/[/b]: summary.json" in said


def test_every_command_on_a_run(recipe, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", str(recipe)]) == 0
    assert "iteration 2/2" in capsys.readouterr().err
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["train"]["iterations"] == 2
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    assert main(["eval", str(run), "--images", "6"]) == 0
    assert "shapes.strict" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["base"]["images"] == summary["tuned"]["images"] == 6
    assert {"strict_pass", "rewards"} <= set(summary["tuned"])
    assert summary["train_seconds"] > 0

    assert main(["report", str(run)]) == 0
    assert (run / "report.html").stat().st_size > 10_000
    capsys.readouterr()

    assert main(["sample", str(run), "a red circle", "a cross", "--count", "2", "--out", str(tmp_path / "a")]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert [p.name for p in paths] == ["0000-00.png", "0000-01.png", "0001-00.png", "0001-01.png"]
    assert main(["sample", str(run), "a red circle", "a cross", "--count", "2", "--out", str(tmp_path / "b")]) == 0
    assert [(tmp_path / "b" / p.name).read_bytes() for p in paths] == [p.read_bytes() for p in paths]
    assert main(["sample", str(run), "a red circle", "--checkpoint", "base", "--out", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c" / "0000-00.png").exists()

    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    assert (tmp_path / "exported" / "model_index.json").exists()

    assert main(["train", str(recipe)]) == 2
    assert "already holds a run; continue it with run.resume=true" in capsys.readouterr().err
    assert main(["train", str(recipe), "run.resume=true", "train.iterations=3"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("command", ["eval", "report", "sample", "export"])
def test_a_directory_without_a_run_is_refused(command, tmp_path, capsys):
    more = {"sample": ["a red circle"], "export": [str(tmp_path / "out")]}.get(command, [])
    assert main([command, str(tmp_path), *more]) == 2
    assert f"error: {tmp_path}: not a run directory" in capsys.readouterr().err


def test_ctrl_c_leaves_a_checkpoint_that_resumes(recipe, tmp_path):
    settings = "train.iterations=1000", "eval.every=0"
    (process,) = start_ranks(tmp_path, command_line, "train", str(recipe), *settings, ranks=1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline, "no iteration was logged"
        assert process.is_alive(), (tmp_path / "output 0.txt").read_text()
        time.sleep(0.1)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    (code,), (said,) = ended([process], tmp_path)
    assert code == 130
    assert "Traceback" not in said
    done = len(metrics.read_text().splitlines())
    assert (tmp_path / "run" / "checkpoints" / f"{done:06d}").is_dir()
    assert main(["train", str(recipe), "run.resume=true", f"train.iterations={done + 1}", "eval.every=0"]) == 0
    assert len(metrics.read_text().splitlines()) == done + 1
