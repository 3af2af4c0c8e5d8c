"""`fastgrpo train CONFIG --check`: what is wrong with a run, all of it at once, and its arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastgrpo.algorithms.arithmetic import arithmetic
from fastgrpo.config import load_config
from fastgrpo.distributed.world import environment_number
from fastgrpo.errors import UserError
from fastgrpo.observe.progress import warn
from fastgrpo.planning.plan import HARDWARE
from fastgrpo.preflight.checks import preflight
from fastgrpo.training.setup import distinct, load_callback


def check(path: Path, overrides: Sequence[str] = (), ranks: int | None = None) -> bool:
    """Prints every problem, what is missing and every remark on stderr and, where there is no problem, the run's
    arithmetic. What the run itself would download is missing, and no problem.

    Args:
        path: The config.
        overrides: Settings of it, `key.sub=value`.
        ranks: How many there will be; None: what a recipe's name says (…-8xh100.yaml), else WORLD_SIZE, else 1.

    Returns:
        Whether a run could start.
    """
    try:
        config = load_config(path, overrides)
    except UserError as error:
        return _refused(getattr(error, "problems", None) or (str(error),))
    name = HARDWARE.fullmatch(path.stem)
    count = ranks or (int(name[1]) if name else environment_number("WORLD_SIZE", 1))
    found = preflight(config, count)
    callbacks = [found.attempt(partial(load_callback, name)) for name in config.callbacks]
    found.attempt(partial(distinct, [callback for callback in callbacks if callback is not None]))
    for remark in found.remarks:
        warn(_line(remark))
    for line in found.missing:
        print(f"missing: {_line(line).replace('assets CONFIG', f'assets {path}')}", file=sys.stderr)
    if found.problems:
        return _refused(found.problems)
    for source, prompts in found.prompts.items():
        pictures = len({p.image for p in prompts} - {None})
        print(f"{source}: {len(prompts)} prompts" + (f", {pictures} pictures" if pictures else ""))
    print(arithmetic(config, count))
    return True


def _refused(problems: Sequence[str]) -> bool:
    for problem in problems:
        print(f"error: {_line(problem)}", file=sys.stderr)
    return False


def _line(text: str) -> str:
    return " ".join(text.split())
