"""AdamW on the trained weights, gradient clipping, the learning-rate schedule and the EMA, without a host read.

A gradient that is not finite skips the step on every rank alike (fused AdamW's found_inf) and is counted. With 8-bit
moments (fastgrpo/distributed/adamw_8bit.py) fused AdamW keeps the small tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgrpo.config import Config, OldPolicyDecay, Update
from fastgrpo.distributed.adamw_8bit import SMALLEST, AdamW8bit
from fastgrpo.distributed.fsdp import reshard
from fastgrpo.distributed.shards import exchanged, locals_of
from fastgrpo.models.trainable import OldPolicy
from fastgrpo.training.learning_rate import LearningRate

# As torch.amp.GradScaler has them.
FIRST_LOSS_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


def optimizer_steps(config: Config) -> int:
    """Returns how many optimizer steps a run takes, where every one has samples to train."""
    update, iterations = config.update, config.train.iterations
    # Rollouts that an iteration trains again: fewer at first.
    again = sum(min(iteration, update.replay - 1) for iteration in range(iterations))
    return update.optimizer_steps * (iterations * update.epochs + again)


class LossScale:
    """What the loss is multiplied by where gradients are float16 (arXiv 1710.03740), all on the device.

    Doubled after GROWTH_INTERVAL steps whose gradients were finite, halved after one whose were not.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), FIRST_LOSS_SCALE, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: Tensor) -> None:
        """After an optimizer step; skipped: float32 scalar, 1 where gradients were not finite."""
        torch._amp_update_scale_(self.scale, self.growth, skipped, 2.0, 0.5, GROWTH_INTERVAL)


class OptimizerState:
    """The optimizer of a run, after `steps` optimizer steps; a cosine schedule ends at `total_steps`."""

    def __init__(
        self, policy: nn.Module, config: Update, total_steps: int, eight_bit: type[AdamW8bit] = AdamW8bit,
        loss_scaling: bool = False, old: OldPolicy | None = None, old_decay: OldPolicyDecay | None = None,
    ) -> None:  # fmt: skip
        self.config, self.steps = config, 0
        self.rate = LearningRate(config.optimizer, total_steps, total_steps / (config.optimizer_steps * config.epochs))
        self.policy, self.old, self.old_decay = policy, old, old_decay or OldPolicyDecay()
        self.names = [name for name, p in policy.named_parameters() if p.requires_grad]
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        opt = config.optimizer
        smallest = SMALLEST if opt.kind == "adamw_8bit" else math.inf
        named = list(zip(self.names, self.parameters, strict=True))
        large = {n: p for n, p in named if p.numel() >= smallest}
        self.full = {n: p for n, p in named if p.numel() < smallest}
        self.eight_bit = eight_bit(large, opt) if large else None
        self.adamw = torch.optim.AdamW(
            [{"params": list(self.full.values())}],
            lr=self.rate.at(0),
            betas=(opt.beta1, opt.beta2),
            eps=opt.eps,
            weight_decay=opt.weight_decay,
            fused=True,
        )
        for p in self.full.values():
            # Made now, not at the first step, so that a checkpoint can be loaded into it.
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.adamw.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **zeros}
        self.loss_scale = LossScale(self.parameters[0].device) if loss_scaling else None
        decay = config.ema_decay
        self.ema = None if decay is None else [p.detach().clone() for p in self.parameters]

    @property
    def latest_rate(self) -> float:
        """The learning rate of the last step, before the first one that of the first."""
        return self.rate.at(max(self.steps - 1, 0))

    def seed(self, gradient: Tensor) -> Tensor:
        """Returns what a loss's backward starts from for the coming step: `gradient`, times the loss scale if any."""
        return gradient if self.loss_scale is None else gradient * self.loss_scale.scale

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step on the accumulated gradients: (gradient norm before clipping, 1.0 if it was skipped).

        Both are float32 scalars on the device.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self.loss_scale is not None:
            torch._foreach_mul_(locals_of(grads), 1 / self.loss_scale.scale)
        norm = torch.nn.utils.get_total_norm(grads)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skipped = (~torch.isfinite(norm)).float()
        if self.loss_scale is not None:
            self.loss_scale.update(skipped)
        torch._foreach_mul_(locals_of(grads), (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.adamw.param_groups:
            group["lr"] = self.rate.at(self.steps)
        # The fused kernel leaves weights, moments and step counts as they are where found_inf is 1.
        self.adamw.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.eight_bit is not None:
            self.eight_bit.step(self.rate.at(self.steps), skipped)
        self.steps += 1
        if self.config.ema_per == "optimizer_step":
            self._average(self.steps)
        return norm, skipped

    def end_iteration(self, iteration: int) -> None:
        """After the optimizer steps of the 0-based iteration, whether or not it had any: the EMA that counts these, and
        the old policy."""
        if self.config.ema_per == "iteration":
            self._average(iteration + 1)
        if self.old is not None:
            self._follow(self.old)

    @torch.no_grad()
    def replace_old(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Gives the old policy other weights, this rank's shards of them. Returns those that it had."""
        assert self.old is not None
        reshard(self.old.modules.values() if self.old.modules else [self.policy])
        before = [shard.clone() for shard in locals_of(self.old.parameters)]
        torch._foreach_copy_(locals_of(self.old.parameters), list(shards))
        return before

    @torch.no_grad()
    def _follow(self, old: OldPolicy) -> None:
        reshard(old.modules.values() if old.modules else [self.policy])
        kept = self.old_decay.at(self.steps)
        # Where it keeps nothing it is the policy to the bit.
        if kept == 0:
            torch._foreach_copy_(locals_of(old.parameters), locals_of(self.parameters))
        else:
            torch._foreach_lerp_(locals_of(old.parameters), locals_of(self.parameters), 1 - kept)

    @torch.no_grad()
    def _average(self, count: int) -> None:
        """The `count`-th average of the EMA, if there is one."""
        decay = self.config.ema_decay
        if self.ema is None or decay is None:
            return
        if self.config.ema_warmup:
            decay = min(decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(locals_of(self.ema), locals_of(self.parameters), 1 - decay)

    @contextmanager
    def averaged(self, use: bool = True) -> Iterator[None]:
        """The EMA weights in place of the trained ones (which come back); nothing changes without an EMA."""
        if self.ema is None or not use:
            yield
            return
        reshard([self.policy])
        with exchanged(locals_of(self.parameters), locals_of(self.ema)):
            try:
                yield
            finally:
                reshard([self.policy])
