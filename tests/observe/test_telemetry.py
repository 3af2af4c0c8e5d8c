"""Metrics on disk, rewinding them on resume, phase times, the live line."""

import gzip
import json
import subprocess
import sys
import time
from datetime import datetime
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from support.tiny import tiny_config

from fastgrpo.commands.train import train
from fastgrpo.config import Config, Run
from fastgrpo.errors import UserError
from fastgrpo.observe.progress import Progress
from fastgrpo.observe.run_log import RunLog, read_metrics
from fastgrpo.observe.timers import PhaseTimer


def make_config(**telemetry) -> Config:
    return tiny_config(Path("none"), telemetry=telemetry)


def test_each_iteration_is_one_line_on_disk_at_once(tmp_path):
    telemetry = RunLog(tmp_path, make_config())
    telemetry.log(0, {"reward/mean": 0.5, "lr": 1e-5})
    telemetry.log(1, {"reward/mean": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 0, "reward/mean": 0.5, "lr": 1e-5},
        {"iteration": 1, "reward/mean": None},
    ]
    telemetry.close()


def events(run) -> list[dict]:
    """Without their times, which must be in order."""
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    times = [datetime.fromisoformat(line.pop("time")) for line in lines]
    assert times == sorted(times)
    return lines


def test_what_happens_is_a_log_of_json_lines(tmp_path):
    telemetry = RunLog(tmp_path, make_config())
    telemetry.event("start", 0, ranks=2)
    telemetry.log(0, {"optimizer_steps/skipped": 0.0, "samples/failed": 0.0})
    telemetry.log(1, {"optimizer_steps/skipped": 1.0, "samples/failed": 3.0})
    telemetry.event("heldout", 2, score=float("nan"), rewards={"shapes": float("nan"), "clip": 0.5})
    # A resumed run's metrics are rewound; what happened stays.
    telemetry.rewind(0)
    telemetry.close()
    assert events(tmp_path) == [
        {"event": "start", "iteration": 0, "ranks": 2},
        {"event": "lost", "iteration": 1, "optimizer_steps/skipped": 1.0, "samples/failed": 3.0},
        {"event": "heldout", "iteration": 2, "score": None, "rewards": {"shapes": None, "clip": 0.5}},
    ]


def test_a_run_logs_its_start_evaluations_checkpoints_and_end(tiny_flux, tmp_path):
    run = tmp_path / "run"
    settings = {"eval": {"every": 2, "images": 2, "grid": 2}, "checkpoint": {"every": 2}}
    train(tiny_config(tiny_flux, run, **settings))
    train(tiny_config(tiny_flux, run, **settings).model_copy(update={"run": Run(dir=str(run), seed=7, resume=True)}))
    kinds = [(line["event"], line["iteration"]) for line in events(run) if line["event"] != "note"]
    first = [("start", 0), ("eval", 0), ("heldout", 0), ("eval", 2), ("heldout", 2), ("checkpoint", 2), ("end", 2)]
    assert kinds == [*first, ("start", 2), ("end", 2)]
    assert any("samples" in line["text"] for line in events(run) if line["event"] == "note")
    assert all(line["seconds"] > 0 for line in events(run) if line["event"] in ("eval", "checkpoint"))
    assert events(run)[-1]["why"] == "finished"


def test_other_ranks_write_nothing(tmp_path):
    telemetry = RunLog(tmp_path / "run", make_config(tensorboard=True), main=False)
    telemetry.log(0, {"reward/mean": 0.5})
    telemetry.event("start", 0)
    telemetry.images(0, "heldout", tmp_path / "none.png", [])
    telemetry.rewind(0)
    telemetry.close()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_leaves_the_file_of_one_never_stopped(tmp_path):
    def run(folder, *spans):
        for start, stop in spans:
            telemetry = RunLog(folder, make_config())
            telemetry.rewind(start)
            for i in range(start, stop):
                telemetry.log(i, {"reward/mean": i / 7})
            telemetry.close()
        return (folder / "metrics.jsonl").read_bytes()

    assert run(tmp_path / "stopped", (0, 7), (5, 10)) == run(tmp_path / "whole", (0, 10))


