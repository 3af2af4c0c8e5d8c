"""Where the components of a pipeline are and when: on the device, in host memory until they are used, or not loaded.

Knows diffusers' pipelines and no family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.config.dtypes import DTYPES
from fastgrpo.models.loading import load_pipeline
from fastgrpo.models.nf4 import quantize_layers


class Memory:
    """How tensors are made in host memory, and copied to the device. A plan, whose tensors are fake, has another."""

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor without values in host memory; page-locked where `device` is a GPU, so that copies do not wait."""
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def on_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy of a weight or buffer that is in host memory."""
        return tensor.detach().to(device, non_blocking=True)


class OffloadedModule:
    """A frozen module in host memory, copied to the device while it is used.

    The copies are dropped afterwards and nothing is copied back. On a GPU the host memory is page-locked, so that the
    host does not wait for a copy.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device = device
        self.module = module
        self.host: dict[int, Tensor] = {}
        self.lock = RLock()
        if device.type == "cuda":
            for _, holder, name in self._tensors():
                holder[name].data = holder[name].data.pin_memory()

    def _tensors(self) -> Iterator[tuple[int, dict[str, Tensor], str]]:
        """Each parameter and buffer: a number, and which dictionary has it under which name."""
        number = 0
        for part in self.module.modules():
            for holder in (part._parameters, part._buffers):
                for name, tensor in holder.items():
                    if tensor is not None:
                        yield number, holder, name  # pyright: ignore[reportReturnType]
                        number += 1

    @contextmanager
    def on_device(self, memory: Memory) -> Iterator[None]:
        """Within it the module is on the device. A thread may nest it; two threads wait for one another, because each
        has a stream of its own."""
        with self.lock:
            outer = not self.host
            if outer:
                self._copy_to_device(memory)
            try:
                yield
            finally:
                if outer:
                    self._drop_copies()

    def _copy_to_device(self, memory: Memory) -> None:
        # A tensor that stands in several places (tied embeddings) is copied once.
        copies: dict[int, Tensor] = {}
        for number, holder, name in self._tensors():
            tensor = self.host[number] = holder[name]
            if id(tensor) not in copies:
                copy = memory.on_device(tensor, self.device)
                copies[id(tensor)] = nn.Parameter(copy, False) if isinstance(tensor, nn.Parameter) else copy
            holder[name] = copies[id(tensor)]

    def _drop_copies(self) -> None:
        for number, holder, name in self._tensors():
            holder[name] = self.host[number]
        self.host.clear()


