"""What `fastgrpo bench stay` measures, a handful of each: random signals, and pairs of processes."""

import json
import subprocess
import sys

import pytest

# In a process of its own: every trial is a fork of it, and a fork of one that has run models may hang.
CODE = "import json; from fastgrpo.commands.bench import load; print(json.dumps(load('stay').{}({}, iterations=2)))"


def measured(what, count):
    command = [sys.executable, "-c", CODE.format(what, count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# The moments one by one are tests/training/test_signals.py.
@pytest.mark.full
def test_random_signals_end_both_ranks_alike_and_lose_nothing():
    found = measured("signals", 2)
    assert found["other"] == 0
    assert found["75 on both"] + found["ended before the signal, 0 on both"] == 2
    assert found["identical"] == found["trials"] == 2


def test_of_two_processes_on_a_run_directory_one_trains():
    found = measured("pairs", 1)
    assert found["one trained, the other said so"] + found["one after the other"] == 1
    assert found["all iterations"] == found["identical"] == found["pairs"] == 1
