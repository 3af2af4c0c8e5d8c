"""Checkpoints: safetensors and JSON; complete or absent, verified before anything is read.

`run.dir/checkpoints/<iteration>/` holds a shard file a rank with their index (fastgrpo/checkpoints/shard_files.py),
`state.json` and `manifest.json` (SHA-256 of every file). It is written beside and renamed, so a crash at any byte
leaves the last good one; a thread writes it while training goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.checkpoints.shard_files import Part, flatten, part_of, read_shards, write_index, write_shard
from fastgrpo.distributed.shards import first_replica, local
from fastgrpo.errors import UserError
from fastgrpo.observe.progress import warn

# 1 was a directory of torch.distributed.checkpoint, whose index is a pickle.
FORMAT = 2


class DamagedError(UserError):
    """A checkpoint that is not what was written: another one may serve."""


class CheckpointStore:
    """The checkpoints of a run directory. `main` writes the JSON and removes what is old; every rank calls."""

    def __init__(self, directory: Path, main: bool = True) -> None:
        self.directory, self.main = directory, main
        # In host memory, the copies that the writing thread reads.
        self._copies: dict[str, Tensor] = {}
        self._group: Any = None
        self._writing: Thread | None = None
        self._error: Exception | None = None
        # What could not be removed, so that it is said once.
        self._stuck: set[Path] = set()

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
        """Writes the checkpoint of `iteration`, then removes all but the latest `keep`, the best one, and the latest
        whose weights are finite.

        tensors, extra: nested mappings of tensors; those that are not sharded are written by the first process that
        has their name. extra: tensors that nothing changes any more; they are not copied.

        In the background it returns once the tensors are copied to host memory; what then fails is raised by the next
        `save` or `wait`. Raises UserError (disk full, no permission); the earlier checkpoints stay.
        """
        self.wait()
        if self.path(iteration).exists():
            return
        several = dist.is_initialized() and dist.get_world_size() > 1
        if self._group is None and several:
            # Of its own, so that the writing thread's collectives never meet those of training.
            self._group = dist.new_group(backend="gloo")
        parts = [part_of(*named) for named in flatten(tensors) if _ours(named[1])]
        if background:
            parts = self._copied(parts)
        parts += [part_of(*named) for named in flatten(extra or {}) if _ours(named[1])]
        plain = {name for name, t in flatten({**tensors, **(extra or {})}) if not isinstance(t, DTensor)}
        work = partial(self._write, iteration, parts, plain, dict(state), keep, best)
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

    def _copied(self, parts: list[Part]) -> list[Part]:
        """Copies in host memory (page-locked, of a GPU's tensors), which the next checkpoint uses again."""
        copies = []
        for part in parts:
            copy = self._copies.get(part.name)
            if copy is None or copy.shape != part.data.shape:
                copy = torch.empty_like(part.data, device="cpu", pin_memory=part.data.is_cuda)
                self._copies[part.name] = copy
            copies.append(Part(part.name, part.shape, part.offset, copy.copy_(part.data, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _write(
        self, iteration: int, parts: list[Part], plain: set[str], state: dict[str, Any], keep: int, best: int | None
    ) -> None:
        final, scratch = self.path(iteration), self.directory / f"tmp-{iteration:06d}"
        rank = dist.get_rank(self._group) if self._group is not None else 0
        try:
            others = self._named_before(sorted(plain), rank)
            mine = [part for part in parts if part.name not in others]
            self._together(partial(_fresh, scratch), main_only=True)
            self._together(partial(write_shard, scratch / f"shard-{rank:05d}.safetensors", mine))
            self._together(partial(self._finish, scratch, final, state, keep, best), main_only=True)
        except OSError as error:
            if self.main:
                shutil.rmtree(scratch, ignore_errors=True)
            last = self.iterations()
            kept = f"the checkpoint of iteration {last[-1]} is intact" if last else "there is none yet"
            self._error = UserError(f"{final}: cannot write the checkpoint: {_reason(error)}; {kept}")
        except Exception as error:
            self._error = error

    def _named_before(self, names: Sequence[str], rank: int) -> set[str]:
        """Which of the tensors that are not sharded an earlier process has too; that one writes them."""
        if self._group is None:
            return set()
        text = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self._group)
        padded = torch.full((int(max(lengths)),), ord(" "), dtype=torch.uint8)
        padded[: len(text)] = text
        everyone = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(everyone, padded, group=self._group)
        return {name for other in everyone[:rank] for name in json.loads(bytes(other.tolist()))}

    def _together(self, work: Callable[[], object], main_only: bool = False) -> None:
        """Every process, or main alone, does it; where it fails on any, every one raises an OSError, or its own."""
        code, other = 0, None
        if self.main or not main_only:
            try:
                work()
            except OSError as error:
                code = error.errno or errno.EIO
            except Exception as error:
                code, other = errno.EIO, error
        if self._group is not None:
            status = torch.tensor([code])
            dist.all_reduce(status, dist.ReduceOp.MAX, group=self._group)
            code = int(status)
        if other is not None:
            raise other
        if code:
            raise OSError(code, os.strerror(code))

    def _finish(self, scratch: Path, final: Path, state: dict[str, Any], keep: int, best: int | None) -> None:
        """Main: completes the files, renames them into place, and removes what is old."""
        state = {"format": FORMAT, "not_finite": write_index(scratch), **state}
        (scratch / "state.json").write_text(json.dumps(state, indent=1))
        sums = {p.name: _checksum(p) for p in sorted(scratch.iterdir())}
        (scratch / "manifest.json").write_text(_canonical(sums))
        for file in scratch.glob("*.json"):
            _sync(file)
        _sync(scratch)
        scratch.rename(final)
        _sync(self.directory)
        there = self.iterations()
        kept = {*there[-keep:], best, next(filter(self._is_finite, reversed(there)), None)}
        for iteration in there:
            if iteration not in kept:
                self._remove(iteration)

    def _remove(self, iteration: int) -> None:
        """Removes a checkpoint; where that cannot be, it stays, with a warning."""
        path = self.path(iteration)
        try:
            # Renamed first: a crash while files are removed leaves nothing that looks complete.
            old = path.rename(self.directory / f"tmp-old-{iteration:06d}")
            shutil.rmtree(old)
        except OSError as error:
            if path not in self._stuck:
                self._stuck.add(path)
                warn(f"{path}: cannot remove this old checkpoint: {_reason(error)}")

    def _is_finite(self, iteration: int) -> bool:
        try:
            return not json.loads((self.path(iteration) / "state.json").read_text()).get("not_finite")
        except (OSError, ValueError):
            return False

    def last_finite(self) -> int | None:
        """The latest checkpoint whose weights are finite, as its state.json says, or None."""
        return next(filter(self._is_finite, reversed(self.iterations())), None)

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
                f"(format {state.get('format')}, not {FORMAT}); use that version, or start anew in another run.dir"
            )
        return state

    def load(self, iteration: int, tensors: Mapping[str, Any]) -> None:
        """Fills `tensors` in place. Raises UserError where the checkpoint holds others than these."""
        path = self.path(iteration)
        try:
            read_shards(path, tensors)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{path}: does not fit this model and config: {_reason(error)}") from None


def _ours(tensor: Tensor) -> bool:
    """Whether this process may have to write its part of a tensor."""
    return local(tensor).numel() > 0 and (not isinstance(tensor, DTensor) or first_replica(tensor))


def plain_states(states: Mapping[str, Any]) -> dict[str, Any]:
    """The states of callbacks, by name, that hold anything. Raises UserError, naming one that JSON cannot hold."""
    for name, state in states.items():
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise UserError(f"callbacks: the state of '{name}' is not plain data for JSON: {error}") from None
    return {name: state for name, state in states.items() if state}


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
    """The cause, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
