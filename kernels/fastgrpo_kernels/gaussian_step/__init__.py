"""y = a·x + b·v + s·ε in one pass, with guidance, log-probability and predicted clean sample where asked for."""

from .op import GaussianStep, gaussian_step

__all__ = ["GaussianStep", "gaussian_step"]
