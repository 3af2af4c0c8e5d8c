"""Public on-policy gradient: checks, CPU path, Triton launch, custom operator."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import as_rows, check_dtype, check_no_grad, check_sizes, check_traced, is_eager, per_sample
from .._cpu import column, quotient
from .._launch import coefficient_steps, kernel_scalar, launch, launches, row_strides, rows
from .._noise_args import Noise, noise_cpu, split_noise
from ..noise import NoiseKey, split_seed

Coefficient = float | Tensor


def on_policy_gradient(
    advantage_weight: Tensor,
    b: Coefficient,
    s: Coefficient,
    noise: Noise,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Computes ∂L/∂v = -advantage_weight·b·ε/(s·D) of a strictly on-policy update, without v.

    L = -Σ advantage_weight·exp(log-ratio) at ratio 1, where neither clip nor KL has a gradient (arXiv 2402.03300,
    eq. 3, with π = π_old). Times 2s² it is the gradient of the unit ratio, times s that of RatioNorm, times D that of
    trainers that sum the log-probability over elements. Reads nothing of a latent's size but an explicit ε. Not
    differentiable.

    Args:
        advantage_weight: Each sample's advantage times its weight in the loss (1/number of pairs for a mean), [B]
            float32 or float64.
        b: The step's coefficient of the model output, a float or [B] float64 or float32.
        s: The step's standard deviation, > 0, like b.
        noise: The `NoiseKey` of the step that was taken, or its ε [B, ...].
        shape: The shape of v, of 2 to 5 dimensions.
        dtype: The dtype of v: float32, bfloat16 or float16 (small gradients of large latents underflow in float16).

    Returns:
        The gradient, [B, ...] contiguous in `dtype`.

    Raises:
        ValueError: Shapes, devices or values do not fit: s <= 0, or values that are not finite (checked where reading
            them costs no device-to-host copy); or an input requires a gradient.
        TypeError: A dtype or a type does not fit.
    """
    shape = _check_shape(shape, noise)
    check_dtype("dtype", dtype)
    # A stand-in for v: its shape and device, without its memory.
    like = _source(noise).new_empty((), dtype=torch.float32).expand(shape)
    if not isinstance(advantage_weight, Tensor) or advantage_weight.ndim != 1:
        raise TypeError(f"advantage_weight: expected a [{shape[0]}] tensor, one advantage times weight for each sample")
    weight = per_sample("advantage_weight", advantage_weight, like)
    b, s = per_sample("b", b, like), per_sample("s", s, like, positive=True)
    check_no_grad(advantage_weight=advantage_weight, b=b, s=s)
    eps, words, seed = split_noise(noise, like)
    if not is_eager(eps, words, advantage_weight):
        return _on_policy_gradient_op(*as_rows((weight, b, s), like), eps, words, seed, shape, dtype)
    return _forward(weight, b, s, eps, words, seed, shape, dtype)


def on_policy_backward(
    v: Tensor, advantage_weight: Tensor, b: Coefficient, s: Coefficient, noise: Noise, *, retain_graph: bool = False
) -> None:
    """Back-propagates a strictly on-policy update through the model that made `v`, without forming a loss.

    The same as v.backward(on_policy_gradient(advantage_weight, b, s, noise, v.shape, v.dtype)).

    Args:
        v: The model output [B, ...], with its graph.
        advantage_weight: As of `on_policy_gradient`.
        b: As of `on_policy_gradient`.
        s: As of `on_policy_gradient`.
        noise: As of `on_policy_gradient`.
        retain_graph: Whether the graph can be propagated through again.

    Raises:
        ValueError: v has no graph to propagate through, or an argument does not fit.
    """
    if not isinstance(v, Tensor):
        raise TypeError(f"v: expected a tensor, got {type(v).__name__}")
    if not v.requires_grad:
        raise ValueError("v: has no graph to propagate through; evaluate the model with gradients enabled")
    gradient = on_policy_gradient(advantage_weight, b, s, noise, v.shape, v.dtype)
    v.backward(gradient, retain_graph=retain_graph)


def _source(noise: Noise) -> Tensor:
    source = noise.words if isinstance(noise, NoiseKey) else noise
    if not isinstance(source, Tensor):
        raise TypeError(f"noise: expected the step's NoiseKey or its noise tensor, got {type(noise).__name__}")
    return source


def _check_shape(shape: Sequence[int], noise: Noise) -> list[int]:
    sizes = check_sizes("shape", shape)
    if not 2 <= len(sizes) <= 5 or math.prod(sizes) <= 0:
        raise ValueError(f"shape: expected v's non-empty [B, ...] of 2 to 5 dimensions, got {sizes}")
    source = _source(noise)
    if source.ndim == 0 or source.shape[0] != sizes[0]:
        raise ValueError(f"shape: has {sizes[0]} samples, the noise is of shape {list(source.shape)}")
    return sizes


def _forward(weight, b, s, eps, words, seed, shape, dtype) -> Tensor:
    source = words if eps is None else eps
    body = launch_on_policy_gradient if launches(source) else on_policy_gradient_cpu
    return body(weight, b, s, eps, words, seed, shape, dtype)


def on_policy_gradient_cpu(
    weight: Coefficient,
    b: Coefficient,
    s: Coefficient,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The ATen path: the noise, scaled in place by a factor made in float64."""
    like = torch.empty((), device="cpu").expand(shape)
    factor = column(-weight * quotient(b, s) / math.prod(shape[1:]), like)
    if eps is not None:
        return torch.mul(eps.to(torch.float32), factor).to(dtype).contiguous()
    return noise_cpu(None, words, seed, like).mul_(factor).to(dtype)


def launch_on_policy_gradient(
    weight: Coefficient,
    b: Coefficient,
    s: Coefficient,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The Triton path: one launch."""
    from ..noise_kernel import BLOCK, NUM_WARPS
    from .kernel import _on_policy_gradient_kernel

    grad = torch.empty(shape, dtype=dtype, device=(words if eps is None else eps).device)  # pyright: ignore[reportOptionalMemberAccess]
    eps = None if eps is None else rows(eps)
    words = None if words is None else words.contiguous()
    weight, b, s = kernel_scalar(weight), kernel_scalar(b), kernel_scalar(s)
    elements = math.prod(shape[1:])
    blocks = -(-elements // BLOCK)
    launch(
        _on_policy_gradient_kernel,
        shape[0] * blocks,
        grad.device,
        grad,
        weight,
        b,
        s,
        eps,
        words,
        *split_seed(seed),
        *row_strides([eps], elements),
        elements,
        blocks,
        **coefficient_steps(("advantage", "b", "s"), (weight, b, s)),
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return grad


@torch.library.custom_op("fastgrpo_kernels::on_policy_gradient", mutates_args=())
def _on_policy_gradient_op(
    weight: Tensor,
    b: Tensor,
    s: Tensor,
    eps: Tensor | None,
    words: Tensor | None,
    seed: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    check_traced(advantage_weight=weight, b=b, s=s)
    return _forward(weight, b, s, eps, words, seed, shape, dtype)


@_on_policy_gradient_op.register_fake
def _(weight, b, s, eps, words, seed, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=weight.device)
