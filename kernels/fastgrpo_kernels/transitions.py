"""Transition coefficients of every sampler: y = a·x + b·v + s·ε, with v the model output and ε ~ N(0, I).

Python floats in, Python floats out (float64); tensors in, float64 tensors out on the same device, broadcast over their
shapes, so that every sample may stand at its own step. Nothing is copied from a device to the host: levels out of
order are refused when they are floats or CPU tensors, and are the caller's responsibility on a device.
"""

import math
import numbers
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import is_host_readable, offender

Scalar = float | Tensor
Prediction = Literal["epsilon", "v_prediction", "sample"]


class Transition(NamedTuple):
    """Coefficients (a, b, s) of y = a·x + b·v + s·ε: three floats, or three float64 tensors of one shape."""

    a: Scalar
    b: Scalar
    s: Scalar


def ode(sigma: Scalar, sigma_next: Scalar) -> Transition:
    """Euler step of the rectified-flow ODE from noise level `sigma` to `sigma_next`: (1, Δ, 0), Δ = sigma_next - sigma.

    Raises ValueError unless 0 <= sigma_next < sigma <= 1.
    """
    sigma, sigma_next = _float64(sigma=sigma, sigma_next=sigma_next)
    _check_flow_levels(sigma, sigma_next)
    delta = sigma_next - sigma
    zero = 0.0 * delta + 0.0
    return Transition(zero + 1.0, delta, zero)


def dance_sde(sigma: Scalar, sigma_next: Scalar, eta: Scalar) -> Transition:
    """SDE step of DanceGRPO (arXiv 2505.07818) with constant noise level `eta`; eta = 0 is the ODE step.

    a = 1 + η²Δ/(2σ), b = Δ·(1 + η²(1-σ)/(2σ)), s = η·√(-Δ). Raises ValueError unless 0 <= sigma_next < sigma <= 1 and
    eta >= 0.
    """
    sigma, sigma_next, eta = _float64(sigma=sigma, sigma_next=sigma_next, eta=eta)
    _check_flow_levels(sigma, sigma_next)
    _check(eta, "eta", "at least 0 and finite", lambda t: (t >= 0) & (t < math.inf))
    delta = sigma_next - sigma
    half = eta * eta / (2.0 * sigma)
    return Transition(1.0 + half * delta, delta * (1.0 + half * (1.0 - sigma)), eta * _sqrt(-delta))


def flow_sde(sigma: Scalar, sigma_next: Scalar, noise_level: Scalar, sigma_max: Scalar) -> Transition:
    """SDE step of Flow-GRPO (arXiv 2505.05470): the Dance form with η = noise_level·√(σ/(1-σ)).

    At σ = 1 the denominator takes `sigma_max`, the second level of the schedule, for σ. Raises ValueError unless
    0 <= sigma_next < sigma <= 1, noise_level >= 0 and 0 <= sigma_max < 1.
    """
    sigma, sigma_next, noise_level, sigma_max = _float64(
        sigma=sigma, sigma_next=sigma_next, noise_level=noise_level, sigma_max=sigma_max
    )
    _check(noise_level, "noise_level", "at least 0 and finite", lambda t: (t >= 0) & (t < math.inf))
    _check(sigma_max, "sigma_max", "at least 0 and less than 1", lambda t: (t >= 0) & (t < 1))
    _check_flow_levels(sigma, sigma_next)
    eta = noise_level * _sqrt(sigma / (1.0 - _where_one(sigma, sigma_max)))
    return dance_sde(sigma, sigma_next, eta)


def cps(sigma: Scalar, sigma_next: Scalar, noise_level: Scalar) -> Transition:
    """Coefficients-preserving step of Flow-CPS (arXiv 2509.05952); noise_level = 0 is the ODE step, 1 renews all noise.

    With θ = π·noise_level/2: a = (1-σ') + σ'·cos θ, b = -σ(1-σ') + (1-σ)σ'·cos θ, s = σ'·sin θ. Raises ValueError
    unless 0 <= sigma_next < sigma <= 1 and 0 <= noise_level <= 1.
    """
    sigma, sigma_next, noise_level = _float64(sigma=sigma, sigma_next=sigma_next, noise_level=noise_level)
    _check_flow_levels(sigma, sigma_next)
    _check(noise_level, "noise_level", "between 0 and 1", lambda t: (t >= 0) & (t <= 1))
    theta = noise_level * (0.5 * math.pi)
    kept = sigma_next * _cos(theta)
    a = (1.0 - sigma_next) + kept
    b = (1.0 - sigma) * kept - sigma * (1.0 - sigma_next)
    return Transition(a, b, sigma_next * _sin(theta))


