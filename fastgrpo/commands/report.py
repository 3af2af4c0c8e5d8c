"""A run, or several side by side, as one self-contained HTML page: `fastgrpo report RUN [RUN…]`."""

from __future__ import annotations

import base64
import html
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from fastgrpo import __version__
from fastgrpo.config import RewardSpec, flatten_rewards
from fastgrpo.config.yaml import dump_yaml, parse_yaml
from fastgrpo.errors import UserError
from fastgrpo.observe.charts import curve_chart, time_chart
from fastgrpo.observe.media import read_tiles
from fastgrpo.observe.run_log import read_metrics


@dataclass(frozen=True)
class RunData:
    """What a run directory holds. metrics: the lines of metrics.jsonl; evaluations: by iteration, 0 is the base."""

    name: str
    directory: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of a metric, where it is a number."""
        found = [(m["iteration"], m[key]) for m in self.metrics if m.get(key) is not None]
        return [x for x, _ in found], [y for _, y in found]

    def heldout(self, reward: str) -> tuple[list[int], list[float]]:
        """Iterations and held-out means of a reward."""
        found = [(e["iteration"], e["rewards"][reward]) for e in self.evaluations if reward in e["rewards"]]
        return [x for x, _ in found], [y for _, y in found]

    def ends(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The held-out evaluation before and after: the closing one where there was one, else the run's own."""
        if self.summary is not None:
            return self.summary["base"], self.summary["tuned"]
        return (self.evaluations[0], self.evaluations[-1]) if len(self.evaluations) > 1 else None

    def phases(self) -> dict[str, float]:
        """Seconds of the whole run by phase, the longest first, what is in no phase last."""
        totals: dict[str, float] = {}
        for line in self.metrics:
            for key, value in line.items():
                if key.startswith("time/") and key != "time/total":
                    totals[key[5:]] = totals.get(key[5:], 0.0) + value
        return dict(sorted(totals.items(), key=lambda item: (item[0] == "other", -item[1])))


def read_run(directory: Path) -> RunData:
    """The data of a run directory. Raises UserError where it is none, or has not trained yet."""
    try:
        config = parse_yaml((directory / "config.yaml").read_text(encoding="utf-8"), str(directory / "config.yaml"))
    except FileNotFoundError:
        raise UserError(f"{directory}: not a run directory (it has no config.yaml)") from None
    metrics = read_metrics(directory)
    if not metrics:
        raise UserError(f"{directory}: nothing to report: the run has not finished an iteration yet")
    evaluations = [_read_json(path) for path in sorted((directory / "eval").glob("*.json"))]
    summary = directory / "summary.json"
    return RunData(
        directory.resolve().name,
        directory,
        config,
        metrics,
        sorted(evaluations, key=lambda e: e["iteration"]),
        _read_json(summary) if summary.exists() else None,
    )


