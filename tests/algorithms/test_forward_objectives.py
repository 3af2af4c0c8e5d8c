"""The objectives of the forward process: as their papers write them in float64, exactly still on policy, and the levels
that rows are drawn at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.levels import flow_levels
from torch.nn.functional import logsigmoid

from fastgrpo.algorithms.advantages import Advantages
from fastgrpo.algorithms.forward import LevelSource, forward_levels
from fastgrpo.algorithms.layout import epoch_samples, rank_samples
from fastgrpo.algorithms.objectives import RowInputs, available, forward_objective
from fastgrpo.algorithms.schedule import NoiseLevels, shifted
from fastgrpo.config import Config, TrainingTimes, validate
from fastgrpo.errors import ConfigError
from fastgrpo.training.forward import best_and_worst, matching_sums
from fastgrpo_kernels import transitions

SHAPE = (3, 5, 7)


def config_of(kind: str, **objective) -> Config:
    return validate({
        "model": {"family": "flux", "path": "shapes:flux"}, "prompts": {"train": "shapes:train"},
        "rewards": [{"name": "shapes"}], "eval": {"every": 0}, "rollout": {"group_size": 4},
        "objective": {"kind": kind, **objective},
    })  # fmt: skip


def rows(count: int, dtype: torch.dtype = torch.float32):
    """Clean samples, noise, levels, old outputs, new outputs and advantages."""
    generator = torch.Generator().manual_seed(3)
    x0, eps, error, move = torch.randn(4, count, *SHAPE, generator=generator).unbind(0)
    old = (eps - x0 + 0.5 * error).to(dtype)
    t, A = torch.rand(count, generator=generator) * 0.9 + 0.05, 3 * torch.randn(count, generator=generator)
    return x0, eps, t, old, (old.float() + 0.05 * move).to(dtype).requires_grad_(), A


def ours(config: Config, x0, eps, t, old, new, A) -> torch.Tensor:
    objective = forward_objective(config)
    assert objective is not None
    one = torch.ones(len(x0))
    sums = matching_sums(new, old, x0, eps, one, -one, objective.branches)
    return objective.losses(sums, RowInputs(A, t, t)).loss.mean()


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


def nft_of_the_paper(beta, x0, eps, t, old, new, A):
    """Equation 5 of arXiv 2509.16117 with the weights of its appendix: residuals of the predicted clean sample."""
    at = t.view(-1, 1, 1, 1)
    x, share, total = (1 - at) * x0 + at * eps, (A.clamp(-5, 5) / 10 + 0.5).clamp(0, 1), 0.0
    for sign, part in ((1, share), (-1, 1 - share)):
        residual = x - at * (old + sign * beta * (new - old)) - x0
        total = total + part * mean(residual**2) / mean(residual.abs()).detach().clamp(min=1e-5)
    return (5 / beta * total).mean()


def awm_of_the_paper(weighting, clip, x0, eps, t, old, new, A):
    """arXiv 2509.25050: the ratio of two log-probabilities, each from a squared error."""

    def log_prob(v):
        M = mean((v - (eps - x0)) ** 2)
        known = {"uniform": M, "t": t * M, "t**2": t**2 * M, "huber": t * ((M + 1e-10).sqrt() - 1e-5)}
        return -known[weighting] if weighting in known else -t / 0.25 * ((M + 1e-10) ** 0.25 - 1e-10**0.25)

    ratio = (log_prob(new) - log_prob(old)).exp()
    return torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip)).mean()


def dpo_of_the_paper(beta, x0, eps, t, old, new, A):
    """Equation 14 of arXiv 2311.12908, of pairs (best, worst) one after the other."""
    error = mean((new - (eps - x0)) ** 2) - mean((old - (eps - x0)) ** 2)
    return -logsigmoid(-beta / 2 * (error[::2] - error[1::2])).mean()


CASES = {
    **{f"nft {beta}": ("nft", {"beta": beta}, nft_of_the_paper, (beta,)) for beta in (1.0, 0.1)},
    **{
        f"awm {weighting} {clip}": (
            "awm", {"weighting": weighting, "clip_low": clip, "clip_high": clip}, awm_of_the_paper, (weighting, clip)
        )
        for weighting in ("uniform", "t", "t**2", "huber", "ghuber")
        for clip in (1e-3, 1.0)
    },
    **{f"dpo {beta}": ("dpo", {"beta": beta}, dpo_of_the_paper, (beta,)) for beta in (1.0, 2000.0)},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_the_papers(case):
    kind, settings, paper, arguments = CASES[case]
    x0, eps, t, old, new, A = rows(6)
    loss = ours(config_of(kind, **settings), x0, eps, t, old, new, A)
    exact = [x.detach().double() for x in (x0, eps, t, old, new, A)]
    exact[4].requires_grad_()
    expected = paper(*arguments, *exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradient, wanted = torch.autograd.grad(loss, new)[0], torch.autograd.grad(expected, exact[4])[0]
    assert wanted.norm() > 0
    assert (gradient - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_on_policy_everything_is_exactly_zero(case, dtype):
    kind, settings, *_ = CASES[case]
    x0, eps, t, old, _, A = rows(6, dtype)
    objective, one = forward_objective(config_of(kind, **settings)), torch.ones(6)
    assert objective is not None
    sums = matching_sums(old.clone().requires_grad_(), old, x0, eps, one, -one, objective.branches)
    assert sums.P.abs().max() == sums.Q.max() == 0
    assert torch.equal(objective.losses(sums, RowInputs(A, t, t)).ratio, one)


@pytest.mark.parametrize("prediction", ["flow", "epsilon", "v_prediction", "sample"])
def test_targets_and_clean_samples_of_every_prediction(prediction):
    level = np.array([0.2, 0.7])
    found = forward_levels(level, level, prediction)
    x0, eps = np.array([0.3, -1.1]), np.array([0.8, 0.4])
    x, v = found.signal * x0 + found.noise * eps, found.target_noise * eps + found.target_x0 * x0
    for place in range(2):
        a, b, _ = transitions.clean_coefficients(float(level[place]), prediction)
        assert a * x[place] + b * v[place] == pytest.approx(x0[place])
        assert abs(b) == pytest.approx(found.clean[place])
    # The flow that mixes as much noise into as much signal.
    assert found.t == pytest.approx(found.noise / (found.signal + found.noise))


def source(table=None, **times) -> LevelSource:
    levels = flow_levels(shifted([1 - i / 10 for i in range(11)], 3.0), "transformer")
    return LevelSource(levels, TrainingTimes(**times), table, lambda times: np.zeros(times.shape, dtype=np.int64))


def test_levels_of_the_rollout_are_drawn_without_repetition():
    drawn = source(count=9).draw(500, [1, 2]).times
    every = source().rollout.start
    assert set(np.unique(drawn)) == set(every)
    assert all(len(set(row)) == 9 for row in drawn)
    assert np.array_equal(drawn, source(count=9).draw(500, [1, 2]).times)
    assert not np.array_equal(drawn, source(count=9).draw(500, [1, 3]).times)
    late = source(count=2, draw="strata", high=0.9, low=0.3).draw(500, [1]).times
    kept = [t for t in every if 0.3 <= t <= 0.9]
    assert set(np.unique(late)) == set(kept)
    assert (late[:, 0] > late[:, 1]).all()
    with pytest.raises(ConfigError, match=r"objective\.times\.count: 11 levels cannot be drawn from the 10 of"):
        source(count=11).draw(2, [0])


def test_continuous_levels_are_stratified_and_shifted():
    even = np.sort(source(count=4, draw="uniform", low=0.2).draw(400, [0]).times, axis=1)
    assert ((even >= 0.2 + 0.2 * np.arange(4)) & (even <= 0.4 + 0.2 * np.arange(4))).all()
    bell = source(count=3, draw="logit_normal", shift=3.0).draw(4000, [0]).times
    plain = bell / (3 - 2 * bell)
    assert np.log(plain / (1 - plain)).mean() == pytest.approx(0, abs=0.03)
    assert np.log(plain / (1 - plain)).std() == pytest.approx(1, abs=0.03)
    # A diffusion model's are timesteps, with its own ᾱ.
    table = np.linspace(0.99, 0.01, 1000)
    levels = NoiseLevels((0.5,), (0.9,), (500.0,), ("unet",), "epsilon")
    found = LevelSource(levels, TrainingTimes(count=2, draw="uniform"), table, lambda t: np.zeros(t.shape, int))
    drawn = found.draw(50, [0])
    assert (drawn.times % 1 == 0).all()
    assert drawn.signal**2 == pytest.approx(table[drawn.times.astype(int)])


def test_pairs_are_the_best_with_the_worst():
    values = np.array([0.1, 3.0, -1.0, 0.2, 5.0, 5.0, 5.0, 5.0, 2.0, 9.0, -2.0, 1.0])
    valid = np.ones(12, bool)
    valid[9] = False
    found = best_and_worst(Advantages(values, values[:, None], valid, np.zeros(3, bool)), 4, 2)
    assert found.samples.tolist() == [[1, 2], [3, 0], [8, 10]]
    assert found.key.tolist() == [0, 1, 8]


@pytest.mark.parametrize("group", [2, 3, 8])
def test_an_epoch_divides_the_samples_otherwise_and_alike_at_any_world_size(group):
    total, steps = 48, 4
    whole = epoch_samples(total, steps, 1, 0, group, [7, 1])
    assert sorted(whole.reshape(-1)) == list(range(total))
    assert not np.array_equal(np.sort(whole), rank_samples(total, steps, 1, 0))
    for world in (2, 3, 6):
        parts = [epoch_samples(total, steps, world, rank, group, [7, 1]) for rank in range(world)]
        assert np.array_equal(np.concatenate(parts, axis=1), whole)
        for rank, part in enumerate(parts):
            # What a rank trains it has rolled out.
            assert set(part.reshape(-1)) == set(rank_samples(total, steps, world, rank).reshape(-1))
    if total // steps % group == 0:
        assert all(len(set(row)) == len(row) // group for row in whole // group)
    assert np.array_equal(epoch_samples(total, steps, 2, 1, group, None), rank_samples(total, steps, 2, 1))


def test_one_line_each():
    assert {"grpo", "nft", "awm", "dpo"} <= set(available())
    for kind, settings, said in (
        ("ntf", {}, "objective.kind: unknown objective 'ntf'; did you mean 'nft'"),
        ("nft", {"dual_clip": 2.0}, "objective.dual_clip: is nothing that objective.kind nft reads; leave it out"),
        ("grpo", {"beta": 0.1}, "objective.beta: is nothing that objective.kind grpo reads; leave it out"),
        ("dpo", {"pairs": 3}, "objective.pairs: 3 pairs need 6 samples, and rollout.group_size is 4"),
        ("nft", {"kl_weight": 0.1}, "objective.kl: gaussian is of a trajectory's steps"),
        ("awm", {"times": {"low": 0.5, "high": 0.5}}, "objective.times.low: 0.5 is not below"),
    ):
        with pytest.raises(ConfigError) as caught:
            forward_objective(config_of(kind, **settings))
        assert said in str(caught.value)
