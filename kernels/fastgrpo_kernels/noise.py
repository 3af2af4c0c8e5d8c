"""Counter-based normal noise: the same key gives the same ε on any rank, in any batch, in any order.

NOISE_V1: Philox 4x32-10 (Salmon et al., SC 2011) keyed by the 64-bit seed, with counter words (element // 4, stream and
step, global sample id, iteration); the four output words give the four elements by Box-Muller:

    u = (w + ½)·2⁻³² in float32, θ = 2π·w'·2⁻³²,  ε = √(-2 ln u)·(cos θ, sin θ)

The highest bit of the second counter word is not counted: where it is set, ε has the other sign, to the bit.

Integer words are equal to the bit everywhere; ε is bitwise repeatable on one platform and agrees within 1e-6 absolute
between the CPU path, the Triton kernel and the numpy oracle (`noise_reference.py`).
"""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_dtype, check_integer, check_sizes, is_eager, is_host_readable
from ._launch import launch, launches

NOISE_V1 = 1

STREAM_INITIAL = 0  # initial latents, keyed by prompt or by sample
STREAM_SDE = 1  # ε of stochastic transitions
STREAM_SUBSET = 2  # which steps of a trajectory are trained
STREAM_VAE = 3  # sampling of a VAE posterior
STREAM_FORWARD = 4  # ε of the forward process at a training row, keyed by sample or by pair

_MASK = 0xFFFFFFFF
# What of a key's first word is counted; the bit above it mirrors.
_COUNTED = 0x7FFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
# Counters hashed at a time on the CPU: int64 temporaries of 512 KiB stay in cache.
_CPU_CHUNK = 1 << 16

Rows = int | Sequence[int] | Tensor


class NoiseKey(NamedTuple):
    """Names the noise of B samples: `seed` in [0, 2⁶³) and int32 `words` [B, 3] on the latents' device.

    Columns of `words` are (mirrored << 31 | stream << 24 | step, global sample id, iteration). Build it by `noise_key`.
    """

    seed: int
    words: Tensor


def noise_key(
    seed: int, sample: Sequence[int] | Tensor, step: Rows, iteration: Rows, stream: int, device: torch.device | str,
    *, antithetic: bool = False,
) -> NoiseKey:  # fmt: skip
    """Returns the key of one noise draw for each of B samples.

    Args:
        seed: The run's seed, in [0, 2⁶³).
        sample: The global ids of the samples, [B], a list or an integer tensor; they count modulo 2³².
        step: The index of the step, an int or [B], in [0, 2²⁴).
        iteration: The number of the iteration, an int or [B]; it counts modulo 2³².
        stream: What the noise is for: one of the STREAM constants, in [0, 128).
        device: Where the noise is to be drawn.
        antithetic: Samples 2k and 2k + 1 get one draw with opposite signs (antithetic variates; Hammersley and Morton
            1956). Each is standard normal still; what is even in ε cancels between the two.

    Raises:
        ValueError: A number is out of its range; tensors on a device are not read.
    """
    seed = check_integer("seed", seed, 0, 1 << 63)
    check_integer("stream", stream, 0, 128)
    _check_steps(step)
    ids = _int64("sample", sample, device)
    if ids.ndim != 1:
        raise ValueError(f"sample: expected [B] ids, got shape {list(ids.shape)}")
    first = _column("step", step, ids) | (stream << 24)
    if antithetic:
        first, ids = first | ((ids & 1) << 31), ids & ~1
    columns = [first, ids, _column("iteration", iteration, ids)]
    # Conversion keeps the low 32 bits.
    return NoiseKey(seed, torch.stack(columns, dim=1).to(torch.int32))


