"""A signal to any rank, at any moment: every rank ends alike, with 75, and a resumed run is bit-identical."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from support.processes import ended, start_ranks
from support.runs import metrics
from support.tiny import tiny_config

from fastgrpo.commands.main import main
from fastgrpo.config.sections import dump_settings
from fastgrpo.distributed import signals
from fastgrpo.distributed.signals import GRACE, INTERRUPTED, PREEMPTED, StopRequest, listening


class Two:
    """Two ranks, of which the other wishes something."""

    def __init__(self, other):
        self.other = other

    def gather_all(self, vector):
        return np.stack([vector, np.array([float(self.other)])])


def test_a_wish_is_not_an_agreement_and_is_never_lost():
    stop = StopRequest()
    sent = stop.wish
    stop.ask(signal.SIGUSR1)
    assert (stop.wish, stop.agreed) == (PREEMPTED, 0)
    # The ranks had sent their wishes before it came.
    assert stop.take(sent) == 0
    assert stop.agree(Two(0)) == PREEMPTED
    other = StopRequest()
    assert other.agree(Two(INTERRUPTED)) == INTERRUPTED
    assert other.agree(Two(0)) == INTERRUPTED


def test_repeats_count_once_and_only_a_later_ctrl_c_ends_at_once(capfd):
    now = [0.0]
    stop = StopRequest(lambda: now[0])
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
        stop.ask(number)
    assert stop.wish == PREEMPTED
    assert len(capfd.readouterr().err.splitlines()) == 2
    now[0] = GRACE + 1
    stop.ask(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT)


def test_handlers_come_back():
    before = {number: signal.getsignal(number) for number in signals.STOPS}
    stop = StopRequest()
    with listening(stop):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wish == PREEMPTED
    assert {number: signal.getsignal(number) for number in signals.STOPS} == before


EARLY = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Finder())
from fastgrpo.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_while_torch_is_imported_is_taken(tiny_flux, tmp_path):
    (tmp_path / "c.yaml").write_text(dump_settings(tiny_config(tiny_flux, tmp_path / "run")), encoding="utf-8")
    command = [sys.executable, "-c", EARLY, "train", str(tmp_path / "c.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 75, done.stderr
    assert "stopped before its first iteration, to be requeued" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


ALONE = """
import os, signal, sys, threading
from datetime import timedelta
from fastgrpo.distributed import signals
signals.listen()
early, number = sys.argv[1] == "early", int(sys.argv[2])
if early:
    os.kill(os.getpid(), number)
