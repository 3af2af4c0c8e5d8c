"""y = a·x + b·v + s·ε in one pass."""

from .op import gaussian_step

__all__ = ["gaussian_step"]
