"""Other trainers' step functions and losses, with their signatures and results, on these kernels. docs/drop-in.md.

Written from the papers' formulas; schedulers are used through their attributes, so diffusers need not be installed.
Nothing here copies from a device to the host.
"""

from . import awm, dance_grpo, ddpo, diffusion_nft, flow_factory, flow_grpo
from .loss import GRPOLoss

__all__ = ["GRPOLoss", "awm", "dance_grpo", "ddpo", "diffusion_nft", "flow_factory", "flow_grpo"]
