"""Real pipelines with random weights, made where they run: no file is read and nothing is downloaded.

Tokenizers, which the family makes, know the words of the embedded worlds alone, and pad as the real ones do.
"""

from __future__ import annotations

import torch

from fastgrpo.config import Model
from fastgrpo.models import ModelFamily, family_class
from fastgrpo.models.architectures import build_family


def random_family(config: Model, device: torch.device, sharded: bool = False) -> ModelFamily:
    """What `fastgrpo.models.load_family` gives, of the configuration at model.path; takes its place in a Trainer."""
    assert not sharded, "random weights are made whole"
    return build_family(config, device, family_class(config.family).word_tokenizers(config.max_sequence_length))
