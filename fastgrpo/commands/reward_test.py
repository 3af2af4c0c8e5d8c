"""`fastgrpo reward-test`: what a reward says of a few samples, before a run depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import RewardSpec, flatten_rewards
from fastgrpo.config.overrides import load_data, override
from fastgrpo.config.sections import validate_settings
from fastgrpo.data.prompts import Prompt, load_prompts, open_image
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.observe.tracebacks import described
from fastgrpo.rewards import Reward, Scores, load_reward
from fastgrpo.rewards.base import ask
from fastgrpo.rewards.failures import FailureLog
from fastgrpo.rewards.scoring import release_rewards

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Pixels of a side of the samples that are drawn here.
SIZE = 256
FPS = 8.0


def specs_of(name: str, settings: Sequence[str] = ()) -> list[RewardSpec]:
    """The rewards of a name with `key=value` settings (path=…, options.scale=2), or of a .yaml file that has them."""
    if name.endswith((".yaml", ".yml")):
        data = load_data(name, settings).get("rewards")
        if not isinstance(data, list) or not data:
            raise ConfigError(f"{name}: has no list of rewards")
        return flatten_rewards([validate_settings(RewardSpec, one, f"rewards.{i}") for i, one in enumerate(data)])
    own: dict[str, Any] = {"name": name}
    for setting in settings:
        override(own, setting)
    return flatten_rewards([validate_settings(RewardSpec, own, "rewards.0")])


def a_few_samples(
    count: int, prompts: str | None = None, images: str | None = None, video: bool = False
) -> tuple[Tensor, list[Prompt]]:
    """Samples [count, 3, H, W], or [count, 3, F, H, W] with `video`, and their prompts.

    images: a folder of pictures of one size; else they are drawn by the embedded worlds, and show what their own
    captions say. prompts: a source of `load_prompts`, for these captions; repeated where it has too few.
    """
    from fastgrpo.shapes import moving_render, moving_world, render, world

    rng = np.random.default_rng(0)
    captions = list(islice(cycle(load_prompts("moving:heldout" if video else "shapes:heldout")[::7]), count))
    texts = captions if prompts is None else list(islice(cycle(load_prompts(prompts)), count))
    if images is not None:
        return _pictures(Path(images), count, video), texts
    if video:
        drawn = moving_render.render_batch([moving_world.parse(p.text) for p in captions], rng, SIZE)
    else:
        drawn = render.render_batch([world.parse(p.text) for p in captions], rng, SIZE)
    return torch.from_numpy(drawn).float().div(255).movedim(-1, 1).contiguous(), texts


def _pictures(folder: Path, count: int, video: bool) -> Tensor:
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise UserError(f"--images: {folder} holds no pictures ({', '.join(PICTURES)})")
    opened = [open_image(str(path)) for path in islice(cycle(paths), count)]
    if len({picture.size for picture in opened}) > 1:
        raise UserError(f"--images: the pictures of {folder} differ in size, and a reward's samples never do")
    pictures = torch.from_numpy(np.stack([np.asarray(p) for p in opened])).float().div(255).movedim(-1, 1)
    return pictures[:, :, None].expand(-1, -1, 9, -1, -1).contiguous() if video else pictures.contiguous()


def try_reward(
    spec: RewardSpec, samples: Tensor, prompts: list[Prompt], note: Callable[[str], None]
) -> tuple[Scores, float]:
    """A reward's scores of the samples, and the seconds that they took; `note` is told what a run would stumble over.

    Raises UserError where it fails, with a file that has the traceback.
    """
    reward = load_reward(spec)
    scores = _asked(reward, spec.key, samples, prompts)
    begin = perf_counter()
    again = _asked(reward, spec.key, samples, prompts)
    seconds = perf_counter() - begin
    alone = Scores.concatenate(
        [_asked(reward, spec.key, samples[i : i + 1], prompts[i : i + 1]) for i in range(len(prompts))]
    )
    release_rewards({spec.key: reward}, FailureLog(note))
    known = scores.values[scores.counted]
    if not len(known):
        asked = "it is asked for none of these prompts" if not np.any(scores.asked) else "no sample could be scored"
        note(f"{spec.key}: {asked}")
        return scores, seconds
    if not _alike(scores, again, 0.0):
        note(f"{spec.key}: the same samples score differently when they are scored again")
    elif not _alike(scores, alone, 1e-3 * float(np.abs(known).max())):
        note(f"{spec.key}: a sample's score depends on the others of its batch")
    if len(known) > 1 and np.ptp(known) == 0:
        note(f"{spec.key}: all samples score alike: where that is so, nothing is learned")
    return scores, seconds


def _asked(reward: Reward, key: str, samples: Tensor, prompts: list[Prompt]) -> Scores:
    try:
        return ask(reward, samples, prompts, FPS if samples.ndim == 5 else None)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"reward '{key}' failed for {len(prompts)} samples: {described(error, key)}") from None


def _alike(a: Scores, b: Scores, tolerance: float) -> bool:
    return np.array_equal(a.valid, b.valid) and bool((np.abs(a.values - b.values) <= tolerance).all())


def shown(spec: RewardSpec, scores: Scores, prompts: Sequence[Prompt], seconds: float) -> list[str]:
    """The lines that are printed of a reward: a sample each, then all of them."""
    assert scores.asked is not None
    names = list(scores.components)
    lines = [f"{spec.key}, weight {spec.weight:g}"]
    for row, prompt in enumerate(prompts):
        if not scores.asked[row]:
            said = "not asked"
        elif not scores.valid[row]:
            said = "no score"
        else:
            said = "  ".join([f"{scores.values[row]:.5g}", *(f"{n} {scores.components[n][row]:.5g}" for n in names)])
        lines.append(f"  {said:<10}  {prompt.text:.80}")
    known = scores.values[scores.counted]
    if len(known):
        lines.append(f"  mean {known.mean():.5g}, std {known.std():.5g}, {seconds / len(prompts):.3g} s a sample")
    return lines
