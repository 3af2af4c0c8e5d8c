"""Counting what a GPU would be asked to launch, on the meta device: ATen operations and Triton kernels."""

import importlib
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that allocate, and those that make a view, launch nothing.
# promote_types answers on the host.
ALLOCATIONS = {"promote_types", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
LAUNCHERS = (
    "clipped_loss.fused",
    "clipped_loss.op",
    "gaussian_step.paths",
    "log_prob.op",
    "on_policy_gradient.op",
    "shift_moments.op",
)


class _CountAten(TorchDispatchMode):
    def __init__(self, counted: Counter) -> None:
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ALLOCATIONS:
            self.counted[f"aten {name}"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counting():
    """Counts launches by name: `aten …` and `triton …`. Kernels are counted and not run."""
    counted = Counter()

    def launch(kernel, *arguments, **constants):
        counted[f"triton {kernel.fn.__name__}"] += 1

    def arrivals(*arguments, **options):
        # On a GPU these are kept from call to call.
        return torch.empty(0, device="meta")

    with _CountAten(counted):
        patches = []
        for name in LAUNCHERS:
            module = importlib.import_module(f"fastgrpo_kernels.{name}")
            for attribute, replacement in (("launch", launch), ("arrivals", arrivals)):
                if hasattr(module, attribute):
                    patches.append(mock.patch.object(module, attribute, replacement))
        for patch in patches:
            patch.start()
        try:
            yield counted
        finally:
            for patch in patches:
                patch.stop()


def aten(counted: Counter) -> int:
    """How many of the counted launches are ATen's."""
    return sum(count for name, count in counted.items() if name.startswith("aten "))


def triton(counted: Counter) -> int:
    """How many of the counted launches are our kernels."""
    return sum(count for name, count in counted.items() if name.startswith("triton "))
