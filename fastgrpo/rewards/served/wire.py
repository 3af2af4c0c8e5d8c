"""What travels between a trainer and a reward server: samples as safetensors (raw, or PNG/WebP inside), scores as JSON.

A request is one safetensors file: `request` (uint8 JSON: version, encoding, shape, fps, prompts) and either `samples`
(raw: float32; uint8: rounded to 1/255) or `images` (uint8, PNG or lossless WebP files end to end) with `ends` (int64).
`sources` (uint8 [K, H, W, 3], as large as the samples) are the prompts' pictures, each once; a prompt has the place of
its own, or the name of an embedded world's. Nothing is ever unpickled, and no path that a client names is opened.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fastgrpo.data.images import source_pixels
from fastgrpo.data.prompts import DRAWN, PNG_DATA, Prompt
from fastgrpo.rewards.base import Scores

VERSION = 1
# Of a request: bytes of safetensors' own header (four tensors), bytes of its JSON, and values in it (each of which
# takes some hundred bytes once it is read).
MAX_HEADER, MAX_HEAD, MAX_VALUES = 2**12, 2**23, 2**18
MEDIA_TYPE = "application/x-fastgrpo"
Encoding = Literal["raw", "uint8", "png", "webp"]
Size = Annotated[int, Field(ge=1, le=2**20)]


class WireError(ValueError):
    """A message that is not one of ours. status: what HTTP says of it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Prompt(_Message):
    text: Annotated[str, Field(min_length=1, max_length=65_536)]
    negative: str | None = None
    source: Annotated[int, Field(ge=0)] | None = None
    drawn: Annotated[str, Field(max_length=65_536)] | None = None
    metadata: dict[str, Any] = {}


class _Request(_Message):
    version: Literal[1]
    encoding: Encoding
    shape: Annotated[list[Size], Field(min_length=4, max_length=5)]
    fps: float | None = None
    prompts: list[_Prompt]


class _Answer(_Message):
    values: list[float]
    valid: list[bool]
    asked: list[bool]
    components: dict[str, list[float | None]] = {}


@dataclass(frozen=True)
class ScoreRequest:
    """samples: float32 [B, 3, H, W] or [B, 3, F, H, W] in [0, 1]; prompts: B; fps: of videos, else None."""

    samples: Tensor
    prompts: list[Prompt]
    fps: float | None


def encode_request(samples: Tensor, prompts: Sequence[Prompt], fps: float | None, encoding: Encoding) -> bytes:
    """The body of a request. `raw` loses nothing; the others round to 1/255."""
    from safetensors.torch import save

    # A path is the client's own: the server gets the picture.
    pictures = {p.image: p for p in prompts if p.image is not None and not p.image.startswith(DRAWN)}
    texts = [_described(p, list(pictures)) for p in prompts]
    head = {"version": VERSION, "encoding": encoding, "shape": list(samples.shape), "fps": fps, "prompts": texts}
    tensors = {"request": torch.frombuffer(bytearray(json.dumps(head).encode()), dtype=torch.uint8)}
    if pictures:
        tensors["sources"] = torch.from_numpy(source_pixels(list(pictures.values()), *samples.shape[-2:]))
    if encoding == "raw":
        tensors["samples"] = samples.float().cpu().contiguous()
    else:
        rounded = (samples.clamp(0, 1) * 255).round().to(torch.uint8).cpu().contiguous()
        tensors |= {"samples": rounded} if encoding == "uint8" else _compressed(rounded, encoding)
    return save(tensors)


def decode_request(body: bytes, max_bytes: int) -> ScoreRequest:
    """The request of a body. Raises WireError: 400 for what is malformed, 413 for samples above max_bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if int.from_bytes(body[:8], "little") > MAX_HEADER:
        raise WireError(f"a safetensors header above {MAX_HEADER} bytes")
    try:
        tensors = load(body)
        head = tensors["request"]
        if head.dtype != torch.uint8 or head.ndim != 1:
            raise WireError("'request' should be uint8 text")
        text = head.numpy().tobytes()
        if len(text) > MAX_HEAD or sum(map(text.count, (b",", b":", b"[", b"{"))) > MAX_VALUES:
            raise WireError(f"'request' is above {MAX_HEAD} bytes or {MAX_VALUES} values", 413)
        request = _Request.model_validate_json(text)
    except WireError:
        raise
    except (SafetensorError, ValidationError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise WireError(f"not a request: {_line(error)}") from None
    shape = request.shape
    if shape[1] != 3 or len(request.prompts) != shape[0]:
        raise WireError(f"samples {shape} of {len(request.prompts)} prompts should be [prompts, 3, …]")
    if 4 * math.prod(shape) > max_bytes:
        raise WireError(f"samples {shape} take {4 * math.prod(shape)} bytes, and the limit is {max_bytes}", 413)
    images = _sources(tensors.pop("sources", None), request)
    prompts = [Prompt(p.text, p.negative, image, p.metadata) for p, image in zip(request.prompts, images, strict=True)]
    return ScoreRequest(_samples(tensors, request), prompts, request.fps)


def _described(prompt: Prompt, pictures: Sequence[str]) -> dict[str, Any]:
    """A prompt as the head of a request has it; pictures: the names of those that are sent, in order."""
    said: dict[str, Any] = {"text": prompt.text, "negative": prompt.negative, "metadata": dict(prompt.metadata)}
    if prompt.image is None:
        return said
    return said | ({"source": pictures.index(prompt.image)} if prompt.image in pictures else {"drawn": prompt.image})


def _sources(sources: Tensor | None, request: _Request) -> list[str | None]:
    """The image of each prompt, as `open_image` takes it."""
    if sources is not None and (sources.dtype != torch.uint8 or list(sources.shape[1:]) != [*request.shape[-2:], 3]):
        raise WireError(f"'sources' is {sources.dtype} {list(sources.shape)}, not uint8 pictures like the samples")
    count, found = 0 if sources is None else len(sources), []
    if count > len(request.prompts):
        raise WireError(f"{count} sources of {len(request.prompts)} prompts")
    urls = [_png(picture) for picture in sources] if sources is not None else []
    for prompt in request.prompts:
        if prompt.source is not None and prompt.source >= count:
            raise WireError(f"a prompt has source {prompt.source}, and {count} came")
        if prompt.drawn is not None and not prompt.drawn.startswith(DRAWN):
            raise WireError("'drawn' should name a picture of an embedded world")
        found.append(prompt.drawn if prompt.source is None else urls[prompt.source])
    return found


def _png(picture: Tensor) -> str:
    """uint8 [H, W, 3] as `open_image` takes it."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, format="PNG", compress_level=1)
    return PNG_DATA + base64.b64encode(buffer.getvalue()).decode()


