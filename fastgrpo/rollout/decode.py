"""Final latents to pixels in host memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastgrpo.models.protocol import ModelFamily
from fastgrpo.rollout.sampler import batch_rows, forward_batches


def decode(
    family: ModelFamily, latents: Tensor, batch: int, decode_batch: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Images of latents [n, *shape], decoded in batches of exactly `batch`: [n, 3, H, W] in [0, 1], in host memory.

    decode_batch: decodes a batch in place of `family.decode`; the memory plan counts with it. On a GPU their copies may
    still be under way: the host synchronizes before it reads them.
    """
    decode_batch = decode_batch or family.decode
    images: Tensor | None = None
    done = 0
    with family.on_device("vae"):
        for index, real in forward_batches(np.arange(len(latents)), batch):
            part = decode_batch(batch_rows(latents, index, real))[:real]
            if images is None:
                images = family.host_empty((len(latents), *part.shape[1:]), part.dtype)
            images[done : done + real].copy_(part, non_blocking=True)
            done += real
    assert images is not None
    return images


def synchronize(device: torch.device) -> None:
    """The host waits for this thread's stream: once an iteration, before it reads the images."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
