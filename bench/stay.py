"""What a run survives, measured: kills, signals, two processes at once, corruption, other world sizes; and what staying
up costs.

Every trial is a process forked from this one, which has imported everything: the runs are of the shipped FLUX with four
samples an iteration.

fastgrpo bench stay kills --count 50
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgrpo.checkpoints.store import CheckpointStore, DamagedError
from fastgrpo.config import load_config
from fastgrpo.distributed import signals as stop_signals
from fastgrpo.errors import REQUEUE, PreemptedError, UserError
from fastgrpo.observe.run_log import RunLog, read_metrics
from fastgrpo.observe.timers import PhaseTimer, peak_memory_bytes
from fastgrpo.training.callbacks import Callback
from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
from fastgrpo.training.state import training_tensors
from fastgrpo.training.trainer import Trainer

from .inputs import inputs

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "shapes-flux.yaml"
SMALL = (
    "rollout.prompts_per_iteration=1",
    "rollout.group_size=4",
    "rollout.steps=3",
    "rollout.forward_batch=4",
    "eval.every=0",
    "checkpoint.every=1",
    "telemetry.progress=false",
    "run.resume=auto",
)


def trainer_of(folder: Path, iterations: int, *settings: str) -> Trainer:
    return Trainer.from_config(
        load_config(CONFIG, [*SMALL, f"run.dir={folder}", f"train.iterations={iterations}", *settings])
    )


def fork(work: Callable[[], None], rank: int = 0, ranks: int = 1, port: int = 0) -> int:
    """The process id of a copy of this process that does `work` and ends as the command line does: with 0, 2 and an
    error printed, 75 after a signal; or with 1."""
    # A signal that comes before the copy listens waits until it does.
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals.STOPS)
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals.STOPS)
        return process
    try:
        stop_signals.listen()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals.STOPS)
        # The parent's thread pools did not survive the fork. Asked for here, they are made anew before the loaders'
        # threads ask at once, which is a race in PyTorch ("Invalid thread pool!").
        torch.set_num_threads(1)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work()
        sys.stdout.flush()
        os._exit(0)
    except PreemptedError:
        os._exit(REQUEUE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr, flush=True)
        os._exit(1)


def train(folder: Path, iterations: int, *settings: str) -> None:
    """Trains to the end, and leaves the SHA-256 of every training tensor (of rank 0's shards) in end.txt."""
    trainer = trainer_of(folder, iterations, *settings)
    (folder / f"started-{trainer.world.rank}").touch()
    trainer.run()
    digest = hashlib.sha256()
    for tensors in training_tensors(trainer.optimizer).values():
        for tensor in tensors.values():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            digest.update(full.detach().contiguous().numpy().tobytes())
    if trainer.world.main:
        (folder / "end.txt").write_text(digest.hexdigest())


def start(folder: Path, ranks: int, iterations: int, *settings: str) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for marker in folder.glob("started-*"):
        marker.unlink()
    return [fork(lambda: train(folder, iterations, *settings), rank, ranks, port) for rank in range(ranks)]


def finish(processes: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def complete(folder: Path, ranks: int, iterations: int, *settings: str) -> str:
    """The digest of a run that is trained, or continued, to its end."""
    codes = finish(start(folder, ranks, iterations, *settings))
    assert not any(codes), codes
    return (folder / "end.txt").read_text()


def kills(count: int, iterations: int = 3, seed: int = 0) -> dict[str, Any]:
    """kill -9 at random moments of a run: every rank, or one of two ranks; resumed, the end is bit-identical."""
    chance = random.Random(seed)
    outcome = {"trials": 0, "identical": 0, "before the end": 0, "in a checkpoint's write": 0, "of one rank of two": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        reference, span = {}, {}
        for ranks in (1, 2):
            begin = time.perf_counter()
            reference[ranks] = complete(root / f"straight-{ranks}", ranks, iterations)
            span[ranks] = time.perf_counter() - begin
        for trial in range(count):
            ranks = 2 if trial % 5 == 4 else 1
            folder = root / "run"
            processes = start(folder, ranks, iterations)
            time.sleep(chance.uniform(0, span[ranks]))
            outcome["before the end"] += not (folder / "end.txt").exists()
            os.kill(processes[-1], signal.SIGKILL)
            outcome["in a checkpoint's write"] += bool(list((folder / "checkpoints").glob("tmp-*")))
            begin = time.perf_counter()
            finish(processes)
            if ranks == 2:
                outcome["of one rank of two"] += 1
                slowest = max(slowest, time.perf_counter() - begin)
            (folder / "end.txt").unlink(missing_ok=True)
            outcome["identical"] += complete(folder, ranks, iterations) == reference[ranks]
            outcome["trials"] += 1
            shutil.rmtree(folder)
            print(outcome, file=sys.stderr, flush=True)
    return outcome | {"slowest end of the other rank, seconds": round(slowest, 1)}


def signals(count: int = 100, iterations: int = 3, seed: int = 0) -> dict[str, Any]:
    """SIGTERM or SIGUSR1 at a random moment at one of two ranks: 75 on both; resumed, the end is bit-identical.

    A moment after the last agreement of the ranks, which the event of the end follows at once, finds a run that ends by
    itself: 0 on both. Such a trial is not one of `count`.
    """
    chance = random.Random(seed)
    settings = ("eval.every=2", "eval.images=4", "eval.steps=3", "parallel.timeout=600")
    outcome = {"trials": 0, "75 on both": 0, "ended before the signal, 0 on both": 0, "other": 0, "identical": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        begin = time.perf_counter()
        reference = complete(folder, 2, iterations, *settings)
        span = time.perf_counter() - begin
        shutil.rmtree(folder)
        while outcome["trials"] < count:
            number, rank = chance.choice([signal.SIGTERM, signal.SIGUSR1]), chance.randrange(2)
            processes = start(folder, 2, iterations, *settings)
            time.sleep(chance.uniform(0, 0.9 * span))
            events = folder / "events.jsonl"
            ended = events.exists() and '"event": "end"' in events.read_text()
            os.kill(processes[rank], number)
            begin = time.perf_counter()
            codes = finish(processes)
            slowest = max(slowest, time.perf_counter() - begin)
            if ended and codes == [0, 0]:
                outcome["ended before the signal, 0 on both"] += 1
                # This machine has become faster than when the span was measured.
                span *= 0.95
            else:
                outcome["trials"] += 1
                outcome["75 on both"] += codes == [REQUEUE] * 2
                if codes != [REQUEUE] * 2:
                    outcome["other"] += 1
                    print(f"{number!r} at rank {rank}: {codes}", file=sys.stderr, flush=True)
                (folder / "end.txt").unlink(missing_ok=True)
                outcome["identical"] += complete(folder, 2, iterations, *settings) == reference
            shutil.rmtree(folder)
            print(outcome, file=sys.stderr, flush=True)
    return outcome | {"slowest end, seconds": round(slowest, 1)}


def pairs(count: int = 50, iterations: int = 3, seed: int = 0) -> dict[str, Any]:
    """Two processes on one run directory, the second at a random moment of the first: one trains, the other says who
    does, and nothing is lost."""
    chance = random.Random(seed)
    outcome = {"pairs": 0, "one trained, the other said so": 0, "one after the other": 0, "all iterations": 0}
    outcome["identical"] = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        begin = time.perf_counter()
        reference = complete(root / "straight", 1, iterations)
        span = time.perf_counter() - begin
        for _ in range(count):
            folder = root / "run"
            said = root / "said"
            first = start(folder, 1, iterations)
            time.sleep(chance.uniform(0, 0.8 * span))
            second = fork(lambda folder=folder, said=said: _told(folder, said, iterations))
            codes = finish([*first, second])
            text = said.read_text() if said.exists() else ""
            outcome["one trained, the other said so"] += sorted(codes) == [0, 2] and "is in use by process" in text
            outcome["one after the other"] += codes == [0, 0]
            outcome["all iterations"] += [line["iteration"] for line in read_metrics(folder)] == [*range(iterations)]
            outcome["identical"] += (folder / "end.txt").read_text() == reference
            outcome["pairs"] += 1
            shutil.rmtree(folder)
            said.unlink(missing_ok=True)
            print(outcome, file=sys.stderr, flush=True)
    return outcome


def _told(folder: Path, said: Path, iterations: int) -> None:
    """Trains, and leaves what it was refused with."""
    try:
        train(folder, iterations)
    except UserError as error:
        said.write_text(str(error))
        raise


def ranks(iterations: int = 2) -> dict[str, Any]:
    """A run continued on 1 → 2 → 1 ranks beside one on 1 rank: the distance of weights over what training moved."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        steps = [iterations, 2 * iterations, 3 * iterations]
        constant = "update.optimizer.schedule=constant"
        complete(root / "straight", 1, steps[-1], constant, "checkpoint.keep=9")
        for count, last in zip((1, 2, 1), steps, strict=True):
            complete(root / "moved", count, last, constant)
        base = {n: t.detach().clone() for n, t in _weights(root / "empty", 1, constant).items()}
        one, moved = (_weights(root / name, steps[-1], constant) for name in ("straight", "moved"))
        rewards = [_column(root / name, "reward/mean") for name in ("straight", "moved")]
        return {
            "weights apart / moved": _distance(one, moved) / _distance(one, base),
            "weights apart / norm": _distance(one, moved) / torch.stack([t.norm() for t in one.values()]).norm().item(),
            "rewards": rewards,
        }


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return torch.stack([(a[n] - b[n]).norm() for n in a]).norm().item()


def _weights(folder: Path, iterations: int, *settings: str) -> dict[str, torch.Tensor]:
    """Of a run's last checkpoint; of the start, in a folder without one."""
    return training_tensors(trainer_of(folder, iterations, *settings).optimizer)["model"]


def _column(folder: Path, name: str) -> list[float]:
    from fastgrpo.observe.run_log import read_metrics

    return [line[name] for line in read_metrics(folder)]


def corruptions(count: int, seed: int = 0) -> dict[str, Any]:
    """Random damage to the newest of two checkpoints: is it seen, and is the one before it used?"""
    chance, outcome = random.Random(seed), {"trials": 0, "detected, the previous one used": 0, "loaded silently": 0}
    kinds = {"flip": 0, "truncate": 0, "remove": 0, "append": 0}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        complete(folder, 1, 2)
        store = CheckpointStore.of_run(folder)
        for _ in range(count):
            file = chance.choice(sorted(store.path(2).iterdir()))
            kind = chance.choice(sorted(kinds))
            data = file.read_bytes()
            _damage(file, data, kind, chance)
            try:
                used = store.newest_good(lambda text: None)
            except DamagedError:
                used = None
            outcome["trials"] += 1
            kinds[kind] += 1
            outcome["detected, the previous one used"] += used == 1
            outcome["loaded silently"] += used == 2
            aside = store.directory / "damaged-000002"
            if aside.exists():
                aside.rename(store.path(2))
            file.write_bytes(data)
        assert store.newest_good(print) == 2
    return outcome | kinds


def _damage(file: Path, data: bytes, kind: str, chance: random.Random) -> None:
    place = chance.randrange(len(data))
    if kind == "remove":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(data[:place])
    elif kind == "append":
        file.write_bytes(data + chance.randbytes(1 + place % 64))
    else:
        file.write_bytes(data[:place] + bytes([data[place] ^ chance.randrange(1, 256)]) + data[place + 1 :])


def costs(count: int = 5) -> dict[str, Any]:
    """Seconds that a checkpoint takes from training, written at once and in the background; telemetry's own."""
    with tempfile.TemporaryDirectory() as temporary:
        trainer = trainer_of(Path(temporary) / "run", 1)
        checkpoints = CheckpointCallback.of(trainer)
        assert checkpoints is not None
        tensors = training_tensors(trainer.optimizer)
        size = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(count + 1):
            for background in (False, True):
                begin = time.perf_counter()
                checkpoints.store.save(2 * turn + background, tensors, {}, 2, None, background)
                if turn:
                    seconds[background].append(time.perf_counter() - begin)
                checkpoints.store.wait()
        at_once, behind = statistics.median(seconds[False]), statistics.median(seconds[True])
        return {
            "MB": size / 1e6,
            "at once": at_once,
            "in the background": behind,
            "share": behind / at_once,
            "telemetry an iteration": _telemetry_seconds(trainer),
        }


def _telemetry_seconds(trainer: Trainer, count: int = 200) -> float:
    telemetry, timer = RunLog(trainer.log.directory, trainer.config), PhaseTimer("cpu")
    metrics = {f"metric/{i}": float(i) for i in range(30)}
    begin = time.process_time()
    for iteration in range(count):
        for name in ("conditioning", "rollout", "decode", "sync", "reward", "update"):
            with timer.phase(name):
                pass
        seconds = timer.lap().read()
        memory = {"memory/peak_bytes": float(peak_memory_bytes())}
        telemetry.log(iteration, metrics | seconds | memory)
    telemetry.close()
    return (time.process_time() - begin) / count


def soak(seconds: float = 3600) -> dict[str, Any]:
    """Resident memory of a run after its tenth iteration, by tenths and at its end, checkpoints written every ten."""
    with tempfile.TemporaryDirectory() as temporary:
        trainer = trainer_of(Path(temporary) / "run", 10**6, "checkpoint.every=10")
        begin, memory = time.perf_counter(), []

        class Watch(Callback):
            def after_iteration(self, trainer: Trainer) -> None:
                memory.append(_resident())
                if time.perf_counter() - begin > seconds:
                    trainer.halted = "long enough"

        trainer.callbacks.insert(0, Watch())
        with contextlib.suppress(UserError):
            trainer.run()
        after, last = memory[10:21], memory[-10:]
        return {
            "seconds": time.perf_counter() - begin,
            "iterations": len(memory),
            "MB after ten iterations": statistics.median(after) / 1e6,
            "MB at the end": statistics.median(last) / 1e6,
            "MB by tenths": [round(statistics.median(part) / 1e6) for part in np.array_split(memory[10:], 10)],
            "ratio": statistics.median(last) / statistics.median(after),
        }


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


MEASURES = {
    "inputs": inputs,
    "kills": kills,
    "signals": signals,
    "pairs": pairs,
    "ranks": ranks,
    "corruptions": corruptions,
    "costs": costs,
    "soak": soak,
}
