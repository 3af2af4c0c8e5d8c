"""How a run stops to be continued, and continues: signals, the claim of a run directory, what may change on resume."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import yaml

from fastgrpo.config import Config, dump
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.training.checkpoint import CheckpointStore

# A checkpoint of another value of these does not continue the same run.
FIXED = (
    "run.seed",
    "model",
    "prompts.train",
    "prompts.select",
    "rollout",
    "rewards",
    "scoring.staleness",
    "advantage",
    "objective",
    "update",
)

# Why a run stops; where ranks differ, the largest counts.
GOING_ON, INTERRUPTED, PREEMPTED = 0, 1, 2

# How a run ended, for its log.
ENDS = {GOING_ON: "finished", INTERRUPTED: "interrupted", PREEMPTED: "preempted"}
STOPS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}


@contextmanager
def listening(stop: Callable[[int], None]) -> Iterator[None]:
    """Calls `stop` with the reason at a first SIGINT, SIGTERM or SIGUSR1; a second one is taken as it is."""

    def ask(number: int, _frame: Any) -> None:
        signal.signal(number, before[signal.Signals(number)])
        stop(STOPS[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        for number in before:
            signal.signal(number, ask)
    except ValueError:
        # Not the main thread (a notebook, a server): signals stay as they are.
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def claim_directory(config: Config, store: CheckpointStore, world: World) -> int | None:
    """The iteration to continue from, or None to start; writes the resolved config. Raises UserError.

    Main reads every byte of the checkpoint; a damaged one gives way to the one before it, with a note.
    """
    directory, resume = store.directory.parent, config.run.resume
    used = (directory / "config.yaml").exists()
    # Before main writes it: a rank that looked later would take this run for another.
    world.barrier()
    if resume is False and used:
        raise ConfigError(
            f"run.dir: {directory} already holds a run; continue it with run.resume=true, or name another"
        )
    if used and resume is not False and store.iterations():
        compare(yaml.safe_load((directory / "config.yaml").read_text()), config)
    start, error = -1, None
    if world.main:
        try:
            start = _claim(config, store)
        except UserError as problem:
            start, error = -2, problem
    # Main found out for all; the others end with it, silently.
    start = int(world.gather(np.array([float(start)]))[0, 0])
    if start == -2:
        raise error or ConfigError(f"run.dir: {directory}: rank 0 could not claim it")
    return None if start == -1 else start


def _claim(config: Config, store: CheckpointStore) -> int:
    """Main's part: the iteration of the newest good checkpoint, or -1."""
    directory, resume = store.directory.parent, config.run.resume
    start = None
    try:
        if resume is not False:
            start = store.newest_good(lambda text: print(f"warning: {text}", file=sys.stderr, flush=True))
        if start is not None:
            store.state(start, verified=True)
        if resume is True and start is None:
            raise ConfigError(f"run.resume: {directory} holds no checkpoint to continue; drop run.resume to start anew")
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / "config.yaml.tmp"
        scratch.write_text(dump(config), encoding="utf-8")
        os.replace(scratch, directory / "config.yaml")
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {directory}: {error.strerror}") from None
    return -1 if start is None else start


def compare(before: dict[str, Any], config: Config) -> None:
    """Raises ConfigError, naming the first setting that may not change and did."""
    now = config.model_dump(mode="json")
    for key in FIXED:
        old: Any = before
        new: Any = now
        for part in key.split("."):
            old, new = old.get(part), new.get(part)
        if old != new:
            raise ConfigError(
                f"run.resume: {key} differs from the run in {config.run.dir} ({_difference(old, new)}); "
                "put it back, or start anew in another run.dir"
            )


def _difference(old: Any, new: Any) -> str:
    """The first setting of a section that differs, for a message."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return f"{key}: {_difference(old.get(key), new.get(key))}"
    return f"{old!r} then, {new!r} now"
