"""docs/benchmarks.md and the plots, generated from bench/data: the tables of whole iterations, measured and planned."""

from __future__ import annotations

from pathlib import Path

from fastgrpo.errors import require
from fastgrpo.planning.gpus import COMPUTE_EFFICIENCY, GPUS

from . import tables
from .tables import DATA, ROOT, Row, markdown, read
from .train_cases import MODELS, SIZES, SWEEPS

DOCUMENT = ROOT / "docs" / "benchmarks.md"
MARKS = ("<!-- iterations -->\n", "<!-- end of iterations -->\n")
CLOCKS = {"process": "in seconds of the process, whatever ran beside it", "wall": "in seconds of the wall clock"}
SHARES = ("conditioning", "rollout", "decode", "reward", "sync", "update")


def write(table: Path) -> None:
    """Draws a device's plot beside its table, and generates the page anew."""
    plot(read(table), table.with_suffix(".png"))
    DOCUMENT.write_text(document(), encoding="utf-8")


def document() -> str:
    """The page with every table of bench/data between its marks."""
    parts = [_device(table) for table in sorted(DATA.glob("train-*.csv"))]
    planned = read(DATA / "planned.csv")
    return tables.between(DOCUMENT, MARKS, "\n".join([*parts, *([_planned(planned)] if planned else [])]))


def latest(rows: list[Row]) -> list[Row]:
    """Of each model, size and point the row measured last, models and sweeps in their order."""
    found = {(row["model"], row["size"], row["point"]): row for row in sorted(rows, key=lambda r: r["date"])}
    models, sweeps = list(MODELS), ["base", *SWEEPS]

    def place(row: Row) -> tuple:
        sweep = row["point"].partition("=")[0]
        rank = sweeps.index(sweep) if sweep in sweeps else len(sweeps)
        return SIZES.index(row["size"]), models.index(row["model"]), rank, len(row["point"]), row["point"]

    return sorted(found.values(), key=place)


def _device(table: Path) -> str:
    rows = latest(read(table))
    device = table.stem.removeprefix("train-")
    peaks = sorted({(float(row["peak_tflops"]), row["peak_by"]) for row in rows})
    (low, by), high = peaks[0], peaks[-1][0]
    words = "by a matrix product of the same process" if by == "matmul" else "as its vendor has it"
    between = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    dates = sorted({row["date"][:10] for row in rows})
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    lines = [f"### {device}\n", f"![Shares of an iteration, and sweeps](../bench/data/{table.stem}.png)\n"]
    clocks = " and ".join(sorted({CLOCKS[row["clock"]] for row in rows}))
    lines.append(f"Measured {' and '.join(dates)} at {commits}, {clocks}.\nPeak: {between} TFLOP/s {words}.\n")
    head = ("model", "size", "samples/s", "iteration", *SHARES, "TFLOP", "MFU", "peak", "J/sample", "× sequential")
    bases = [row for row in rows if row["point"] == "base"]
    lines.append(markdown(head, [_base(row) for row in bases]))
    swept = [row for row in rows if row["point"] != "base"]
    if swept:
        known = {(row["model"], row["size"]): row for row in bases}
        body = [_swept(row, known.get((row["model"], row["size"]))) for row in swept]
        lines.append(markdown(("model", "size", "point", "samples/s", "of base", "update", "MFU", "peak"), body))
    recipes = dict.fromkeys(f"{row['model']}, {row['size']}: {row['shape']}" for row in bases)
    lines.append("".join(f"- {recipe}\n" for recipe in recipes))
    return "\n".join(lines)


def _base(row: Row) -> list[str]:
    seconds = [f"{float(row[f'{phase}_s']):.3g}" for phase in SHARES]
    times = f"{float(row['speedup']):.1f}" if row["speedup"] else "–"
    return [
        row["model"], row["size"], f"{float(row['samples_per_s']):.3g}", f"{float(row['iteration_s']):.3g} s", *seconds,
        f"{float(row['tflop']):.3g}", f"{float(row['mfu']):.0%}", f"{float(row['peak_mib']) / 1024:.2f} GiB",
        row["joules_per_sample"] or "–", times,
    ]  # fmt: skip


def _swept(row: Row, base: Row | None) -> list[str]:
    rate = float(row["samples_per_s"])
    share = f"{rate / float(base['samples_per_s']):.2f}" if base else "–"
    return [
        row["model"], row["size"], row["point"], f"{rate:.3g}", share, f"{float(row['update_s']):.3g} s",
        f"{float(row['mfu']):.0%}", f"{float(row['peak_mib']) / 1024:.2f} GiB",
    ]  # fmt: skip


def _planned(rows: list[Row]) -> str:
    gpus = [name for name in GPUS if any(row["gpu"] == name for row in rows)]
    dates = sorted({row["date"] for row in rows})
    found = {(row["model"], row["gpu"]): row for row in rows}
    body = []
    for model in (m for m in MODELS if (m, gpus[0]) in found):
        first = found[model, gpus[0]]
        of = {gpu: found[model, gpu] for gpu in gpus}
        cells = [row["samples_per_s"] if row["fits"] == "yes" else "does not fit" for row in of.values()]
        body.append([model, first["need_gib"], first["pflop"], *cells])
    words = (
        f"samples a second at {COMPUTE_EFFICIENCY:.0%} of the vendor's peak, as plans assume, without rewards and text"
    )
    text = (
        "### Planned, not measured\n\nThe real recipes on one GPU that nobody measured them on, by `fastgrpo bench "
        f"planned`\n({' and '.join(dates)}): {words}\nencoders.\n\n"
    )
    return (
        text
        + markdown(("model, one GPU", "GiB", "PFLOP an iteration", *gpus), body)
        + "".join(
            f"- {model}: {found[model, gpus[0]]['shape']}\n" for model in MODELS if (model, gpus[0]) in found
        ).join(("\n", ""))
    )


def plot(rows: list[Row], path: Path) -> None:
    """Bars of the seconds by phase of every model's base, and of each sweep the rates beside the base's."""
    require("matplotlib", "bench train")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = latest(rows)
    sweeps = [s for s in SWEEPS if any(row["point"].startswith(f"{s}=") for row in rows)]
    columns = min(3, 1 + len(sweeps))
    lines = -(-(1 + len(sweeps)) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.4 * lines), squeeze=False)
    first, *others = axes.flat
    bases = {f"{row['model']} {row['size']}": row for row in rows if row["point"] == "base"}
    left = [0.0] * len(bases)
    for phase in SHARES:
        shares = [float(row[f"{phase}_s"]) / float(row["iteration_s"]) for row in bases.values()]
        first.barh(list(bases), shares, left=left, label=phase)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    first.invert_yaxis()
    first.set_title("share of an iteration", fontsize=9)
    first.legend(fontsize=6, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    for axis, sweep in zip(others, sweeps, strict=False):
        swept = [row for row in rows if row["point"].startswith(f"{sweep}=")]
        for name, base in bases.items():
            mine = [row for row in swept if f"{row['model']} {row['size']}" == name]
            if mine:
                labels = ["base", *(row["point"].partition("=")[2] for row in mine)]
                axis.plot(labels, [float(row["samples_per_s"]) for row in (base, *mine)], "o", label=name)
        axis.set_ylim(bottom=0)
        axis.set_title(f"{sweep}: samples/s", fontsize=9)
        axis.legend(fontsize=6)
    for axis in others[len(sweeps) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
