"""What the real recipes of `fastgrpo bench train` cost on one GPU, by `fastgrpo plan`: no GPU, nothing measured.

fastgrpo bench planned [--model flux]
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

from fastgrpo.planning.gpus import GPUS, SPARE
from fastgrpo.planning.plan import plan, total_seconds

from . import tables, train_page
from .tables import DATA, Row
from .train_cases import MODELS, case_config, shape_of

PLANNED = ("a100-80", "h100", "h200", "b200", "mi300x")
KEY = ("model", "gpu")
COLUMNS = (*KEY, "shape", "fits", "need_gib", "pflop", "iteration_s", "samples_per_s", "date", "commit")


def run(models: list[str] | None) -> None:
    """One plan a recipe, a minute or two each, whose FLOPs and bytes every GPU's seconds come from."""
    names = tables.chosen("bench planned", "model", models, MODELS)
    for model in names:
        rows = planned(model)
        tables.upsert(DATA / "planned.csv", rows, KEY, COLUMNS)
        print(f"{model}: {rows[0]['need_gib']} GiB, {rows[0]['pflop']} PFLOP an iteration", file=sys.stderr, flush=True)
    train_page.DOCUMENT.write_text(train_page.document(), encoding="utf-8")


def planned(model: str) -> list[Row]:
    """A row for each GPU, of the recipe on one of them."""
    config = case_config(model, "real", {}, Path("runs"))
    found = plan(config, GPUS["h100"], 1)
    samples = config.rollout.prompts_per_iteration * config.rollout.candidates
    flops = sum(phase.cost.flops for phase in found.run.phases)
    common = {
        "model": model,
        "shape": shape_of(config),
        "need_gib": f"{found.need / 2**30:.1f}",
        "pflop": f"{flops / 1e15:.3g}",
        "date": f"{datetime.date.today()}",
        "commit": tables.revision(),
    }
    rows = []
    for name in PLANNED:
        seconds = total_seconds(found, GPUS[name])
        fits = "yes" if found.need <= (1 - SPARE) * GPUS[name].memory else "no"
        figures = {"iteration_s": f"{seconds:.3g}", "samples_per_s": f"{samples / seconds:.3g}"}
        rows.append({**common, "gpu": name, "fits": fits, **figures})
    return rows
