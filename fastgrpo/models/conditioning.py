"""What a model is conditioned on, and how prompts become it: encoded once, kept in memory and on disk."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.data.prompts import Prompt
from fastgrpo.models.embeddings import EmbeddingCache, Key, key_of

# A batch size is part of the numerics, so text is always encoded in batches of this many prompts.
ENCODE_BATCH = 8
# Prompts encoded ahead, whose encodings are on the device together.
AHEAD_BATCH = 64


class Conditioning(Mapping[str, Tensor]):
    """What the model is conditioned on: named tensors whose first dimension is the row (a prompt, or a sample).

    host: what the host must know of each row without asking the device, such as how long its text is.
    """

    def __init__(self, tensors: Mapping[str, Tensor], host: Mapping[str, np.ndarray] | None = None) -> None:
        self.tensors, self.host = dict(tensors), dict(host or {})

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def rows(self, index: np.ndarray) -> Conditioning:
        """The rows at `index` [R], in its order, repeats allowed."""
        device = next(iter(self.tensors.values())).device
        chosen = to_device(index, device)
        return Conditioning(
            {name: tensor.index_select(0, chosen) for name, tensor in self.tensors.items()},
            {name: array[index] for name, array in self.host.items()},
        )

    def branches(self, name: str, guided: bool) -> Tensor:
        """[R, …] of a name, or with guidance [2R, …]: the negative prompts' rows, then the prompts'."""
        return torch.cat([self[f"negative_{name}"], self[name]]) if guided else self[name]

    def host_branches(self, name: str, guided: bool) -> np.ndarray:
        """`branches` of what the host knows."""
        return np.concatenate([self.host[f"negative_{name}"], self.host[name]]) if guided else self.host[name]


class PromptEncoding(abc.ABC):
    """The part of a family (fastgrpo/models/protocol.py) that encodes prompts, by its `encode_prompts`."""

    config: Model
    device: torch.device
    embeddings: EmbeddingCache
    # What a family declares: see fastgrpo/models/protocol.py.
    guidance_style: ClassVar[Literal["embedded", "cfg"]]
    unguided_scale: ClassVar[float]
    host_names: ClassVar[tuple[str, ...]]

    @property
    def guided(self) -> bool:
        """Whether a prediction takes two branches."""
        return self.guides(self.config)

    @classmethod
    def guides(cls, config: Model) -> bool:
        """Whether a prediction takes two branches at a config's guidance."""
        return cls.branch_scale(config) > cls.unguided_scale

    @classmethod
    def branch_scale(cls, config: Model) -> float:
        """The scale of classifier-free guidance by two branches; at most `unguided_scale`: there is one."""
        return getattr(config, cls.branch_setting())

    @classmethod
    def branch_setting(cls) -> str:
        """Which setting of `model` is that scale."""
        return "guidance" if cls.guidance_style == "cfg" else "true_cfg"

    @property
    @abc.abstractmethod
    def takes_image(self) -> bool:
        """Whether its pipeline starts from a picture of the prompt's."""

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Encodes prompts, [len(prompts), …] each."""

    @abc.abstractmethod
    def encoding(self) -> AbstractContextManager[None]:
        """Within it everything that encodes prompts is on the device."""

    @abc.abstractmethod
    def trained_on_host(self) -> AbstractContextManager[None]:
        """Within it the trained components are in host memory."""

    @abc.abstractmethod
    def drop_encoders(self) -> None:
        """Frees the text encoders; a prompt that is not cached loads them again."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], keep: int = 4096) -> Conditioning:
        """The conditioning of prompts, with classifier-free guidance that of their negatives too (`negative_<name>`).

        Each text is encoded once and kept: the `keep` most recent in memory, all in model.embedding_cache.
        """
        tensors = self._encoded(prompts)
        if self.guided:
            negatives = self._encoded([self.negative(p) for p in prompts])
            tensors |= {f"negative_{name}": tensor for name, tensor in negatives.items()}
        self.embeddings.forget(max(keep, len(prompts)))
        return self.condition(tensors)

    def negative(self, prompt: Prompt) -> Prompt:
        """What guidance leads away from; without classifier-free guidance the prompt itself."""
        if not self.guided:
            return prompt
        text = self.config.negative_prompt if prompt.negative is None else prompt.negative
        return Prompt(text, image=prompt.image if self.takes_image else None)

    def condition(self, encoded: Mapping[str, Tensor]) -> Conditioning:
        """Encoded prompts as conditioning, with what stays on the host apart."""
        host = [name for name in encoded if name.removeprefix("negative_") in self.host_names]
        return Conditioning(
            {name: tensor.to(self.device) for name, tensor in encoded.items() if name not in host},
            {name: encoded[name].cpu().numpy() for name in host},
        )

    def _encoded(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        distinct = {key_of(p): p for p in prompts}
        found = {key: self.embeddings.get(p) for key, p in distinct.items()}
        missing = [p for key, p in distinct.items() if found[key] is None]
        if missing:
            with self.encoding():
                found |= self._encoded_anew(missing)
        rows = [cast(dict[str, Tensor], found[key_of(p)]) for p in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _encoded_anew(self, prompts: Sequence[Prompt]) -> dict[Key, dict[str, Tensor]]:
        found = {}
        for start in range(0, len(prompts), ENCODE_BATCH):
            chunk = list(prompts[start : start + ENCODE_BATCH])
            encoded = self.encode_prompts(chunk + [chunk[-1]] * (ENCODE_BATCH - len(chunk)))
            for row, prompt in enumerate(chunk):
                found[key_of(prompt)] = {
                    name: tensor[row].cpu() if name in self.host_names else tensor[row].clone()
                    for name, tensor in encoded.items()
                }
                self.embeddings.put(prompt, found[key_of(prompt)])
        return found

    def encode_ahead(self, prompts: Sequence[Prompt]) -> None:
        """Encodes into model.embedding_cache what it lacks of these prompts, negatives too; then frees the encoders.

        Before weights are sharded: the trained components make room for the encoders.
        """
        missing = [p for p in prompts if not (self.embeddings.has(p) and self.embeddings.has(self.negative(p)))]
        with self.trained_on_host() if missing else nullcontext():
            for start in range(0, len(missing), AHEAD_BATCH):
                self.encode(missing[start : start + AHEAD_BATCH], keep=1)
        # What was read back from disk would be on the host; this is on the device.
        self.embeddings.forget(0)
        self.drop_encoders()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array as a tensor on `device`, without waiting for the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
