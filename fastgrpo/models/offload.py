"""Frozen modules whose weights wait in host memory and are on the device only while they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Tensor, nn


class Visitor:
    """A frozen module on the host. Its weights are copied to the device for a visit, and the copies dropped after it:
    nothing comes back. Page-locked, where the device is a GPU, so that the host does not wait for a copy."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.module = module
        self.host: dict[int, Tensor] = {}
        self.lock = RLock()
        if device.type == "cuda":
            for _, holder, name in self._places():
                holder[name].data = holder[name].data.pin_memory()

    def _places(self) -> Iterator[tuple[int, dict[str, Tensor], str]]:
        """Each place of a parameter or buffer: a number, and where it stands under which name."""
        number = 0
        for part in self.module.modules():
            for holder in (part._parameters, part._buffers):
                for name, tensor in holder.items():
                    if tensor is not None:
                        yield number, holder, name  # pyright: ignore[reportReturnType]
                        number += 1

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Within it the module is on the device. Visits of a thread may be nested; those of two wait for one another,
        because each has a stream of its own."""
        with self.lock:
            outer = not self.host
            if outer:
                self._arrive()
            try:
                yield
            finally:
                if outer:
                    self._leave()

    def _arrive(self) -> None:
        # A tensor that stands in several places (tied embeddings) is copied once.
        copies: dict[int, Tensor] = {}
        for number, holder, name in self._places():
            tensor = self.host[number] = holder[name]
            if id(tensor) not in copies:
                copy = tensor.detach().to(self.device, non_blocking=True)
                copies[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
            holder[name] = copies[id(tensor)]

    def _leave(self) -> None:
        for number, holder, name in self._places():
            holder[name] = self.host[number]
        self.host.clear()