def ddim(
    alpha_bar: Scalar,
    alpha_bar_next: Scalar,
    eta: Scalar,
    prediction: Prediction = "epsilon",
    *,
    clip_sample: bool = False,
    thresholding: bool = False,
) -> Transition:
    """DDIM-η step (arXiv 2010.02502, eq. 12 and 16) from ᾱ to ᾱ' for a model that predicts epsilon, v or the sample.

    Raises ValueError unless 0 <= alpha_bar < alpha_bar_next <= 1 and eta >= 0; for `epsilon` at alpha_bar = 0, where
    the step is undefined; when eta leaves no room for the deterministic part (1 - ᾱ' < s²); and for `clip_sample` or
    `thresholding`, which are not affine in the model output.
    """
    for name, value in (("clip_sample", clip_sample), ("thresholding", thresholding)):
        if value:
            raise ValueError(f"{name}: a clipped DDIM step is not affine in the model output; set {name}=False")
    _check_prediction(prediction, ("epsilon", "v_prediction", "sample"))
    now, following, eta = _float64(alpha_bar=alpha_bar, alpha_bar_next=alpha_bar_next, eta=eta)
    _check(now, "alpha_bar", "at least 0", lambda t: t >= 0)
    _check(following, "alpha_bar_next", "at most 1", lambda t: t <= 1)
    _check(following - now, "alpha_bar_next", "greater than alpha_bar", lambda t: t > 0, shown=following)
    _check(eta, "eta", "at least 0 and finite", lambda t: (t >= 0) & (t < math.inf))
    s = eta * _sqrt((1.0 - following) / (1.0 - now) * (1.0 - now / following))
    room = 1.0 - following - s * s
    _check(room, "eta", "small enough that s² <= 1 - alpha_bar_next", lambda t: t >= -1e-12, shown=eta)
    direction = _sqrt(_clamp_min0(room))
    clean = clean_coefficients(now, prediction)
    # ε̂ = (x - √ᾱ·x̂0)/√(1-ᾱ) turns y = √ᾱ'·x̂0 + c·ε̂ into a line in (x, v).
    ratio = direction / _sqrt(1.0 - now)
    slope = _sqrt(following) - ratio * _sqrt(now)
    return Transition(ratio + slope * clean.a, slope * clean.b, s)


def clean_coefficients(
    level: Scalar, prediction: Literal["flow", "epsilon", "v_prediction", "sample"] = "flow"
) -> Transition:
    """Coefficients of the predicted clean sample x̂0 = a·x + b·v (s = 0), for previews and for rewards on x̂0.

    `level` is σ for `flow` (x̂0 = x - σ·v) and ᾱ for the diffusion predictions. Raises ValueError for a level outside
    [0, 1], and for `epsilon` at ᾱ = 0.
    """
    _check_prediction(prediction, ("flow", "epsilon", "v_prediction", "sample"))
    (level,) = _float64(level=level)
    _check(level, "level", "between 0 and 1", lambda t: (t >= 0) & (t <= 1))
    zero = 0.0 * level
    if prediction == "flow":
        return Transition(zero + 1.0, -level, zero)
    if prediction == "sample":
        return Transition(zero, zero + 1.0, zero)
    if prediction == "v_prediction":
        return Transition(_sqrt(level), -_sqrt(1.0 - level), zero)
    _check(level, "alpha_bar", "greater than 0 for an epsilon prediction", lambda t: t > 0)
    inverse = 1.0 / _sqrt(level)
    return Transition(inverse, -_sqrt(1.0 - level) * inverse, zero)


