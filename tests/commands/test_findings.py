"""`fastgrpo doctor RUN` on recorded runs: those that one broken thing keeps from learning, and those that learn.

bench/doctor_runs.py made the records, which hold what the findings read.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.tiny import tiny_config

from fastgrpo.commands.bench import load
from fastgrpo.commands.findings import Evidence, diagnose, findings, remaining_base
from fastgrpo.commands.main import main
from fastgrpo.commands.report.run_data import RunData
from fastgrpo.config import dump

RECORDS = Path(__file__).with_name("doctor_runs")
# Those of the cases whose record is kept.
KEPT = {path.stem for path in RECORDS.glob("*.json")}
CASES = {case: found for case, found in load("doctor_runs").CASES.items() if case in KEPT}
BROKEN = [case for case, (cause, *_) in CASES.items() if cause]
LEARNS = [case for case in load("doctor_runs").LEARNS if case in KEPT]


def recorded(case: str) -> RunData:
    data = json.loads((RECORDS / f"{case}.json").read_text())
    return RunData(case, Path(case), data["config"], data["metrics"], [], data["evaluations"], None, [])


def test_ten_of_twelve_causes_are_named_first():
    assert len(BROKEN) >= 12
    named = {case: [f.name for f in findings(Evidence.of(recorded(case)))] for case in BROKEN}
    right = [case for case, names in named.items() if names[:1] == [CASES[case][0]]]
    assert len(right) >= 10 / 12 * len(BROKEN), named


@pytest.mark.parametrize("case", LEARNS)
def test_a_run_that_learns_is_no_false_alarm_at_any_evaluation(case):
    run, evidence = recorded(case), None
    for count in range(2, len(run.evaluations) + 1):
        last = run.evaluations[count - 1]["iteration"]
        metrics = [line for line in run.metrics if line["iteration"] < last]
        evidence = Evidence.of(dataclasses.replace(run, metrics=metrics, evaluations=run.evaluations[:count]))
        assert findings(evidence) == []
    # The record of faster-0 ends before its interval is above 0.
    assert evidence is not None
    assert case == "faster-0" or evidence.rises


def make_run(folder: Path, base: Sequence[float | None], last: Sequence[float | None], **sections) -> Path:
    """A run directory of 8 iterations with two evaluations of a reward."""
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(tiny_config(folder, folder, **sections)))
    line = {"reward/mean": 0.5, "reward/std": 0.2, "groups/zero_spread": 0.0, "ratio/first_max_deviation": 0.0}
    lines = [json.dumps({"iteration": i, "samples/failed": 0.0, **line}) for i in range(8)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for iteration, values in ((0, base), (8, last)):
        data = {"iteration": iteration, "images": len(values), "values": {"shapes": values}}
        (folder / "eval" / f"{iteration:06d}.json").write_text(json.dumps(data))
    return folder


@pytest.fixture
def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(0.5, 0.2, 60)


MANY = {"prompts_per_iteration": 8}


def test_exit_codes_and_what_is_printed(tmp_path, capsys, scores):
    rises = make_run(tmp_path / "rises", list(scores), list(scores + 0.1), rollout=MANY)
    assert main(["doctor", str(rises)]) == 0
    assert "the held-out score rises: +0.100, 95% interval +0.100 … +0.100, 60 samples" in capsys.readouterr().out
    still = make_run(tmp_path / "still", list(scores), list(scores + 1e-4), rollout=MANY)
    # So small a change is above 0 all the same, and no finding.
    assert main(["doctor", str(still)]) == 0
    still = make_run(tmp_path / "same", list(scores), list(scores), rollout=MANY)
    assert main(["doctor", str(still)]) == 1
    printed = capsys.readouterr().out
    assert "rate_low: a held-out score changed by 0.0% of its spread in 8 iterations" in printed
    assert "at least 10%" in printed
    assert "raise update.optimizer.lr" in printed
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert main(["doctor", str(still), "train.iterations=3"]) == 2
    assert "'train.iterations=3': settings are for a config" in capsys.readouterr().err


def test_what_holds_the_policy_is_told_apart(tmp_path, scores):
    same = list(scores)
    averaged = {"ema_decay": 0.999, "ema_warmup": False}
    for name, sections in {
        "ema": {"update": averaged},
        "kl": {"objective": {"kl_weight": 1.0}},
        "rate_low": {},
    }.items():
        run = make_run(tmp_path / name, same, same, rollout=MANY, **sections)
        assert [f.name for f in diagnose(run)[1]] == [name]


def test_a_fall_of_all_scores_is_too_high_a_rate_and_noise_of_the_judge_is_named(tmp_path, scores):
    fallen = make_run(tmp_path / "fallen", list(scores), list(scores - 0.2), rollout=MANY)
    assert [f.name for f in diagnose(fallen)[1]] == ["rate_high"]
    other = np.random.default_rng(1).permutation(scores)
    noisy = make_run(tmp_path / "noisy", list(scores), list(other), rollout=MANY)
    assert [f.name for f in diagnose(noisy)[1]] == ["reward_noise"]


@pytest.mark.parametrize(
    "model, named",
    [
        ({"family": "flux", "true_cfg": 2.0}, "model.true_cfg=1"),
        ({"family": "z_image", "guidance": 1.0}, "model.guidance=0"),
        ({"family": "flux", "guidance": 3.5}, None),
        ({"family": "z_image", "guidance": 0.0}, None),
    ],
)
def test_guidance_by_two_branches_is_found_whatever_its_setting_and_scale(tmp_path, scores, model, named):
    run = make_run(tmp_path / "run", list(scores), list(scores), rollout=MANY, model=model)
    advice = [f.change for f in diagnose(run)[1] if f.name == "guidance"]
    assert len(advice) == (named is not None)
    assert all(named in text for text in advice)


@pytest.mark.parametrize("kind, names", [("grpo", {"eta_low", "untrained_spread", "rate_low"}), ("awm", {"rate_low"})])
def test_a_forward_process_has_no_noise_of_its_steps_to_change(tmp_path, scores, kind, names):
    sections = {"rollout": {**MANY, "shared_noise": False}, "objective": {"kind": kind}}
    run = make_run(tmp_path / "run", list(scores), list(scores), **sections)
    lines = (run / "metrics.jsonl").read_text().replace('"reward/std": 0.2', '"reward/std": 1e-3')
    (run / "metrics.jsonl").write_text(lines)
    assert {f.name for f in diagnose(run)[1]} == names


@pytest.mark.parametrize("kind, advised", [("grpo", True), ("awm", True), ("nft", False), ("dpo", False)])
def test_a_ratio_that_is_not_one_is_advised_a_wider_clip_range_only_where_there_is_one(tmp_path, scores, kind, advised):
    run = make_run(tmp_path / "run", list(scores), list(scores + 0.1), rollout=MANY, objective={"kind": kind})
    lines = (run / "metrics.jsonl").read_text().replace('max_deviation": 0.0', 'max_deviation": 0.01')
    (run / "metrics.jsonl").write_text(lines)
    [found] = diagnose(run)[1]
    assert found.name == "ratio"
    assert ("objective.clip_low" in found.change) is advised


def test_what_is_left_of_the_base_in_an_average():
    config = tiny_config(Path("nowhere"), update={"ema_decay": 0.9, "ema_warmup": False, "optimizer_steps": 2})
    assert remaining_base(config, 5) == pytest.approx(0.9**10)
    warm = tiny_config(Path("nowhere"), update={"ema_decay": 0.9})
    assert remaining_base(warm, 2) == pytest.approx(2 / 11 * 3 / 12)
    assert remaining_base(tiny_config(Path("nowhere")), 5) == 0


def test_before_eight_iterations_it_is_too_early_to_say_why(tmp_path, capsys, scores):
    run = make_run(tmp_path / "run", list(scores), list(scores), rollout={**MANY, "shared_noise": False})
    data = json.loads((run / "eval" / "000008.json").read_text()) | {"iteration": 2}
    (run / "eval" / "000008.json").write_text(json.dumps(data))
    assert main(["doctor", str(run)]) == 0
    said = "after 2 iterations the held-out score does not rise measurably: +0.000, 95% interval"
    assert said in (printed := capsys.readouterr().out)
    assert "60 samples; too early to say why (before iteration 8)" in printed
    for path in (run / "eval").glob("*.json"):
        path.unlink()
    assert [f.name for f in diagnose(run)[1]] == ["untrained_spread"]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")
    assert diagnose(run) == (
        "after 1 iteration the reward of the rollouts does not rise; too early to say why (before iteration 8); no "
        "held-out evaluations to compare", [],
    )  # fmt: skip


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"kind": "dpo"}},
        {"objective": {"kind": "awm", "old_decay": {"rate": 0.1, "most": 0.9}}},
        {"scoring": {"staleness": 1}},
    ],
)
def test_a_ratio_to_another_policy_than_the_update_starts_from_is_no_finding(tmp_path, scores, sections):
    run = make_run(tmp_path / "run", list(scores), list(scores + 0.1), rollout=MANY, **sections)
    first, *others = (run / "metrics.jsonl").read_text().splitlines()
    others = [line.replace('max_deviation": 0.0', 'max_deviation": 0.05') for line in others]
    (run / "metrics.jsonl").write_text("\n".join([first, *others]) + "\n")
    assert diagnose(run)[1] == []


def test_a_small_fall_of_all_scores_is_not_both_too_high_and_too_low_a_rate(tmp_path, scores):
    run = make_run(tmp_path / "run", list(scores), list(scores - 1e-3), rollout=MANY)
    assert [f.name for f in diagnose(run)[1]] == ["rate_low"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_held_out_samples_without_a_score_are_left_out(tmp_path, scores):
    some = make_run(tmp_path / "some", [None, *scores[1:]], [*(scores[:-1] + 0.1), None], rollout=MANY)
    assert diagnose(some) == (
        "after 8 iterations the held-out score rises: +0.100, 95% interval +0.100 … +0.100, 58 samples", [],
    )  # fmt: skip
    none = make_run(tmp_path / "none", list(scores), [None] * 60, rollout=MANY)
    assert diagnose(none) == (
        "after 8 iterations the reward of the rollouts does not rise; no held-out evaluations to compare", [],
    )  # fmt: skip
