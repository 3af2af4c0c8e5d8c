"""Held-out score against processor seconds, samples and forward passes, of each objective and way to reuse samples:
`fastgrpo bench objectives`.

Every setting trains the same pipeline on the same prompts and reward for the same processor time, one after the other
for each seed; what evaluations take is not counted. Rows, picture and page hold what was run, and no more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fastgrpo.config import Config, load_config
from fastgrpo.evaluation.heldout import Evaluation, evaluate, heldout_prompts
from fastgrpo.training.trainer import Trainer

from . import tables
from .tables import DATA, Row

KEY = ("config", "setting", "seed", "iteration")
COLUMNS = (
    *KEY, "processor_seconds", "samples", "forward_equivalents", "reward", "score", "images", "settings", "date",
    "commit",
)  # fmt: skip
PICTURE = tables.ROOT / "docs" / "images" / "objectives.png"
# What a curve is to gain over its start: 12 points.
GOAL = 0.12
PAGE, MARKS = tables.ROOT / "docs" / "results.md", ("<!-- objectives -->", "<!-- /objectives -->")

# Samples of a group that are drawn with noise of their own, by all the deterministic steps; no clip range where none is
# read.
OWN_NOISE = ("rollout.shared_noise=false", "rollout.suffix_steps=null")
UNCLIPPED = ("objective.clip_low=1e-4", "objective.clip_high=1e-4")
AWM = (
    *OWN_NOISE, "objective.kind=awm", "objective.clip_low=1", "objective.clip_high=1",
    "objective.times={count: 1, draw: uniform}", "objective.old_weight=1", "update.optimizer.lr=1e-4",
)  # fmt: skip
SETTINGS: dict[str, tuple[str, ...]] = {
    "grpo": (),
    "grpo-2-epochs": ("update.epochs=2", "objective.dppo_threshold=1e-3"),
    "grpo-replay": ("update.replay=2", "objective.dppo_threshold=1e-3"),
    "nft": (
        *OWN_NOISE, *UNCLIPPED, "objective.kind=nft", "objective.times={count: 1, draw: uniform}",
        "objective.old_decay={rate: 0.01, most: 0.5}", "update.optimizer_steps=2", "update.optimizer.lr=1e-4",
    ),
    "awm": (*AWM, "update.optimizer_steps=2"),
    # Small rollouts, each trained twice.
    "awm-2-epochs": (*AWM, "update.epochs=2", "rollout.prompts_per_iteration=8"),
    "dpo": (
        *OWN_NOISE, *UNCLIPPED, "objective.kind=dpo", "objective.beta=100", "objective.pairs=2",
        "objective.times={count: 2, draw: uniform}", "update.optimizer_steps=2", "update.optimizer.lr=1e-4",
    ),
}  # fmt: skip


@dataclass
class Counter:
    """Counts rows that a model evaluates: without gradients once, with them three times (a backward is two)."""

    total: float = 0.0
    families: list[Any] = field(default_factory=list)

    def watch(self, family: Any) -> None:
        """Counts the rows of a family's `predict` from here on."""
        if any(family is known for known in self.families):
            return
        self.families.append(family)
        predict = family.predict

        def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.total += len(x) * (3 if torch.is_grad_enabled() else 1)
            return predict(x, *rest)

        family.predict = counted


def score_of(evaluation: Evaluation, config: Config) -> float:
    """The share of images that pass strictly, where the reward says so; else the weighted sum of the rewards' means."""
    summary = evaluation.summary()
    if summary["strict_pass"] is not None:
        return float(summary["strict_pass"])
    return float(sum(spec.weight * summary["rewards"][spec.key] for spec in config.scored))


def curve(config: Config, seconds: float, every: float, images: int) -> list[Row]:
    """Trains for so many processor seconds, with an evaluation about every `every` of them; a row an evaluation."""
    trainer, counter, rows = Trainer.from_config(config), Counter(), []
    heldout = heldout_prompts(config, images)
    counter.watch(trainer.family)
    if trainer.updater.forward is not None:
        counter.watch(trainer.updater.forward.family)
    spent, due, equivalents, rewards = 0.0, 0.0, 0.0, []
    while True:
        done = spent >= seconds or trainer.iteration >= config.train.iterations
        if spent >= due or done:
            with trainer.optimizer.averaged(config.eval.ema):
                found = evaluate(
                    trainer.family, trainer.rewards, heldout, config, trainer.world, trainer.failures
                )  # fmt: skip
            rows.append({
                "iteration": trainer.iteration, "processor_seconds": round(spent, 1),
                "samples": trainer.iteration * trainer.rollouts.samples, "forward_equivalents": round(equivalents),
                "reward": f"{np.mean(rewards):.4f}" if rewards else "", "score": f"{score_of(found, config):.4f}",
                "images": images,
            })  # fmt: skip
            print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), file=sys.stderr, flush=True)
            due, rewards = due + every, []
        if done:
            return rows
        begin, counter.total = time.process_time(), 0.0
        rewards.append(trainer.step()["reward/mean"])
        spent += time.process_time() - begin
        equivalents += counter.total


