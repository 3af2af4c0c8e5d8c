"""bench/gradients.py: what it takes for signal is the norm of the mean, not of the noise around it."""

import pytest
import torch
from support.tiny import tiny_config

from fastgrpo.commands.bench import load
from fastgrpo.config.sections import dump_settings

bench = load("gradients")


def test_signal_is_the_squared_norm_of_the_mean_without_the_noise_that_is_in_it():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((4096,), 0.5, dtype=torch.float64) / 64
    noise = torch.randn(40, 4096, generator=generator, dtype=torch.float64) / 64
    norm, squared, error = bench.signal(mean + noise)
    assert norm**2 == pytest.approx(1 + 0.25, rel=0.02)
    assert 0 < error < 0.003
    assert squared == pytest.approx(0.25, abs=3 * error + 0.01)
    # The squared norm of their mean has a fortieth of the noise in it too.
    assert float((mean + noise).mean(0).square().sum()) - squared == pytest.approx(1 / 40, rel=0.2)


def test_the_cosine_of_two_signals_is_not_shortened_by_their_noise():
    generator = torch.Generator().manual_seed(1)
    first, other = torch.zeros(4096, dtype=torch.float64), torch.zeros(4096, dtype=torch.float64)
    first[0], other[0], other[1] = 1.0, 0.6, 0.8

    def drawn(mean: torch.Tensor) -> torch.Tensor:
        return mean + torch.randn(60, 4096, generator=generator, dtype=torch.float64) / 64

    # Two steps, whose signals have the sum `other`.
    reference = {0: drawn(0.3 * other), 2: drawn(0.7 * other)}
    assert bench.cosine(drawn(first), reference) == pytest.approx(0.6, abs=0.08)
    assert bench.cosine(drawn(other), reference) == pytest.approx(1.0, abs=0.08)


def test_gradients_are_of_one_step_each_at_weights_that_stay(tiny_flux, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_settings(tiny_config(tiny_flux)))
    found = bench.gradients(str(path), 2, ["rollout.trained={kind: window, size: 1, start: 1}"])
    assert list(found) == [1]
    assert found[1].shape[0] == 2
    assert float(found[1].norm()) > 0
    assert not torch.equal(*found[1])
