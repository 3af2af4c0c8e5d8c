"""What a run directory holds, read for a report: config, metrics, events, evaluations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.config import RewardSpec, flatten_rewards
from fastgrpo.config.yaml import parse_yaml
from fastgrpo.errors import UserError
from fastgrpo.evaluation.compare import STRICT, shown_columns
from fastgrpo.evaluation.statistics import Interval, mean_interval
from fastgrpo.observe.run_log import read_metrics


@dataclass(frozen=True)
class Gain:
    """A reward before and after training, on the same held-out prompts from the same initial noise.

    interval: of the paired difference, 95%; None where the evaluation did not keep the values of each image.
    """

    name: str
    before: float
    after: float
    images: int
    interval: Interval | None

    @property
    def strict(self) -> bool:
        return self.name.endswith(STRICT)

    @property
    def direction(self) -> int:
        """1 where it rose, -1 where it fell, 0 where the interval holds 0."""
        low, high = self.interval or (self.after - self.before,) * 2
        return int(low > 0) - int(high < 0)


@dataclass(frozen=True)
class RunData:
    """What a run directory holds.

    metrics: the lines of metrics.jsonl. events: those of events.jsonl. evaluations: the run's own, by iteration; 0 is
    the base model. summary: the closing evaluation (`fastgrpo eval`), with its pictures in `closing`.
    """

    name: str
    directory: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None
    closing: list[dict[str, Any]]

    @property
    def noun(self) -> str:
        return "videos" if self.config["model"].get("frames", 1) > 1 else "images"

    @property
    def rewards(self) -> list[RewardSpec]:
        return flatten_rewards([RewardSpec(**reward) for reward in self.config["rewards"]])

    @property
    def watched(self) -> list[str]:
        """The rewards that are scored and not trained."""
        return [spec.key for spec in self.rewards if not spec.weight]

    @property
    def seconds(self) -> float:
        return sum(line.get("time/total") or 0.0 for line in self.metrics)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a metric, where it is a number."""
        found = [(m["iteration"], m[key]) for m in self.metrics if m.get(key) is not None]
        return [x for x, _ in found], [y for _, y in found]

    def ends(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The evaluation before and after: the closing one where there was one, else the run's own."""
        if self.summary is not None and "tuned" in self.summary:
            return self.summary["base"], self.summary["tuned"]
        return (self.evaluations[0], self.evaluations[-1]) if len(self.evaluations) > 1 else None

    def gains(self) -> list[Gain]:
        """Each reward and strict pass rate before and after, the strict ones first; not those that gave no score."""
        ends = self.ends()
        if ends is None:
            return []
        before, after = ends
        known = (self.summary or {}).get("difference", {})
        found = []
        for name in shown_columns(after["rewards"]):
            if name not in before["rewards"] or math.isnan(after["rewards"][name] - before["rewards"][name]):
                continue
            interval = tuple(known[name]["interval95"]) if name in known else paired_interval(before, after, name)
            found.append(Gain(name, before["rewards"][name], after["rewards"][name], after["images"], interval))
        return sorted(found, key=lambda gain: not gain.strict)

    def phases(self) -> dict[str, float]:
        """Seconds of the whole run by phase, the longest first, what is in no phase last."""
        totals: dict[str, float] = {}
        for line in self.metrics:
            for key, value in line.items():
                if key.startswith("time/") and key != "time/total":
                    totals[key[5:]] = totals.get(key[5:], 0.0) + value
        return dict(sorted(totals.items(), key=lambda item: (item[0] == "other", -item[1])))


def values_of(evaluation: dict[str, Any], name: str) -> np.ndarray:
    """The values of a column by image, NaN where one failed; empty where the evaluation did not keep them."""
    return np.array(evaluation.get("values", {}).get(name, ()), dtype=float)


def paired_interval(before: dict[str, Any], after: dict[str, Any], name: str) -> Interval | None:
    """The bootstrap 95% interval of a column's mean difference; None where two evaluations cannot be paired."""
    old, new = values_of(before, name), values_of(after, name)
    return mean_interval(new - old) if len(old) == len(new) > 1 else None


def read_run(directory: Path) -> RunData:
    """The data of a run directory. Raises UserError where it is none, or has not trained yet."""
    config = read_config(directory)
    metrics = read_metrics(directory)
    if not metrics:
        raise UserError(f"{directory}: nothing to report: the run has not finished an iteration yet")
    summary = directory / "summary.json"
    return RunData(
        directory.resolve().name,
        directory,
        config,
        metrics,
        _read_events(directory / "events.jsonl"),
        _read_evaluations(directory / "eval"),
        read_json(summary) if summary.exists() else None,
        _read_evaluations(directory / "final" / "eval") if summary.exists() else [],
    )


def read_config(directory: Path) -> dict[str, Any]:
    """A run's resolved config. Raises UserError where the directory is no run's."""
    path = directory / "config.yaml"
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: not a run directory (it has no config.yaml)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not the config of a run: it should be a mapping of sections")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for what is not a JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object; remove it to go on")
    return data


def _read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """By iteration, each with the folder that its pictures are in."""
    found = []
    for path in folder.glob("*.json"):
        evaluation = read_json(path)
        if "iteration" not in evaluation:
            raise UserError(f"{path}: not an evaluation; remove it to go on")
        found.append(evaluation | {"folder": folder})
    return sorted(found, key=lambda evaluation: evaluation["iteration"])


def _read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl; one that a kill cut short, or that is none, is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            event = json.loads(text)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found
