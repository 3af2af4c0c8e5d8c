"""The examples run as they stand, shortened by settings alone."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = ["rollout.prompts_per_iteration=2", "rollout.group_size=4", "rollout.forward_batch=8"]


def test_the_script_trains_plots_and_samples(tmp_path):
    script = [sys.executable, str(ROOT / "examples" / "train_flux.py"), "--iterations", "2", "--out", str(tmp_path)]
    done = subprocess.run([*script, *SMALL], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reward") == 2
    assert "first ratio off by 0" in done.stdout
    for name in ("before.png", "after.png", "reward.png"):
        assert (tmp_path / name).stat().st_size > 1000
    # Other libraries are as quiet as on the command line.
    assert "Loading" not in done.stderr
    assert "bitsandbytes" not in done.stderr


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells one after another, as Jupyter runs them, with fewer and smaller iterations."""
    notebook = json.loads((ROOT / "examples" / "train_flux.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    space: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"])
            more = ", ".join(f'"{setting}"' for setting in [*SMALL, "eval.images=4"])
            code = code.replace("train.iterations=40", "train.iterations=2").replace("eval.every=20", "eval.every=1")
            exec(code.replace('"telemetry.progress=false"', f'"telemetry.progress=false", {more}'), space)
    assert space["result"].iterations == 2
    assert [row["iteration"] for row in space["result"].evaluations] == [0, 1, 2]
    assert space["metrics"]["ratio/first_max_deviation"] == 0
    assert space["best"].best[0] == 1
