"""The reward server, the hostile client and the failing network of bench/serving.py, for tests."""

from fastgrpo.commands.bench import load

_bench = load("serving")
TOKEN, serving, malformed, Unreliable = _bench.TOKEN, _bench.serving, _bench.malformed, _bench.Unreliable
