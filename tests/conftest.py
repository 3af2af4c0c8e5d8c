"""Which tests run where: `gpu` needs CUDA; `full` takes minutes and runs only when asked for by `-m`."""

import os
import re
from pathlib import Path

import pytest
import torch

# Kernel tests run Triton on the GPU where there is one, and in its interpreter on CPU tensors otherwise. That has to be
# chosen before anything imports triton: peft does, where bitsandbytes is installed. Tests that compile ahead of time
# run in a process of their own.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # One thread for each of several workers (`-n`), and for the processes that their tests start: two threads that wait
    # for each other on a core that they do not have take ten times as long as one.
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads())
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Processes that tests start find tests/support too.
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr") or ""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "full" in item.keywords and "full" not in asked:
            item.add_marker(pytest.mark.skip(reason="minutes long: pytest -m full, or make test-full"))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Names a test's case by what it sets and expects, not by a number; the same in every process."""
    if isinstance(val, dict | list | tuple | BaseException):
        return re.sub(r"[^\w.=,+-]+", "-", _words(val))[:60]
    return argname if getattr(val, "__name__", "") == "<lambda>" else None


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "+".join(map(_words, value))
    plain = value is None or isinstance(value, str | int | float)
    return str(value) if plain else type(value).__name__


@pytest.fixture(autouse=True)
def no_process_group():
    """Ends the process group that a test leaves, as a trainer does that shards."""
    import torch.distributed as dist

    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    # One that could not be made has taken a name, and DTensor's caches know the next one by the name before it.
    dist.distributed_c10d._world.group_count = 0


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory):
    """A pipeline directory of the shipped sizes with random weights whose output is not nearly zero."""
    from fastgrpo.shapes import world
    from fastgrpo.shapes.tiny_flux import TinyFluxSizes, build_pipeline

    path = tmp_path_factory.mktemp("tiny_flux")
    build_pipeline(world.vocabulary(), TinyFluxSizes(), seed=0).save_pretrained(path)
    return path
