"""P = mean(d·ε) and Q = mean(d²) of the standardized shift d = b·(v - v_old)/s."""

from .op import shift_moments

__all__ = ["shift_moments"]
