"""Ranks of a process group in processes of their own, which have what takes seconds to import from the start.

They are forked by a server that has only imported; a fork of a process that has run models may hang.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "diffusers.pipelines.flux.pipeline_flux", "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5", "fastgrpo.commands.train", "fastgrpo.models.families.flux",
    "fastgrpo.rewards.shapes", "support.two_ranks",
])  # fmt: skip
LIMIT = 900


def run_ranks(folder: Path, function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[str]:
    """Calls a function in every rank, each of which must end with 0, and returns what each wrote to stdout and stderr.

    Args:
        folder: Where that is written to.
        function: Of a module that can be imported; called with `arguments`.
        arguments: Of the function.
        ranks: How many ranks; 1: a process alone, without a group.
    """
    codes, said = ended(start_ranks(folder, function, *arguments, ranks=ranks), folder)
    assert codes == [0] * ranks, "\n".join(text[-6000:] for text in said)
    return said


def start_ranks(folder: Path, function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[BaseProcess]:
    """The processes of `run_ranks`, which nobody watches over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(ranks):
        environment = dict(os.environ)
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        given = str(folder / f"output {rank}.txt"), environment, os.getcwd(), function, arguments
        started.append(SERVER.Process(target=_rank, args=given))
        started[-1].start()
    return started


def ended(processes: Sequence[BaseProcess], folder: Path) -> tuple[list[int | None], list[str]]:
    """Waits for processes of `start_ranks`: their exit codes, and what each wrote."""
    try:
        for process in processes:
            process.join(LIMIT)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [(folder / f"output {rank}.txt").read_text() for rank in range(len(processes))]


def command_line(*arguments: str) -> None:
    """The command line in a process."""
    from fastgrpo.commands.main import main

    if code := main(list(arguments)):
        sys.exit(code)


def _rank(
    output: str, environment: dict[str, str], directory: str, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    function(*arguments)
    if dist.is_initialized():
        # gloo ends the process of a rank whose peer is gone while it tears down.
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
