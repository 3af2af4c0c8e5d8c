"""An error that a component's own code raised, as one line."""

from __future__ import annotations

import traceback

import torch
from torch import nn

from fastgrpo.observe.tracebacks import described

LIBRARIES = ("diffusers.", "transformers.")
# Collectives and compilers run within a component's forward, and are not its own.
BETWEEN = ("torch.distributed", "torch._dynamo", "torch._inductor", "triton")


def component_failure(error: BaseException) -> str | None:
    """Returns a line for an error out of a component of a pipeline: which, what it said and where its traceback is;
    None for any other.

    A config.json may say what its class only stumbles over when it runs: a part of fewer channels than come, a dropout
    of NaN, an activation that there is none of.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(str(frame.f_globals.get("__name__", "")).startswith(BETWEEN) for frame in frames):
        return None
    for frame in frames:
        own = frame.f_locals.get("self")
        if isinstance(own, nn.Module) and type(own).__module__.startswith(LIBRARIES):
            kind, library = type(own).__name__, type(own).__module__.partition(".")[0]
            return f"{kind} of {library} fails where it runs; its config.json may not fit: {described(error, kind)}"
    return None
