"""Other trainers' step functions, with their signatures and return values, on these kernels. docs/drop-in.md.

Written from the papers' formulas; schedulers are used through their attributes, so diffusers need not be installed.
Nothing here copies from a device to the host.
"""

from . import dance_grpo, ddpo, flow_factory, flow_grpo
from .loss import GRPOLoss

__all__ = ["GRPOLoss", "dance_grpo", "ddpo", "flow_factory", "flow_grpo"]
