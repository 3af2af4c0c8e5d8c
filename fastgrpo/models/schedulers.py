"""The noise levels and timesteps of a pipeline, asked of its own scheduler, and the scheduler that samples as trained.

Only levels and timesteps are taken from a scheduler: the steps between them are rollout.sampler's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fastgrpo.algorithms.schedule import NoiseLevels, linear_levels, shifted
from fastgrpo.config import Model
from fastgrpo.errors import ConfigError

# What a scheduler raises over settings that its pipeline cannot use.
ASKING_ERRORS = (ValueError, TypeError, AssertionError, AttributeError, ImportError, IndexError)
# Float32 levels this near to an even schedule, shifted, are that schedule.
SAME_LEVEL = 1e-6
# Multistep schedulers start this far below 1, because their own solvers cannot start at it.
FIRST_LEVEL = 2e-6
# Settings that change a diffusion scheduler's levels, and that DDIM does not have.
OTHER_LEVELS = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas",
)  # fmt: skip


def with_shift(scheduler: Any, shift: float | str, path: str) -> Any:
    """A copy of a flow's scheduler, with a numeric shift in place of all that shifts in its own config.

    Args:
        scheduler: A diffusers scheduler.
        shift: rollout.shift: k in k·σ/(1+(k−1)·σ), or `pipeline` for the scheduler as it is.
        path: model.path, for errors.

    Raises:
        ConfigError: For a number, where the scheduler has no shift.
    """
    config, kind = scheduler.config, type(scheduler)
    if shift == "pipeline":
        return kind.from_config(config)
    name = next((name for name in ("flow_shift", "shift") if name in config), None)
    if name is None:
        raise ConfigError(
            f"rollout.shift: {shift:g}, but the {kind.__name__} of '{path}' has no shift; set it to pipeline"
        )
    off = {key: value for key, value in (("use_dynamic_shifting", False), ("shift_terminal", None)) if key in config}
    return kind.from_config(config, **{name: float(shift)}, **off)


def flow_steps(
    scheduler: Any, steps: int, arguments: Mapping[str, Any], path: str, shift: float | None = None
) -> NoiseLevels:
    """The levels of a flow that a scheduler has for so many steps, and what its pipeline tells the model at each.

    Args:
        scheduler: One that nobody else uses; its timesteps are set.
        steps: Sampling steps.
        arguments: What the pipeline gives `set_timesteps` beside the number of steps.
        path: model.path, for errors.
        shift: k in k·σ/(1+(k−1)·σ), where the scheduler may be nothing more: levels that agree with it are given in
            float64, unrounded.

    Raises:
        ConfigError: For a scheduler that cannot serve the pipeline, or whose levels are not those of a flow.
    """
    from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

    name = type(scheduler).__name__
    try:
        retrieve_timesteps(scheduler, steps, "cpu", **arguments)
        times, sigmas = scheduler.timesteps, scheduler.sigmas.tolist()
    except ASKING_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"model.path: the {name} of '{path}' cannot serve its pipeline: {reason}") from None
    falling = all(later < level for level, later in itertools.pairwise(sigmas))
    if len(sigmas) != steps + 1 or len(times) != steps or not falling or sigmas[0] > 1 or sigmas[-1] != 0:
        raise ConfigError(
            f"model.path: the {name} of '{path}' has no {steps} levels that fall from 1 to 0, as a rectified flow's "
            "do, each with a timestep; put a FlowMatchEulerDiscreteScheduler into its "
            "scheduler/scheduler_config.json, without invert_sigmas, or a multistep one with use_flow_sigmas"
        )
    if sigmas[0] > 1 - FIRST_LEVEL:
        sigmas[0] = 1.0
    exact = shifted(linear_levels(steps), shift) if shift else sigmas
    if max(abs(level - other) for level, other in zip(exact, sigmas, strict=True)) <= SAME_LEVEL:
        sigmas = exact
    given = tuple(sigmas[:-1])
    if not times.is_floating_point():
        # Multistep schedulers round their timesteps down.
        given = tuple(time / scheduler.config.num_train_timesteps for time in times.tolist())
    return NoiseLevels(tuple(sigmas[:-1]), tuple(sigmas[1:]), given, ("",) * steps)


def check_diffusion_scheduler(config: Model, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for a scheduler whose levels DDIM does not have; settings: its scheduler_config.json."""
    import inspect

    import diffusers

    name = settings.get("_class_name", "")
    kind = getattr(diffusers, name, None)
    mend = "in its scheduler/scheduler_config.json"
    # A file may leave to its class what is that class's default.
    known = set(settings) | (set(inspect.signature(kind.__init__).parameters) if kind else set())
    if "beta_schedule" not in known:
        raise ConfigError(
            f"model.path: the scheduler of '{config.path}' is a {name}, which has no betas for DDIM to follow; put a "
            f"DDIMScheduler {mend}"
        )
    for setting in ("clip_sample", "thresholding"):
        if settings.get(setting):
            raise ConfigError(
                f"model.path: the scheduler of '{config.path}' asks for {setting}, and a clipped step is not "
                f"affine in the model's output; set {setting} to false {mend}"
            )
    if other := next((setting for setting in OTHER_LEVELS if settings.get(setting)), None):
        raise ConfigError(
            f"model.path: the scheduler of '{config.path}' asks for {other}, and DDIM's levels are its betas'; set "
            f"{other} to false {mend}"
        )
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ConfigError(
            f"model.path: the scheduler of '{config.path}' has prediction_type {prediction}, which DDIM lacks "
            f"(one of: epsilon, v_prediction, sample); set it {mend}"
        )


def ddim_steps(scheduler: Any, steps: int, path: str) -> NoiseLevels:
    """The levels and timesteps of a DDIMScheduler, whose timesteps are set. Raises ConfigError for ᾱ = 0 of epsilon."""
    scheduler.set_timesteps(steps)
    times: Sequence[int] = scheduler.timesteps.tolist()
    alphas = scheduler.alphas_cumprod.double().tolist()
    stride = scheduler.config.num_train_timesteps // steps
    kind = scheduler.config.prediction_type
    start = [alphas[t] for t in times]
    if kind == "epsilon" and min(start) == 0:
        raise ConfigError(
            f"model.path: the scheduler of '{path}' starts at ᾱ = 0, where a model of epsilon says nothing of the "
            "image; set rescale_betas_zero_snr to false in its scheduler/scheduler_config.json"
        )
    # A step goes back by the stride, wherever rounding has put the next timestep.
    final = float(scheduler.final_alpha_cumprod)
    end = [alphas[t - stride] if t >= stride else final for t in times]
    return NoiseLevels(tuple(start), tuple(end), tuple(map(float, times)), ("",) * steps, kind)