import torch.distributed as dist
if not early:
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
with signals.meeting(0.5):
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
"""


@pytest.mark.parametrize(
    "when, number, code", [("early", signal.SIGTERM, 75), ("late", signal.SIGUSR1, 75), ("late", signal.SIGINT, 130)]
)
def test_a_rank_that_waits_for_others_in_vain_ends_as_it_is_asked(when, number, code):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-c", ALONE, when, str(int(number))]
    done = subprocess.run(command, env=os.environ | place, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert f"{number.name}: ended while waiting for the other ranks" in done.stderr


def test_a_signal_while_ranks_meet_is_taken_once_they_have():
    signals.listen()
    try:
        request, before = signals.stop_request(), signal.set_wakeup_fd(-1)
        with signals.meeting(0.2):
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.5)
        assert request.wish == signals.PREEMPTED
        assert signal.set_wakeup_fd(before) == -1
    finally:
        signals.stop_listening()


def train(config, moment, number, rank):
    """A run of two ranks as `torchrun -m fastgrpo train` starts them; rank RANK signals itself at a moment."""
    signals.listen()
    from fastgrpo.checkpoints.store import CheckpointStore
    from fastgrpo.rollout import rollouts
    from fastgrpo.rollout.generator import Generator
    from fastgrpo.training import setup, trainer
    from fastgrpo.training.callbacks import evaluation
    from fastgrpo.training.callbacks.checkpointing import CheckpointCallback
    from fastgrpo.training.update import Updater

    armed = [os.environ["RANK"] == rank]

    def before(owner, name, times=1):
        original, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == times and armed[0]:
                armed[0] = False
                os.kill(os.getpid(), signal.Signals[number])
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    {
        "load": lambda: before(trainer, "prepare_weights"),
        "claim": lambda: before(setup, "claim_directory"),
        "evaluation": lambda: before(evaluation, "evaluate", 2),
        "first evaluation": lambda: before(evaluation, "evaluate"),
        "rollout": lambda: before(Generator, "start", 2),
        "gather": lambda: before(rollouts, "gather_scores", 2),
        "update": lambda: before(Updater, "run", 2),
        "checkpoint": lambda: before(CheckpointStore, "save"),
        "checkpoint's write": lambda: before(CheckpointStore, "_finish" if rank == "0" else "_write"),
        "end": lambda: before(CheckpointCallback, "on_end"),
    }[moment]()
    from fastgrpo.commands.main import main

    sys.exit(main(["train", str(config), "run.resume=auto"]))


def start_two(folder, *arguments):
    return start_ranks(folder, train, folder / "c.yaml", *arguments)


MOMENTS = ["load", "claim", "first evaluation", "evaluation", "rollout", "gather", "update", "checkpoint",
           "checkpoint's write", "end"]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("rank, name", [("0", "SIGTERM"), ("1", "SIGUSR1")])
def test_every_rank_leaves_with_75_and_goes_on(tiny_flux, tmp_path, moment, rank, name):
    one_moment(tiny_flux, tmp_path, moment, name, rank)


def test_a_signal_at_one_rank_during_its_update_stops_both(tiny_flux, tmp_path):
    one_moment(tiny_flux, tmp_path, "update", "SIGTERM", "1")


def one_moment(tiny_flux, folder, moment, name, rank):
    config = tiny_config(
        tiny_flux, folder / "run", rollout={"group_size": 4}, train={"iterations": 3},
        eval={"every": 2, "images": 4}, checkpoint={"every": 2},
    )  # fmt: skip
    (folder / "c.yaml").write_text(dump_settings(config), encoding="utf-8")
    begin = time.monotonic()
    codes, errors = ended(start_two(folder, moment, name, rank), folder)
    assert codes == [75, 75], errors
    assert not any("Traceback" in error for error in errors), errors
    codes, errors = ended(start_two(folder, "load", name, "none"), folder)
    assert codes == [0, 0], errors
    assert [line["iteration"] for line in metrics(folder / "run")] == [0, 1, 2]
    assert time.monotonic() - begin < 500


@pytest.mark.full
def test_a_stopped_rank_is_named_and_the_run_goes_on_when_it_does(tiny_flux, tmp_path):
    config = tiny_config(
        tiny_flux, tmp_path / "run", rollout={"group_size": 4}, train={"iterations": 6},
        telemetry={"progress": False, "stall_seconds": 3.0},
        rewards=[{"name": "support.slow:SlowReward", "options": {"seconds": 2.0}}],
    )  # fmt: skip
    (tmp_path / "c.yaml").write_text(dump_settings(config), encoding="utf-8")
    ranks = start_two(tmp_path, "load", "SIGTERM", "none")
    limit = time.monotonic() + 300
    while not (tmp_path / "run" / "ranks" / "1.json").exists():
        assert time.monotonic() < limit
        time.sleep(0.2)
    time.sleep(1)
    process = ranks[1].pid
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    try:
        events = tmp_path / "run" / "events.jsonl"
        while '"stall"' not in events.read_text():
            assert time.monotonic() < limit
            time.sleep(0.2)
    finally:
        os.kill(process, signal.SIGCONT)
    codes, errors = ended(ranks, tmp_path)
    assert codes == [0, 0], errors
    # Stopped in its reward, it may be named for that first.
    assert re.search(r"warning: rank 1 has (given no sign of life for|been in 'reward')", errors[0]), errors[0]
    assert not (tmp_path / "run" / "ranks").exists()


@pytest.mark.full
def test_a_rank_that_is_gone_is_one_line(tiny_flux, tmp_path):
    slow = [{"name": "support.slow:SlowReward", "options": {"seconds": 2.0}}]
    config = tiny_config(tiny_flux, tmp_path / "run", rollout={"group_size": 4}, train={"iterations": 60}, rewards=slow)
    (tmp_path / "c.yaml").write_text(dump_settings(config), encoding="utf-8")
    ranks = start_two(tmp_path, "load", "SIGTERM", "none")
    limit = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text():
        assert time.monotonic() < limit
        time.sleep(0.2)
    ranks[1].kill()
    ranks[0].join(100)
    assert ranks[0].exitcode == 1
    errors = (tmp_path / "output 0.txt").read_text()
    assert "error: another rank ended, or was silent for parallel.timeout" in errors
    assert "Traceback" not in errors


def test_a_command_that_python_calls_leaves_no_handler_behind(tmp_path):
    before = {number: signal.getsignal(number) for number in signals.STOPS}
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert {number: signal.getsignal(number) for number in signals.STOPS} == before
    assert signals.stop_request() is not signals.stop_request()
