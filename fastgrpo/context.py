"""Context parallelism: the tokens of a sample split over ranks in every block (Ulysses, arXiv 2309.14509).

Every rank of a group gets the whole model output, and its gradients are those of its own tokens: they add up to the
whole. FLUX and Wan follow diffusers' own plans; HunyuanVideo, which has none, splits its video tokens, keeps its text
on every rank and exchanges heads in `joint_attention`.
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
    module: nn.Module, tokens: Sequence[int], ranks: int, size: int, device: str, method: str = "ulysses"
) -> None:
    """Splits the tokens of a diffusers transformer over every `size` consecutive ones of `ranks` processes, in place.

    tokens: the lengths of the sequences that are split; method: ulysses or ring. Raises ConfigError for a model without
    a plan, and for heads or tokens that do not divide.
    """
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    kind = type(module).__name__
    plan = _video_plan() if kind == "HunyuanVideoTransformer3DModel" else getattr(module, "_cp_plan", None)
    if plan is None:
        raise ConfigError(f"parallel.context: {size}, but {kind} has no plan to split its tokens; leave it at 1")
    check_split(size, cast(Any, module).config.num_attention_heads, tokens, method)
    ring, ulysses = (size, 1) if method == "ring" else (1, size)
    mesh = init_device_mesh(device, (ranks // size, ring, ulysses), mesh_dim_names=("data", "ring", "ulysses"))
    config = ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses)
    # What diffusers' enable_parallelism sets up, which needs a GPU to count.
    config.setup(dist.get_rank(), ranks, torch.device(device), mesh)
    for part in module.modules():
        processor = getattr(part, "processor", None)
        if processor is not None and hasattr(processor, "_parallel_config"):
            processor._parallel_config = ParallelConfig(context_parallel_config=config)
    apply_context_parallel(module, config, plan)


def check_split(size: int, heads: int, tokens: Sequence[int], method: str) -> None:
    """Raises ConfigError for tokens, and with Ulysses heads, that `size` does not divide."""
    if method == "ulysses" and heads % size:
        raise ConfigError(f"parallel.context: {size} does not divide the model's {heads} attention heads")
    if odd := next((n for n in tokens if n % size), None):
        raise ConfigError(
            f"parallel.context: {size} does not divide the {odd} tokens of a sample; change model.height, width, "
            "frames or max_sequence_length, or split over fewer ranks"
        )


def check_context(config: Any, kinds: Sequence[str], parts: Mapping[str, Mapping[str, Any]], device: str) -> None:
    """Raises ConfigError for context parallelism that a model cannot have, from its components' configs alone.

    config: of the run. kinds: those that the family has. parts: as `ModelFamily.read_configs` gives them.
    """
    family, size, method = config.model.family, config.parallel.context, config.parallel.context_kind
    if method not in kinds:
        other = f"set parallel.context_kind to {' or '.join(kinds)}, or leave it at 1" if kinds else "leave it at 1"
        raise ConfigError(f"parallel.context: {size}, but the tokens of {family} cannot be split by {method}; {other}")
    if method == "ring" and device == "cpu":
        raise ConfigError("parallel.context_kind: ring attention needs GPUs; on a CPU use ulysses")
    transformer = parts.get("transformer") or parts["transformer_2"]
    check_split(
        size, transformer["num_attention_heads"], token_lengths(config.model, transformer, parts["vae"]), method
    )


def split_lengths(family: Any) -> list[int]:
    """`token_lengths` of a family that is loaded."""
    return token_lengths(family.config, family.transformer.config, family.pipeline.vae.config)


def token_lengths(model: Any, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> list[int]:
    """The token sequences of a sample that a plan splits: an image's or a video's, and FLUX's text.

    model: its settings; transformer, vae: the configs of its components.
    """
    if model.family == "flux":
        side = 2 * 2 ** (len(vae["block_out_channels"]) - 1)
        return [(model.height // side) * (model.width // side), model.max_sequence_length]
    space = vae.get("spatial_compression_ratio") or vae["scale_factor_spatial"]
    time = vae.get("temporal_compression_ratio") or vae["scale_factor_temporal"]
    patch = transformer["patch_size"]
    t, h, w = patch if isinstance(patch, Sequence) else (transformer["patch_size_t"], patch, patch)
    frames = (model.frames - 1) // time + 1
    return [(frames // t) * (model.height // space // h) * (model.width // space // w)]


def _video_plan() -> dict[str, Any]:
    """HunyuanVideo's: video tokens and their positions are split once they are embedded, and gathered at the end."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    def after(dim: int, dims: int) -> Any:
        return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=True)

    return {
        "x_embedder": {0: after(1, 3)},
        "rope": {0: after(0, 2), 1: after(0, 2)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }


def group_of(parallel: Any) -> tuple[Any, int, int]:
    """(process group, size, rank in it) of a diffusers parallel config; of None: (None, 1, 0)."""
    if parallel is None:
        return None, 1, 0
    mesh = parallel.context_parallel_config._ulysses_mesh
    return mesh.get_group(), mesh.size(), mesh.get_local_rank()


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