def second_order_weight(
    previous: float, level: float, following: float, prediction: Literal["flow", "epsilon", "v_prediction", "sample"]
) -> float:
    """The weight c that makes a deterministic step from `level` to `following` one of DPM-Solver++ 2M (arXiv
    2211.01095, algorithm 2, midpoint): y = (the `ode` or eta-0 `ddim` step) + c·(x̂0 - x̂0 of the step from `previous`).

    Levels are σ (flow) or ᾱ, floats; with α and σ of a level and λ = log(α/σ),
    c = (α' - σ'·α/σ)·(λ' - λ)/(2·(λ - λ_previous)). Raises ValueError for levels out of order, and where a λ is not
    finite: from pure noise, and to none.
    """
    _check_prediction(prediction, ("flow", "epsilon", "v_prediction", "sample"))
    rising = (previous, level, following) if prediction != "flow" else (1 - previous, 1 - level, 1 - following)
    if not 0 < rising[0] < rising[1] < rising[2] < 1:
        raise ValueError(
            f"previous, level, following: must approach the clean sample strictly between pure noise and it, got "
            f"{previous}, {level}, {following}"
        )
    (a0, s0), (a1, s1), (a2, s2) = (
        (1 - x, x) if prediction == "flow" else (math.sqrt(x), math.sqrt(1 - x)) for x in (previous, level, following)
    )
    h_previous, h = math.log(a1 / s1) - math.log(a0 / s0), math.log(a2 / s2) - math.log(a1 / s1)
    return (a2 - s2 * a1 / s1) * h / (2 * h_previous)


def _float64(**values: Scalar) -> tuple:
    """The arguments as floats, or, if any is a tensor, as float64 tensors of one shape on its device."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (Tensor, numbers.Real)):
            raise TypeError(f"{name}: expected a float or a tensor, got {type(value).__name__}")
    devices = [value.device for value in values.values() if isinstance(value, Tensor)]
    if not devices:
        return tuple(float(value) for value in values.values())
    device, tensors = devices[0], []
    for name, value in values.items():
        if not isinstance(value, Tensor):
            # A fill, not a host-to-device copy.
            value = torch.full((), float(value), dtype=torch.float64, device=device)
        elif value.device != device:
            raise ValueError(f"{name}: is on {value.device}, but another level is on {device}; move it there")
        elif not value.dtype.is_floating_point:
            raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
        tensors.append(value.to(torch.float64))
    try:
        return tuple(torch.broadcast_tensors(*tensors))
    except RuntimeError:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ValueError(f"{', '.join(values)}: must have one shape, or broadcast to it, got {shapes}") from None


def _check_flow_levels(sigma: Scalar, sigma_next: Scalar) -> None:
    _check(sigma, "sigma", "at most 1", lambda t: t <= 1)
    _check(sigma_next, "sigma_next", "at least 0", lambda t: t >= 0)
    _check(sigma - sigma_next, "sigma_next", "smaller than sigma", lambda t: t > 0, shown=sigma_next)


def _check(value: Scalar, name: str, allowed: str, predicate, *, shown: Scalar | None = None) -> None:
    if isinstance(value, Tensor):
        if not is_host_readable(value):
            return
        valid = bool(predicate(value).all())
    else:
        valid = bool(predicate(value))
    if not valid:
        found = value if shown is None else shown
        raise ValueError(f"{name}: must be {allowed}, got {offender(found, lambda _: ~predicate(value))}")


def _check_prediction(prediction: str, allowed: tuple[str, ...]) -> None:
    if prediction not in allowed:
        raise ValueError(f"prediction: unknown prediction {prediction!r}; one of: {', '.join(allowed)}")


def _sqrt(value: Scalar) -> Scalar:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _cos(value: Scalar) -> Scalar:
    return value.cos() if isinstance(value, Tensor) else math.cos(value)


def _sin(value: Scalar) -> Scalar:
    return value.sin() if isinstance(value, Tensor) else math.sin(value)


def _clamp_min0(value: Scalar) -> Scalar:
    return value.clamp_min(0.0) if isinstance(value, Tensor) else max(value, 0.0)


def _where_one(sigma: Scalar, replacement: Scalar) -> Scalar:
    """`sigma` with 1 replaced."""
    if isinstance(sigma, Tensor):
        return torch.where(sigma == 1.0, replacement, sigma)
    return replacement if sigma == 1.0 else sigma
