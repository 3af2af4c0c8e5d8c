"""The static table: every kernel compiled ahead of time for every target, on a machine with or without a GPU.

fastgrpo bench static [--target sm_90] [--case shift_moments/key] [--dtype bfloat16] [--no-write]
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastgrpo.errors import UserError, nearest

from .devices import DEVICES, SHAPES
from .tables import Row, between, markdown

TABLE = Path(__file__).parent / "data" / "static.csv"
DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
MARKS = ("<!-- static table -->\n", "<!-- end of static table -->\n")
KEY = ("case", "pass", "kernel", "dtype", "target")
COLUMNS = (
    *KEY, "registers", "stack_bytes", "shared_bytes", "load_bits", "store_bits", "fp64", "local",
    "instructions_per_element", "bytes_per_element", "least_bytes_per_element", "launches",
    "hunyuan_us", "flux_us", "bound", "triton",
)  # fmt: skip
# More of these is worse; fewer bits a load or store is.
COSTS = (
    "registers", "stack_bytes", "shared_bytes", "fp64", "local", "instructions_per_element", "bytes_per_element",
    "launches",
)  # fmt: skip
WIDTHS = ("load_bits", "store_bits")


def run(targets: list[str] | None, cases: list[str] | None, dtypes: list[str] | None, *, write: bool) -> None:
    """Compile, print the tables, and unless told otherwise put the rows into bench/data/static.csv."""
    rows = compile_rows(targets, cases, dtypes)
    if write:
        whole = not (targets or cases or dtypes)
        write_table(rows if whole else [*read_table(), *rows])
        DOCUMENT.write_text(document(), encoding="utf-8")
    show(rows)


def compile_rows(
    targets: Iterable[str] | None = None, cases: Iterable[str] | None = None, dtypes: Iterable[str] | None = None
) -> list[Row]:
    """Rows of the chosen part of the matrix, compiled in a process of its own, where Triton is not interpreted."""
    from .static_cases import CASES, DTYPES

    known = {"target": (targets, DEVICES), "case": (cases, CASES), "dtype": (dtypes, DTYPES)}
    chosen = [_chosen(name, list(asked or ()), options) for name, (asked, options) in known.items()]
    code = "from fastgrpo.commands.bench import load; load('static').worker()"
    command = [sys.executable, "-c", code, json.dumps(chosen)]
    done = subprocess.run(command, env=compiler_environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compiler_environment() -> dict[str, str]:
    """This process's environment, less what makes Triton interpret instead of compile."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def worker() -> None:
    """Compile what sys.argv[1] asks for and print the rows as JSON."""
    from .static_cases import CASES

    targets, cases, dtypes = json.loads(sys.argv[1])
    rows = []
    for case in cases:
        for dtype in dtypes if CASES[case].by_dtype else ["float32"]:
            for target in targets:
                if target in CASES[case].targets:
                    rows += _rows(case, dtype, target)
    print(json.dumps(rows))


def _chosen(what: str, names: list[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"bench static: unknown {what} {name!r}; {hint}(one of: {', '.join(known)})")
    return names or known


def record(case: str, dtype: str, shape: tuple[int, ...]) -> dict[str, list]:
    """Launches of a case's forward and backward pass, recorded from the call on tensors without storage."""
    import torch
    from triton.runtime.jit import JITFunction

    from .static_asm import Launch
    from .static_cases import CASES, DTYPES, Inputs

    launches: list[Launch] = []

    def recorded(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "maxnreg") if name in named}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | named
        launches.append(Launch(kernel, math.prod(grid), arguments, options))

    original, JITFunction.run = JITFunction.run, recorded  # pyright: ignore[reportAttributeAccessIssue]
    try:
        outputs = CASES[case].call(Inputs(shape, DTYPES[dtype]))
        passes = {"forward": list(launches)}
        launches.clear()
        if CASES[case].backward:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward([o for o in outputs if o.requires_grad], [torch.empty_like(o) for o in outputs])
            passes["backward"] = list(launches)
    finally:
        JITFunction.run = original
    return passes


