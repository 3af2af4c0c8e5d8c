"""A model of few blocks that stands for a deep one: what blocks of one kind cost is linear in how many there are.

FLOPs, collectives and weights are. Memory is at each point of the program: at the first blocks and at the last ones, in
a forward pass or a backward pass, another block adds the same; between them it runs straight from one to the other, so
the peak is at an end. Three blocks (a first, a last and one between) and four give both ends and what one more adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastgrpo.config import Config
from fastgrpo.models import ModelFamily
from fastgrpo.planning.meter import Cost, Meter, Peaks

# Blocks that stand for a stack.
SHORT = 3


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind that follow each other in a module list of a component; begin: the first one's index."""

    component: str
    blocks: str
    begin: int
    length: int


# (stack, index in it, blocks that it has here); of a block that is in none, (None, which of those, 0).
Place = tuple[int | None, int, int]


def stacks_of(family: ModelFamily, config: Config) -> list[Stack]:
    """What can be shortened: none where blocks of a kind are treated differently by their number."""
    every = config.model.activation_checkpointing
    names = [*(config.model.trainable or ()), *((config.model.lora and config.model.lora.targets) or ())]
    if (isinstance(every, int) and every > 1) or any(part.isdigit() for name in names for part in name.split(".")):
        return []
    stacks = []
    for component, name, blocks in _lists(family):
        kinds = [_kind(block) for block in blocks]
        begin = 0
        for end in range(1, len(kinds) + 1):
            if end == len(kinds) or kinds[end] != kinds[begin]:
                if end - begin > SHORT + 1:
                    stacks.append(Stack(component, name, begin, end - begin))
                begin = end
    return stacks


def shorten(family: ModelFamily, stacks: Sequence[Stack], lengths: Sequence[int]) -> None:
    """Leaves `lengths` blocks of each stack, in place."""
    for component, name, blocks in list(_lists(family)):
        kept = set(range(len(blocks)))
        for stack, length in zip(stacks, lengths, strict=True):
            if (stack.component, stack.blocks) == (component, name):
                kept -= set(range(stack.begin + length, stack.begin + stack.length))
        family.modules[component].set_submodule(name, nn.ModuleList(blocks[i] for i in sorted(kept)))


class Stretches:
    """Names what runs for a meter: which call, and which block of it, forward or backward."""

    def __init__(self, meter: Meter, family: ModelFamily, stacks: Sequence[Stack], lengths: Sequence[int]) -> None:
        self.meter = meter
        self.call: tuple[Hashable, ...] = ()
        for component, name, blocks in _lists(family):
            places: dict[int, Place] = {}
            removed = 0
            for number, (stack, length) in enumerate(zip(stacks, lengths, strict=True)):
                if (stack.component, stack.blocks) == (component, name):
                    begin = stack.begin - removed
                    places |= {begin + i: (number, i, length) for i in range(length)}
                    removed += stack.length - length
            alone = iter(range(len(blocks)))
            for i, block in enumerate(blocks):
                place = places[i] if i in places else (None, next(alone), 0)
                self._watch(block, (component, name, *place))

    def enter(self, *call: Hashable) -> None:
        """A call begins, or what lies between two."""
        self.call = call
        self.meter.stretch = (call, "outside", None)

    def _watch(self, block: nn.Module, place: Any) -> None:
        meter = self.meter

        def begin(*_: Any) -> None:
            meter.stretch = (self.call, "forward", place)

        def end(_block: Any, _inputs: Any, outputs: Any) -> None:
            meter.stretch = (self.call, "after", place)
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.requires_grad:
                    output.register_hook(backward)

        def backward(_: Tensor) -> None:
            meter.stretch = (self.call, "backward", place)

        block.register_forward_pre_hook(begin)
        block.register_forward_hook(end)


def deep_cost(costs: Sequence[Cost], more: Sequence[int]) -> Cost:
    """Of the whole depth. costs: at the short depth, and with one block more of each stack; more: those left out."""
    total = costs[0].copy()
    for cost, times in zip(costs[1:], more, strict=True):
        total.add(cost - costs[0], times)
    return total


def deep_number(numbers: Sequence[int], more: Sequence[int]) -> int:
    """`deep_cost` of a number."""
    return numbers[0] + sum(times * (n - numbers[0]) for n, times in zip(numbers[1:], more, strict=True))


def deep_peaks(peaks: Sequence[Peaks], more: Sequence[int]) -> dict[str, int]:
    """Bytes by category at the peak of the whole depth; arguments as of `deep_cost`."""
    ends = [_by_ends(found) for found in peaks]
    best: dict[str, int] = {}
    for name in ends[0]:
        if all(name in other for other in ends):
            categories = set().union(*(other[name] for other in ends))
            live = {c: deep_number([other[name][c] for other in ends], more) for c in categories}
            if not best or sum(live.values()) > sum(best.values()):
                best = live
    return best


def _by_ends(peaks: Peaks) -> dict[Hashable, Counter[str]]:
    """Blocks of a stack counted from its nearer end, the second one of three from both."""
    found: dict[Hashable, Counter[str]] = {}
    for name, live in peaks.items():
        for key in _keys(name):
            if key not in found or live.total() > found[key].total():
                found[key] = live
    return found


def _keys(name: Any) -> Iterator[Hashable]:
    if not isinstance(name, tuple) or len(name) != 3 or name[2] is None:
        yield name
        return
    call, direction, (component, blocks, stack, index, length) = name
    if stack is None:
        yield name
        return
    for end, place in (("first", index), ("last", length - 1 - index)):
        if place <= 1:
            yield call, direction, component, blocks, stack, end, place


def _lists(family: ModelFamily) -> Iterator[tuple[str, str, list[nn.Module]]]:
    """(component, name, blocks) of every module list of repeated blocks."""
    for component, module in family.modules.items():
        for name in family.block_lists:
            yield component, name, list(module.get_submodule(name).children())


def _kind(block: nn.Module) -> tuple[str, tuple]:
    """What makes two blocks alike: their modules, and the names, shapes and types of what they hold."""
    held = (*block.named_parameters(), *block.named_buffers())
    return repr(block), tuple((name, tuple(t.shape), t.dtype) for name, t in held)