def write_report(runs: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of one or several run directories, to `report.html` in the first unless `out` says where.

    Raises UserError for a directory without a run, or without an iteration.
    """
    directories = [Path(runs)] if isinstance(runs, str | Path) else [Path(run) for run in runs]
    data = [read_run(directory) for directory in directories]
    path = Path(out) if out is not None else directories[0] / "report.html"
    title = " · ".join(run.name for run in data)
    sections = [
        _headline(data),
        _learning(data),
        _hacking(data),
        _stability(data),
        _time(data),
        _categories(data),
        _images(data),
        _config(data),
    ]
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    page = template.substitute(title=html.escape(title), body="\n".join(filter(None, sections)), version=__version__)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)
    return path


def _headline(runs: list[RunData]) -> str:
    """One row of figures for each run."""
    rows = []
    for run in runs:
        last, seconds = run.metrics[-1], sum(line.get("time/total") or 0.0 for line in run.metrics)
        _, rewards = run.series("reward/mean")
        tenth = max(1, len(rewards) // 10)
        figures = [*_gains(run)]
        figures.append(("reward in training", _arrow(_mean(rewards[:tenth]), _mean(rewards[-tenth:]), "{:.3f}"), ""))
        figures.append(("iterations", f"{last['iteration'] + 1}", f"{_duration(seconds)} in all"))
        _, speed = run.series("samples_per_second")
        figures.append(("samples a second", f"{_mean(speed):.0f}", ""))
        figures.append(("peak memory", f"{(last.get('memory/peak_bytes') or 0) / 2**30:.1f} GiB", ""))
        cards = "".join(
            f'<div class="figure"><div class="label">{html.escape(label)}</div><div class="value">{value}</div>'
            f'<div class="note">{note}</div></div>'
            for label, value, note in figures
        )
        name = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
        rows.append(f'{name}<div class="figures">{cards}</div>')
    return _section("", "".join(rows))


def _gains(run: RunData) -> Iterable[tuple[str, str, str]]:
    """Held-out rewards and strict pass rates, before and after."""
    ends = run.ends()
    if ends is None:
        return
    before, after = ends
    intervals = (run.summary or {}).get("difference", {})
    for name in after["rewards"]:
        strict = name.endswith(".strict")
        if "." in name and not strict:
            continue
        scale, style = (100, "{:.1f}%") if strict else (1, "{:.3f}")
        label = "held-out strict pass" if strict else f"held-out {name}"
        note = f"{after['images']} images"
        if name in intervals:
            low, high = (scale * bound for bound in intervals[name]["interval95"])
            digits = 1 if strict else 3
            note = f"gain {low:+.{digits}f} … {high:+.{digits}f}{' points' if strict else ''} (95%), {note}"
        yield label, _arrow(scale * before["rewards"][name], scale * after["rewards"][name], style), note


def _learning(runs: list[RunData]) -> str:
    """Reward curves, the runs overlaid."""
    rewards = list(dict.fromkeys(name for run in runs for e in run.evaluations for name in e["rewards"]))
    charts = [curve_chart("Reward in training", {r.name: r.series("reward/mean") for r in runs}, smooth=True)]
    for name in rewards:
        strict = name.endswith(".strict")
        if strict or "." not in name:
            curves = {r.name: r.heldout(name) for r in runs}
            charts.append(curve_chart(f"Held-out {name}", curves, markers=True, percent=strict))
    return _section("Learning", _figures(charts))


def _hacking(runs: list[RunData]) -> str:
    """Held-out rewards (weight 0) beside the trained one, and what the guard saw and did; always shown."""
    charts, lines = [], []
    for run in runs:
        held = [name for name in _watched(run) if run.series(f"reward/{name}")[0]]
        charts += [
            curve_chart(f"{run.name}: held-out reward {name}", {run.name: run.series(f"reward/{name}")}, smooth=True)
            for name in held
        ]
        lines.append(f"{html.escape(run.name)}: {_verdict(run, held)}")
    return _section("Held-out rewards", _figures(charts), "<br>".join(lines))


def _watched(run: RunData) -> list[str]:
    """The rewards that are scored and not trained."""
    return [spec.key for spec in flatten_rewards([RewardSpec(**r) for r in run.config["rewards"]]) if not spec.weight]


def _verdict(run: RunData, held: list[str]) -> str:
    """What the guard against reward hacking saw, in a line."""
    action = (run.config.get("guard") or {}).get("action", "off")
    setting = f"The guard (guard.action) is {action}"
    if not held:
        return f"{setting}; no held-out reward was scored (one of weight 0), so nothing would show reward hacking."
    iterations, falling = run.series("guard/falling")
    fell = [i for i, count in zip(iterations, falling, strict=True) if count]
    names = html.escape(", ".join(held))
    if not fell:
        return f"{setting}; {names} did not fall while the trained reward rose."
    done = {"off": "nothing was done about it", "stop": "it stopped the run", "raise_kl": "it raised the KL's weight"}
    kl = run.series("guard/kl_weight")[1]
    weight = f" to {kl[-1]:g}" if action == "raise_kl" and kl else ""
    return (
        f"{setting}; of {names}, one fell while the trained reward rose in {len(fell)} iterations, first in {fell[0]}; "
        f"{done[action]}{weight}."
    )


# Title, metric, and whether it is a share, of what tells a healthy run.
STABILITY = (
    ("Largest |ratio − 1|", "ratio/max_deviation", False),
    ("Clipped pairs", "clip_fraction", True),
    ("Gaussian KL", "kl", False),
    ("Gradient norm", "grad_norm", False),
    ("Groups without spread", "groups/zero_spread", True),
    ("Mean |advantage|", "advantage/abs_mean", False),
)


def _stability(runs: list[RunData]) -> str:
    """How far the policy moved, and what it learned from; a metric that was always 0 is said so, not drawn."""
    clip = {run.config["objective"]["clip_high"] for run in runs}
    line = ("clip range", clip.pop()) if len(clip) == 1 else None
    charts, zero = [], []
    for title, key, percent in STABILITY:
        curves = {run.name: run.series(key) for run in runs}
        values = [value for _, y in curves.values() for value in y]
        if values and not any(values):
            zero.append(title)
            continue
        ratio = key == "ratio/max_deviation"
        charts.append(curve_chart(title, curves, smooth=True, percent=percent, log=ratio, line=line if ratio else None))
    first = ", ".join(f"{max(run.series('ratio/first_max_deviation')[1], default=0.0):.2g}" for run in runs)
    note = f"Largest |ratio − 1| in the first update after a rollout: {first}."
    if zero:
        note += f" Exactly 0 in every iteration: {', '.join(zero)}."
    return _section("Stability", _figures(charts), note)


def _time(runs: list[RunData]) -> str:
    """Where the seconds went."""
    tables = []
    for run in runs:
        phases = run.phases()
        total = sum(phases.values()) or 1.0
        rows = [
            (name, _duration(value), f"{value / total:.1%}", _gib(run.series(f"memory/{name}_bytes")[1]))
            for name, value in phases.items()
        ]
        tables.append(_table((run.name, "time", "share", "most memory"), rows))
    chart = time_chart({run.name: run.phases() for run in runs})
    note = "<br>".join(html.escape(f"{run.name}: {said}") for run in runs if (said := _machines(run)))
    return _section(
        "Time by phase", f'<div class="wide">{chart}</div><div class="tables">{"".join(tables)}</div>', note
    )


def _gib(values: Sequence[float]) -> str:
    return f"{max(values) / 2**30:.2f} GiB" if values else ""


def _machines(run: RunData) -> str:
    """What the ranks and their GPUs told: who came last, and what held a clock back."""
    said = []
    _, last = run.series("ranks/last")
    if last:
        rank = max(set(last), key=last.count)
        behind = _mean(run.series("ranks/behind_seconds")[1])
        said.append(
            f"rank {rank:.0f} came last in {last.count(rank)} of {len(last)} iterations, and the last one was "
            f"{_duration(behind)} behind the median rank"
        )
    if power := run.series("gpu/power_w")[1]:
        said.append(f"{_mean(power):.0f} W, {_mean(run.series('gpu/joules_per_sample')[1]):.0f} J a sample")
    if clock := run.series("gpu/clock_mhz")[1]:
        limited = _mean(run.series("gpu/limited")[1])
        said.append(f"slowest clock {min(clock):.0f} MHz, {limited:.0%} of readings held back by power or heat")
    return "; ".join(said)


def _categories(runs: list[RunData]) -> str:
    """Held-out means by prompt category, before and after."""
    tables = []
    for run in runs:
        before, after = run.ends() or ({}, {})
        if not after.get("by_category"):
            continue
        name = next((n for n in after["rewards"] if n.endswith(".strict")), next(iter(after["rewards"])))
        rows = []
        for category in after["by_category"]:
            old, new = (e["by_category"].get(category, {}).get(name, math.nan) for e in (before, after))
            rows.append((category.replace("_", " "), f"{old:.1%}", f"{new:.1%}", f"{100 * (new - old):+.1f}"))
        tables.append(_table((f"{run.name}: {name}", "before", "after", "points"), rows))
    return _section("Held-out prompts by category", f'<div class="tables">{"".join(tables)}</div>') if tables else ""


def _images(runs: list[RunData]) -> str:
    """The same prompts from the same initial noise: before, then after each run."""
    shown = [run for run in runs if run.evaluations]
    if not shown:
        return ""
    base = shown[0].evaluations[0]
    columns = [("before", shown[0], base)]
    for run in shown:
        last = run.evaluations[-1]
        if last["iteration"] != base["iteration"] and last["prompts"] == base["prompts"]:
            name = f"{run.name}, " if len(shown) > 1 else ""
            columns.append((f"{name}iteration {last['iteration']}", run, last))
    tiles = [grid_tiles(run.directory / "eval" / e.get("video", e["grid"]), len(e["prompts"])) for _, run, e in columns]
    cards = []
    for prompt, *row in zip(base["prompts"], *tiles, strict=True):
        caption = html.escape(prompt)
        images = "".join(f'<img alt="{caption}" src="{tile}">' for tile in row)
        cards.append(f'<figure><div class="pair">{images}</div><figcaption>{caption}</figcaption></figure>')
    order = " → ".join(html.escape(label) for label, _, _ in columns)
    note = f"Prompts never trained on, from the same initial noise, sampled deterministically: {order}."
    return _section("Images", f'<div class="pairs">{"".join(cards)}</div>', note)


def grid_tiles(path: Path, count: int, largest: int = 256) -> list[str]:
    """The `count` pictures of a sheet of `fastgrpo.evaluate`, still or moving, as data URLs."""
    kind = path.suffix.removeprefix(".")
    return [f"data:image/{kind};base64," + base64.b64encode(tile).decode() for tile in read_tiles(path, count, largest)]


def _config(runs: list[RunData]) -> str:
    """What differs between the runs, and each run's whole config and versions."""
    flat = [dict(_flatten(run.config)) for run in runs]
    parts = []
    if len(runs) > 1:
        keys = sorted({key for settings in flat for key in settings})
        differing = [key for key in keys if len({str(settings.get(key)) for settings in flat}) > 1]
        rows = [(key, *(str(settings.get(key)) for settings in flat)) for key in differing]
        parts.append(_table(("differs", *(run.name for run in runs)), rows))
    for run in runs:
        name, text = html.escape(run.name), dump_yaml(run.config)
        opened = " open" if len(runs) == 1 else ""
        parts.append(f"<details{opened}><summary>{name}</summary><pre>{html.escape(text)}</pre></details>")
        if run.summary is not None:
            versions = ", ".join(f"{package} {version}" for package, version in run.summary["versions"].items())
            parts.append(f'<p class="note">{name}: seed {run.summary["seed"]}; {html.escape(versions)}</p>')
    return _section("Config", "".join(parts))


def _flatten(node: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if not isinstance(node, dict):
        yield prefix, node
        return
    for key, value in node.items():
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def _section(title: str, body: str, note: str = "") -> str:
    head = f"<h2>{title}</h2>" if title else ""
    return f"<section>{head}{f'<p class=note>{note}</p>' if note else ''}{body}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _figures(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(chart for chart in charts if chart)}</div>'


def _arrow(before: float, after: float, style: str) -> str:
    return f'{style.format(before)} <span class="arrow">→</span> {style.format(after)}'


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _duration(seconds: float) -> str:
    """`42 s`, `5 min 40 s`, `12 h 03 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
