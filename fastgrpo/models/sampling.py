"""How a pipeline samples: latents of which shape, at the noise levels of its own scheduler, and how it is called.

Knows no family: a family overrides where its pipeline differs.
"""

from __future__ import annotations

import abc
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor

from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.config import Model
from fastgrpo.models.schedulers import flow_steps, with_shift


class PipelineSampling(abc.ABC):
    """The part of a family (fastgrpo/models/protocol.py) that says what its pipeline samples, at which noise levels."""

    pipeline: Any
    config: Model
    # What a family declares: see fastgrpo/models/protocol.py.
    trained: ClassVar[tuple[str, ...]]
    guidance_style: ClassVar[Literal["embedded", "cfg"]]

    @property
    @abc.abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample, without the batch dimension, from model.height, width and frames."""

    @property
    def beside(self) -> int:
        """How many elements of a sample's flat latents, its last, are denoised beside those that are trained: sound.

        They take every step without noise, and no loss sees them.
        """
        return 0

    @property
    def policy_shape(self) -> tuple[int, ...]:
        """Of the part of a sample's latents that is trained: `latent_shape`, without what is denoised beside it."""
        return (self.latent_shape[0] - self.beside,) if self.beside else self.latent_shape

    def of_policy(self, rows: Tensor) -> Tensor:
        """The trained part of rows [R, *latent_shape]: [R, *policy_shape]."""
        return rows[:, : -self.beside].contiguous() if self.beside else rows

    def noise_levels(self, steps: int, shift: float | str) -> NoiseLevels:
        """The levels of a run of `steps`, as the family's pipeline would use them; shift: rollout.shift."""
        scheduler = self.sampling_scheduler(shift)
        k = self.pipeline_shift() if shift == "pipeline" else float(shift)
        levels = flow_steps(scheduler, steps, self.timestep_arguments(scheduler, steps), self.config.path, k)
        return replace(levels, modules=self.acting_modules(levels))

    def sampling_scheduler(self, shift: float | str) -> Any:
        """A scheduler of its own with which the pipeline samples as trained; what an export carries."""
        return with_shift(self.pipeline.scheduler, shift, self.config.path)

    def timestep_arguments(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """What the pipeline gives `set_timesteps` beside the number of steps."""
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}

    def acting_modules(self, levels: NoiseLevels) -> tuple[str, ...]:
        """The trained component that acts at each step."""
        return (self.trained[0],) * levels.steps

    def forward_table(self) -> np.ndarray | None:
        """ᾱ of every timestep that a diffusion model was trained at, float64; None for a flow, which has all levels."""
        return None

    def pipeline_shift(self) -> float | None:
        """The shift k that the pipeline's scheduler config asks for at this size; None where it is no plain shift."""
        config = self.pipeline.scheduler.config
        return None if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift"))

    def pipeline_arguments(self, steps: int) -> dict[str, Any]:
        """How the pipeline is called to sample as training does, but for the prompt and its image."""
        config = self.config
        called: dict[str, Any] = {"height": config.height, "width": config.width, "num_inference_steps": steps}
        if config.frames > 1:
            called["num_frames"] = config.frames
        if self.guidance_style == "cfg":
            called["negative_prompt"] = config.negative_prompt
        return called | {"guidance_scale": config.guidance, "max_sequence_length": config.max_sequence_length}

    def pipeline_settings(self) -> tuple[str, ...]:
        """Lines of Python for a card's snippet, which set up `pipe` to sample as training does where a pipeline is not
        told all of it when it is called."""
        return ()