def normal(key: NoiseKey, shape_per_row: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws standard normal noise by Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller.

    Row i depends on row i of the key alone: not on B, the device's block size, or any generator's state.

    Args:
        key: The key of B draws.
        shape_per_row: The shape of one draw; it has elements.
        dtype: The dtype that the float32 noise is rounded to.

    Returns:
        The noise, [B, *shape_per_row] on the key's device.
    """
    check_key(key)
    check_dtype("dtype", dtype)
    shape_per_row = check_sizes("shape_per_row", shape_per_row)
    elements = math.prod(shape_per_row)
    if elements <= 0:
        raise ValueError(f"shape_per_row: has no elements, got {list(shape_per_row)}")
    if is_eager(key.words):
        rows = _normal_body(key.words, key.seed, elements)
    else:
        rows = _normal_op(key.words, key.seed, elements)
    return rows.view(-1, *shape_per_row).to(dtype)


def random_words(key: NoiseKey, count: int) -> Tensor:
    """Returns the first random words of each row's sequence: int64 [B, count], values in [0, 2³²).

    Args:
        key: The key of B draws.
        count: The number of words a row, below 2³⁴.
    """
    check_key(key)
    check_integer("count", count, 1, 1 << 34)
    groups = torch.arange((count + 3) // 4, dtype=torch.int64, device=key.words.device)
    words = torch.stack(_philox(groups, key.words, key.seed), dim=-1)
    return words.flatten(1)[:, :count]


def uniform(key: NoiseKey, count: int) -> Tensor:
    """Returns uniform draws in (0, 1), float64 [B, count]: for draws of steps and subsets on the host.

    Args:
        key: The key of B draws.
        count: The number of draws a row; each takes one word of `random_words`.
    """
    return (random_words(key, count).to(torch.float64) + 0.5) * 2.0**-32


def check_key(key: object, batch: int | None = None, device: torch.device | None = None) -> None:
    """Refuse a malformed key, or one that is not of `batch` rows on `device`."""
    if not isinstance(key, NoiseKey):
        raise TypeError(f"noise: expected a NoiseKey, got {type(key).__name__}; build it with noise_key(...)")
    words = key.words
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != 3:
        raise ValueError(f"noise: expected int32 words [B, 3], got {words.dtype} {list(words.shape)}")
    if batch is not None and words.shape[0] != batch:
        raise ValueError(f"noise: key has {words.shape[0]} rows, the latents have {batch}")
    if device is not None and words.device != device:
        raise ValueError(f"noise: key is on {words.device}, the latents on {device}; build it there")


def split_seed(seed: int) -> tuple[int, int]:
    """Low and high half of the seed as signed 32-bit integers, as kernels take them."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def _normal_body(words: Tensor, seed: int, elements: int) -> Tensor:
    return (launch_normal if launches(words) else normal_cpu)(words, seed, elements)


@torch.library.custom_op("fastgrpo_kernels::normal", mutates_args=())
def _normal_op(words: Tensor, seed: int, elements: int) -> Tensor:
    return _normal_body(words, seed, elements)


@_normal_op.register_fake
def _(words: Tensor, seed: int, elements: int) -> Tensor:
    return words.new_empty((words.shape[0], elements), dtype=torch.float32)


def normal_cpu(words: Tensor, seed: int, elements: int) -> Tensor:
    """ε as float32 [B, elements] in ATen: int64 arithmetic for the words, float64 for the angle."""
    batch = words.shape[0]
    groups = (elements + 3) // 4
    out = torch.empty((batch, groups, 4), dtype=torch.float32, device=words.device)
    columns = max(_CPU_CHUNK // max(batch, 1), 1)
    sign = torch.where(words[:, :1] < 0, -1.0, 1.0)
    for start in range(0, groups, columns):
        index = torch.arange(start, min(start + columns, groups), dtype=torch.int64, device=words.device)
        w = _philox(index, words, seed)
        block = out[:, start : start + columns]
        for pair in (0, 2):
            # Scaling by 2⁻³² is exact, so fused and separate multiply-adds round alike.
            u = w[pair].to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
            radius = u.log_().mul_(-2.0).clamp_min_(0.0).sqrt_().mul_(sign)
            angle = w[pair + 1].to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
            torch.mul(radius, angle.cos().to(torch.float32), out=block[:, :, pair])
            torch.mul(radius, angle.sin_().to(torch.float32), out=block[:, :, pair + 1])
    flat = out.view(batch, groups * 4)
    return flat if groups * 4 == elements else flat[:, :elements].contiguous()


def launch_normal(words: Tensor, seed: int, elements: int) -> Tensor:
    """ε as float32 [B, elements] from the Triton kernel."""
    from .noise_kernel import BLOCK, NUM_WARPS, _normal_kernel

    words = words.contiguous()
    out = torch.empty((words.shape[0], elements), dtype=torch.float32, device=words.device)
    blocks = -(-elements // BLOCK)
    arguments = out, words, *split_seed(seed), elements, blocks
    launch(_normal_kernel, words.shape[0] * blocks, words.device, *arguments, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def _philox(groups: Tensor, words: Tensor, seed: int) -> list[Tensor]:
    """Philox 4x32-10 of counters (groups [G], *words [B, 3]): four int64 tensors [B, G] of 32-bit values."""
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    row = words.to(torch.int64).bitwise_and_(_MASK)
    # The first rounds broadcast: counters vary along G, key words along B.
    c0, c1, c2, c3 = (groups & _MASK).unsqueeze(0), row[:, 0:1] & _COUNTED, row[:, 1:2], row[:, 2:3]
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, and the mask drops the sign that >> extends.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0 = ((b >> 32) ^ (c1 ^ key_a)).bitwise_and_(_MASK)
        c2 = ((a >> 32) ^ (c3 ^ key_b)).bitwise_and_(_MASK)
        c1, c3 = b & _MASK, a & _MASK
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    shape = torch.broadcast_shapes(c0.shape, c1.shape)
    return [c.expand(shape) for c in (c0, c1, c2, c3)]


def _check_steps(step: Rows) -> None:
    """Refuse steps that would run into the stream's bits, where reading them costs no device-to-host copy."""
    if isinstance(step, (int, numbers.Integral)):
        check_integer("step", step, 0, 1 << 24)
    elif not isinstance(step, Tensor) or is_host_readable(step):
        steps = _int64("step", step, "cpu")
        outside = steps[(steps < 0) | (steps >= 1 << 24)]
        if outside.numel():
            raise ValueError(f"step: must be in [0, 2**24), got {int(outside[0])}")


def _int64(name: str, value: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype == torch.bool:
            raise TypeError(f"{name}: expected integers, got {value.dtype}")
        return value.to(device=device, dtype=torch.int64, non_blocking=True)
    if not isinstance(value, Sequence) or not all(isinstance(v, numbers.Integral) for v in value):
        raise TypeError(f"{name}: expected integers, got {value!r}")
    host = torch.tensor(value, dtype=torch.int64, device="cpu")
    if torch.device(device).type == "cuda":
        # Pinned memory: a pageable copy would wait for the device.
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _column(name: str, value: Rows, ids: Tensor) -> Tensor:
    if isinstance(value, (int, numbers.Integral)):
        return torch.full_like(ids, int(value))
    column = _int64(name, value, ids.device)
    if column.shape != ids.shape:
        raise ValueError(f"{name}: expected an int or shape {list(ids.shape)}, got {list(column.shape)}")
    return column