def test_a_line_cut_short_by_a_kill_is_dropped_and_any_other_bad_line_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "lr": 1.0}\n{"iteration": 1, "l')
    assert read_metrics(tmp_path) == [{"iteration": 0, "lr": 1.0}]
    telemetry = RunLog(tmp_path, make_config())
    telemetry.rewind(1)
    telemetry.log(1, {"lr": 2.0})
    telemetry.close()
    assert read_metrics(tmp_path) == [{"iteration": 0, "lr": 1.0}, {"iteration": 1, "lr": 2.0}]
    path.write_text('{"iteration": 0}\nnonsense\n{"iteration": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a line of metrics"):
        read_metrics(tmp_path)


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    telemetry = RunLog(tmp_path, make_config())
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot write the metrics: No space left on device$"):
        telemetry.log(0, {"lr": 1.0})
    telemetry.close()


def test_no_run_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_gets_scalars_images_and_drops_what_is_rewound(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from PIL import Image

    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "grid.png")
    for start, stop, value in ((0, 4, 0.25), (2, 5, 0.75)):
        telemetry = RunLog(tmp_path, make_config(tensorboard=True))
        if start:
            telemetry.rewind(start)
        for i in range(start, stop):
            telemetry.log(i, {"reward/mean": value})
        telemetry.images(stop, "heldout", tmp_path / "grid.png", ["a red circle"])
        telemetry.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        (0, 0.25),
        (1, 0.25),
        (2, 0.75),
        (3, 0.75),
        (4, 0.75),
    ]
    assert events.Images("heldout")[-1].width == 8


def test_wandb_gets_the_config_metrics_and_images_and_goes_on_under_one_id(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append(("end", None))
    )
    wandb = ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    settings = []
    monkeypatch.setattr(wandb, "init", lambda **given: settings.append(given) or run, raising=False)
    monkeypatch.setattr(wandb, "Image", lambda path, caption: (path, caption), raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 1):
        telemetry = RunLog(tmp_path, make_config(wandb_project="demo"))
        telemetry.rewind(start)
        telemetry.log(start, {"lr": 0.5})
        telemetry.images(start, "heldout", "grid.png", ["a", "b"])
        telemetry.close()
    each = [(0, {"lr": 0.5}), (0, {"heldout": ("grid.png", "a\nb")}), ("end", None)]
    assert calls == each + [(1 if step == 0 else step, values) for step, values in each]
    first, second = settings
    assert first == second
    assert (first["project"], first["resume"]) == ("demo", "allow")
    assert first["config"]["rollout"]["group_size"] == 3


def test_wandb_itself_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs fastgrpo[logging]: wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    telemetry = RunLog(tmp_path, make_config(wandb_project="demo"))
    telemetry.log(0, {"reward/mean": 0.5})
    telemetry.images(1, "heldout", tmp_path / "grid.png", ["a", "b"])
    telemetry.close()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith((tmp_path / "wandb_id").read_text())
    (written,) = folder.glob("*.wandb")
    assert b"reward/mean" in written.read_bytes()


@pytest.mark.parametrize(
    "setting, package", [({"tensorboard": True}, "tensorboard"), ({"wandb_project": "demo"}, "wandb")]
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, setting, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        RunLog(tmp_path, make_config(**setting))
    message = str(caught.value)
    assert f"telemetry.{next(iter(setting))}" in message
    assert "fastgrpo[logging]" in message
    assert "\n" not in message


def test_phase_times_add_up_and_start_anew():
    timer = PhaseTimer("cpu")
    for _ in range(2):
        with timer.phase("rollout"):
            time.sleep(0.02)
    with timer.phase("update"):
        time.sleep(0.01)
    time.sleep(0.03)
    seconds = timer.read()
    assert 0.04 <= seconds["rollout"] < 0.4
    assert seconds["update"] >= 0.01
    assert seconds["other"] >= 0.03
    assert sum(v for k, v in seconds.items() if k != "total") == pytest.approx(seconds["total"], abs=1e-9)
    assert set(timer.read()) == {"other", "total"}


def test_a_phase_that_raises_is_timed():
    timer = PhaseTimer("cpu")
    with pytest.raises(KeyError), timer.phase("reward"):
        raise KeyError
    assert "reward" in timer.read()


def test_memory_is_told_by_phase():
    import numpy

    timer = PhaseTimer("cpu")
    with timer.phase("rollout"):
        block = numpy.ones(2**25)
        del block
    with timer.phase("update"):
        pass
    lap = timer.lap()
    assert 2**27 < lap.memory["rollout"] - lap.memory["update"] < 2**29
    assert timer.peak >= lap.memory["rollout"]
    assert timer.lap().memory == {}


def test_the_live_table_shows_phases_memory_and_who_is_behind(monkeypatch):
    import io

    from rich.console import Console

    metrics = {"reward/mean": 0.5, "time/rollout": 3.0, "time/update": 1.0, "time/total": 4.0}
    metrics |= {"memory/update_bytes": 3.0 * 2**30, "ranks/last": 5.0, "ranks/behind_seconds": 0.5}
    metrics |= {"gpu/power_w": 650.0, "gpu/clock_mhz": 1755.0, "gpu/limited": 0.5}
    written = io.StringIO()
    screen = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr("rich.console.Console", lambda stderr: screen)
    with Progress(total=10) as progress:
        progress.update(1, metrics)
        progress.note("a note")
    shown = written.getvalue()
    for words in (
        "reward 0.500",
        "rollout",
        "75%",
        "3.00 GiB",
        "rank 5 is 0.50 s behind",
        "650 W",
        "1755 MHz",
        "a note",
    ):
        assert words in shown
    assert "50% of GPUs held back" in shown


@pytest.mark.gpu
def test_phase_times_on_a_gpu_are_those_of_the_stream():
    import torch

    timer = PhaseTimer("cuda")
    with timer.phase("update"):
        torch.cuda._sleep(200_000_000)
    assert timer.read()["update"] > 0.02


def test_peak_memory_is_of_this_process():
    code = (
        "import numpy; from fastgrpo.observe.timers import peak_memory_bytes as peak; before = peak(); "
        "block = numpy.ones(2**26); del block; print(peak() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 2**28 < grown < 2**30


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    with Progress(total=10, start=2) as progress:
        for i in range(2, 10):
            progress.update(i + 1, {"reward/mean": 0.5})
        progress.note("stopped")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines[:-1]] == ["iteration 5/10", "iteration 8/10", "iteration 10/10"]
    assert "reward 0.500 · 4.00 s/iteration · 00:00:20 left" in lines[0]
    assert lines[-1] == "stopped"


def test_progress_of_a_pretraining_stage_shows_what_it_is_given(capsys):
    with Progress(total=1, unit="denoiser step") as progress:
        progress.update(1, {"loss": 0.25, "lr": 1e-4})
    assert capsys.readouterr().err.startswith("denoiser step 1/1 · loss 0.25 · lr 0.0001 · ")


def test_progress_can_be_silent(capsys):
    with Progress(total=1, enabled=False) as progress:
        progress.update(1, {"reward/mean": 0.5})
    assert capsys.readouterr() == ("", "")


def test_chosen_iterations_are_traced_with_their_phases(tiny_flux, tmp_path):
    # Few samples: a trace has every operation of its iteration.
    window = {"kind": "window", "size": 1, "start": 0}
    roll = {"prompts_per_iteration": 1, "group_size": 2, "steps": 3, "trained": window}
    config = tiny_config(tiny_flux, tmp_path, rollout=roll, train={"iterations": 2}, telemetry={"profile": [1]})
    train(config)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "iteration-000001-rank-0.json.gz"
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"conditioning", "rollout", "decode", "sync", "update", "aten::addmm"} <= names
