"""What an iteration of the tiny FLUX costs against its samples, steps, tokens and ranks: `fastgrpo bench curves`.

FLOPs and collective bytes are those of the plan, of one rank; seconds are measured here, of the places with one rank.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastgrpo.planning.dry_run import DryRun, dry_run

from . import tables
from .tables import DATA, Row
from .train import in_process
from .train_cases import Point, case_config

KEY = ("axis", "value")
COLUMNS = (*KEY, "gflop", "collective_mb", "seconds", "date", "commit")
PICTURE = tables.ROOT / "docs" / "images" / "cost-curves.png"
# Samples by prompts of 8; tokens by the side of an image, 4 pixels a token; ranks share 256 samples.
AXES: dict[str, dict[int, dict[str, Any]]] = {
    "samples": {8 * n: {"rollout.prompts_per_iteration": n} for n in (4, 8, 16, 32)},
    "steps": {n: {"rollout.steps": n} for n in (4, 8, 16, 32)},
    "tokens": {(side // 4) ** 2: {"model.height": side, "model.width": side} for side in (32, 48, 64, 96)},
    "ranks": {n: {"rollout.prompts_per_iteration": 32} for n in (1, 2, 4, 8)},
}
# Every rank has at least as many prompts as a forward pass has rows: none is padded.
FIXED = {"parallel.fsdp": "on", "rollout.forward_batch": 4}


def counted(axis: str, value: int) -> DryRun:
    """The plan of one place of an axis, of rank 0."""
    config = case_config("flux", "tiny", FIXED | AXES[axis][value], Path("runs"))
    return dry_run(config, value if axis == "ranks" else 1)


def run(iterations: int = 3) -> None:
    """Plans every place, measures those of one rank, and writes table and picture."""
    rows = []
    for axis, places in AXES.items():
        for value, settings in places.items():
            phases = counted(axis, value).phases
            row: Row = dict.fromkeys(COLUMNS, "") | {"axis": axis, "value": value, "commit": tables.revision()}
            row["gflop"] = f"{sum(p.cost.flops for p in phases) / 1e9:.6g}"
            row["collective_mb"] = f"{sum(sum(p.cost.bytes.values()) for p in phases) / 1e6:.6g}"
            if axis != "ranks":
                measured = in_process(tables.ROOT, "flux", "tiny", Point(axis, FIXED | settings), iterations, False)
                row |= {"seconds": measured["iteration_s"], "date": measured["date"]}
            print(", ".join(f"{k} {row[k]}" for k in COLUMNS[:5]), file=sys.stderr, flush=True)
            rows.append(row)
    table = DATA / f"curves-{tables.device_slug()}.csv"
    tables.upsert(table, rows, KEY, COLUMNS)
    plot(tables.read(table), PICTURE)


def plot(rows: list[Row], path: Path) -> None:
    """A panel an axis, everything relative to its first place, and the line of proportion."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fastgrpo.observe.charts import SETTINGS, SOFT

    with rc_context(SETTINGS):
        figure = Figure(figsize=(10, 2.6), layout="constrained")
        for axes, axis in zip(figure.subplots(1, len(AXES)), AXES, strict=True):
            mine = sorted((r for r in rows if r["axis"] == axis), key=lambda r: int(r["value"]))
            x = [int(row["value"]) for row in mine]
            for column, style in (("gflop", "o-"), ("seconds", "s--"), ("collective_mb", "^:")):
                # Not measured, or no collective at all.
                known = {int(r["value"]): float(r[column]) for r in mine if r[column] and float(r[column])}
                if known:
                    first = next(iter(known.values()))
                    ratios = [value / first for value in known.values()]
                    axes.plot(list(known), ratios, style, label=column.replace("_", " "))
            grows = [n / x[0] for n in x]
            axes.plot(x, [1 / g for g in grows] if axis == "ranks" else grows, color=SOFT, linewidth=0.7)
            axes.set(xscale="log", yscale="log", xlabel=axis, xticks=x, xticklabels=map(str, x))
            axes.set_ylabel("× the first place" if axis == "samples" else "")
            axes.minorticks_off()
            axes.legend(frameon=False, fontsize=7)
        figure.savefig(path, dpi=110)
