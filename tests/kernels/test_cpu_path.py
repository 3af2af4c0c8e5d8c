"""The ATen path: tiles of any size give the same bits, and statistics are those of the call whenever they are read."""

from typing import Any

import pytest
import torch

from fastgrpo_kernels import LossStatistics, _cpu, grpo_loss, log_prob

CLIP: dict[str, Any] = {"clip_low": 1e-3, "clip_high": 1e-3}


def outputs_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Losses, statistics and gradients of a loss and of a log-probability, coefficients by row."""
    generator = torch.Generator().manual_seed(0)
    x, v, change, noise = torch.randn(4, *shape, generator=generator)
    rows = torch.linspace(0.1, 0.3, shape[0], dtype=torch.float64)
    v_old, v = (v + 0.01 * change).to(dtype), v.to(dtype).requires_grad_()
    losses, statistics = grpo_loss(v, v_old, rows, 2 * rows, noise, rows, 0.5, per_sample=True, **CLIP)
    (by_loss,) = torch.autograd.grad(losses.sum(), v)
    density = log_prob(x, v, x + 0.1 * change, 1 - rows, rows, 2 * rows)
    (by_density,) = torch.autograd.grad(density.sum(), v)
    return [losses.detach(), statistics.values, by_loss, density.detach(), by_density]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 5, 7001), (5, 300), (2, 4096, 4), (7, 1)], ids=str)
def test_tiles_of_any_size_give_the_same_bits(monkeypatch, shape, dtype):
    whole = outputs_of(shape, dtype)
    for tile in (4096, 3 * 4096):
        monkeypatch.setattr(_cpu, "_TILE", tile)
        pairs = zip(outputs_of(shape, dtype), whole, strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)


@pytest.mark.parametrize(("batch", "elements"), [(1, 1), (3, 100), (5, 4096), (2, 9000), (20, 5000)])
def test_a_tile_is_one_run_of_memory_and_all_together_are_everything(monkeypatch, batch, elements):
    monkeypatch.setattr(_cpu, "_TILE", 2 * 4096)
    latents = torch.zeros(batch, elements)
    for tile in _cpu.tiles(batch, elements):
        part = latents if tile is None else latents[tile]
        assert part.is_contiguous()
        assert 0 < part.numel() <= 2 * 4096
        part += 1
    assert torch.equal(latents, torch.ones(batch, elements))


@pytest.mark.parametrize("per_sample", [True, False])
def test_statistics_are_those_of_the_call_whatever_happens_to_its_tensors(per_sample):
    def call() -> tuple[list[torch.Tensor], torch.Tensor, LossStatistics]:
        generator = torch.Generator().manual_seed(1)
        v, change, noise = torch.randn(3, 4, 16, 8, generator=generator)
        weight, advantages = torch.rand(4, generator=generator), torch.randn(4, generator=generator)
        v_old, v = v + 0.01 * change, v.requires_grad_()
        loss, statistics = grpo_loss(v, v_old, 0.1, 0.3, noise, advantages, weight, per_sample=per_sample, **CLIP)
        return [v_old, noise, weight, advantages], loss, statistics

    _, _, read_at_once = call()
    expected = read_at_once.values
    arguments, loss, statistics = call()
    for argument in arguments:
        argument.zero_()
    with torch.no_grad():
        loss.mul_(2)
    assert torch.equal(statistics.values, expected)
    assert not statistics.values.requires_grad
    assert statistics.values is statistics.values
    assert repr(statistics) == f"LossStatistics(values={expected})"
