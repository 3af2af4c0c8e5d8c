"""`fastgrpo eval`: a base model, or a run beside its base, on any prompts by any rewards.

Both draw the same prompts from the same initial noise, so differences are paired. Intervals are bootstrap 95% intervals
over prompts; diversity is the mean pairwise cosine distance of the images in a CLIP, so that a collapse shows.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrpo import __version__
from fastgrpo.config import Config, RewardSpec, load_config
from fastgrpo.evaluate import (
    Evaluation,
    apply_checkpoint,
    choose_rewards,
    evaluate,
    heldout_prompts,
    known_mean,
    open_run,
    record,
)
from fastgrpo.models import load_family
from fastgrpo.parallel import World
from fastgrpo.pictures import write_frames, write_grid
from fastgrpo.rewards import load_reward
from fastgrpo.rewards.clip import ClipReward

Interval = tuple[float, float]


@dataclass(frozen=True)
class Request:
    """What to evaluate. images: of each model, of which `samples` are of one prompt; prompts: a source of load_prompts,
    None: the config's held-out; rewards: as `choose_rewards` takes them; embedding: the CLIP that measures diversity;
    out: a directory, None: the run's own for its own prompts and rewards, else `evaluations/` in it."""

    images: int = 480
    checkpoint: str = "latest"
    prompts: str | None = None
    rewards: Sequence[str] = ()
    samples: int = 1
    embedding: str = "shapes:clip"
    out: Path | None = None


