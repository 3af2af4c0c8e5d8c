"""The same measurements through pytest-benchmark, which keeps, compares and prints its own runs.

pytest bench/test_kernels.py -k "loss and full and flux" [--benchmark-autosave] [--benchmark-compare]
"""

import pytest
import torch

from fastgrpo.commands.bench import load

kernels, providers = load("kernels"), load("providers")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    (shape, op, mode, provider)
    for shape in providers.SHAPES
    for op, operation in providers.OPERATIONS.items()
    for mode in operation.modes
    for provider in providers.PROVIDERS
]


@pytest.fixture(scope="module")
def inputs():
    made: dict = {}

    def of(shape):
        if shape not in made:
            made.clear()
            made[shape] = providers.Inputs(providers.SHAPES[shape], torch.bfloat16, DEVICE)
        return made[shape]

    return of


@pytest.mark.parametrize("shape, op, mode, provider", CASES, ids=["-".join(case) for case in CASES])
def test_kernel(benchmark, inputs, shape, op, mode, provider):
    work = providers.prepare(op, provider, mode, inputs(shape))

    def run():
        work()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape} {op} {mode}"
    benchmark.extra_info["peak_mib"] = round(kernels.peak_bytes(work, DEVICE) / 2**20, 4)
    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
