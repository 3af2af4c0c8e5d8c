"""`fastgrpo eval`: a base model, or a run beside its base, on any prompts by any rewards.

Both draw the same prompts from the same initial noise, so differences are paired. Intervals are bootstrap 95% intervals
over prompts; diversity is the mean pairwise cosine distance of the images in a CLIP, so that a collapse shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastgrpo.evaluation.heldout import Evaluation, known_mean
from fastgrpo.evaluation.statistics import by_unit, distance_by_unit, jackknife, mean_interval, overall_distance

# A column of a reward that is 1 for a picture that is right and 0 for one that is not.
STRICT = ".strict"

# Of each column, a sequence of values by picture: a list of JSON's, or an array.
Columns = Mapping[str, Any]


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


def most_changed(base: Columns, others: Sequence[Columns], places: Iterable[int]) -> list[int]:
    """The order in which pictures are shown: what changed most first.

    A picture that became right or wrong (a column `….strict`) comes before one whose reward moved, and a gain before an
    equal loss.

    Args:
        base: Of the base model, the values of each column by picture; None or NaN where there is none.
        others: The same of each model that is shown beside it.
        places: Of the pictures.

    Returns:
        The places in that order.
    """

    def change(place: int) -> tuple[float, float]:
        most = [0.0, 0.0]
        for other in others:
            for name in shown_columns(base):
                old, new = (of[name][place] if place < len(of.get(name, ())) else None for of in (base, other))
                if old is not None and new is not None and not math.isnan(new - old):
                    soft = not name.endswith(STRICT)
                    most[soft] = max(most[soft], abs(new - old) + (1e-6 if new > old else 0.0))
        return most[0], most[1]

    return sorted(places, key=change, reverse=True)


def fair_sample(base: Columns, tuned: Columns, count: int) -> list[int]:
    """Places of `count` pictures to show: as large a share of gains, of losses and of the rest as among all of them.

    A gain is a picture that became right, or where nothing says what is right, one whose first reward rose. Of each
    kind the first pictures are taken, so that nothing is chosen by its looks; most changed first.
    """
    names = shown_columns(base)
    name = next((name for name in names if name.endswith(STRICT)), names[0])
    change = np.nan_to_num(np.asarray(tuned[name], dtype=float) - np.asarray(base[name], dtype=float))
    count = min(count, len(change))
    kinds = [np.flatnonzero(np.sign(change) == sign) for sign in (1, -1, 0)]
    shares = [len(kind) * count / len(change) for kind in kinds]
    counts = [int(share) for share in shares]
    for i in sorted(range(3), key=lambda i: counts[i] - shares[i])[: count - sum(counts)]:
        counts[i] += 1
    places = [int(place) for kind, most in zip(kinds, counts, strict=True) for place in kind[:most]]
    return most_changed(base, [tuned], places)


def shown_columns(columns: Iterable[str]) -> list[str]:
    """The rewards themselves and their strict pass rates, without other components, `<reward>.<component>`.

    A reward's own name may have dots: `my_rewards.py:Contrast`.
    """
    names = list(columns)
    owners = tuple(f"{name}." for name in names)
    return [name for name in names if name.endswith(STRICT) or not name.startswith(owners)]


def marks(values: Columns, place: int) -> list[tuple[str, float]]:
    """What is said under a picture: the columns that tell right from wrong, else its rewards; only what is known."""
    shown = shown_columns(values)
    names = [name for name in shown if name.endswith(STRICT)] or shown
    found = [(name, values[name][place]) for name in names if place < len(values[name])]
    return [(name, float(value)) for name, value in found if value is not None and not math.isnan(value)]


def _mean_of(units: np.ndarray) -> dict[str, Any]:
    return {"mean": known_mean(units), "interval95": mean_interval(units)}


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
        result["difference"] = {"overall": jackknife(features["base"], features["tuned"], unit)}
        if several:
            result["difference"]["within_prompt"] = _mean_of(within["tuned"] - within["base"])
    return result


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
