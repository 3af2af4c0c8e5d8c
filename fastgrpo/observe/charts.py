"""The report's charts, as inline SVG with the page's own font."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, SOFT, LINE = "#1c2430", "#586170", "#e4e7ec"
RUN_COLORS = ("#3056d3", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#a61e4d")

# The page's names of these colours, which are others in the dark.
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line"} | {color: f"run{i}" for i, color in enumerate(RUN_COLORS)}

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    # The same data is the same bytes.
    "svg.hashsalt": "fastgrpo",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Series = tuple[Sequence[int], Sequence[float]]

# Iterations, values, and the ends of their intervals, NaN where there is none.
Points = tuple[Sequence[int], Sequence[float], Sequence[float], Sequence[float]]

# Points of a curve at most: more than a card has pixels.
MOST_POINTS = 400


def curve_chart(
    title: str,
    series: Mapping[str, Series | Points],
    *,
    smooth: bool = False,
    markers: bool = False,
    percent: bool = False,
    log: bool = False,
    line: tuple[str, float] | None = None,
    extra: Mapping[str, Points] | None = None,
    note: str = "",
) -> str:
    """A card with one curve a run; empty where no run has a value.

    Args:
        title: Above the chart.
        series: Of each run, the curve; with the ends of intervals, they are drawn as bars.
        smooth: Draws the moving mean over a twentieth of the run, the values behind it.
        markers: Draws a dot at each value.
        percent: Values are shares.
        log: The axis is logarithmic where all values are positive.
        line: A labelled horizontal line.
        extra: Points of their own, as diamonds: of another measurement of the same thing.
        note: Plain text under the title: what the chart says.
    """
    present = {
        name: tuple(np.asarray(part, dtype=float) for part in given) for name, given in series.items() if len(given[0])
    }
    if not present:
        return ""
    with rc_context(SETTINGS):
        figure = Figure(figsize=(4.2, 2.35), layout="constrained")
        axes = figure.subplots()
        colors = dict(zip(present, _colors(len(present)), strict=True))
        for name, (x, y, *interval) in present.items():
            color, window = colors[name], max(1, len(y) // 20) if smooth else 1
            kept = slice(None, None, -(-len(y) // MOST_POINTS))
            if window > 1:
                axes.plot(x[kept], y[kept], color=color, alpha=0.22, linewidth=0.8)
            shown = moving_mean(y, window)[kept]
            axes.plot(x[kept], shown, color=color, linewidth=1.7, label=name, marker="o" if markers else None)
            _bars(axes, x, y, interval, color)
        for name, (x, y, *interval) in (extra or {}).items():
            axes.plot(x, y, color=colors[name], linestyle="none", marker="D", markersize=7, markerfacecolor="none")
            _bars(axes, x, y, interval, colors[name])
        if line is not None:
            axes.axhline(line[1], color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)), label=line[0])
        if log and all((y > 0).all() for _, y, *_ in present.values()):
            axes.set_yscale("log")
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_xlabel("iteration")
        if len(present) > 1 or line is not None:
            axes.legend(frameon=False, fontsize=10, labelcolor=SOFT, loc="best")
        said = "; ".join(
            f"{name}: from {_number(y[0], percent)} to {_number(y[-1], percent)}"
            for name, (_, y, *_) in present.items()
        )
        label = html.escape(f"{title}, by iteration. {said}", quote=True)
        under = f'<p class="note">{html.escape(note)}</p>' if note else ""
        return f'<div class="chart"><h3>{html.escape(title)}</h3>{under}{svg(figure, label)}</div>'


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"


def _bars(axes: Any, x: Any, y: Any, interval: Sequence[Any], color: str) -> None:
    """Vertical bars between the ends of intervals, where there are any."""
    if interval and np.isfinite(np.asarray(interval, dtype=float)).any():
        low, high = (np.asarray(end, dtype=float) for end in interval)
        around = np.clip(np.stack([np.asarray(y) - low, high - np.asarray(y)]), 0, None)
        axes.errorbar(x, y, yerr=around, fmt="none", ecolor=color, elinewidth=1.2, capsize=3, alpha=0.7)


def scaling_chart(path: Path, sizes: Sequence[int], curves: Mapping[str, Any], selector: str) -> None:
    """A PNG: of each reward the mean among the best of N, by model, with 95% intervals; N doubles along the axis."""
    names = list(next(iter(curves.values())))
    with rc_context(SETTINGS):
        figure = Figure(figsize=(4.4 * len(names), 3.0), dpi=150, layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for color, (model, rewards) in zip(_colors(len(curves)), curves.items(), strict=True):
                low, high = np.transpose(rewards[name]["interval95"])
                axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
                axes.plot(
                    sizes, rewards[name]["mean"], color=color, linewidth=1.7, marker="o", markersize=3, label=model
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(n) for n in sizes])
            axes.grid(axis="y", color=LINE, linewidth=0.7)
            axes.tick_params(length=0)
            axes.set_title(f"{name} (it chooses)" if name == selector else name, fontsize=9)
            axes.set_xlabel("N: the best of")
            axes.legend(frameon=False, fontsize=8, labelcolor=SOFT)
        figure.savefig(path)


def strong_scaling_chart(path: Path, curves: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> None:
    """A PNG of the same work on more and more GPUs: seconds beside the ideal, efficiency, and bytes by link.

    curves: of each mesh the columns world, seconds, efficiency, node and network (bytes of a GPU and of an adapter).
    """
    with rc_context(SETTINGS):
        figure = Figure(figsize=(12.6, 3.4), dpi=150, layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        figure.suptitle(title, fontsize=10, color=SOFT)
        for color, (name, of) in zip(_colors(len(curves)), curves.items(), strict=True):
            world = np.asarray(of["world"], dtype=float)
            style = {"color": color, "linewidth": 1.7, "marker": "o", "markersize": 3}
            left.plot(world, of["seconds"], label=name, **style)
            middle.plot(world, of["efficiency"], label=name, **style)
            right.plot(world, np.asarray(of["node"]) / 1e9, label=f"{name}, node", **style)
            right.plot(world, np.asarray(of["network"]) / 1e9, label=f"{name}, network", linestyle="--", **style)
        first = next(iter(curves.values()))
        world = np.asarray(first["world"], dtype=float)
        ideal = first["seconds"][0] * world[0] / world
        left.plot(world, ideal, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)), label="ideal")
        left.set_yscale("log")
        middle.set_ylim(0, 1.05)
        middle.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axes, label in ((left, "seconds an iteration"), (middle, "efficiency"), (right, "GB a GPU or adapter")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(world, [f"{n:.0f}" for n in world])
            axes.minorticks_off()
            axes.grid(axis="y", color=LINE, linewidth=0.7)
            axes.set_xlabel("GPUs")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=8, labelcolor=SOFT)
        figure.savefig(path)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each place, of fewer at the start."""
    if window == 1:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def svg(figure: Figure, label: str) -> str:
    """A figure as an inline SVG element, its colours those of the page. label: what it shows, escaped."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Several figures stand in one page: what nothing refers to needs no name.
    used = set(re.findall(r'"#([^"]+)"|url\(#([^)]+)\)', text))
    kept = {name for pair in used for name in pair if name}
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in kept else "", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _colors(count: int) -> list[str]:
    return [RUN_COLORS[i % len(RUN_COLORS)] for i in range(count)]