def evaluate_target(target: str | Path, request: Request | None = None, note: Callable[[str], None] = print) -> dict:
    """Evaluates a config's base model, or a run directory beside its base; writes and gives the summary.

    Writes `summary.json`, `table.md`, and grids under `final/`. Raises UserError for what is not there.
    """
    target, request = Path(target), request or Request()
    run = target.is_dir()
    store, iteration = None, 0
    if run:
        config, store, iteration = open_run(target, request.checkpoint)
    else:
        config = load_config(target)
    out = _directory(target, run, request)
    specs = choose_rewards(config, request.rewards)
    rewards = {spec.key: load_reward(spec) for spec in specs}
    embedder = ClipReward(request.embedding)
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    distinct = heldout_prompts(config, -(-request.images // request.samples), request.prompts)
    unit = np.arange(len(distinct)).repeat(request.samples)[: request.images]
    prompts = [distinct[i] for i in unit]

    family = load_family(config.model, world.device)
    base = evaluate(family, rewards, prompts, config, world, note)
    record(base, out / "final", 0, config.eval.grid, config.model.fps, config.eval.mp4)
    features = {"base": embedder.embed(base.images).double().numpy()}
    summary: dict[str, Any] = {"base": described(base, unit)}
    if store is not None:
        state = store.state(iteration)
        apply_checkpoint(family, config, store, iteration)
        tuned = evaluate(family, rewards, prompts, config, world, note)
        record(tuned, out / "final", iteration, config.eval.grid, config.model.fps, config.eval.mp4)
        features["tuned"] = embedder.embed(tuned.images).double().numpy()
        _side_by_side(base, tuned, config, out / "final")
        summary |= {"tuned": described(tuned, unit), **compared(base, tuned, unit)}
        summary |= {"iteration": iteration, "train_seconds": state["train_seconds"]}
    summary["diversity"] = diversity(features, unit)
    summary |= {
        "prompts": request.prompts or config.prompts.heldout,
        "samples_per_prompt": request.samples,
        "embedding": request.embedding,
        "seed": config.run.seed,
        "versions": versions(),
    }
    _write(summary, specs, out)
    return summary | {"directory": str(out)}


def described(evaluation: Evaluation, unit: np.ndarray) -> dict[str, Any]:
    """`Evaluation.summary` and the intervals of its means."""
    intervals = {name: mean_interval(by_unit(values, unit)) for name, values in evaluation.values.items()}
    return evaluation.summary() | {"interval95": intervals}


def compared(base: Evaluation, tuned: Evaluation, unit: np.ndarray) -> dict[str, Any]:
    """Paired differences and win rates of every column that both have; ties are half a win."""
    differences, rates = {}, {}
    for name in base.values:
        if name not in tuned.values:
            continue
        gain = tuned.values[name] - base.values[name]
        wins = np.where(np.isnan(gain), np.nan, (gain > 0) + 0.5 * (gain == 0))
        differences[name] = _mean_of(by_unit(gain, unit))
        rates[name] = _mean_of(by_unit(wins, unit))
    return {"difference": differences, "win_rate": rates}


def _mean_of(units: np.ndarray) -> dict[str, Any]:
    return {"mean": known_mean(units), "interval95": mean_interval(units)}


def by_unit(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Means [u] of values [n] over the images of each prompt, of those that are not NaN; NaN where all are."""
    known = ~np.isnan(values)
    count = np.bincount(unit, known, minlength=unit.max() + 1)
    total = np.bincount(unit, np.where(known, values, 0.0), minlength=unit.max() + 1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def mean_interval(units: np.ndarray, seed: int = 0, draws: int = 10_000) -> Interval:
    """The bootstrap 95% interval of the mean of [u] independent values; NaN are left out."""
    units = units[~np.isnan(units)]
    if len(units) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    # A block of draws at a time: thousands of images would fill the memory.
    means = np.concatenate([rng.choice(units, (500, len(units))).mean(axis=1) for _ in range(draws // 500)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def diversity(features: dict[str, np.ndarray], unit: np.ndarray) -> dict[str, Any]:
    """Mean pairwise cosine distances of normalised features [n, D], by model, and their paired difference.

    overall: of all images; within_prompt: of images of one prompt, where there are several. The interval of the overall
    difference is a jackknife's over prompts (a bootstrap would pair images with themselves).
    """
    overall = {name: overall_distance(f) for name, f in features.items()}
    result: dict[str, Any] = {"overall": overall, "within_prompt": None}
    several = np.bincount(unit).max() > 1
    within = {name: distance_by_unit(f, unit) for name, f in features.items()} if several else {}
    if several:
        result["within_prompt"] = {name: known_mean(units) for name, units in within.items()}
    if {"base", "tuned"} <= features.keys():
        result["difference"] = {"overall": _jackknife(features["base"], features["tuned"], unit)}
        if several:
            result["difference"]["within_prompt"] = _mean_of(within["tuned"] - within["base"])
    return result


def overall_distance(features: np.ndarray) -> float:
    """1 − the mean cosine over all pairs of different rows of normalised features [n, D]."""
    n = len(features)
    return float(1 - ((features.sum(axis=0) ** 2).sum() - n) / max(n * (n - 1), 1))


def distance_by_unit(features: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """`overall_distance` within each unit, [u]; NaN where it has one row."""
    count, sums = _sums(features, unit)
    squares = (sums**2).sum(axis=1)
    return np.where(count > 1, 1 - (squares - count) / np.maximum(count * (count - 1), 1), np.nan)


def _sums(features: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [u] and summed features [u, D] of each unit."""
    sums = np.zeros((unit.max() + 1, features.shape[1]))
    np.add.at(sums, unit, features)
    return np.bincount(unit).astype(np.float64), sums


def _jackknife(base: np.ndarray, tuned: np.ndarray, unit: np.ndarray) -> dict[str, Any]:
    """tuned − base of the overall distance, and its 95% interval from leaving out one unit at a time."""
    mean = overall_distance(tuned) - overall_distance(base)
    left_out = []
    for features in (base, tuned):
        count, sums = _sums(features, unit)
        n = len(features) - count
        squares = ((features.sum(axis=0) - sums) ** 2).sum(axis=1)
        left_out.append(1 - (squares - n) / np.maximum(n * (n - 1), 1))
    gains = left_out[1] - left_out[0]
    u = len(gains)
    error = float(np.sqrt((u - 1) / u * ((gains - gains.mean()) ** 2).sum()))
    return {"mean": mean, "interval95": (mean - 1.96 * error, mean + 1.96 * error)}


def table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the comparison, or of the base alone."""
    base, tuned = summary["base"], summary.get("tuned")
    spread = summary["diversity"]
    kinds = [k for k in ("overall", "within_prompt") if spread[k] is not None]
    if tuned is None:
        rows = [[name, f"{value:.3f}", _span(base["interval95"][name])] for name, value in base["rewards"].items()]
        rows += [[f"diversity, {k.replace('_', ' ')}", f"{spread[k]['base']:.3f}", ""] for k in kinds]
        return ["", "base", "95% interval"], rows
    rows = []
    for name, gain in summary["difference"].items():
        win = summary["win_rate"][name]
        values = (f"{part['rewards'][name]:.3f}" for part in (base, tuned))
        rows.append([name, *values, f"{gain['mean']:+.3f}", _span(gain["interval95"], "+"), f"{win['mean']:.1%}",
                     _span([100 * x for x in win["interval95"]], "", 1)])  # fmt: skip
    for kind in kinds:
        gain = spread["difference"][kind]
        values = (f"{spread[kind][part]:.3f}" for part in ("base", "tuned"))
        label = f"diversity, {kind.replace('_', ' ')}"
        rows.append([label, *values, f"{gain['mean']:+.3f}", _span(gain["interval95"], "+"), "", ""])
    return ["", "base", "tuned", "difference", "95% interval", "win rate", "95% interval"], rows


def _span(interval: Sequence[float], sign: str = "", digits: int = 3) -> str:
    low, high = interval
    return f"{low:{sign}.{digits}f} … {high:{sign}.{digits}f}"


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    import diffusers
    import transformers

    return {
        "fastgrpo": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _directory(target: Path, run: bool, request: Request) -> Path:
    if request.out is not None:
        return request.out
    if run and request.prompts is None and not request.rewards:
        return target
    name = (request.prompts or "heldout").replace(":", "-").replace("/", "-")
    return (target if run else Path("runs") / target.stem) / "evaluations" / name


def _side_by_side(base: Evaluation, tuned: Evaluation, config: Config, folder: Path) -> None:
    """`side-by-side.png`: base and tuned of each prompt next to each other."""
    count = min(config.eval.grid, len(base.images))
    pairs = torch.stack([base.images[:count], tuned.images[:count]], dim=1).flatten(0, 1)
    (write_frames if pairs.ndim == 5 else write_grid)(pairs, folder / "side-by-side.png")


def _write(summary: dict[str, Any], specs: Sequence[RewardSpec], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    summary["scored_by"] = [spec.model_dump(mode="json") for spec in specs]
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    head, rows = table(summary)
    lines = [head, ["---"] * len(head), *rows]
    (out / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
