"""bench/gpu_check.sh and its stages, rehearsed: what passes, what is wrong, what is left out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgrpo.commands.bench import load

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal; on a GPU make gpu-check runs it")


def call(out, *arguments, **environment):
    """The script's exit status and output; logs go to a folder."""
    command = ["bash", str(ROOT / "bench" / "gpu_check.sh"), *arguments]
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable, "WHEELS": "/none", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out.parent)
    return done.returncode, done.stdout + done.stderr


def test_the_stages_are_named_in_order_of_worth(tmp_path):
    code, said = call(tmp_path / "out", "--list")
    assert code == 0
    names = [line.split()[0] for line in said.splitlines()]
    assert names == [
        "environment", "numerics", "host", "device", "races", "compiled", "tests-gpu", "tests-kernels", "train", "lora",
        "train-compiled", "inductor", "real-stable-diffusion", "real-flux", "ncu",
    ]  # fmt: skip


def test_chosen_stages_run_and_leave_their_findings(tmp_path):
    out = tmp_path / "out"
    code, said = call(out, "--cpu", "numerics", "races", "ncu")
    assert code == 0, said
    assert (out / "summary.txt").read_text().splitlines()[0].startswith("numerics: passed, ")
    assert "ncu: needs a GPU, not rehearsed" in said
    findings = [json.loads(line) for line in (out / "gpu_check.jsonl").read_text().splitlines()]
    assert [f["dtype"] for f in findings if f["stage"] == "numerics"] == [
        "torch.float32",
        "torch.bfloat16",
        "torch.float16",
    ]
    assert dict.fromkeys(("moments", "loss", "nft", "log_prob", "rollout"), 0) in [f.get("different") for f in findings]


def test_a_stage_that_fails_is_told_and_stops_no_other(tmp_path):
    out = tmp_path / "out"
    # Without --cpu these need a GPU, which is not here.
    code, said = call(out, "races", "environment")
    assert code == 1
    assert [line.split(",")[0] for line in (out / "summary.txt").read_text().splitlines()] == [
        "races: FAILED (1)",
        "environment: FAILED (1)",
    ]
    assert f"failed: races environment (logs in {out})" in said


def test_a_first_call_ends_in_its_time_and_names_what_it_left_out(tmp_path):
    code, said = call(tmp_path / "out", BUDGET="10")
    assert code == 0
    assert said.startswith("left out, for want of time: environment numerics host device")


def test_an_unknown_stage_is_one_line(tmp_path):
    code, said = call(tmp_path / "out", "numeric")
    assert code == 2
    assert said.startswith("gpu_check: unknown stage 'numeric'; one of: environment numerics")


@pytest.fixture
def gpu_check(tmp_path, monkeypatch):
    module = load("gpu_check")
    monkeypatch.setattr(module, "OUT", tmp_path)
    monkeypatch.setattr(module, "wrong", [])
    return module


def test_a_runs_first_ratio_and_reward_are_judged(gpu_check, tmp_path):
    def metrics(rewards, deviations):
        rows = [{"reward/mean": r, "ratio/first_max_deviation": d} for r, d in zip(rewards, deviations, strict=True)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"note": 1}, *rows]))
        gpu_check.wrong.clear()
        gpu_check.run(str(tmp_path))
        return gpu_check.wrong

    assert metrics([0.5, 0.6, 0.7], [0.0, 0.0, 0.0]) == []
    assert "the first ratio is off by 1e-07" in metrics([0.5, 0.6], [0.0, 1e-7])[0]
    assert "rewards [0.5, 0.5]" in metrics([0.5, 0.5], [0.0, 0.0])[0]
    assert "1 iterations" in metrics([0.5], [0.0])[0]


def test_too_slow_a_row_is_wrong(gpu_check):
    row = {"op": "loss", "mode": "full", "shape": "flux", "provider": "ours", "p50_ms": "1.0"}
    for slower, wrong in ((8.5, 0), (2.0, 1)):
        gpu_check.wrong.clear()
        gpu_check._expect_faster(row, [{**row, "provider": "eager", "p50_ms": slower}], "eager", 8.0)
        assert len(gpu_check.wrong) == wrong
    # A row that was not measured proves nothing.
    gpu_check.wrong.clear()
    gpu_check._expect_faster(row, [], "eager", 8.0)
    assert gpu_check.wrong == ["loss full flux: nan × as fast as eager, less than 8.0"]


def test_wrong_numbers_are_found(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "CPU", True)
    monkeypatch.setattr(gpu_check, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu_check, "ODD", [(3, 5, 137)])
    gpu_check.numerics()
    assert gpu_check.wrong == []
    exact = gpu_check.fk.gaussian_step
    monkeypatch.setattr(gpu_check.fk, "gaussian_step", lambda *a, **k: exact(*a, **k) * (1 + 1e-4))
    gpu_check.numerics()
    assert any(what.startswith("step of [3, 5, 137] torch.float32") for what in gpu_check.wrong)
