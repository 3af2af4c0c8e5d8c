"""Fused maths of visual GRPO: Gaussian steps, shift moments and their gradients. Needs torch; triton on GPUs."""

from . import transitions
from ._noise_args import MatchingTarget, StoredStep
from .clipped_loss import LossStatistics, clipped_loss, grpo_loss, nft_loss
from .gaussian_step import GaussianStep, gaussian_step
from .log_prob import log_prob
from .noise import (
    NOISE_V1,
    STREAM_INITIAL,
    STREAM_SDE,
    STREAM_SUBSET,
    STREAM_VAE,
    NoiseKey,
    noise_key,
    normal,
    random_words,
    uniform,
)
from .on_policy_gradient import on_policy_backward, on_policy_gradient
from .shift_moments import MatchingMoments, shift_moments
from .transitions import Transition

__all__ = [
    "NOISE_V1",
    "STREAM_INITIAL",
    "STREAM_SDE",
    "STREAM_SUBSET",
    "STREAM_VAE",
    "GaussianStep",
    "LossStatistics",
    "MatchingMoments",
    "MatchingTarget",
    "NoiseKey",
    "StoredStep",
    "Transition",
    "clipped_loss",
    "gaussian_step",
    "grpo_loss",
    "log_prob",
    "nft_loss",
    "noise_key",
    "normal",
    "on_policy_backward",
    "on_policy_gradient",
    "random_words",
    "shift_moments",
    "transitions",
    "uniform",
]
