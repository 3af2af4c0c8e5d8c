"""Encoded prompts, each encoded once: in memory, and on disk where model.embedding_cache says so.

`<directory>/<model>/<prompt>.safetensors`, both names digests; a file is written beside and renamed, so several
processes may share a directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from fastgrpo.config import Model
from fastgrpo.data.prompts import DRAWN, Prompt
from fastgrpo.errors import UserError

Key = tuple[str, str | None]


def key_of(prompt: Prompt) -> Key:
    """What an encoded prompt depends on: its text and its image."""
    return prompt.text, prompt.image


def model_digest(path: str, parts: tuple[str, ...], settings: dict[str, object]) -> str:
    """Names a model's encoders: their files (names, sizes, times; JSON by content) and the settings they run with.

    Of a hub id, the revision in the hub's local cache says what they are, whether or not they are there yet.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(path, "model_index.json")
        return _digest(
            {"path": path, "revision": Path(found).parent.name if isinstance(found, str) else "", **settings}
        )
    files = []
    for part in parts:
        for file in sorted((folder / part).rglob("*")):
            if file.is_file():
                text = file.suffix == ".json"
                stamp = hashlib.sha256(file.read_bytes()).hexdigest() if text else file.stat().st_mtime_ns
                files.append([str(file.relative_to(folder)), file.stat().st_size, stamp])
    return _digest({"path": str(folder.resolve()), "files": files, **settings})


def encoded_size(config: Model) -> tuple[int, ...]:
    """The height, width and frames that a prompt's image is encoded for."""
    return config.height, config.width, config.frames


class EmbeddingCache:
    """The encoded prompts of one model: the `keep` most recent in memory; all of them in `directory`, if any."""

    def __init__(self, directory: Path | None, size: tuple[int, ...] = ()) -> None:
        """size: what the encoding of a prompt's image depends on beside the image."""
        self.directory, self.size = directory, size
        self.memory: OrderedDict[Key, dict[str, Tensor]] = OrderedDict()

    def has(self, prompt: Prompt) -> bool:
        return key_of(prompt) in self.memory or (self.directory is not None and self._path(prompt).exists())

    def get(self, prompt: Prompt) -> dict[str, Tensor] | None:
        """The tensors of a prompt, or None. Raises UserError for a file that cannot be read."""
        key = key_of(prompt)
        if key in self.memory:
            self.memory.move_to_end(key)
            return self.memory[key]
        if self.directory is None or not (path := self._path(prompt)).exists():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            self.memory[key] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.embedding_cache: {path} cannot be read ({error}); remove it") from None
        return self.memory[key]

    def put(self, prompt: Prompt, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors of a prompt. Raises UserError where the directory cannot be written."""
        self.memory[key_of(prompt)] = tensors
        if self.directory is None:
            return
        from safetensors.torch import save_file

        path = self._path(prompt)
        scratch = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, scratch)
            scratch.replace(path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise UserError(f"model.embedding_cache: cannot write {path}: {error.strerror}") from None

    def forget(self, keep: int) -> None:
        """Drops all but the `keep` most recent from memory."""
        while len(self.memory) > keep:
            self.memory.popitem(last=False)

    def _path(self, prompt: Prompt) -> Path:
        assert self.directory is not None
        image = prompt.image
        if image is not None and not image.startswith(DRAWN):
            # Pictures are turned as their orientation says: those that were encoded before they were have other names.
            image = "turned:" + hashlib.sha256(Path(image).read_bytes()).hexdigest()
        sized = {"size": self.size} if image is not None else {}
        return self.directory / f"{_digest({'text': prompt.text, 'image': image, **sized})}.safetensors"


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
