"""Context parallelism: the tokens of a sample split over ranks in every block (Ulysses, arXiv 2309.14509).

Every rank of a group gets the whole model output, and its gradients are those of its own tokens: they add up to the
whole. A plan, which the family gives, says where a model's tokens are split and joined; most are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from fastgrpo.errors import ConfigError


def split_tokens(
    module: nn.Module,
    plan: Mapping[str, Any] | None,
    tokens: Sequence[int],
    ranks: int,
    size: int,
    device: str,
    method: str = "ulysses",
) -> None:
    """Splits the tokens of a diffusers transformer over every `size` consecutive ones of `ranks` processes, in place.

    plan: where, in diffusers' form (`_cp_plan`); tokens: the lengths of the sequences that are split; method: ulysses
    or ring. Raises ConfigError for a model without a plan, and for heads or tokens that do not divide.
    """
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    if plan is None:
        kind = type(module).__name__
        raise ConfigError(f"parallel.context: {size}, but {kind} has no plan to split its tokens; leave it at 1")
    check_split(size, head_count(cast(Any, module).config), tokens, method)
    ring, ulysses = (size, 1) if method == "ring" else (1, size)
    mesh = init_device_mesh(device, (ranks // size, ring, ulysses), mesh_dim_names=("data", "ring", "ulysses"))
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses)
    # What diffusers' enable_parallelism sets up, which needs a GPU to count.
    config.setup(dist.get_rank(), ranks, torch.device(device), mesh)
    for part in module.modules():
        processor = getattr(part, "processor", None)
        if processor is not None and hasattr(processor, "_parallel_config"):
            processor._parallel_config = ParallelConfig(context_parallel_config=config)
    apply_context_parallel(module, config, dict(plan))


def head_count(settings: Mapping[str, Any]) -> int | None:
    """How many attention heads a transformer of these settings has, by either name that diffusers has for it."""
    return settings.get("num_attention_heads", settings.get("n_heads"))


def check_split(size: int, heads: int | None, tokens: Sequence[int], method: str) -> None:
    """Raises ConfigError for tokens, and with Ulysses heads, that `size` does not divide."""
    if method == "ulysses" and heads is None:
        raise ConfigError(f"parallel.context: {size}, but the model's config has no num_attention_heads; leave it at 1")
    if method == "ulysses" and heads is not None and heads % size:
        raise ConfigError(f"parallel.context: {size} does not divide the model's {heads} attention heads")
    if odd := next((n for n in tokens if n % size), None):
        raise ConfigError(
            f"parallel.context: {size} does not divide the {odd} tokens of a sample; change model.height, width, "
            "frames or max_sequence_length, or split over fewer ranks"
        )


def group_of(parallel: Any) -> tuple[Any, int, int]:
    """(process group, size, rank in it) of a diffusers parallel config; of None: (None, 1, 0)."""
    if parallel is None:
        return None, 1, 0
    mesh = parallel.context_parallel_config._ulysses_mesh
    return mesh.get_group(), mesh.size(), mesh.get_local_rank()


def own_tokens(x: Tensor, dim: int, size: int, rank: int) -> Tensor:
    """This rank's tokens of what every rank holds: one of `size` equal slices along `dim`."""
    return x if size == 1 else x.chunk(size, dim=dim)[rank]


def tokens_to_heads(x: Tensor, group: Any, size: int) -> Tensor:
    """[B, S / size, H, D] of every rank -> [B, S, H / size, D] of all tokens; differentiable."""
    if size == 1:
        return x
    batch, tokens, heads, width = x.shape
    # One slab of heads for each rank, first.
    sent = x.reshape(batch, tokens, size, heads // size, width).permute(2, 0, 1, 3, 4).contiguous()
    slabs = _exchange(sent, group)
    return slabs.permute(1, 0, 2, 3, 4).reshape(batch, size * tokens, heads // size, width)


def heads_to_tokens(x: Tensor, group: Any, size: int) -> Tensor:
    """`tokens_to_heads` undone."""
    if size == 1:
        return x
    batch, tokens, heads, width = x.shape
    sent = x.reshape(batch, size, tokens // size, heads, width).permute(1, 0, 2, 3, 4).contiguous()
    slabs = _exchange(sent, group)
    return slabs.permute(1, 2, 0, 3, 4).reshape(batch, tokens // size, size * heads, width)


def own_heads(x: Tensor, size: int, rank: int) -> Tensor:
    """[B, T, H / size, D]: this rank's heads of what every rank holds."""
    return x if size == 1 else x.chunk(size, dim=2)[rank]


def all_heads(x: Tensor, group: Any, size: int) -> Tensor:
    """[B, T, H, D] of every rank's heads. Its gradient is summed over ranks: each has the part of its own tokens."""
    if size == 1:
        return x
    gathered = funcol.all_gather_single_autograd(x.movedim(2, 0).contiguous(), 0, group)
    return gathered.movedim(0, 2)


def _exchange(x: Tensor, group: Any) -> Tensor:
    """Slab i of [size, …] to rank i, and its slab from there."""
    out = funcol.all_to_all_single_autograd(x.flatten(0, 1), None, None, group)
    return funcol.wait_tensor(out).reshape(x.shape)
