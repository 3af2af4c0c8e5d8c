"""Out of memory, as one line: the phase, the peak, and the nearest settings that fit by a plan.

The plan is made in a process of its own: it makes a process group, and this one's may be in use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch

from fastgrpo.config import Config, validate
from fastgrpo.distributed.world import this_machine
from fastgrpo.errors import UserError
from fastgrpo.observe.timers import peak_memory_bytes
from fastgrpo.planning.gpus import GIB, Gpu

# A plan of the largest models takes minutes.
SECONDS = 600


class OutOfMemoryError(UserError):
    """The device's memory, or the host's, did not suffice."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def explained(error: BaseException, config: Config, peak: int = 0) -> OutOfMemoryError:
    """The one line for a run that ran out of memory.

    Args:
        error: What was raised; its `phase` is where (PhaseTimer.doing).
        config: Of the run.
        peak: The most bytes that the run had allocated; what is known now, if that is more.
    """
    memory, ranks, local = this_machine()
    phase = getattr(error, "phase", "loading")
    most = max(peak, peak_memory_bytes())
    what = f"out of memory in {phase}: {most / GIB:.1f} of {memory / GIB:.1f} GiB were in use"
    if os.environ.get("RANK", "0") != "0":
        return OutOfMemoryError(f"{what}; rank 0, or `fastgrpo plan`, says what fits")
    return OutOfMemoryError(f"{what}; {_planned(config, memory, ranks, local)}")


def _planned(config: Config, memory: int, ranks: int, local: int) -> str:
    """What a plan in another process says."""
    asked = json.dumps({"config": config.model_dump(mode="json"), "memory": memory, "ranks": ranks, "local": local})
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fastgrpo.planning.advice"], input=asked, text=True, capture_output=True,
            timeout=SECONDS, env=alone | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "no plan could be made in time; `fastgrpo plan` says what fits"
    if done.returncode == 0 and done.stdout.strip():
        return done.stdout.strip().splitlines()[-1]
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"no plan could be made ({why:.200})"


def advice(config: Config, memory: int, ranks: int, local: int) -> str:
    """The nearest settings that fit devices of `memory` bytes, by a plan; where it fits already, what needs less."""
    from fastgrpo.planning.plan import nearest_fit, overridden, plan, remedies

    device = Gpu("this device", memory, 1.0, 1.0, 1.0)
    first = plan(config, device, ranks, local)
    if not first.fits:
        found = nearest_fit(first)
        if found is None:
            return f"a plan needs {first.need / GIB:.1f} GiB, and no settings that fit were found; use a smaller model"
        settings, fit = found
        return f"by a plan this fits: {_shown(settings)} ({fit.need / GIB:.1f} GiB)"
    for step in remedies(config, first.worst.name):
        candidate = plan(overridden(config, step), device, ranks, local)
        if candidate.need < first.need:
            needs = f"{first.need / GIB:.1f} GiB, and {candidate.need / GIB:.1f} GiB"
            return f"a plan needs {needs} with {_shown(step)}; is the memory used by something else too?"
    return f"a plan needs {first.need / GIB:.1f} GiB; is the memory used by something else too?"


def _shown(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in settings.items())


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(advice(validate(given["config"]), given["memory"], given["ranks"], given["local"]))