def encode_scores(scores: Scores) -> dict[str, Any]:
    """Scores as JSON data; NaN in a component is null."""
    components = {
        name: [None if math.isnan(x) else x for x in column.tolist()] for name, column in scores.components.items()
    }
    assert scores.asked is not None
    lists = {name: getattr(scores, name).tolist() for name in ("values", "valid", "asked")}
    return {**lists, "components": components}


def decode_scores(body: bytes, count: int) -> Scores:
    """The scores of an answer. Raises WireError where it is not one of `count` samples."""
    try:
        answer = _Answer.model_validate_json(body)
        nan = float("nan")
        components = {
            name: np.array([nan if x is None else x for x in column]) for name, column in answer.components.items()
        }
        scores = Scores(np.array(answer.values), np.array(answer.valid), components, np.array(answer.asked))
    except ValueError as error:
        raise WireError(f"not an answer: {_line(error)}") from None
    if len(scores.values) != count:
        raise WireError(f"an answer of {len(scores.values)} scores for {count} samples")
    return scores


def _compressed(rounded: Tensor, encoding: str) -> dict[str, Tensor]:
    """uint8 samples as image files end to end, frame after frame, and where each ends."""
    from PIL import Image

    frames = rounded if rounded.ndim == 4 else rounded.transpose(1, 2).flatten(0, 1)
    options: dict[str, Any] = {"lossless": True, "method": 0} if encoding == "webp" else {"compress_level": 1}
    files = io.BytesIO()
    ends = []
    for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
        Image.fromarray(frame).save(files, format=encoding.upper(), **options)
        ends.append(files.tell())
    data = torch.frombuffer(bytearray(files.getvalue()), dtype=torch.uint8)
    return {"images": data, "ends": torch.tensor(ends)}


def _samples(tensors: dict[str, Tensor], request: _Request) -> Tensor:
    shape, encoding = request.shape, request.encoding
    names = {"request", "samples"} if encoding in ("raw", "uint8") else {"request", "images", "ends"}
    if set(tensors) != names:
        raise WireError(f"'{encoding}' should hold {', '.join(sorted(names))}, not {', '.join(sorted(tensors))[:200]}")
    if encoding in ("png", "webp"):
        return _decompressed(tensors["images"], tensors["ends"], request).float() / 255
    samples, dtype = tensors["samples"], torch.float32 if encoding == "raw" else torch.uint8
    if list(samples.shape) != shape or samples.dtype != dtype:
        raise WireError(f"'samples' is {samples.dtype} {list(samples.shape)}, and should be {dtype} {shape}")
    if encoding == "uint8":
        return samples.float() / 255
    if not (torch.isfinite(samples).all() and samples.min() >= 0 and samples.max() <= 1):
        raise WireError("'samples' should be finite and in [0, 1]")
    return samples


def _decompressed(images: Tensor, ends: Tensor, request: _Request) -> Tensor:
    """uint8 samples of image files. A file of another size or kind than it says is refused before it is decoded."""
    from PIL import Image

    shape = request.shape
    frames, (height, width) = math.prod(shape[:1] + shape[2:-2]), shape[-2:]
    if images.dtype != torch.uint8 or images.ndim != 1 or ends.dtype != torch.int64 or list(ends.shape) != [frames]:
        raise WireError(f"'images' should be uint8 bytes and 'ends' int64 [{frames}]")
    data = images.numpy().tobytes()
    places = [0, *ends.tolist()]
    if places[-1] != len(data) or any(b <= a for a, b in pairwise(places)):
        raise WireError("'ends' should rise to the length of 'images'")
    pixels = torch.empty(frames, height, width, 3, dtype=torch.uint8)
    for place, (start, stop) in enumerate(pairwise(places)):
        try:
            with Image.open(io.BytesIO(data[start:stop]), formats=[request.encoding.upper()]) as image:
                if image.size != (width, height) or image.mode != "RGB":
                    raise WireError(f"image {place} is {image.mode} {image.size}, not RGB {(width, height)}")
                pixels[place] = torch.from_numpy(np.array(image))
        except WireError:
            raise
        except Exception as error:
            raise WireError(f"image {place} is not a {request.encoding}: {_line(error)}") from None
    channels_first = pixels.permute(0, 3, 1, 2)
    return channels_first if len(shape) == 4 else channels_first.unflatten(0, (shape[0], shape[2])).transpose(1, 2)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
