"""What `fastgrpo bench stay` measures, a handful of each: random signals, and pairs of processes."""

import json

import pytest
from support.processes import run_ranks

from fastgrpo.commands.bench import load


def measure(what, count):
    print(json.dumps(getattr(load("stay"), what)(count, iterations=2)))


def measured(folder, what, count):
    """In a process of its own: every trial is a fork of it, and a fork of one that has run models may hang."""
    (said,) = run_ranks(folder, measure, what, count, ranks=1)
    return json.loads(said.splitlines()[-1])


# The moments one by one are tests/distributed/test_signals.py.
@pytest.mark.full
def test_random_signals_end_both_ranks_alike_and_lose_nothing(tmp_path):
    found = measured(tmp_path, "signals", 2)
    assert found["other"] == 0
    assert found["75 on both"] + found["ended before the signal, 0 on both"] == 2
    assert found["identical"] == found["trials"] == 2


def test_of_two_processes_on_a_run_directory_one_trains(tmp_path):
    found = measured(tmp_path, "pairs", 1)
    assert found["one trained, the other said so"] + found["one after the other"] == 1
    assert found["all iterations"] == found["identical"] == found["pairs"] == 1
