"""What an objective of the forward process is: sums over the elements of a row in, a loss for each row out.

A row is a final sample x̂0, noised again to a level t. With v the model's output there, v_old that of the policy it is
compared with, and u what a perfect model would say, five means over a row's elements are all that an objective reads
(fastgrpo_kernels.MatchingTarget); the trainer does the rest.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastgrpo.config import Config


@dataclass(frozen=True)
class RowSums:
    """Means over the elements of each row, float32 [B], with d = v − v_old and e = v_old − u.

    Attributes:
        P: mean(d·e); differentiable.
        Q: mean(d²); differentiable. P and Q are exactly 0 where v is v_old.
        R: mean(e²), the squared error of v_old, for an objective with `branches`; else None.
        above: mean|e + β·d|, with β its `branches`; else None.
        below: mean|e − β·d|, likewise.
    """

    P: Tensor
    Q: Tensor
    R: Tensor | None = None
    above: Tensor | None = None
    below: Tensor | None = None

    @property
    def change(self) -> Tensor:
        """2P + Q: the mean squared error of v, less that of v_old."""
        return 2 * self.P + self.Q


@dataclass(frozen=True)
class RowInputs:
    """What is known of each row, float32 [B].

    Attributes:
        advantages: Of the row's sample.
        t: The noise level: a flow's t; of a diffusion model √(1−ᾱ)/(√ᾱ + √(1−ᾱ)), the t of the same signal-to-noise
            ratio.
        clean: |∂x̂0/∂v|, by which an error of the output becomes one of the clean sample that it predicts: a flow's t.
    """

    advantages: Tensor
    t: Tensor
    clean: Tensor


@dataclass(frozen=True)
class RowLosses:
    """What an objective makes of rows, float32 [B].

    Attributes:
        loss: Differentiable.
        ratio: How much likelier the objective holds the row's sample to be than under the old policy; 1 where v is
            v_old, and logged.
        clipped: 1 where the loss is a clipped branch; None: there is none.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor | None = None


class ForwardObjective(abc.ABC):
    """An objective of the forward process; a package offers its own by the entry point group `fastgrpo.objectives`.

    Made once for a run. `losses` is called for each micro-batch, on the device, and reads nothing back to the host.
    """

    # What v_old is: the output of the old policy (objective.old_decay), or of the reference model.
    against: ClassVar[Literal["old", "reference"]] = "old"
    # Rows come as pairs, the better sample's and then the worse one's, at one t and with one noise.
    paired: ClassVar[bool] = False
    # Whether a row whose advantage is 0 has a gradient.
    trains_zero: ClassVar[bool] = False
    # The settings of `objective` that it reads; others must be as they are by default.
    settings: ClassVar[tuple[str, ...]] = ()
    # β of the sums `above` and `below`; None: they are not made, nor R.
    branches: float | None = None

    @abc.abstractmethod
    def __init__(self, config: Config) -> None:
        """Takes its settings. Raises ConfigError for what it cannot use."""

    @abc.abstractmethod
    def losses(self, sums: RowSums, rows: RowInputs) -> RowLosses:
        """Returns the loss of each row; the trainer averages them over the rows of an optimizer step."""
