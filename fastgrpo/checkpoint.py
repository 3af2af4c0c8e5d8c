"""Checkpoints: DCP for tensors, JSON for the rest; complete or absent, verified before anything is read.

`run.dir/checkpoints/<iteration>/` holds DCP's files, `state.json` and `manifest.json` (SHA-256 of every file). It is
written beside and renamed, so a crash at any byte leaves the last good one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from fastgrpo.errors import UserError
from fastgrpo.optimizer import OptimizerState

FORMAT = 1


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of a run directory. `main` writes the JSON and removes what is old; every rank calls."""

    directory: Path
    main: bool = True

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

    def save(self, iteration: int, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of `iteration`. Raises UserError (disk full, no permission); the earlier ones stay."""
        final, scratch = self.path(iteration), self.directory / f"tmp-{iteration:06d}"
        try:
            if self.main:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
            _barrier()
            dcp.save(dict(tensors), checkpoint_id=str(scratch), no_dist=not dist.is_initialized())
            _barrier()
            if self.main:
                (scratch / "state.json").write_text(json.dumps({"format": FORMAT, **state}, indent=1))
                sums = {p.name: _checksum(p) for p in sorted(scratch.iterdir())}
                (scratch / "manifest.json").write_text(json.dumps(sums, indent=1))
                for file in scratch.iterdir():
                    _sync(file)
                if final.exists():
                    shutil.rmtree(final)
                scratch.rename(final)
                _sync(self.directory)
            _barrier()
        except (OSError, dcp.api.CheckpointException) as error:
            if self.main:
                shutil.rmtree(scratch, ignore_errors=True)
            last = self.iterations()
            kept = f"the checkpoint of iteration {last[-1]} is intact" if last else "there is none yet"
            raise UserError(f"{final}: cannot write the checkpoint: {_reason(error)}; {kept}") from None
        return final

    def state(self, iteration: int) -> dict[str, Any]:
        """The verified `state.json` of a checkpoint. Raises UserError, naming the file that is damaged."""
        path = self.path(iteration)
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            for name, expected in manifest.items():
                if _checksum(path / name) != expected:
                    raise UserError(
                        f"{path / name}: damaged (its checksum differs); remove {path} to use an earlier one"
                    )
            state = json.loads((path / "state.json").read_text())
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(
                f"{path}: not a readable checkpoint: {_reason(error)}; remove it to use an earlier one"
            ) from None
        if "state.json" not in manifest or state.get("format") != FORMAT:
            raise UserError(
                f"{path}: written by another version of fastgrpo (format {state.get('format')}, not {FORMAT})"
            )
        return state

    def load(self, iteration: int, tensors: Mapping[str, Any]) -> None:
        """Fills `tensors` in place. Raises UserError where the checkpoint holds others than these."""
        path = self.path(iteration)
        try:
            dcp.load(dict(tensors), checkpoint_id=str(path), no_dist=not dist.is_initialized())
        except (OSError, ValueError, KeyError, RuntimeError, dcp.api.CheckpointException) as error:
            raise UserError(f"{path}: does not fit this model and config: {_reason(error)}") from None

    def prune(self, keep: int, best: int | None) -> None:
        """Removes all but the latest `keep` and the best one."""
        if self.main:
            for iteration in self.iterations()[:-keep]:
                if iteration != best:
                    shutil.rmtree(self.path(iteration))


def training_tensors(optimizer: OptimizerState) -> dict[str, Any]:
    """Every tensor that training changes, by parameter name: weights, AdamW's state, EMA. DTensors stay sharded."""
    named = list(zip(optimizer.names, optimizer.parameters, strict=True))
    tensors: dict[str, Any] = {"model": dict(named)}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        tensors[key] = {name: optimizer.adamw.state[parameter][key] for name, parameter in named}
    if optimizer.ema is not None:
        tensors["ema"] = dict(zip(optimizer.names, optimizer.ema, strict=True))
    return tensors


def load_weights(transformer: nn.Module, store: CheckpointStore, iteration: int, ema: bool) -> None:
    """Fills the trainable parameters of an unsharded transformer from a checkpoint; its EMA where `ema`."""
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
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


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _reason(error: BaseException) -> str:
    """The cause, in one line; DCP wraps the exceptions of its ranks."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
