"""What a backward pass recomputes, and blocks that are compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compiles the forward of each block, in place, below what checkpointing and FSDP2 add. Blocks that are alike share
    their code: it is compiled once."""
    for block in blocks:
        block.forward = torch.compile(block.forward)


def checkpoint_activations(blocks: list[nn.Module], setting: str | int) -> None:
    """Recomputes blocks in backward instead of keeping their activations: none, all, every k-th block, or selective,
    all blocks but for the outputs of their matrix products and attention.

    `auto` has been replaced by one of them (fastgrpo/planning/plan.py); it raises ValueError here.
    """
    if setting == "none":
        return
    contexts = partial(create_selective_checkpoint_contexts, saved_operations()) if setting == "selective" else None
    every = 1 if setting in ("all", "selective") else int(setting)
    for block in blocks[::every]:
        block.forward = partial(_recomputed, block.forward, contexts)


def _recomputed(forward, contexts, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    selective = {} if contexts is None else {"context_fn": contexts}
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **selective, **kwargs)


def saved_operations() -> list[Any]:
    """What selective checkpointing keeps: matrix products and attention, by far the most of a block's work."""
    aten = torch.ops.aten
    names = (
        "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )  # fmt: skip
    return [getattr(aten, name).default for name in names]
