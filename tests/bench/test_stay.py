"""What `fastgrpo bench stay` measures, a handful of each: random signals, and pairs of processes."""

from fastgrpo.commands.bench import load


def test_random_signals_end_both_ranks_alike_and_lose_nothing():
    found = load("stay").signals(2, iterations=2)
    assert found["other"] == 0
    assert found["75 on both"] + found["ended before the signal, 0 on both"] == 2
    assert found["identical"] == found["trials"] == 2


def test_of_two_processes_on_a_run_directory_one_trains():
    found = load("stay").pairs(2, iterations=2)
    assert found["one trained, the other said so"] + found["one after the other"] == 2
    assert found["all iterations"] == found["identical"] == found["pairs"] == 2