def run(
    path: Path, names: Sequence[str] | None, seeds: Sequence[int], seconds: float, every: float, images: int,
    overrides: Sequence[str], label: str | None, write: bool,
) -> list[Row]:  # fmt: skip
    """Runs settings in turns, seed after seed.

    Args:
        path: The recipe that all settings start from.
        names: Of SETTINGS; None: all.
        seeds: run.seed of each turn.
        seconds: Processor seconds of training that each gets.
        every: Between evaluations.
        images: Of an evaluation.
        overrides: Further settings of all.
        label: What the rows call it, where one setting is tried with other numbers; None: its name.
        write: Whether rows, picture and page are written.
    """
    rows, table = [], DATA / f"objectives-{tables.device_slug()}.csv"
    for seed in seeds:
        for name in tables.chosen("bench objectives", "setting", names, SETTINGS):
            given = [*SETTINGS[name], *overrides]
            print(f"{label or name}, seed {seed}: {' '.join(given)}", file=sys.stderr, flush=True)
            with TemporaryDirectory() as scratch:
                fixed = [f"run.dir={scratch}/run", f"run.seed={seed}", "eval.every=0", "checkpoint.every=0"]
                config = load_config(path, [*given, *fixed, "telemetry.progress=false"])
                about = {"config": path.stem, "setting": label or name, "seed": seed, "settings": " ".join(given)}
                about |= {"date": date.today().isoformat(), "commit": tables.revision()}
                new = [about | row for row in curve(config, seconds, every, images)]
            rows += new
            if write:
                tables.upsert(table, new, KEY, COLUMNS, series=KEY[:3])
    if write:
        known = tables.read(table)
        plot(known, PICTURE)
        PAGE.write_text(tables.between(PAGE, MARKS, page(known)), encoding="utf-8")
    return rows


def reached(curve: Sequence[Row], gain: float, column: str) -> float | None:
    """Where a curve is first so far above its start, along a column, linearly between evaluations; None: nowhere."""
    goal = float(curve[0]["score"]) + gain
    for before, after in pairwise(curve):
        low, high = float(before["score"]), float(after["score"])
        if high >= goal:
            begin, end = float(before[column]), float(after[column])
            return begin + (end - begin) * (goal - low) / (high - low)
    return None


def curves(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """By config and setting, and by seed within it: the rows of a run in order."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (int(row["seed"]), int(row["iteration"]))):
        found.setdefault((row["config"], row["setting"]), {}).setdefault(row["seed"], []).append(row)
    return {name: found[name] for name in sorted(found)}


def page(rows: Sequence[Row]) -> str:
    """A Markdown table: what each setting gained over the score at its start, by seed, at the end of its time, and the
    processor seconds and samples that it took to GOAL."""
    lines = []
    for (config, setting), runs in curves(rows).items():
        ends = [run[-1] for run in runs.values()]
        gains = [100 * (float(run[-1]["score"]) - float(run[0]["score"])) for run in runs.values()]
        seconds, samples = (
            ["–" if (at := reached(run, GOAL, column)) is None else f"{at:.0f}" for run in runs.values()]
            for column in ("processor_seconds", "samples")
        )
        last, spent = ends[-1], np.mean([float(end["processor_seconds"]) for end in ends])
        lines.append((
            config, setting, len(ends), " ".join(f"{gain:+.1f}" for gain in gains), f"{np.mean(gains):+.1f}",
            " ".join(seconds), " ".join(samples), f"{spent:.0f}", last["iteration"], last["samples"],
            last["forward_equivalents"], last["images"], last["date"], last["commit"],
        ))  # fmt: skip
    goal = f"{100 * GOAL:+.0f}"
    head = (
        "config", "setting", "seeds", "points gained, by seed", "mean", f"s to {goal}", f"samples to {goal}",
        "processor s", "iterations", "samples", "forward-equivalents", "images", "date", "commit",
    )  # fmt: skip
    return tables.markdown(head, lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Points gained against processor seconds, samples and forward passes, a line a seed; a row of panels a config."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastgrpo.observe.charts import RUN_COLORS, SETTINGS

    axes_of = ("processor_seconds", "samples", "forward_equivalents")
    known = curves(rows)
    configs, names = (list(dict.fromkeys(parts)) for parts in zip(*known, strict=True))
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10, 2.6 * len(configs)), layout="constrained")
        panels = figure.subplots(len(configs), 3, sharey="row", squeeze=False)
        for config, line in zip(configs, panels, strict=True):
            for axes, column in zip(line, axes_of, strict=True):
                for setting in (name for name in names if (config, name) in known):
                    turn, color = divmod(names.index(setting), len(RUN_COLORS))
                    for number, run in enumerate(known[config, setting].values()):
                        gains = [100 * (float(row["score"]) - float(run[0]["score"])) for row in run]
                        axes.plot(
                            [float(row[column]) for row in run], gains, linewidth=1, marker=".",
                            color=RUN_COLORS[color], linestyle=("-", "--", ":")[turn % 3],
                            label=None if number else setting,
                        )  # fmt: skip
                axes.set(xlabel=column.replace("_", " "))
            line[0].set(ylabel="points gained", title=config)
            line[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(path, dpi=110)
