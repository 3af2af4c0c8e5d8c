"""GRPO's loss as a module: hyper-parameters when it is built, tensors when it is called, (loss, metrics) back."""

from __future__ import annotations

from torch import Tensor, nn

from .._checks import check_latents, check_no_grad
from .._noise_args import StoredStep
from ..clipped_loss import grpo_loss
from ..clipped_loss.op import check_objective
from ..noise import NoiseKey


class GRPOLoss(nn.Module):
    """The clipped objective of visual GRPO, from model outputs instead of log-probabilities.

    `epsilon_low` and `epsilon_high` bound the ratio (1e-4 suits means over elements), `beta` weighs the Gaussian KL to
    a reference model, `delta` > 1 bounds the loss of negative advantages (dual clip), `dppo_threshold` masks by
    KL (Flow-DPPO), `advantage_clip` bounds |A|. `ratio`: gaussian, unit (Flow-CPS) or ratio_norm (GRPO-Guard).
    Raises ValueError for a value out of range. fastgrpo_kernels.grpo_loss holds the formulas.
    """

    def __init__(
        self,
        *,
        epsilon_low: float = 1e-4,
        epsilon_high: float = 1e-4,
        beta: float = 0.0,
        delta: float | None = None,
        dppo_threshold: float | None = None,
        advantage_clip: float = 5.0,
        ratio: str = "gaussian",
    ) -> None:
        super().__init__()
        self.objective = check_objective(epsilon_low, epsilon_high, ratio, delta, dppo_threshold, beta, "mean", None)
        self.advantage_clip = advantage_clip

    def forward(
        self,
        model_output: Tensor,
        old_model_output: Tensor,
        b: float | Tensor,
        s: float | Tensor,
        noise: NoiseKey | Tensor | StoredStep,
        advantages: Tensor,
        ref_model_output: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over samples, a scalar differentiable in `model_output`, and metrics, left on the device.

        Model outputs are [B, ...] of one dtype; `b` and `s` are the step's coefficients (fastgrpo_kernels.transitions),
        floats or [B]; `noise` is the step's key, its ε, or the StoredStep (x, y, a) it was; `advantages` are [B].
        `ref_model_output` is needed for beta > 0 and refused for beta = 0, which would ignore it. Metrics: ratio,
        clip_ratio, kl, dropped (means over samples) and max_deviation of the ratio from 1, float32.
        """
        check_latents("model_output", model_output)
        for name, other in (("old_model_output", old_model_output), ("ref_model_output", ref_model_output)):
            if other is not None or name == "old_model_output":
                check_latents(name, other, like=model_output, same_dtype=True)
        check_no_grad(old_model_output=old_model_output, ref_model_output=ref_model_output, advantages=advantages)
        if (ref_model_output is None) != (self.objective.kl_weight == 0):
            needed = "needs the reference model's output" if ref_model_output is None else "ignores it; pass None"
            raise ValueError(f"ref_model_output: beta = {self.objective.kl_weight} {needed}")
        batch = model_output.shape[0]
        if not isinstance(advantages, Tensor):
            raise TypeError(f"advantages: expected a [{batch}] tensor, got {type(advantages).__name__}")
        if advantages.shape != (batch,):
            raise ValueError(f"advantages: expected shape [{batch}], got {list(advantages.shape)}")
        objective = self.objective
        loss, statistics = grpo_loss(
            model_output,
            old_model_output,
            b,
            s,
            noise,
            advantages.float().clamp(-self.advantage_clip, self.advantage_clip),
            1.0 / batch,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            ratio=objective.ratio,  # pyright: ignore[reportArgumentType]
            dual_clip=objective.dual_clip,
            dppo_threshold=objective.dppo_threshold,
            kl_weight=objective.kl_weight,
            v_reference=ref_model_output,
        )
        return loss, {
            "ratio": statistics.ratio,
            "clip_ratio": statistics.clipped,
            "kl": statistics.kl,
            "dropped": statistics.dropped,
            "max_deviation": statistics.max_deviation,
        }
