"""`fastgrpo best-of RUN`: what choosing the best of N samples gives, N = 1, 2, 4 …, for the base model and the run's.

Every prompt's samples are drawn once; the expected score of the best of N of them, over all subsets of N, is exact:
the j-th worst of M is the best of a random N with probability C(j − 1, N − 1) / C(M, N).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import gammaln

from fastgrpo.commands.evaluate import versions
from fastgrpo.commands.runs import apply_checkpoint, choose_rewards, make_results, open_run
from fastgrpo.commands.sample import scored_chunks
from fastgrpo.distributed.world import World
from fastgrpo.errors import UserError
from fastgrpo.evaluation.heldout import heldout_prompts, known_mean
from fastgrpo.evaluation.statistics import mean_interval
from fastgrpo.models import load_family
from fastgrpo.observe.charts import scaling_chart
from fastgrpo.rewards import load_reward


def best_of_run(
    run_dir: str | Path, most: int = 256, prompts: int = 24, source: str | None = None, rewards: Sequence[str] = (),
    checkpoint: str = "latest", out: str | Path | None = None, note: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Writes `best-of.json` and `best-of.png` to `out` (the run directory), and gives the curves.

    rewards (see `choose_rewards`): the first one chooses; the others, and it, judge what was chosen. Of each model
    `most` samples of each of `prompts` prompts are drawn.
    """
    if most < 2:
        raise UserError(f"--most: {most} leaves nothing to choose from; at least 2")
    config, store, iteration = open_run(Path(run_dir), checkpoint)
    scorers = {spec.key: load_reward(spec) for spec in choose_rewards(config, rewards)}
    folder = Path(out or run_dir)
    make_results(folder)
    world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    family = load_family(config.model, world.device)
    texts = heldout_prompts(config, prompts, source)
    selector = next(iter(scorers))
    sizes = [2**i for i in range(most.bit_length()) if 2**i <= most]
    curves: dict[str, Any] = {}
    for model in ("base", "tuned"):
        if model == "tuned":
            apply_checkpoint(family, config, store, iteration)
        columns: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
        for _, _, scores in scored_chunks(family, texts, config, world, scorers, most, note):
            for name, values in scores.items():
                columns[name].append(values)
        table = {name: np.concatenate(parts).reshape(len(texts), most) for name, parts in columns.items()}
        curves[model] = {name: _curve(table[selector], values, sizes) for name, values in table.items()}
    result = {
        "sizes": sizes, "selected_by": selector, "curves": curves, "prompts": len(texts), "samples": most,
        "iteration": iteration, "seed": config.run.seed, "versions": versions(),
    }  # fmt: skip
    (folder / "best-of.json").write_text(json.dumps(result, indent=1))
    scaling_chart(folder / "best-of.png", sizes, curves, selector)
    return result


def _curve(chooser: np.ndarray, values: np.ndarray, sizes: Sequence[int]) -> dict[str, list]:
    """Mean over prompts [sizes] of what the best of N scores, and its bootstrap intervals."""
    per_prompt = np.stack([best_of_n(chooser, values, n) for n in sizes])
    return {"mean": [known_mean(row) for row in per_prompt], "interval95": [mean_interval(row) for row in per_prompt]}


def best_of_n(chooser: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Expected `values` [P] of the sample with the highest `chooser` among n of each prompt's M, both [P, M].

    Samples of equal rank share their chances. A sample without a choosing score is never drawn; NaN where fewer than n
    remain, or where what would be chosen has no value.
    """
    expected = np.full(len(values), np.nan)
    for place, (keys, scores) in enumerate(zip(chooser, values, strict=True)):
        known = ~np.isnan(keys)
        keys, scores = keys[known], scores[known]
        m = len(keys)
        if m < n:
            continue
        order = np.argsort(keys, kind="stable")
        chance = np.exp(_log_choose(np.arange(m), n - 1) - _log_choose(np.array([m]), n))
        _, tied = np.unique(keys[order], return_inverse=True)
        chance = (np.bincount(tied, chance) / np.bincount(tied))[tied]
        ranked = scores[order]
        expected[place] = (chance[chance > 0] * ranked[chance > 0]).sum()
    return expected


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    """log C(n, k), −∞ where n < k."""
    safe = np.maximum(n, k)
    return np.where(n < k, -np.inf, gammaln(safe + 1) - gammaln(k + 1) - gammaln(safe - k + 1))
