"""A frozen base in NF4 (QLoRA, arXiv 2305.14314): bitsandbytes packs two weights a byte, with a float32 scale for each
64 of them: 4.5 bits a weight.

bitsandbytes' own layer takes other kernels without gradients, or for a single row, than with them; here rollout and
replay are one path, a dequantized weight and a matrix product, so that the ratio starts at exactly 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.config import Model
from fastgrpo.errors import require

BLOCK = 64


def check_quantization(config: Model) -> None:
    """Raises UserError where model.quantize needs a package that is not installed; loads nothing."""
    if config.quantize:
        require("bitsandbytes", f"model.quantize: {config.quantize}")


class NF4Linear(nn.Linear):
    """A linear layer whose frozen weight is `weight` (uint8, two to a byte) and `scale` (float32, one a block).

    Both are buffers: whole on every rank, never sharded. Its output is differentiable in its input alone.
    """

    weight: Any

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, scale = _quantized(layer.weight, device)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        shape = self.out_features, self.in_features
        return _Product.apply(input, self.weight, self.scale, self.bias, shape)  # pyright: ignore


class _Product(torch.autograd.Function):
    """x Wᵀ + bias. Backward dequantizes W again, which keeps it out of memory in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Any, shape: Any) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.shape = shape
        return nn.functional.linear(x, dequantize(packed, scale, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        packed, scale = ctx.saved_tensors
        return grads[0] @ dequantize(packed, scale, ctx.shape, grads[0].dtype), None, None, None, None


# An operator of ours, so that a plan needs no bitsandbytes: on fake tensors PyTorch takes what is registered below.
@torch.library.custom_op(
    "fastgrpo::dequantize_nf4", mutates_args=(),
    schema="(Tensor packed, Tensor scale, int[] shape, ScalarType dtype) -> Tensor",
)  # fmt: skip
def dequantize(packed: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`."""
    import bitsandbytes.functional  # noqa: F401  (registers the operation)

    return torch.ops.bitsandbytes.dequantize_4bit(packed, scale, BLOCK, "nf4", shape, dtype)


@dequantize.register_fake
def _(packed: Tensor, scale: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def _quantized(weight: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The packed weight [⌈n/2⌉, 1] uint8 and its scales [⌈n/64⌉] float32; of a meta tensor, the same without values."""
    if weight.is_meta:
        count = weight.numel()
        packed = torch.empty(-(-count // 2), 1, dtype=torch.uint8, device="meta")
        return packed, torch.empty(-(-count // BLOCK), device="meta")
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.detach().to(device), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax


def quantize_layers(blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Replaces the linear layers of these blocks, one after another, so that the device never holds them whole."""
    for block in blocks:
        for part in list(block.modules()):
            for name, layer in list(part.named_children()):
                if type(layer) is nn.Linear:
                    setattr(part, name, NF4Linear(layer, device))


def quantized_layers(module: nn.Module) -> list[NF4Linear]:
    return [layer for layer in module.modules() if isinstance(layer, NF4Linear)]


def parameter_count(module: nn.Module) -> int:
    """Weights of a module, quantized ones by what they stand for."""
    packed = sum(layer.in_features * layer.out_features for layer in quantized_layers(module))
    return packed + sum(p.numel() for p in module.parameters())
