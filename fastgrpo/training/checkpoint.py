"""Checkpoints: DCP for tensors, JSON for the rest; complete or absent, verified before anything is read.

`run.dir/checkpoints/<iteration>/` holds DCP's files, `state.json` and `manifest.json` (SHA-256 of every file). It is
written beside and renamed, so a crash at any byte leaves the last good one; a thread writes it while training goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from fastgrpo.errors import UserError
from fastgrpo.training.optimizer import OptimizerState

FORMAT = 1


class DamagedError(UserError):
    """A checkpoint that is not what was written: another one may serve."""


class CheckpointStore:
    """The checkpoints of a run directory. `main` writes the JSON and removes what is old; every rank calls."""

    def __init__(self, directory: Path, main: bool = True) -> None:
        self.directory, self.main = directory, main
        self._stager = BlockingAsyncStager(cache_staged_state_dict=True)
        self._group: Any = None
        self._writing: Thread | None = None
        self._error: Exception | None = None

    @staticmethod
    def of_run(run_dir: str | Path, main: bool = True) -> CheckpointStore:
        return CheckpointStore(Path(run_dir) / "checkpoints", main)

    def iterations(self) -> list[int]:
        """The iterations with a complete checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit() and p.is_dir())

    def path(self, iteration: int) -> Path:
        return self.directory / f"{iteration:06d}"

    def save(
        self, iteration: int, tensors: Mapping[str, Any], state: Mapping[str, Any], keep: int, best: int | None = None,
        background: bool = False, extra: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Writes the checkpoint of `iteration`, then removes all but the latest `keep` and the best one.

        extra: more tensors, of any shape, that nothing changes any more: they are not copied.

        In the background it returns once the tensors are copied to host memory; what then fails is raised by the next
        `save` or `wait`. Raises UserError (disk full, no permission); the earlier checkpoints stay.
        """
        self.wait()
        if self.path(iteration).exists():
            return
        if self._group is None and dist.is_initialized() and dist.get_world_size() > 1:
            # Of its own, so that the writing thread's collectives never meet those of training.
            self._group = dist.new_group(backend="gloo")
        if background:
            if not torch.cuda.is_available() and self._stager.state_dict_cache is None:
                # Without a GPU there is no pinned memory, which the stager would ask for.
                self._stager.state_dict_cache = BlockingAsyncStager().stage(dict(tensors))
            tensors = self._stager.stage(dict(tensors))
        tensors = {**tensors, **(extra or {})}
        work = partial(self._write, iteration, tensors, dict(state), keep, best)
        if background:
            self._writing = Thread(target=work, name=f"checkpoint {iteration}", daemon=True)
            self._writing.start()
        else:
            work()
            self.wait()

    def wait(self) -> None:
        """Waits until what `save` began is on disk. Raises its UserError."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, iteration: int, tensors: Any, state: dict[str, Any], keep: int, best: int | None) -> None:
        final, scratch = self.path(iteration), self.directory / f"tmp-{iteration:06d}"
        try:
            self._together(partial(_fresh, scratch))
            dcp.save(tensors, checkpoint_id=str(scratch), process_group=self._group, no_dist=not dist.is_initialized())
            self._together(partial(self._finish, scratch, final, state, keep, best))
        except (OSError, dcp.api.CheckpointException) as error:
            if self.main:
                shutil.rmtree(scratch, ignore_errors=True)
            last = self.iterations()
            kept = f"the checkpoint of iteration {last[-1]} is intact" if last else "there is none yet"
            self._error = UserError(f"{final}: cannot write the checkpoint: {_reason(error)}; {kept}")
        except Exception as error:
            self._error = error

    def _together(self, work: Callable[[], None]) -> None:
        """Main does it; where it fails, every rank raises its OSError."""
        code = 0
        if self.main:
            try:
                work()
            except OSError as error:
                code = error.errno or errno.EIO
        if self._group is not None:
            status = torch.tensor([code])
            dist.broadcast(status, 0, group=self._group)
            code = int(status)
        if code:
            raise OSError(code, os.strerror(code))

    def _finish(self, scratch: Path, final: Path, state: dict[str, Any], keep: int, best: int | None) -> None:
        """Main: completes the files, renames them into place, and removes what is old."""
        (scratch / "state.json").write_text(json.dumps({"format": FORMAT, **state}, indent=1))
        sums = {p.name: _checksum(p) for p in sorted(scratch.iterdir())}
        (scratch / "manifest.json").write_text(_canonical(sums))
        for file in scratch.iterdir():
            _sync(file)
        _sync(scratch)
        scratch.rename(final)
        _sync(self.directory)
        for iteration in self.iterations()[:-keep]:
            if iteration != best:
                # Renamed first: a crash while files are removed leaves nothing that looks complete.
                old = self.path(iteration).rename(self.directory / f"tmp-old-{iteration:06d}")
                shutil.rmtree(old)

    def verify(self, iteration: int) -> None:
        """Reads every byte of a checkpoint. Raises DamagedError, naming the file that is not what was written."""
        path = self.path(iteration)
        try:
            text = (path / "manifest.json").read_text()
            manifest = json.loads(text)
            if text != _canonical(manifest) or "state.json" not in manifest:
                raise ValueError("its manifest.json is not as it was written")
            for name, expected in manifest.items():
                if _checksum(path / name) != expected:
                    raise DamagedError(
                        f"{path / name}: damaged (its checksum differs); remove {path} to use an earlier one"
                    )
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DamagedError(
                f"{path}: not a readable checkpoint: {_reason(error)}; remove it to use an earlier one"
            ) from None

    def newest_good(self, note: Callable[[str], None]) -> int | None:
        """The latest checkpoint whose every byte is as it was written, or None where there is none; main's part.

        Damaged later ones are set aside, as damaged-<iteration>. Raises DamagedError where no checkpoint is good.
        """
        damaged: list[tuple[int, DamagedError]] = []
        for leftover in self.directory.glob("tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for iteration in reversed(self.iterations()):
            try:
                self.verify(iteration)
            except DamagedError as error:
                damaged.append((iteration, error))
                continue
            for later, error in damaged:
                aside = self.directory / f"damaged-{later:06d}"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(later).rename(aside)
                note(f"{str(error).rpartition(';')[0]}; it is now {aside}, and iteration {iteration} is used")
            return iteration
        if damaged:
            raise damaged[0][1]
        return None

    def state(self, iteration: int, verified: bool = False) -> dict[str, Any]:
        """The `state.json` of a checkpoint that is verified here, unless it is. Raises UserError."""
        if not verified:
            self.verify(iteration)
        state = json.loads((self.path(iteration) / "state.json").read_text())
        if state.get("format") != FORMAT:
            raise UserError(
                f"{self.path(iteration)}: written by another version of fastgrpo "
                f"(format {state.get('format')}, not {FORMAT})"
            )
        return state

    def load(self, iteration: int, tensors: Mapping[str, Any]) -> None:
        """Fills `tensors` in place. Raises UserError where the checkpoint holds others than these."""
        path = self.path(iteration)
        try:
            dcp.load(dict(tensors), checkpoint_id=str(path), no_dist=not dist.is_initialized())
        except (OSError, ValueError, KeyError, RuntimeError, dcp.api.CheckpointException) as error:
            raise UserError(f"{path}: does not fit this model and config: {_reason(error)}") from None


def training_tensors(optimizer: OptimizerState) -> dict[str, Any]:
    """Every tensor that training changes, by parameter name: weights, AdamW's state, EMA. DTensors stay sharded."""
    named = list(zip(optimizer.names, optimizer.parameters, strict=True))
    tensors: dict[str, Any] = {"model": dict(named)}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        tensors[key] = {name: optimizer.adamw.state[parameter][key] for name, parameter in optimizer.full.items()}
    if optimizer.eight_bit is not None:
        tensors["adamw_8bit"] = optimizer.eight_bit.state()
    if optimizer.ema is not None:
        tensors["ema"] = dict(zip(optimizer.names, optimizer.ema, strict=True))
    return tensors


def load_weights(policy: nn.Module, store: CheckpointStore, iteration: int, ema: bool) -> None:
    """Fills the trainable parameters of an unsharded policy from a checkpoint; its EMA where `ema`."""
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        store.load(iteration, {"ema" if ema else "model": named})


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _canonical(manifest: Any) -> str:
    """Of a manifest: the one text of it, so that any byte of the file counts."""
    return json.dumps(manifest, indent=1)


def _reason(error: BaseException) -> str:
    """The cause, in one line; DCP wraps the exceptions of its ranks."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
