"""One process writes a run directory: a lock that the kernel frees when its owner ends, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import IO

from fastgrpo.errors import UserError
from fastgrpo.observe.progress import warn

LOCK = "lock"

# What this process holds, by resolved path: the file, and how many have asked for it.
_held: dict[Path, tuple[IO[str], int]] = {}


class RunLock:
    """The lock of a run directory, held until `release` or the end of this process.

    `run.dir/lock` says who holds it; the file alone means nothing, and stays. Two locks of one process are one. Raises
    UserError where another process has it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory.resolve() / LOCK
        file, holders = _held.get(self.path, (None, 0))
        _held[self.path] = (file or _taken(self.path), holders + 1)
        self._mine = True

    def release(self) -> None:
        """Lets others have it; a second call does nothing."""
        if not self._mine:
            return
        self._mine = False
        file, holders = _held.pop(self.path)
        if holders > 1:
            _held[self.path] = (file, holders - 1)
        else:
            file.close()


def _taken(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {path.parent}: {error.strerror}") from None
    try:
        # Of the open file, so that it is free as soon as no process has this file open: no times, no process numbers.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(file)
        file.close()
        raise UserError(
            f"run.dir: {path.parent} is in use by {owner}; wait until it ends, end it, or name another run.dir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warn(
            f"run.dir: the file system of {path.parent} has no locks ({error.strerror}): nothing keeps a second "
            "process from writing there"
        )
    file.truncate(0)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": now}))
    file.flush()
    return file


def _owner(file: IO[str]) -> str:
    """Who holds it, as the file says; it may just have been opened."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        file.seek(0)
        said = json.loads(file.read())
        return f"process {said['process']} of host {said['host']} since {said['started']}"
    return "another process"
