"""Counting what a GPU would be asked to launch, on the meta device: ATen operations and Triton kernels."""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo_kernels import _launch

# Operations that allocate, and those that make a view, launch nothing.
# promote_types answers on the host.
ALLOCATIONS = {"promote_types", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


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

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastgrpo_kernels.") and name != _launch.__name__:
                for attribute, replacement in (("launch", launch), ("arrivals", arrivals)):
                    if getattr(module, attribute, None) is getattr(_launch, attribute):
                        stack.enter_context(mock.patch.object(module, attribute, replacement))
        stack.enter_context(_CountAten(counted))
        yield counted


def aten(counted: Counter) -> int:
    """How many of the counted launches are ATen's."""
    return sum(count for name, count in counted.items() if name.startswith("aten "))


def triton(counted: Counter) -> int:
    """How many of the counted launches are our kernels."""
    return sum(count for name, count in counted.items() if name.startswith("triton "))
