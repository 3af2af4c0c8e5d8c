"""What a plan runs once and counts often: calls of a method, micro-batches, optimizer steps that cost the same.

The trainer's own rollout and update take these in place of a plain call and a plain loop, so that nothing of them is
written again here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastgrpo.distributed.residency import Residency
from fastgrpo.planning.depth import Stretches
from fastgrpo.planning.meter import Cost, Meter, Peaks
from fastgrpo.training.micro_batches import MicroBatch
from fastgrpo_kernels.clipped_loss import FIELDS


class Repeated:
    """Stands for a method of the family whose calls cost the same: it is run `runs` times for each component, and the
    last of these calls' cost counts for those that follow. rows: of all calls. last: of a call that has been run."""

    def __init__(
        self, meter: Meter, stretches: Stretches, whole: bool, method: Callable[..., Tensor], runs: int = 2,
        last: dict[int, Any] | None = None,
    ) -> None:  # fmt: skip
        self.meter, self.stretches, self.whole = meter, stretches, whole
        self.method, self.runs = method, runs
        self.calls: dict[int, int] = {}
        self.last: dict[int, tuple[Cost, Peaks, tuple[int, ...], torch.dtype]] = {} if last is None else last
        self.shared = last is not None
        self.rows = 0

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        self.rows += len(x)
        key = id(rest[2]) if len(rest) > 2 else 0
        call = self.calls[key] = self.calls.get(key, 0) + 1
        known = key in self.last and (self.shared or call > self.runs)
        if known and not self.whole:
            cost, more, shape, dtype = self.last[key]
            self.meter.cost.add(cost)
            self.meter.swell(more)
            return torch.empty(shape, dtype=dtype)
        before, outside = self.meter.cost.copy(), self.stretches.call
        category = self.meter.category
        self.stretches.enter(self.method.__name__, list(self.calls).index(key), min(call, self.runs))
        with self.meter.counting("activations"), self.meter.transient() as more:
            output = self.method(x, *rest)
        self.stretches.enter(*outside)
        self.meter.claim([output], category)
        self.last[key] = self.meter.cost - before, more, tuple(output.shape), output.dtype
        return output


class CountedWalk:
    """Goes through the micro-batches of optimizer steps in place of the trainer, counting what is left out.

    An optimizer step made like the one before is counted and not run. Of each component the first micro-batch, and then
    one of each kind, are run; with `whole` all of them. rows: of all micro-batches.
    """

    def __init__(self, meter: Meter, stretches: Stretches, whole: bool, policy: nn.Module, kept: Residency) -> None:
        self.meter, self.stretches, self.whole, self.policy = meter, stretches, whole, policy
        # Micro-batches of one kind cost the same, but for a step's first.
        self.syncs_matter = kept.sync_once or kept.update_unsharded
        # Rows with gradients, and those that other policies evaluate.
        self.rows = self.compared = 0
        # What the last step that was run is made of, and its cost, its optimizer included, once it has ended.
        self._made_of: list[Any] | None = None
        self._begin, self._cost = Cost(), None
        # The peaks of its micro-batches, over its beginning.
        self._peaks: Peaks = {}
        self._statistics: list[Tensor] = []

    def __call__(self, chosen: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        self.rows += sum(len(micro.rows) for micro in chosen)
        self.compared += sum(len(micro.rows) * micro.others for micro in chosen)
        if not self.whole:
            if self._made_of is not None and self._cost is None:
                self._cost = self.meter.cost - self._begin
            made_of = [self._kind(micro) for micro in chosen]
            if made_of == self._made_of and self._cost is not None:
                self.meter.cost.add(self._cost)
                self.meter.swell(self._peaks)
                self._keep_statistics(len(chosen))
                return
            self._made_of, self._begin, self._cost = made_of, self.meter.cost.copy(), None
        with self.meter.transient() as self._peaks:
            yield from self._thinned(chosen)
        self.stretches.enter("optimizer")

    def _thinned(self, chosen: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        meter, begun, known = self.meter, set(), {}
        for micro in chosen:
            kind = self._kind(micro)
            if kind in known and not self.whole:
                cost, more = known[kind]
                meter.cost.add(cost)
                meter.swell(more)
                self._keep_statistics(1)
                continue
            before, first = meter.cost.copy(), micro.module not in begun
            self.stretches.enter("micro-batch", kind, first)
            with meter.transient() as more:
                yield micro
            meter.claim(_gradients(self.policy), "gradients")
            if not first:
                known[kind] = meter.cost - before, more
            begun.add(micro.module)

    def _keep_statistics(self, count: int) -> None:
        """What an update keeps of micro-batches for its metrics, here of those that are left out."""
        self._statistics += [torch.empty(len(FIELDS)) for _ in range(count)]

    def _kind(self, micro: MicroBatch) -> tuple[str, int, bool, int]:
        return micro.module, micro.pairs.shape[1], micro.syncs and self.syncs_matter, micro.others


def _gradients(policy: nn.Module) -> Iterator[Tensor]:
    for parameter in policy.parameters():
        if parameter.grad is not None:
            yield parameter.grad
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    if parameter.unsharded_accumulated_grad is not None:
                        yield parameter.unsharded_accumulated_grad
