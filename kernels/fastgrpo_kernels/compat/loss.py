"""GRPO's loss as a module: hyper-parameters when it is built, tensors when it is called, (loss, metrics) back."""

from __future__ import annotations

import difflib

from torch import Tensor, nn

from .._checks import check_number
from .._noise_args import StoredStep
from ..clipped_loss import LossStatistics, grpo_loss
from ..clipped_loss.op import check_objective
from ..noise import NoiseKey

# Other trainers' names of a setting: Liger-Kernel's and TRL's, then DanceGRPO's and Flow-GRPO's.
ALIASES = {
    "epsilon": ("clip_low", "clip_high"),
    "epsilon_low": ("clip_low",),
    "epsilon_high": ("clip_high",),
    "beta": ("kl_weight",),
    "delta": ("dual_clip",),
    "clip_range": ("clip_low", "clip_high"),
    "adv_clip_max": ("advantage_clip",),
}
# What the arguments of forward are called in grpo_loss.
ARGUMENTS = {
    "v": "model_output",
    "v_old": "old_model_output",
    "v_reference": "ref_model_output",
}


class GRPOLoss(nn.Module):
    """The clipped objective of visual GRPO, from model outputs instead of log-probabilities.

    Args:
        clip_low: The ratio is clipped below 1 - clip_low; 1e-4 suits means over elements. Also `epsilon_low`.
        clip_high: The ratio is clipped above 1 + clip_high. Also `epsilon_high`; `epsilon` or `clip_range` sets both,
            or the one that no name of its own sets.
        kl_weight: Weight of the Gaussian KL to a reference model. Also `beta`.
        dual_clip: Bounds the loss where the advantage is negative by -A·dual_clip; greater than 1. Also `delta`.
        dppo_threshold: Drops samples by their KL (Flow-DPPO).
        advantage_clip: Advantages are clipped to ±advantage_clip; None leaves them. Also `adv_clip_max`.
        ratio: "gaussian", "unit" (Flow-CPS) or "ratio_norm" (GRPO-Guard).
        reduction: "mean" over samples, or "none": the loss of each sample [B].
        aliases: Settings by the names of other trainers, as given above.

    Raises:
        ValueError: A value is out of range. The message has the name that was given.
        TypeError: A name is unknown, or a setting is given by two names.

    `fastgrpo_kernels.grpo_loss` holds the formulas.
    """

    def __init__(
        self,
        *,
        clip_low: float = 1e-4,
        clip_high: float = 1e-4,
        kl_weight: float = 0.0,
        dual_clip: float | None = None,
        dppo_threshold: float | None = None,
        advantage_clip: float | None = 5.0,
        ratio: str = "gaussian",
        reduction: str = "mean",
        **aliases: float | None,
    ) -> None:
        super().__init__()
        settings: dict = {
            "clip_low": clip_low,
            "clip_high": clip_high,
            "kl_weight": kl_weight,
            "dual_clip": dual_clip,
            "dppo_threshold": dppo_threshold,
            "advantage_clip": advantage_clip,
            "ratio": ratio,
            "reduction": reduction,
        }
        # The name by which each setting was given, for messages.
        self.names = {name: name for name in settings}
        # A name of one limit beside one of both sets its own, as TRL's `epsilon` and `epsilon_high` do.
        for alias, value in sorted(aliases.items(), key=lambda item: -len(ALIASES.get(item[0], ()))):
            self._set(alias, value, settings)
        self.settings = settings
        clip = settings["advantage_clip"]
        if clip is not None:
            check_number(self.names["advantage_clip"], clip)
            if not clip > 0:
                raise ValueError(f"{self.names['advantage_clip']}: must be positive, or None, got {clip}")
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction: expected 'mean' over samples or 'none', got {reduction!r}")
        objective = {name: value for name, value in settings.items() if name not in ("advantage_clip", "reduction")}
        try:
            check_objective(**objective, reduction="mean", elements=None)
        except (TypeError, ValueError) as error:
            raise renamed(error, self.names) from None

    def _set(self, alias: str, value: float | None, settings: dict) -> None:
        if alias not in ALIASES:
            close = difflib.get_close_matches(alias, [*settings, *ALIASES], 1)
            hint = f"did you mean '{close[0]}'?" if close else f"one of: {', '.join([*settings, *ALIASES])}"
            raise TypeError(f"GRPOLoss: unknown setting '{alias}'; {hint}")
        for name in ALIASES[alias]:
            default = (GRPOLoss.__init__.__kwdefaults__ or {})[name]
            refines = len(ALIASES.get(self.names[name], ())) > len(ALIASES[alias])
            if not refines and (self.names[name] != name or settings[name] != default):
                raise TypeError(f"{alias}: sets {name}, which '{self.names[name]}' sets too; give one of them")
            settings[name], self.names[name] = value, alias

    def extra_repr(self) -> str:
        """Returns the settings, by their own names."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())

    def forward(
        self,
        model_output: Tensor,
        old_model_output: Tensor,
        b: float | Tensor,
        s: float | Tensor,
        noise: NoiseKey | Tensor | StoredStep,
        advantages: Tensor,
        ref_model_output: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and metrics.

        Args:
            model_output: The policy's output [B, ...]; the loss is differentiable in it.
            old_model_output: The rollout's output, of the same shape; in another dtype if it was stored so.
            b: The step's coefficient of the model output (`fastgrpo_kernels.transitions`), a float or [B].
            s: The step's standard deviation, a float or [B].
            noise: The step's noise key, its noise [B, ...], or the StoredStep (x, y, a) it was.
            advantages: One for each sample, [B]; or [B, R], of R losses that are summed.
            ref_model_output: The reference model's output; needed for kl_weight > 0, refused for 0.
            mask: bool, True where an element counts, as of padded latents: of the output's shape, or of its first
                dimensions, such as [B, tokens]. Means over elements are over those that count.

        Returns:
            The loss, a float32 scalar or [B], and float32 scalars that stay on the device: the means over samples
            `ratio`, `clip_ratio`, `kl` and `dropped`, and `max_deviation` of the ratio from 1.

        Raises:
            ValueError, TypeError: An argument does not fit; the message has its name.
        """
        settings = self.settings
        if (ref_model_output is None) != (settings["kl_weight"] == 0):
            needed = "needs the reference model's output" if ref_model_output is None else "ignores it; pass None"
            raise ValueError(f"ref_model_output: {self.names['kl_weight']} = {settings['kl_weight']} {needed}")
        if not isinstance(advantages, Tensor):
            raise TypeError(f"advantages: expected a [B] tensor, got {type(advantages).__name__}")
        clip = settings["advantage_clip"]
        advantages = advantages.float()
        batch, each = max(len(advantages), 1), settings["reduction"] == "none"
        try:
            loss, statistics = grpo_loss(
                model_output,
                old_model_output,
                b,
                s,
                noise,
                advantages if clip is None else advantages.clamp(-clip, clip),
                1.0 if each else 1.0 / batch,
                clip_low=settings["clip_low"],
                clip_high=settings["clip_high"],
                ratio=settings["ratio"],
                dual_clip=settings["dual_clip"],
                dppo_threshold=settings["dppo_threshold"],
                kl_weight=settings["kl_weight"],
                v_reference=ref_model_output,
                mask=mask,
                per_sample=each,
            )
        except (TypeError, ValueError) as error:
            raise renamed(error, ARGUMENTS) from None
        means = LossStatistics(statistics.values / batch) if each else statistics
        return loss, {
            "ratio": means.ratio,
            "clip_ratio": means.clipped,
            "kl": means.kl,
            "dropped": means.dropped,
            "max_deviation": statistics.max_deviation,
        }


def renamed(error: TypeError | ValueError, names: dict[str, str]) -> TypeError | ValueError:
    """An operation's error, `argument: what is wrong`, under the name that the argument has here."""
    name, colon, rest = str(error).partition(":")
    here = names.get(name, name)
    return type(error)(f"{here}{colon}{rest}".replace(f"{name}.detach()", f"{here}.detach()"))
