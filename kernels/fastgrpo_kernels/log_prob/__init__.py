"""log N(y; a·x + b·v, s²) as a mean over a sample's elements."""

from .op import log_prob

__all__ = ["log_prob"]
