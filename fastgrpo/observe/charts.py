"""The report's charts, as inline SVG with the page's own font."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

INK, SOFT, LINE = "#1c2430", "#66707f", "#e4e7ec"
RUN_COLORS = ("#3056d3", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#a61e4d")
PHASE_COLORS = ("#3056d3", "#74a0f1", "#f08c00", "#2b8a3e", "#9c36b5", "#0b7285", "#e64980", "#94d82d", "#5c3d2e")
OTHER_COLOR = "#adb5bd"

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    # The same data is the same bytes.
    "svg.hashsalt": "fastgrpo",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Series = tuple[Sequence[int], Sequence[float]]


def curve_chart(
    title: str,
    series: Mapping[str, Series],
    *,
    smooth: bool = False,
    markers: bool = False,
    percent: bool = False,
    log: bool = False,
    line: tuple[str, float] | None = None,
) -> str:
    """A card with one curve a run; empty where no run has a value.

    smooth: the moving mean over a twentieth of the run, the values behind it. log: where all values are positive.
    line: a labelled horizontal line.
    """
    present = {name: (np.asarray(x), np.asarray(y, dtype=float)) for name, (x, y) in series.items() if len(x)}
    if not present:
        return ""
    with rc_context(SETTINGS):
        figure = Figure(figsize=(4.2, 2.35), layout="constrained")
        axes = figure.subplots()
        for color, (name, (x, y)) in zip(_colors(len(present)), present.items(), strict=True):
            window = max(1, len(y) // 20) if smooth else 1
            if window > 1:
                axes.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
            axes.plot(
                x, moving_mean(y, window), color=color, linewidth=1.7, label=name, marker="o" if markers else None
            )
        if line is not None:
            axes.axhline(line[1], color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)), label=line[0])
        if log and all((y > 0).all() for _, y in present.values()):
            axes.set_yscale("log")
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.set_xlabel("iteration")
        if len(present) > 1 or line is not None:
            axes.legend(frameon=False, fontsize=8, labelcolor=SOFT, loc="best")
        return f'<div class="chart"><h3>{html.escape(title)}</h3>{svg(figure)}</div>'


def time_chart(phases: Mapping[str, Mapping[str, float]]) -> str:
    """One bar a run, divided by phase: seconds of the whole run."""
    names = list(dict.fromkeys(name for run in phases.values() for name in run))
    colors = {name: PHASE_COLORS[i % len(PHASE_COLORS)] for i, name in enumerate(names)} | {"other": OTHER_COLOR}
    with rc_context(SETTINGS):
        figure = Figure(figsize=(9.6, 0.85 + 0.42 * len(phases)), layout="constrained")
        axes = figure.subplots()
        left = np.zeros(len(phases))
        for name in names:
            widths = np.array([run.get(name, 0.0) for run in phases.values()])
            axes.barh(list(phases), widths, left=left, color=colors[name], height=0.62, label=name)
            left += widths
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlim(0, left.max() * 1.001)
        figure.legend(loc="outside upper left", ncols=10, frameon=False, fontsize=8, handlelength=0.9, labelcolor=SOFT)
        return svg(figure)


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


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each place, of fewer at the start."""
    if window == 1:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def svg(figure: Figure) -> str:
    """A figure as an inline SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _colors(count: int) -> list[str]:
    return [RUN_COLORS[i % len(RUN_COLORS)] for i in range(count)]
