"""Prompt sources, and the sampler that says which prompts an iteration rolls out."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgrpo.config.paths import expand_user
from fastgrpo.errors import ConfigError, nearest, require
from fastgrpo.registry import Registry

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Prompt:
    """One thing to draw. `image` is the picture that it starts from, the first frame of a video or the source of an
    edit: what `open_image` takes. `metadata` goes to the rewards, as the image does."""

    text: str
    negative: str | None = None
    image: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)


# What begins the name of a picture that is drawn here, not read: a world of fastgrpo/shapes.
DRAWN = ("editing:", "moving:")
# What begins a picture that is given whole.
PNG_DATA = "data:image/png;base64,"
# Of files of every system, the oldest too; other characters that Python would split at are text.
LINE_END = re.compile(r"\r\n|\n|\r")

# What reads a source: by what stands before its colon, called with what follows it; or by a file's suffix, called with
# the path.
SOURCES = Registry(
    "prompt source",
    "fastgrpo.prompts",
    {
        ".csv": "fastgrpo.data.prompts:_csv",
        ".jsonl": "fastgrpo.data.prompts:_jsonl",
        ".txt": "fastgrpo.data.prompts:_txt",
        "editing": "fastgrpo.data.prompts:_editing",
        "words": "fastgrpo.data.prompts:_words",
        "hf": "fastgrpo.data.prompts:_hub",
        "moving": "fastgrpo.data.prompts:_moving",
        "set": "fastgrpo.data.prompts:_ready_made",
        "shapes": "fastgrpo.data.prompts:_shapes",
    },
)


def available() -> list[str]:
    """What a prompt source may begin with, and the suffixes of files that are read; of installed packages too."""
    return [name if name.startswith(".") else f"{name}:" for name in SOURCES.available()]


def is_named(source: str) -> bool:
    """Whether a text begins as a source that is no file does: `shapes:…`, or one of an installed package."""
    return source.startswith(tuple(name for name in available() if name.endswith(":")))


def load_prompts(source: str) -> list[Prompt]:
    """Loads the prompts of a source, in its order.

    Args:
        source: `x.txt`: one prompt a line, blank lines skipped. `x.jsonl`, `x.csv`: `prompt`, and where given
            `negative_prompt` and `image` (relative to the file); every other column goes to the metadata.
            `shapes:train`, `shapes:heldout`: the embedded world (`shapes:train:position,counting`: of these categories
            alone); `moving:train`, `moving:heldout`: its videos, likewise, each prompt with a first frame of its own;
            `editing:train`, `editing:heldout`: edits of its images, each with a source image of its own.
            `words:train`, `words:heldout`: signs with short words and numbers.
            `hf:<dataset>[:split[:column]]`: a Hugging Face dataset, `train` and `prompt` unless said otherwise.
            `set:images`, `set:videos`, and either with `-heldout`: ours, to train on (fastgrpo/data/grammar.py);
            `set:geneval`, `set:hps`, `set:videoalign`, `set:vbench`: to evaluate on (fastgrpo/data/sets.py).
            `<name>:…`: a source that a package offers by the entry point group `fastgrpo.prompts`.

    Raises:
        ConfigError: Naming file and line where there is one.
        UserError: Where an extra is missing.
    """
    kind, colon, rest = source.partition(":")
    if not colon or kind not in SOURCES:
        kind, rest = Path(source).suffix.lower(), source
    if kind not in SOURCES:
        files = [name for name in available() if name.startswith(".")]
        begins = [name for name in available() if name.endswith(":")]
        hint = nearest(f"{source.partition(':')[0]}:", begins) if colon else ""
        raise ConfigError(
            f"{source}: unknown prompt source; {hint}it should be a file ({', '.join(files)}), or begin with "
            f"{', '.join(begins)}; such as shapes:train, set:images, hf:<dataset>[:split[:column]]"
        )
    prompts = list(SOURCES.load(kind, source)(rest))
    if not prompts:
        raise ConfigError(f"{source}: holds no prompts")
    if strange := [p for p in prompts if not isinstance(p, Prompt)]:
        raise ConfigError(f"{source}: gives {type(strange[0]).__name__}, not fastgrpo.data.prompts.Prompt")
    return prompts


def _shapes(spec: str) -> list[Prompt]:
    from fastgrpo.shapes import world

    return _embedded("shapes", spec, world)


def _moving(spec: str) -> list[Prompt]:
    from fastgrpo.shapes import moving_world

    return _embedded("moving", spec, moving_world)


def _words(spec: str) -> list[Prompt]:
    from fastgrpo.shapes import word_world

    return _embedded("words", spec, word_world)


def _editing(spec: str) -> list[Prompt]:
    from fastgrpo.shapes import editing_world

    return _embedded("editing", spec, editing_world)


def _embedded(kind: str, spec: str, world: Any) -> list[Prompt]:
    """A split of an embedded world with its categories, or those that follow it, in equal numbers (as GenEval's).

    A category may have hundreds of times the prompts of another: the large ones are sampled, the small repeat. Every
    prompt of a world with pictures has one of its own.
    """
    from fastgrpo.shapes.world import eval_set

    part, _, named = spec.partition(":")
    categories = tuple(filter(None, named.split(","))) or world.CATEGORIES
    for category in categories:
        if category not in world.CATEGORIES:
            hint = nearest(category, world.CATEGORIES)
            raise ConfigError(
                f"{kind}:{spec}: unknown category '{category}'; {hint}(one of: {', '.join(world.CATEGORIES)})"
            )
    parts = dict(zip(("train", "heldout"), world.split(), strict=True))
    if part not in parts:
        names = [f"{kind}:{name}" for name in parts]
        hint = nearest(f"{kind}:{part}", names)
        raise ConfigError(f"{kind}:{part}: unknown prompts; {hint}(one of: {', '.join(names)})")
    chosen = [p for p in parts[part] if p.category in categories]
    balanced = eval_set(chosen, 160 * len(categories), seed=0, categories=categories)
    return world_prompts(world, balanced)


def world_prompts(world: Any, captions: Iterable[Any]) -> list[Prompt]:
    """Captions of an embedded world as prompts, number i with the world's picture i where it has pictures."""
    image = getattr(world, "image_name", lambda caption, seed: None)
    return [Prompt(p.text, image=image(p, i), metadata={"category": p.category}) for i, p in enumerate(captions)]


def _ready_made(name: str) -> list[Prompt]:
    from fastgrpo.data.sets import SETS

    if name not in SETS:
        names = [f"set:{known}" for known in SETS]
        hint = nearest(f"set:{name}", names)
        raise ConfigError(f"set:{name}: unknown prompts; {hint}(one of: {', '.join(names)})")
    return [_prompt(dict(entry), f"set:{name}", None) for entry in SETS[name]()]


def open_image(image: str) -> Image.Image:
    """The RGB picture of a prompt, turned as its EXIF orientation says (as diffusers' `load_image` does): a file, or a
    picture of an embedded world, `moving:<seed>:<caption>` (a first frame) or `editing:<seed>:<objects>:<edit>`, or the
    bytes of a PNG that came with a request, `data:image/png;base64,…`.

    Raises ConfigError where it cannot be read.
    """
    from PIL import Image, ImageOps

    if image.startswith("moving:"):
        from fastgrpo.shapes.moving_render import first_frame

        _, seed, caption = image.split(":", 2)
        return Image.fromarray(first_frame(caption, int(seed)))
    if image.startswith("editing:"):
        from fastgrpo.shapes.editing_render import source_image

        return Image.fromarray(source_image(image))
    file: Any = image
    if image.startswith(PNG_DATA):
        file, image = io.BytesIO(base64.b64decode(image.removeprefix(PNG_DATA))), "the picture of a request"
    try:
        with Image.open(file) as picture:
            if picture.mode[0] in "IF":
                # To 8 bits PIL cuts them off at 255, and most of the picture is white.
                raise ValueError(f"its pixels are {picture.mode}, of more than 8 bits; write it with 8")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ConfigError(f"{image}: the image has more than {limit:,} pixels, PIL's limit; make it smaller") from None
    except Image.UnidentifiedImageError:
        raise ConfigError(f"{image}: cannot read the image: not a picture") from None
    except MemoryError:
        raise ConfigError(f"{image}: the image does not fit into memory; make it smaller") from None
    # Its readers raise whatever a damaged file makes them stumble over: struct.error, SyntaxError, ValueError …
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{image}: cannot read the image: {reason}") from None


def open_pictures(prompts: Iterable[Prompt]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Opens every picture of the prompts once, whole: (width, height) of those that can be read, a line for others."""
    names = list(dict.fromkeys(p.image for p in prompts if p.image is not None))

    def size(image: str) -> tuple[int, int] | str:
        if image.startswith(DRAWN):
            # Drawn here, and never damaged; a long list would take minutes.
            return 32, 32
        try:
            return open_image(image).size
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = dict(zip(names, pool.map(size, names), strict=True))
    sizes = {name: result for name, result in found.items() if not isinstance(result, str)}
    return sizes, [result for result in found.values() if isinstance(result, str)]


def _hub(spec: str) -> list[Prompt]:
    require("datasets", f"hf:{spec}")
    import datasets

    name, split, column = (*spec.split(":"), "", "")[:3]
    split, column = split or "train", column or "prompt"
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"hf:{spec}: cannot load dataset '{name}', split '{split}': {reason}") from None
    assert isinstance(rows, datasets.Dataset)
    if column not in rows.column_names:
        hint = nearest(column, rows.column_names)
        raise ConfigError(
            f"hf:{spec}: no column '{column}'; {hint}(one of: {', '.join(rows.column_names)}); "
            "write hf:<dataset>:<split>:<column>"
        )
    # Images, audio and the like would be decoded for every row, and no reward has asked for them.
    plain = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Value)]
    rows = rows.select_columns([column, *(name for name in plain if name != column)])
    prompts = []
    for index, row in enumerate(rows):
        record = dict(row)
        record["prompt"] = record.pop(column)
        record.pop("image", None)
        prompts.append(_prompt(record, f"hf:{spec}: row {index}", None))
    return prompts


def _txt(path: str) -> Iterator[Prompt]:
    return _file(Path(expand_user(path)), _text_records)


def _jsonl(path: str) -> Iterator[Prompt]:
    return _file(Path(expand_user(path)), _json_records)


def _csv(path: str) -> Iterator[Prompt]:
    return _file(Path(expand_user(path)), _csv_records)


def _file(path: Path, reader: Callable[[str, Path], Iterator[tuple[int, dict]]]) -> Iterator[Prompt]:
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        # A ValueError is of a name that no file can have.
        reason = error.strerror if isinstance(error, OSError) else error
        siblings = [p.name for p in path.parent.glob(f"*{path.suffix}")] if not os.path.exists(path) else []
        hint = nearest(path.name, siblings).strip()
        raise ConfigError(f"{path}: cannot read the prompts: {reason}{'; ' + hint if hint else ''}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(LINE_END.split(raw[: error.start].decode("utf-8-sig")))
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from None
    for line, record in reader(text, path):
        yield _prompt(record, f"{path}:{line}", path.parent)


def _text_records(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(LINE_END.split(text), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _json_records(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(LINE_END.split(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "cannot be read"
            raise ConfigError(f"{path}:{number}: not valid JSON: {reason}") from None
        if "\\u" in line and _broken(record):
            raise ConfigError(f"{path}:{number}: half of a character by itself (a lone surrogate, such as \\ud83d)")
        if not isinstance(record, dict):
            raise ConfigError(f'{path}:{number}: a line should be an object such as {{"prompt": "a red circle"}}')
        yield number, record


def _broken(record: Any) -> bool:
    """Whether its text cannot be written: a lone surrogate, which no tokenizer takes either."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return True
    return False


def _csv_records(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    line = 1
    try:
        columns = reader.fieldnames or []
        if "prompt" not in columns:
            raise ConfigError(f"{path}:1: no column 'prompt' among the columns {', '.join(columns) or '(none)'}")
        if len(set(columns)) < len(columns):
            raise ConfigError(f"{path}:1: a column is named twice: {', '.join(columns)}")
        # A quoted field may span lines: a record is named by its first.
        line = reader.line_num + 1
        for record in reader:
            if None in record or None in record.values():
                raise ConfigError(f"{path}:{line}: the row has not {len(columns)} fields as the header has")
            yield line, {k: v or None if k in ("negative_prompt", "image") else v for k, v in record.items()}
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}:{line}: not valid CSV: {error}") from None


def _prompt(record: dict, where: str, folder: Path | None) -> Prompt:
    """A Prompt of a record with `prompt`, `negative_prompt`, `image` and others; `folder` is where images are."""
    if "prompt" not in record:
        raise ConfigError(f"{where}: no 'prompt' among {', '.join(map(str, record)) or 'the keys'}")
    text, negative, image = record.pop("prompt"), record.pop("negative_prompt", None), record.pop("image", None)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: 'prompt' should be text, not {text!r:.60}")
    for key, value in (("negative_prompt", negative), ("image", image)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{where}: '{key}' should be text, not {value!r:.60}")
    if image is not None:
        image = str((folder or Path()) / expand_user(image))
        if not os.path.isfile(image):
            raise ConfigError(f"{where}: 'image': no such file: {image}")
    return Prompt(text, negative, image, record)
