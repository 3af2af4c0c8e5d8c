"""Rollouts: equal to the pipeline; independent of batch, rank and prefix sharing; what they keep is what was used."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_config, tiny_rollout_inputs

from fastgrpo.algorithms.layout import lay_out, rank_samples
from fastgrpo.algorithms.schedule import schedule_steps
from fastgrpo.data.prompts import Prompt
from fastgrpo.rollout.decode import decode
from fastgrpo.rollout.sampler import predict_rows, rollout
from fastgrpo_kernels import gaussian_step, noise

WINDOW = {"kind": "window", "size": 2, "start": 1}
SUBSET = {"kind": "subset", "fraction": 0.6}


def run(config, iteration=0):
    family, schedule, layout, conditioning, _ = tiny_rollout_inputs(config, iteration)
    return rollout(family, schedule, layout, conditioning, config.rollout, config.run.seed, iteration), schedule, family


def test_deterministic_rollout_is_the_pipelines_own_output(tiny_flux):
    texts = ["a red circle", "two blue squares", "a green triangle left of a red square"]
    config = tiny_config(tiny_flux, rollout={"steps": 6, "shift": "pipeline", "forward_batch": 3, "group_size": 2})
    family, *_ = tiny_rollout_inputs(config)
    single = config.rollout.model_copy(update={"group_size": 1})
    schedule = schedule_steps(single, family.noise_levels(6, "pipeline"), 3, 0, 7, deterministic=True)
    layout = lay_out(schedule, single, np.arange(3))
    final = rollout(family, schedule, layout, family.encode([Prompt(t) for t in texts]), single, 7, 0).latents
    ours = decode(family, final, 3)
    start = noise.normal(noise.noise_key(7, [0, 1, 2], 0, 0, noise.STREAM_INITIAL, "cpu"), family.latent_shape)
    theirs = family.pipeline(
        texts, height=32, width=32, num_inference_steps=6, guidance_scale=3.5, latents=start, max_sequence_length=10,
        output_type="pt",
    ).images  # fmt: skip
    assert (ours - theirs).abs().max() <= 1e-4
    assert ours.std() > 1e-3


@pytest.mark.parametrize("trained", [WINDOW, SUBSET], ids=["window", "subset"])
@pytest.mark.parametrize("kept", ["keep", "regenerate"])
def test_what_is_kept_reproduces_every_trained_step(tiny_flux, trained, kept):
    config = tiny_config(tiny_flux, rollout={"trained": trained, "noise": kept, "share_prefix": False})
    trajectory, schedule, family = run(config)
    layout = trajectory.layout
    assert len(layout.pair_row) == schedule.trained.sum()
    for pair, row in enumerate(layout.pair_row):
        step, sample = layout.row_step[row], layout.pair_sample[pair]
        assert schedule.trained[step, layout.samples[sample]]
        following = np.flatnonzero((layout.row_step == step + 1) & (layout.row_source == sample))
        if len(following) == 0:
            continue
        key = noise.noise_key(7, [int(layout.samples[sample])], int(step), 0, noise.STREAM_SDE, "cpu")
        eps = noise.normal(key, family.latent_shape)
        if trajectory.noise is not None:
            assert torch.equal(trajectory.noise[pair], eps[0])
        a, b, s = schedule.transitions[step]
        y = gaussian_step(trajectory.x[row][None], trajectory.v_old[row][None], a, b, s, eps)
        assert torch.equal(y[0], trajectory.x[following[0]])


@pytest.mark.parametrize("trained", [WINDOW, SUBSET, {"kind": "window", "size": 3, "start": 0}], ids=str)
def test_sharing_the_prefix_changes_no_bit(tiny_flux, trained):
    shared, *_ = run(tiny_config(tiny_flux, rollout={"trained": trained, "share_prefix": True}))
    apart, *_ = run(tiny_config(tiny_flux, rollout={"trained": trained, "share_prefix": False}))
    assert torch.equal(shared.latents, apart.latents)
    assert len(shared.x) < len(apart.x)
    assert torch.equal(shared.x[shared.layout.pair_row], apart.x[apart.layout.pair_row])
    assert torch.equal(shared.v_old[shared.layout.pair_row], apart.v_old[apart.layout.pair_row])


def test_ranks_share_the_same_samples(tiny_flux):
    config = tiny_config(tiny_flux)
    whole, schedule, family = run(config)
    _, _, _, conditioning, _ = tiny_rollout_inputs(config)
    for rank in range(2):
        samples = rank_samples(6, 1, 2, rank).reshape(-1)
        layout = lay_out(schedule, config.rollout, samples)
        rows = conditioning.rows(layout.prompts)
        part = rollout(family, schedule, layout, rows, config.rollout, 7, 0)
        assert torch.equal(part.latents, whole.latents[samples])


def test_a_group_shares_its_initial_noise_or_does_not(tiny_flux):
    for shared in (True, False):
        config = tiny_config(
            tiny_flux, rollout={"shared_noise": shared, "trained": {"kind": "window", "start": 0}, "steps": 6}
        )
        trajectory, *_ = run(config)
        layout = trajectory.layout
        first = trajectory.x[layout.pair_row[layout.row_step[layout.pair_row] == 0]].reshape(2, 3, -1)
        assert bool((first[:, 0] == first[:, 1]).all()) is shared
        assert not torch.equal(first[0], first[1])
        finals = trajectory.latents.reshape(2, 3, -1)
        assert not torch.equal(finals[:, 0], finals[:, 1])


@pytest.mark.parametrize("trained", [WINDOW, SUBSET], ids=["window", "subset"])
def test_antithetic_samples_take_opposite_noise_at_every_step(tiny_flux, trained):
    settings = {"trained": trained, "group_size": 4, "share_prefix": False, "noise": "keep"}
    plain, *_ = run(tiny_config(tiny_flux, rollout=settings))
    paired, *_ = run(tiny_config(tiny_flux, rollout={**settings, "antithetic": True}))
    layout, eps = paired.layout, paired.noise
    assert eps is not None
    assert plain.noise is not None
    place = {(int(layout.row_step[layout.pair_row[i]]), int(s)): i for i, s in enumerate(layout.pair_sample)}
    both = [(i, place[step, sample + 1]) for (step, sample), i in place.items() if (step, sample + 1) in place]
    mirrored = [(i, j) for i, j in both if layout.pair_sample[i] % 2 == 0]
    assert len(mirrored) >= 4
    for i, j in mirrored:
        assert torch.equal(eps[j], -eps[i])
        assert torch.equal(eps[i], plain.noise[i])
    assert torch.equal(paired.latents[::2], plain.latents[::2])


def test_iterations_and_seeds_draw_other_noise(tiny_flux):
    config = tiny_config(tiny_flux)
    first, *_ = run(config, 0)
    second, *_ = run(config, 1)
    assert not torch.isclose(first.latents, second.latents).any(dim=(1, 2)).all()


@pytest.mark.parametrize("total, steps, world", [(12, 1, 1), (12, 2, 1), (12, 2, 2), (24, 3, 4)])
def test_every_sample_has_one_rank_and_one_optimizer_step(total, steps, world):
    shares = [rank_samples(total, steps, world, rank) for rank in range(world)]
    assert sorted(np.concatenate([s.reshape(-1) for s in shares])) == list(range(total))
    alone = rank_samples(total, steps, 1, 0)
    for k in range(steps):
        assert sorted(np.concatenate([s[k] for s in shares])) == list(alone[k])


@pytest.mark.parametrize("compile", ["none", "blocks"])
def test_compiled_blocks_run_the_code_of_the_update(compile):
    """torch.compile has other code, of other bits, for what is not differentiated."""
    seen = []

    def predict(x, time, rows, model):
        seen.append(torch.is_grad_enabled())
        return model(x)

    family: Any = SimpleNamespace(
        config=SimpleNamespace(compile=compile), dtype=torch.float32, modules={"transformer": torch.nn.Linear(3, 3)}
    )
    prompts: Any = SimpleNamespace(rows=lambda index: index)
    x = torch.randn(5, 3)
    with torch.no_grad():
        v = predict_rows(family, x, 0.5, "transformer", prompts, np.arange(5), 2, predict)
    assert seen == [compile == "blocks"] * 3
    assert not v.requires_grad
    torch.testing.assert_close(v, family.modules["transformer"](x).detach())
