"""What PyTorch code costs: live tensor bytes by category and their peak, FLOPs, collectives; of real or fake tensors.

A tensor counts from the operation that makes its storage until that storage is freed, with FSDP2's resizing in between.
FLOPs are those of matrix products, convolutions and attention (2 a multiply-add). A collective counts the full tensor:
what a gather gives, what a reduction takes.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

# Where a storage goes that an operation makes now.
CATEGORIES = (
    "parameters", "gradients", "optimizer", "ema", "activations", "trajectories", "decoded", "caches", "gathers",
    "host",
)  # fmt: skip

# Name of a collective operation: its kind, and which argument is the full tensor (-1: the result).
COLLECTIVES = {
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d.allgather_": ("all_gather", 0),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d.alltoall_base_": ("all_to_all", 1),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", -1),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_to_all_single": ("all_to_all", 0),
}

# Makers and waiters that are no traffic.
SILENT = {"c10d.barrier", "_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd"}


@dataclass(frozen=True)
class Collective:
    """Of one kind, over groups of one size. apart: how far one rank of a group is from the next."""

    kind: str
    group: int
    apart: int = 1


@dataclass
class Cost:
    """FLOPs; collectives as counts and bytes."""

    flops: int = 0
    count: Counter[Collective] = field(default_factory=Counter)
    bytes: Counter[Collective] = field(default_factory=Counter)

    def copy(self) -> Cost:
        return Cost(self.flops, Counter(self.count), Counter(self.bytes))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.flops - other.flops, self.count - other.count, self.bytes - other.bytes)

    def add(self, other: Cost, times: int = 1) -> None:
        self.flops += times * other.flops
        for mine, theirs in ((self.count, other.count), (self.bytes, other.bytes)):
            for key, number in theirs.items():
                mine[key] += times * number


def _register_cpu_attention() -> None:
    """The attention that a CPU runs, real or fake: PyTorch counts those of GPUs alone."""
    aten = torch.ops.aten
    if aten._scaled_dot_product_flash_attention_for_cpu in flop_registry:
        return

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu)
    def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return _attention_flops(query, key, value)

    @register_flop_formula(aten._scaled_dot_product_flash_attention_for_cpu_backward)
    def _backward(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        # Scores once more, and the gradients of values, scores, queries and keys.
        return _attention_flops(query, key, value) * 5 // 2


def _attention_flops(query: Any, key: Any, value: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


_register_cpu_attention()


def flops_of(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """FLOPs of an operation that was dispatched: of matrix products, convolutions and attention; 0 of all others."""
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=output)


# The most bytes by category of each stretch of a program, by its name.
Peaks = dict[Hashable, Counter[str]]


class Meter(TorchDispatchMode):
    """Counts while it is entered. cost: the running total; live: bytes by category; peaks: the most of them in each
    stretch, as `stretch` names what runs now. host: the most bytes in host memory, which no device holds."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = Cost()
        self.live: Counter[str] = Counter()
        self.total = self.host = 0
        self.peaks: Peaks = {}
        self.category = "activations"
        self._on_host = 0
        self._stretch: Hashable = None
        self._most = 0
        self._paused = False
        self._known: dict[int, list[Any]] = {}
        self._references: dict[int, weakref.ref] = {}

    @contextmanager
    def counting(self, category: str) -> Iterator[None]:
        """New storages belong to `category` within it."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes by category where there were the most."""
        return dict(max(self.peaks.values(), key=lambda live: live.total(), default=Counter()))

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    @property
    def stretch(self) -> Hashable:
        return self._stretch

    @stretch.setter
    def stretch(self, name: Hashable) -> None:
        self._stretch = name
        self._most = self.peaks[name].total() if name in self.peaks else -1
        self._mark()

    def new_peaks(self) -> None:
        """Peaks start over, at what is live."""
        self.peaks = {}
        self.stretch = self.stretch

    @contextmanager
    def transient(self) -> Iterator[Peaks]:
        """Gives, filled when it ends, the bytes by category that each of its peaks has more than its beginning."""
        begin, before = Counter(self.live), self.peaks
        more: Peaks = {}
        self.new_peaks()
        yield more
        inner, self.peaks = self.peaks, before
        for name, live in inner.items():
            more[name] = _difference(live, begin)
            self._offer(name, live)
        self.stretch = self.stretch

    def swell(self, more: Peaks) -> None:
        """The peaks as if what `transient` gave came and went."""
        for name, extra in more.items():
            live = Counter(self.live)
            live.update(extra)
            self._offer(name, live)
        self.stretch = self.stretch

    def _offer(self, name: Hashable, live: Counter[str]) -> None:
        if name not in self.peaks or live.total() > self.peaks[name].total():
            self.peaks[name] = live

    def _mark(self) -> None:
        if self.total > self._most:
            self._most = self.total
            self.peaks[self._stretch] = Counter(self.live)

    def claim(self, tensors: Iterable[Tensor], category: str) -> None:
        """These tensors' storages belong to `category`, whether they were known or not."""
        for tensor in tensors:
            plain = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            key = self._track(plain)
            if key is not None and self._known[key][1] != category:
                size, before = self._known[key]
                self.live[before] -= size
                self.live[category] += size
                self._known[key][1] = category

    def __enter__(self) -> Meter:
        self._resize = torch.UntypedStorage.resize_
        original, meter = self._resize, self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            meter._resized(storage)
            return result

        self._shapes = ShardingPropagator._propagate_tensor_meta_non_cached
        shapes = self._shapes

        def unseen(*args: Any, **kwargs: Any) -> Any:
            # DTensor finds out an operation's shape, once, with whole tensors that are never there.
            meter._paused = True
            try:
                return shapes(*args, **kwargs)
            finally:
                meter._paused = False

        torch.UntypedStorage.resize_ = cast(Any, resize_)
        ShardingPropagator._propagate_tensor_meta_non_cached = unseen
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = cast(Any, self._resize)
        ShardingPropagator._propagate_tensor_meta_non_cached = self._shapes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            # Its own operations on the local shards come here.
            return NotImplemented
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._paused:
            return output
        packet = func._overloadpacket
        self.cost.flops += flops_of(func, args, kwargs, output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        if str(packet) == "fsdp.split_with_sizes_copy":
            # Where FSDP2 keeps the whole weights, made once and resized from then on.
            self.claim(kwargs["out"], "gathers")
        if func.namespace in ("c10d", "_c10d_functional"):
            self._collective(str(packet), args, output)
        return output

    def _collective(self, name: str, args: Any, output: Any) -> None:
        if name in SILENT:
            return
        kind, place = COLLECTIVES[name]
        full = [t for t in tree_leaves(output if place < 0 else args[place]) if isinstance(t, Tensor)]
        if all(t.device.type == "cpu" and t.dtype == torch.float64 and t.ndim <= 1 for t in full):
            # What the host tells other hosts.
            return
        key = Collective(kind, *_group_of(args))
        self.cost.count[key] += 1
        self.cost.bytes[key] += sum(t.numel() * t.element_size() for t in full)
        if name.startswith("c10d._"):
            # FSDP2's buffers: gathered weights, gradients to be reduced, and their reduced shard.
            self.claim([args[1]], "gathers")
            self.claim([args[0]], "gathers" if kind == "all_gather" else "gradients")

    def _track(self, tensor: Tensor) -> int | None:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = [size, self.category]
            self._references[key] = weakref.ref(storage, self._forget(key))
            self._change(self.category, size)
        return key

    def _forget(self, key: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            self._references.pop(key, None)
            size, category = self._known.pop(key)
            self._change(category, -size)

        return freed

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP2 frees and gives back the storage of whole weights so."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = [0, "gathers"]
            self._references[key] = weakref.ref(storage, self._forget(key))
        known = self._known[key]
        self._change(known[1], -known[0])
        known[0], known[1] = size, "gathers"
        self._change("gathers", size)

    def _change(self, category: str, size: int) -> None:
        if category == "host":
            self._on_host += size
            self.host = max(self.host, self._on_host)
            return
        self.live[category] += size
        self.total += size
        self._mark()


def _difference(more: Counter[str], less: Counter[str]) -> Counter[str]:
    """Category by category, below zero too."""
    result = Counter(more)
    result.subtract(less)
    return result


def _group_of(args: Any) -> tuple[int, int]:
    """Of the group among a collective's arguments (a process group, or its name) its size and how far apart its ranks
    are."""
    from torch.distributed import ProcessGroup, get_process_group_ranks
    from torch.distributed.distributed_c10d import _resolve_process_group

    for argument in args:
        group = argument
        if isinstance(argument, torch.ScriptObject):
            group = ProcessGroup.unbox(argument)
        elif isinstance(argument, str) and argument not in ("sum", "avg", "max", "min", "mean"):
            group = _resolve_process_group(cast(Any, argument))
        if isinstance(group, ProcessGroup):
            ranks = get_process_group_ranks(group)
            return len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return 0, 1