class PlacedPipeline:
    """A pipeline whose components are on the device, wait in host memory (`OffloadedModule`), or are not loaded yet."""

    # What a family declares: see fastgrpo/models/protocol.py.
    pipeline_classes: ClassVar[tuple[str, ...]]
    trained: ClassVar[tuple[str, ...]]
    encoders: ClassVar[tuple[str, ...]]
    block_lists: ClassVar[tuple[str, ...]]

    def __init__(self, pipeline: Any, config: Model, device: torch.device) -> None:
        self.pipeline = pipeline
        self.config = config
        self.device = device
        self.dtype = DTYPES[config.dtype]
        # Of components that are still without weights, the file of each tensor.
        self.weight_files: dict[str, dict[str, Path]] = {}
        self.offloaded: dict[str, OffloadedModule] = {}
        self.memory = Memory()

    def place(self, pipeline: Any) -> None:
        """Freezes the components of a pipeline and puts each where it belongs, quantized where the config says so."""
        for name in self.trained if self.config.quantize else ():
            if isinstance(module := getattr(pipeline, name, None), nn.Module):
                quantize_layers(self.blocks(module), self.device)
        for name, module in pipeline.components.items():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval()
                away = [t for t in (*module.parameters(), *module.buffers()) if t.device != self.device]
                if self.is_offloaded(name):
                    self.offloaded[name] = OffloadedModule(module, self.device)
                elif any(t.is_meta for t in away):
                    # Its weights come later; its buffers are there.
                    for part in module.modules():
                        part._buffers.update({n: b.to(self.device) for n, b in part._buffers.items() if b is not None})
                elif away:
                    # Not where it is there already: fake tensors cannot be moved onto themselves.
                    module.to(self.device)
                for part in module.modules():
                    if isinstance(part, nn.Conv2d):
                        # The layout that they are fastest in, on CPUs and on GPUs; a video's convolutions have none.
                        part.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def is_offloaded(self, name: str) -> bool:
        """Whether a component is in host memory except within `on_device`."""
        if self.device.type == "cpu":
            return False
        if name == "vae":
            return self.config.vae != "keep"
        return name in self.encoders and self.config.text_encoders != "keep"

    @contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Within it these components are on the device, those that are offloaded otherwise too."""
        with ExitStack() as stack:
            for name in names:
                if name in self.offloaded:
                    stack.enter_context(self.offloaded[name].on_device(self.memory))
            yield

    def host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without values in host memory, for what is copied from this device and to it."""
        return self.memory.host_empty(shape, dtype, self.device)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Within it everything that encodes prompts is on the device."""
        # Loads it where it is not yet.
        _ = self.encoder
        with self.on_device(*self.encoders, "vae"):
            yield

    @contextmanager
    def trained_on_host(self) -> Iterator[None]:
        """Within it the trained components are in host memory, but for those that are still without weights."""
        whole = [module for module in self.modules.values() if not any(p.is_meta for p in module.parameters())]
        for module in whole:
            module.to("cpu")
        try:
            yield
        finally:
            for module in whole:
                module.to(self.device)

    def drop_encoders(self) -> None:
        """Frees the text encoders; a prompt that is not cached loads them again."""
        vars(self).pop("encoder", None)
        for name in self.encoders:
            self.offloaded.pop(name, None)
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)

    @classmethod
    def own_parts(cls, config: Model) -> dict[str, Any]:
        """Those of its encoders that diffusers does not load as the family needs them, by name."""
        return {}

    @cached_property
    def encoder(self) -> Any:
        """The pipeline that encodes prompts: `pipeline`, or its encoders alone, loaded here, where it has none."""
        if all(getattr(self.pipeline, name, None) is None for name in self.encoders):
            # HunyuanVideo 1.5's pipelines read their autoencoder's config as they are built.
            vae = {"vae": getattr(self.pipeline, "vae", None)}
            given = self.own_parts(self.config) | dict.fromkeys(self.trained) | vae
            loaded = load_pipeline(self.config, self.pipeline_classes, self.trained, given)
            # It is placed already.
            loaded.vae = None
            self.place(loaded)
            return loaded
        return self.pipeline

    @property
    def component_configs(self) -> dict[str, Mapping[str, Any]]:
        """The configs of the components that have one, by name."""
        return {name: part.config for name, part in self.pipeline.components.items() if hasattr(part, "config")}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The trained components, by name."""
        return {name: getattr(self.pipeline, name) for name in self.trained if getattr(self.pipeline, name) is not None}

    @property
    def denoiser(self) -> nn.Module:
        """The trained component, the first of several."""
        return next(iter(self.modules.values()))

    @cached_property
    def policy(self) -> nn.Module:
        """Everything that is trained, as one module: the component, or all of them under their names."""
        return self.denoiser if len(self.modules) == 1 else nn.ModuleDict(self.modules)

    def blocks(self, module: nn.Module) -> list[nn.Module]:
        """A component's repeated blocks in forward order: the units of sharding and of activation checkpointing."""
        return [block for name in self.block_lists for block in module.get_submodule(name).children()]

    @cached_property
    def vae_dtype(self) -> torch.dtype:
        """Of the autoencoder's weights, asked once: diffusers goes through every module for it."""
        return self.pipeline.vae.dtype
