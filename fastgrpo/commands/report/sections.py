"""The sections of a report between its opening and its pictures: curves, time, categories, config."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from fastgrpo.commands.report.markup import arrow, duration, mean, section, table
from fastgrpo.commands.report.opening import opening, provenance, training_ends
from fastgrpo.commands.report.run_data import RunData, values_of
from fastgrpo.config.yaml import dump_yaml
from fastgrpo.evaluation.compare import STRICT, shown_columns
from fastgrpo.evaluation.statistics import mean_interval
from fastgrpo.observe.charts import Points, curve_chart


def summary(runs: list[RunData]) -> str:
    """Of each run what it came to in sentences, its figures, and where they come from."""
    parts = []
    for run in runs:
        figures = [
            *_gain_figures(run),
            ("reward in training", arrow(*training_ends(run), "{:.3f}"), "of rollouts, first and last tenth"),
            ("iterations", f"{run.metrics[-1]['iteration'] + 1}", f"{duration(run.seconds)} in all"),
            ("samples a second", f"{mean(run.series('samples_per_second')[1]):.0f}", "mean of all iterations"),
            ("peak memory", f"{(run.metrics[-1].get('memory/peak_bytes') or 0) / 2**30:.1f} GiB", "of one process"),
        ]
        cards = "".join(
            f'<div class="figure"><div class="label">{html.escape(label)}</div><div class="value">{value}</div>'
            f'<div class="note">{note}</div></div>'
            for label, value, note in figures
        )
        name = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'{name}<p class="opening">{opening(run)}</p><div class="figures">{cards}</div>{provenance(run)}')
    return section("Summary", "".join(parts))


def _gain_figures(run: RunData) -> Iterable[tuple[str, str, str]]:
    for gain in run.gains():
        scale, style = (100, "{:.1f}%") if gain.strict else (1, "{:.3f}")
        note = f"{gain.images} held-out {run.noun}"
        if gain.interval is not None:
            low, high = (scale * bound for bound in gain.interval)
            digits, unit = (1, " points") if gain.strict else (3, "")
            note = f"gain {low:+.{digits}f} … {high:+.{digits}f}{unit} (95%), {note}"
        yield gain.name, arrow(scale * gain.before, scale * gain.after, style), note


def learning(runs: list[RunData]) -> str:
    """Reward curves, the runs overlaid, with intervals."""
    names = dict.fromkeys(name for run in runs for e in run.evaluations for name in shown_columns(e["rewards"]))
    rollouts = {run.name: run.series("reward/mean") for run in runs}
    charts = [
        curve_chart(
            "Reward in training", rollouts, smooth=True,
            note="The mean over an iteration's rollouts, of the prompts trained on; the line is a moving mean.",
        )
    ]  # fmt: skip
    for name in names:
        strict = name.endswith(STRICT)
        during = {run.name: _points(run.evaluations, name) for run in runs}
        closing = {run.name: points for run in runs if len((points := _points(run.closing, name))[0]) > 1}
        what = "The share of samples that is right in every respect." if strict else "The mean."
        charts.append(
            curve_chart(f"{name} on held-out prompts", during, markers=True, percent=strict, extra=closing, note=what)
        )
    note = "Bars are 95% intervals (bootstrap over samples)."
    counts = {e["images"] for run in runs for e in run.evaluations}
    if counts and any(run.closing for run in runs):
        more = ", ".join(sorted({str(run.closing[-1]["images"]) for run in runs if run.closing}))
        noun = runs[0].noun
        note += (
            f" Dots: the evaluations during training, of {', '.join(map(str, sorted(counts)))} {noun}. Diamonds: the "
            f"closing evaluation, of {more}, which the summary's numbers are from."
        )
    return section("Learning", _figures(charts), note if names else "")


def _points(evaluations: Sequence[dict[str, Any]], name: str) -> Points:
    """Iterations, means and 95% intervals of a column in evaluations that have it; no interval where they did not keep
    values."""
    x, y, low, high = [], [], [], []
    for evaluation in evaluations:
        if not math.isnan(evaluation["rewards"].get(name, math.nan)):
            values = values_of(evaluation, name)
            ends = mean_interval(values, draws=2000) if len(values) else (math.nan, math.nan)
            x.append(evaluation["iteration"])
            y.append(evaluation["rewards"][name])
            low.append(ends[0])
            high.append(ends[1])
    return x, y, low, high


def watched(runs: list[RunData]) -> str:
    """Rewards of weight 0 beside the trained one, and what the guard saw and did; always shown."""
    charts, lines = [], []
    for run in runs:
        names = [name for name in run.watched if run.series(f"reward/{name}")[0]]
        charts += [
            curve_chart(f"{run.name}: watched reward {name}", {run.name: run.series(f"reward/{name}")}, smooth=True)
            for name in names
        ]
        lines.append(f"{html.escape(run.name)}: {_guard(run, names)}")
    note = (
        "A watched reward (weight 0) is scored and never trained. Reward hacking, which is a model that finds what a "
        "reward forgives, shows where the trained reward rises and a watched one falls."
    )
    return section("Watched rewards", _figures(charts), "<br>".join([note, *lines]))


def _guard(run: RunData, names: list[str]) -> str:
    """What the guard against reward hacking saw, in a line."""
    action = (run.config.get("guard") or {}).get("action", "off")
    setting = f"The guard (guard.action) is {action}"
    if not names:
        return f"{setting}; no watched reward was scored, so nothing would show reward hacking."
    iterations, falling = run.series("guard/falling")
    fell = [i for i, count in zip(iterations, falling, strict=True) if count]
    shown = html.escape(", ".join(names))
    if not fell:
        return f"{setting}; {shown} did not fall while the trained reward rose."
    done = {"off": "nothing was done about it", "stop": "it stopped the run", "raise_kl": "it raised the KL's weight"}
    kl = run.series("guard/kl_weight")[1]
    weight = f" to {kl[-1]:g}" if action == "raise_kl" and kl else ""
    return (
        f"{setting}; of {shown}, one fell while the trained reward rose in {len(fell)} iterations, first in {fell[0]}; "
        f"{done[action]}{weight}."
    )


# Title, metric, whether it is a share, and what it says, of what tells a healthy run.
STABILITY = (
    ("Largest |ratio − 1|", "ratio/max_deviation", False,
     "The ratio is how likely a step is under the policy now, against the policy that drew it. Past the clip range a "
     "step is no longer pushed further."),
    ("Clipped pairs", "clip_fraction", True,
     "The share of (sample, step) pairs outside the clip range: near 0 the updates are small, near 1 most are lost."),
    ("Gaussian KL", "kl", False, "How far the policy has moved from its reference, in a step's distributions."),
    ("Gradient norm", "grad_norm", False, "Before it is clipped. A jump announces a run that comes apart."),
    ("Groups without spread", "groups/zero_spread", True,
     "The share of prompts whose samples all scored the same: nothing is learned from them."),
    ("Mean |advantage|", "advantage/abs_mean", False,
     "The advantage is a sample's reward against the mean of its group: the strength of the signal."),
)  # fmt: skip


def stability(runs: list[RunData]) -> str:
    """How far the policy moved, and what it learned from; a metric that was always 0 is said so, not drawn."""
    clip = {(run.config.get("objective") or {}).get("clip_high") for run in runs}
    only = clip.pop() if len(clip) == 1 else None
    line = None if only is None else ("clip range", only)
    charts, zero = [], []
    for title, key, percent, meaning in STABILITY:
        curves = {run.name: run.series(key) for run in runs}
        values = [value for _, y in curves.values() for value in y]
        if values and not any(values):
            zero.append(title)
            continue
        ratio = key == "ratio/max_deviation"
        charts.append(
            curve_chart(
                title, curves, smooth=True, percent=percent, log=ratio, line=line if ratio else None, note=meaning
            )
        )
    first = ", ".join(f"{max(run.series('ratio/first_max_deviation')[1], default=0.0):.2g}" for run in runs)
    note = f"Largest |ratio − 1| in the first update after a rollout, which is exactly 0 on policy: {first}."
    if zero:
        note += f" Exactly 0 in every iteration: {', '.join(zero)}."
    return section("Stability", _figures(charts), note)


# Classes of the page, one a phase.
PHASES = ("phase0", "phase1", "phase2", "phase3", "phase4", "phase5", "phase6")


def time(runs: list[RunData]) -> str:
    """Where the seconds went."""
    tables = []
    for run in runs:
        phases = run.phases()
        total = sum(phases.values()) or 1.0
        rows = [
            (name, duration(value), f"{value / total:.1%}", _gib(run.series(f"memory/{name}_bytes")[1]))
            for name, value in phases.items()
        ]
        shares = [(i % len(PHASES), name, value / total) for i, (name, value) in enumerate(phases.items())]
        bar = "".join(f'<span class="{PHASES[i]}" style="width:{share:.2%}"></span>' for i, _, share in shares)
        legend = "".join(f'<span><i class="{PHASES[i]}"></i>{html.escape(name)}</span>' for i, name, _ in shares)
        tables.append(
            f'<div><div aria-hidden="true"><div class="bar">{bar}</div><div class="legend">{legend}</div></div>'
            f"{table((run.name, 'time', 'share', 'most memory'), rows)}</div>"
        )
    note = "<br>".join(html.escape(f"{run.name}: {said}") for run in runs if (said := _machines(run)))
    return section("Time by phase", f'<div class="tables">{"".join(tables)}</div>', note)


def _gib(values: Sequence[float]) -> str:
    return f"{max(values) / 2**30:.2f} GiB" if values else ""


def _machines(run: RunData) -> str:
    """What the ranks and their GPUs told: who came last, and what held a clock back."""
    said = []
    _, last = run.series("ranks/last")
    if last:
        rank = max(set(last), key=last.count)
        behind = mean(run.series("ranks/behind_seconds")[1])
        said.append(
            f"rank {rank:.0f} came last in {last.count(rank)} of {len(last)} iterations, and the last one was "
            f"{duration(behind)} behind the median rank"
        )
    if power := run.series("gpu/power_w")[1]:
        said.append(f"{mean(power):.0f} W, {mean(run.series('gpu/joules_per_sample')[1]):.0f} J a sample")
    if clock := run.series("gpu/clock_mhz")[1]:
        limited = mean(run.series("gpu/limited")[1])
        said.append(f"slowest clock {min(clock):.0f} MHz, {limited:.0%} of readings held back by power or heat")
    return "; ".join(said)


def categories(runs: list[RunData]) -> str:
    """Held-out means by prompt category, before and after."""
    tables = []
    for run in runs:
        before, after = run.ends() or ({}, {})
        if not after.get("by_category"):
            continue
        name = next((n for n in after["rewards"] if n.endswith(STRICT)), next(iter(after["rewards"])))
        rows = []
        for category in after["by_category"]:
            old, new = (e["by_category"].get(category, {}).get(name, math.nan) for e in (before, after))
            rows.append((category.replace("_", " "), f"{old:.1%}", f"{new:.1%}", f"{100 * (new - old):+.1f}"))
        tables.append(table((f"{run.name}: {name}", "before", "after", "points"), rows))
    if not tables:
        return ""
    note = "The numbers of the summary, by kind of prompt."
    return section("Held-out prompts by category", f'<div class="tables">{"".join(tables)}</div>', note)


def config(runs: list[RunData]) -> str:
    """What differs between the runs, and each run's whole config."""
    flat = [dict(_flatten(run.config)) for run in runs]
    parts = []
    if len(runs) > 1:
        keys = sorted({key for settings in flat for key in settings})
        differing = [key for key in keys if len({str(settings.get(key)) for settings in flat}) > 1]
        rows = [(key, *(str(settings.get(key)) for settings in flat)) for key in differing]
        parts.append(table(("differs", *(run.name for run in runs)), rows))
    for run in runs:
        name, text = html.escape(run.name), html.escape(dump_yaml(run.config))
        parts.append(f'<details><summary>Every setting of {name}</summary><pre tabindex="0">{text}</pre></details>')
    return section("Config", "".join(parts))


def _flatten(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield prefix, node
        return
    for key, value in node.items():
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _figures(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(chart for chart in charts if chart)}</div>'
