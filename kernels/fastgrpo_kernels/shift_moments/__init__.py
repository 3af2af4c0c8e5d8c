"""P = mean(d·ε) and Q = mean(d²) of the standardized shift d = b·(v - v_old)/s."""

from .op import MatchingMoments, shift_moments

__all__ = ["MatchingMoments", "shift_moments"]
