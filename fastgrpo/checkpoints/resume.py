"""How a run is continued: the claim of a run directory, and what may change on resume."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgrpo.checkpoints.run_lock import RunLock
from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.config import Config, dump, validate
from fastgrpo.data.prompts import Prompt
from fastgrpo.distributed.world import World
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.observe.progress import warn
from fastgrpo.observe.run_log import read_metrics

# A checkpoint of another value of these does not continue the same run. The prompts count by what they say.
FIXED = (
    "run.seed",
    "model",
    "prompts.select",
    "rollout",
    "rewards",
    "scoring.staleness",
    "advantage",
    "objective",
    "update",
)

# Settings that name files: two spellings of one path are one value.
PATHS = ("path", "embedding_cache")


@dataclass(frozen=True)
class Claim:
    """A run directory that this run has.

    start: the iteration to continue from; None: start. identity: what its checkpoints say of the run. lock: main's.
    """

    start: int | None
    identity: Mapping[str, Any]
    lock: RunLock | None = None

    def release(self) -> None:
        """Lets other processes have it."""
        if self.lock is not None:
            self.lock.release()


def identity(config: Config, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of: its config, and a digest of its training prompts."""
    said = {"source": config.prompts.train, "count": len(prompts), "digest": digest_of(prompts)}
    return {"config": config.model_dump(mode="json"), "prompts": said}


def digest_of(prompts: Sequence[Prompt]) -> str:
    """Of what prompts say: texts, metadata, and the names and sizes of their pictures, wherever these lie."""
    digest = hashlib.sha256()
    for prompt in prompts:
        image = prompt.image
        if image is not None and os.path.isfile(image):
            image = f"{os.path.basename(image)} {os.path.getsize(image)}"
        said = [prompt.text, prompt.negative, image, dict(prompt.metadata)]
        digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def claim_directory(config: Config, prompts: Sequence[Prompt], store: CheckpointStore, world: World) -> Claim:
    """Takes a run directory for this run.

    Main reads every byte of the checkpoint; a damaged one gives way to the one before it, with a note. Only what this
    accepts changes the directory. Raises UserError, on the main process for all.
    """
    digests = world.gather_all(np.array([float(int(digest_of(prompts)[:12], 16))]))
    if (digests != digests[0]).any():
        other = int(np.flatnonzero((digests != digests[0])[:, 0])[0])
        raise ConfigError(f"prompts.train: rank {other} reads other prompts in {config.prompts.train} than rank 0")
    start, error, lock = -1, None, None
    if world.main:
        try:
            lock = RunLock(store.directory.parent)
            start = _claim(config, prompts, store)
        except UserError as problem:
            start, error = -2, problem
    # Main found out for all; the others end with it, silently.
    start = int(world.gather(np.array([float(start)]))[0, 0])
    if start == -2:
        if lock is not None:
            lock.release()
        raise error or ConfigError(f"run.dir: {store.directory.parent}: rank 0 could not claim it")
    return Claim(None if start == -1 else start, identity(config, prompts), lock)


def _claim(config: Config, prompts: Sequence[Prompt], store: CheckpointStore) -> int:
    """Main's part: the iteration of the newest good checkpoint, or -1."""
    directory, resume = store.directory.parent, config.run.resume
    start = None
    try:
        if resume is False:
            _refuse_used(directory, store)
        else:
            start = store.newest_good(warn)
        if start is not None:
            _check(store, start, config, prompts)
        elif resume is True:
            raise ConfigError(f"run.resume: {directory} holds no checkpoint to continue; run.resume=auto starts there")
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / "config.yaml.tmp"
        scratch.write_text(dump(config), encoding="utf-8")
        os.replace(scratch, directory / "config.yaml")
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {directory}: {error.strerror}") from None
    return -1 if start is None else start


def _refuse_used(directory: Path, store: CheckpointStore) -> None:
    """Raises ConfigError where a run has left a checkpoint, or metrics; a start that failed leaves neither."""
    if store.iterations():
        raise ConfigError(
            f"run.dir: {directory} already holds a run; continue it with run.resume=true, or name another"
        )
    if read_metrics(directory):
        raise ConfigError(
            f"run.dir: {directory} holds the metrics of a run that left no checkpoint; run.resume=auto starts anew "
            "there, without them, or name another"
        )


def _check(store: CheckpointStore, iteration: int, config: Config, prompts: Sequence[Prompt]) -> None:
    """Raises UserError where this run cannot go on from a (verified) checkpoint."""
    state = store.state(iteration, verified=True)
    if names := state["not_finite"]:
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
        last = store.last_finite()
        after = "start anew" if last is None else f"remove the checkpoints after {last:06d} to go on from there"
        raise UserError(f"{store.path(iteration)}: these weights are not finite: {some}; {after}, at a lower rate")
    if "config" not in state:
        return
    compare(state["config"], config)
    before = state["prompts"]
    if digest_of(prompts[: before["count"]]) != before["digest"]:
        raise ConfigError(
            f"prompts.train: {config.prompts.train} has other prompts than {before['source']} had when the run in "
            f"{config.run.dir} began; put them back (more may follow at the end), or start anew in another run.dir"
        )
    if more := len(prompts) - before["count"]:
        warn(f"prompts.train: {more} more prompts than at the checkpoint; they are drawn too from here on")


def compare(before: Mapping[str, Any], config: Config) -> None:
    """Raises ConfigError, naming the first setting that may not change and did. before: as a checkpoint has it."""
    try:
        then = validate(dict(before)).model_dump(mode="json")
    except ConfigError as error:
        raise ConfigError(
            f"run.resume: the checkpoint's own config is not one of this version of fastgrpo ({error}); use the "
            "version that wrote it, or start anew in another run.dir"
        ) from None
    now = config.model_dump(mode="json")
    for key in FIXED:
        old: Any = then
        new: Any = now
        for part in key.split("."):
            old, new = old.get(part), new.get(part)
        if difference := _difference(old, new, key.rpartition(".")[2]):
            raise ConfigError(
                f"run.resume: {key} differs from the run in {config.run.dir} ({difference}); put it back, or start "
                "anew in another run.dir"
            )


def _difference(old: Any, new: Any, name: str) -> str:
    """The first setting below `name` that differs, for a message; none: an empty text."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            if inner := _difference(old.get(key), new.get(key), key):
                return f"{key}: {inner}"
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inner = [_difference(a, b, name) for a, b in zip(old, new, strict=True)]
        return next((f"{place}: {text}" for place, text in enumerate(inner) if text), "")
    if old == new or (name in PATHS and isinstance(old, str) and isinstance(new, str) and _real(old) == _real(new)):
        return ""
    return f"{old!r} then, {new!r} now"


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))
