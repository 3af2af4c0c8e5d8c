"""Gradient of a strictly on-policy update, written from the noise alone."""

from .op import on_policy_backward, on_policy_gradient

__all__ = ["on_policy_backward", "on_policy_gradient"]
