"""NOISE_V1: words to the bit, normals to 1e-6, and statistics; independent of batch, threads and implementation."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.kernel_cases import KERNEL_DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgrpo_kernels import (
    STREAM_INITIAL,
    STREAM_SDE,
    STREAM_SUBSET,
    _launch,
    noise,
    noise_key,
    normal,
    random_words,
    uniform,
)
from fastgrpo_kernels.noise_kernel import _normal_kernel
from fastgrpo_kernels.noise_reference import normal as oracle_normal
from fastgrpo_kernels.noise_reference import philox_words

ABSOLUTE = 1e-6


def key_of(rows: int, *, seed: int = 2**62 + 77, step: int = 3) -> noise.NoiseKey:
    return noise_key(seed, list(range(rows)), step, 9, STREAM_SDE, "cpu")


@pytest.mark.parametrize(
    "seed, words, expected",
    [
        (0, [0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        # Random123's other known answers have a counter word 0 that is no small element group.
        (2**63 - 1, [-1, -1, -1], None),
    ],
)
def test_words_equal_the_oracle_and_random123(seed, words, expected):
    key = noise.NoiseKey(seed, torch.tensor([words], dtype=torch.int32))
    ours = random_words(key, 4099)
    oracle = philox_words(key.words.numpy(), seed, 1025).reshape(1, -1)[:, :4099]
    assert np.array_equal(ours.numpy(), oracle.astype(np.int64))
    if expected is not None:
        assert ours[0, :4].tolist() == expected


@pytest.mark.parametrize("elements", [1, 63, 1000, 4097])
def test_normals_agree_with_the_oracle_and_the_kernel(elements):
    key = key_of(3)
    oracle = torch.from_numpy(oracle_normal(key.words.numpy(), key.seed, elements))
    cpu = normal(key, (elements,))
    kernel = noise.launch_normal(key.words.to(KERNEL_DEVICE), key.seed, elements).cpu()
    assert (cpu.double() - oracle).abs().max() <= ABSOLUTE
    assert (kernel.double() - oracle).abs().max() <= ABSOLUTE
    assert (kernel - cpu).abs().max() <= ABSOLUTE


@pytest.mark.parametrize("elements", [1, 63, 4097])
def test_antithetic_samples_mirror_each_other_to_the_bit(elements):
    plain = key_of(6)
    pairs = noise_key(plain.seed, list(range(6)), 3, 9, STREAM_SDE, "cpu", antithetic=True)
    own, drawn = normal(plain, (elements,)), normal(pairs, (elements,))
    assert torch.equal(drawn[::2], own[::2])
    assert torch.equal(drawn[1::2], -own[::2])
    kernel = noise.launch_normal(pairs.words.to(KERNEL_DEVICE), pairs.seed, elements)
    assert torch.equal(kernel[1::2], -kernel[::2])
    oracle = torch.from_numpy(oracle_normal(pairs.words.numpy(), pairs.seed, elements))
    assert (kernel.cpu().double() - oracle).abs().max() <= ABSOLUTE
    # From a tensor of ids as from a list, and with a row's own step and iteration.
    ids, rows = torch.arange(6), torch.tensor([3, 3, 4, 4, 5, 5])
    mixed = noise_key(plain.seed, ids, rows, rows + 6, STREAM_SDE, "cpu", antithetic=True)
    assert torch.equal(mixed.words[:2], pairs.words[:2])
    assert torch.equal(normal(mixed, (elements,))[1::2], -normal(mixed, (elements,))[::2])


def test_a_million_normals_agree_with_the_oracle():
    key = key_of(16)
    oracle = torch.from_numpy(oracle_normal(key.words.numpy(), key.seed, 1 << 16))
    assert (normal(key, (1 << 16,)).double() - oracle).abs().max() <= ABSOLUTE


def test_bits_depend_on_the_row_alone():
    key = key_of(64)
    full = normal(key, (5, 1001))
    assert torch.equal(normal(key, (5, 1001)), full)
    for rows in (slice(17, 18), slice(3, 9), torch.tensor([40, 2, 63])):
        assert torch.equal(normal(noise.NoiseKey(key.seed, key.words[rows]), (5, 1001)), full[rows])
    # A longer row starts with the shorter one, although the work is cut elsewhere.
    assert torch.equal(normal(noise.NoiseKey(key.seed, key.words[:2]), (70_001,))[:, :5005], full[:2].flatten(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(normal(key, (5, 1001)), full)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [256, 1024])
def test_kernel_bits_do_not_depend_on_the_block(block):
    words = key_of(2).words.to(KERNEL_DEVICE)
    out, elements = torch.empty(2, 4100, device=KERNEL_DEVICE), 4100
    blocks = -(-elements // block)
    _launch.launch(
        _normal_kernel,
        2 * blocks,
        out.device,
        out,
        words,
        *noise.split_seed(3),
        elements,
        blocks,
        BLOCK=block,
        num_warps=4,
    )
    assert torch.equal(out, noise.launch_normal(words, 3, elements))


def test_every_part_of_the_key_matters_and_draws_are_uncorrelated():
    count = 1 << 16
    draws = {
        "base": noise_key(7, [5], 3, 9, STREAM_SDE, "cpu"),
        "seed": noise_key(8, [5], 3, 9, STREAM_SDE, "cpu"),
        "high seed": noise_key(7 + 2**32, [5], 3, 9, STREAM_SDE, "cpu"),
        "sample": noise_key(7, [6], 3, 9, STREAM_SDE, "cpu"),
        "step": noise_key(7, [5], 4, 9, STREAM_SDE, "cpu"),
        "iteration": noise_key(7, [5], 3, 10, STREAM_SDE, "cpu"),
        "stream": noise_key(7, [5], 3, 9, STREAM_INITIAL, "cpu"),
    }
    rows = torch.cat([normal(key, (count,)) for key in draws.values()]).double().numpy()
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    # Five standard errors, over 21 pairs.
    assert np.abs(correlation).max() < 5 / np.sqrt(count)
    lagged = [np.corrcoef(rows[0, :-lag], rows[0, lag:])[0, 1] for lag in (1, 2, 3, 4)]
    assert np.abs(lagged).max() < 5 / np.sqrt(count)


def test_normals_are_normal():
    draws = normal(key_of(64, seed=1), (1 << 14,)).double().flatten().numpy()
    n = draws.size
    assert abs(draws.mean()) < 5 / np.sqrt(n)
    assert abs(draws.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs(stats.skew(draws)) < 5 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(draws)) < 5 * np.sqrt(24 / n)
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    # Each lane of the four has its own formula.
    for lane in range(4):
        assert stats.kstest(draws[lane::4], "norm").pvalue > 1e-3
    assert 4.5 < np.abs(draws).max() < 6.8


def test_extreme_words_stay_finite(monkeypatch):
    """u = 1 gives a zero radius, u near 0 the largest one; neither is NaN."""
    extreme = [0xFFFFFFFF, 0, 0, 0xFFFFFFFF]
    monkeypatch.setattr(noise, "_philox", lambda *_: [torch.tensor([[w]]) for w in extreme])
    draws = noise.normal_cpu(torch.zeros(1, 3, dtype=torch.int32), 0, 4)
    assert draws[0, :2].abs().max() == 0
    assert draws[0, 2] == pytest.approx(np.sqrt(66 * np.log(2)), rel=1e-6)


def test_uniform_draws_are_inside_the_unit_interval():
    draws = uniform(noise_key(3, list(range(100)), 0, 0, STREAM_SUBSET, "cpu"), 1000)
    assert draws.dtype == torch.float64
    assert draws.shape == (100, 1000)
    assert draws.min() > 0
    assert draws.max() < 1
    assert stats.kstest(draws.flatten().numpy(), "uniform").pvalue > 1e-3


def test_key_words():
    key = noise_key(1, torch.tensor([3, 2**32 + 4]), torch.tensor([5, 6]), 7, STREAM_SDE, "cpu")
    assert key.words.dtype == torch.int32
    assert key.words.tolist() == [[(1 << 24) | 5, 3, 7], [(1 << 24) | 6, 4, 7]]


def test_dtype_rounds_the_float32_draw():
    key = key_of(2)
    assert torch.equal(normal(key, (100,), torch.bfloat16), normal(key, (100,)).bfloat16())


def test_runs_under_fake_tensors_and_compile():
    with FakeTensorMode():
        fake = normal(noise_key(1, list(range(4)), 2, 3, STREAM_SDE, "cpu"), (2, 5), torch.bfloat16)
    assert fake.shape == (4, 2, 5)
    assert fake.dtype == torch.bfloat16
    key = key_of(4)
    compiled = torch.compile(lambda words: normal(noise.NoiseKey(key.seed, words), (2, 5)), fullgraph=True)
    assert torch.equal(compiled(key.words), normal(key, (2, 5)))
    torch.library.opcheck(torch.ops.fastgrpo_kernels.normal.default, (key.words, key.seed, 10))


# With types that they do not have, too.
make_key: Any = noise_key
draw: Any = normal
draw_uniform: Any = uniform


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda: noise_key(-1, [0], 0, 0, 0, "cpu"), "seed: must be in"),
        (ValueError, lambda: noise_key(2**63, [0], 0, 0, 0, "cpu"), "seed: must be in"),
        (ValueError, lambda: noise_key(0, [0], 0, 0, 128, "cpu"), "stream: must be in"),
        (ValueError, lambda: noise_key(0, [0], 1 << 24, 0, 0, "cpu"), "step: must be in"),
        (ValueError, lambda: noise_key(0, [0, 1], [0], 0, 0, "cpu"), r"step: expected an int or shape \[2\]"),
        (TypeError, lambda: noise_key(0, torch.rand(2), 0, 0, 0, "cpu"), "sample: expected integers"),
        (TypeError, lambda: make_key(0, [0.5], 0, 0, 0, "cpu"), "sample: expected integers"),
        (TypeError, lambda: make_key(1.5, [0], 0, 0, 0, "cpu"), "seed: expected an integer"),
        (ValueError, lambda: noise_key(0, [0, 1], [0, 1 << 24], 0, 0, "cpu"), r"step: must be in \[0, 2\*\*24\)"),
        (ValueError, lambda: noise_key(0, [0], torch.tensor([-1]), 0, 0, "cpu"), "step: must be in"),
        (TypeError, lambda: normal(key_of(2), (3,), torch.int8), "dtype: expected float32"),
        (TypeError, lambda: draw(key_of(2), 3), "shape_per_row: expected a sequence of integers"),
        (ValueError, lambda: random_words(key_of(2), 0), "count: must be in"),
        (TypeError, lambda: draw_uniform(key_of(2), 2.0), "count: expected an integer"),
        (ValueError, lambda: normal(key_of(2), (3, 0)), "shape_per_row: has no elements"),
        (TypeError, lambda: draw((0, torch.zeros(1, 3)), (3,)), "noise: expected a NoiseKey"),
        (ValueError, lambda: normal(noise.NoiseKey(0, torch.zeros(2, 3)), (3,)), "noise: expected int32 words"),
    ],
)
def test_refuses(error, call, message):
    with pytest.raises(error, match=message):
        call()