def _rows(case: str, dtype: str, target: str) -> list[Row]:
    import triton

    from .static_asm import examine
    from .static_cases import CASES, DTYPES, Inputs

    shape, device = SHAPES["hunyuan"], DEVICES[target]
    elements = math.prod(shape)
    rows = []
    for direction, launches in record(case, dtype, shape).items():
        least = Inputs((1, 1), DTYPES[dtype]).bytes_of(getattr(CASES[case], direction))
        for launch in launches:
            figures = examine(launch, device)
            row: Row = {"case": case, "pass": direction, "kernel": launch.kernel.__name__, "dtype": dtype}
            row |= {"target": target, "launches": len(launches), "triton": triton.__version__}
            row |= {column: figures[column] for column in COLUMNS if column in figures}
            if launch.touches_latents(elements):
                per_row = launch.programs // shape[0]
                row |= _per_element(figures, launch.programs * figures["scalar_bytes"] / elements, least)
                row |= _roofline(figures["tile"] * per_row * shape[0] / elements, row, device)
            else:
                row |= {"load_bits": "", "store_bits": ""}
            rows.append({column: row.get(column, "") for column in COLUMNS})
    return rows


def _per_element(figures: Row, scalar_bytes: float, least: int) -> Row:
    tile = figures["tile"]
    return {
        "instructions_per_element": round(figures["thread_instructions"] / tile, 2),
        "bytes_per_element": round(figures["tile_bytes"] / tile + scalar_bytes, 4),
        "least_bytes_per_element": least,
    }


def _roofline(padding: float, row: Row, device: Any) -> Row:
    """Microseconds by bandwidth and by issue rate, the larger of them, and which it is."""
    memory = row["bytes_per_element"] / device.gpu.bandwidth
    issue = row["instructions_per_element"] * padding / device.issue_rate
    times = {f"{name}_us": round(math.prod(shape) * max(memory, issue) * 1e6, 2) for name, shape in SHAPES.items()}
    return times | {"bound": "bandwidth" if memory >= issue else "instructions"}


def read_table() -> list[Row]:
    """Rows of bench/data/static.csv, numbers as numbers."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return [{column: _value(column, text) for column, text in row.items()} for row in csv.DictReader(file)]


def _value(column: str, text: str) -> float | int | str:
    if not text or column in (*KEY, "bound", "triton"):
        return text
    value = float(text)
    return int(value) if value.is_integer() else value


def write_table(rows: list[Row]) -> None:
    """One row a key, the last one given, in order of keys."""
    kept = {tuple(row[k] for k in KEY): row for row in rows}
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([kept[key][column] for column in COLUMNS] for key in sorted(kept))


def document(target: str = "sm_90", dtype: str = "bfloat16") -> str:
    """docs/kernels.md with the committed rows of one target and dtype between its marks."""
    shown = ("case", "pass", "kernel", "registers", "load_bits", "store_bits", "instructions_per_element")
    shown += ("bytes_per_element", "least_bytes_per_element", "launches", "hunyuan_us", "flux_us", "bound")
    names = [column.replace("_per_", "/").replace("_", " ") for column in shown]
    lines = []
    for row in read_table():
        # Where the model output's dtype does not matter there is float32 alone.
        if row["target"] == target and row["dtype"] in (dtype, "float32") and _is_shown(row, dtype):
            lines.append([str(row[column]).strip("_") for column in shown])
    return between(DOCUMENT, MARKS, markdown(names, lines))


def _is_shown(row: Row, dtype: str) -> bool:
    from .static_cases import CASES

    return row["case"] in CASES and (row["dtype"] == dtype or not CASES[row["case"]].by_dtype)


def worse(row: Row, committed: Row) -> list[str]:
    """What of a row got worse than the committed one."""
    found = [c for c in COSTS if row[c] != "" and row[c] > committed[c]]
    found += [c for c in WIDTHS if row[c] != "" and row[c] < committed[c]]
    return [f"{c}: {committed[c]} -> {row[c]}" for c in found]


def show(rows: list[Row]) -> None:
    """One table a target."""
    from rich.console import Console
    from rich.table import Table

    shown = [c for c in COLUMNS if c not in ("target", "triton", "case", "pass")]
    console = Console()
    for target in dict.fromkeys(row["target"] for row in rows):
        device = DEVICES[target]
        table = Table(title=f"{target} ({device.name})", title_justify="left")
        for column in ("case", "pass", *shown):
            table.add_column(column.replace("_per_", "/").replace("_", " "), overflow="fold")
        for row in (r for r in rows if r["target"] == target):
            table.add_row(*(str(row[c]) for c in ("case", "pass", *shown)))
        console.print(table)
        console.print(f"Published figures: {device.gpu.source}", highlight=False)
