"""What a run's prompts and rewards would do in silence, in lines with counts; and their pictures, opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgrpo.config import Config, Model
from fastgrpo.data.prompts import DRAWN, Prompt, open_pictures
from fastgrpo.errors import ConfigError
from fastgrpo.models import ModelFamily
from fastgrpo.models.loading import resolve_path
from fastgrpo.rewards.base import matches

# Text tokens of a CLIP, whatever it is given.
CLIP_TOKENS = 77


def check_pictures(source: str, prompts: Sequence[Prompt], pipeline: str = "", share: slice = slice(None)) -> None:
    """Opens the prompts' pictures; of a `pipeline` that starts from a picture (empty: none does), all must have one.

    share: of the prompts, those whose pictures are opened here. Raises ConfigError with a line for each.
    """
    without = [p for p in prompts if p.image is None]
    problems = []
    if pipeline and without:
        problems.append(
            f"{source}: {len(without)} of {len(prompts)} prompts have no image, such as '{without[0].text:.60}'; "
            f"{pipeline} starts from a picture: give each prompt an 'image'"
        )
    problems += open_pictures(prompts[share])[1]
    if problems:
        raise ConfigError(*problems)


def remarks(config: Config, cls: type[ModelFamily], sources: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """Lines with counts of what a run would do in silence: rewards that are never asked, texts that are not used."""
    said = []
    train = sources.get(config.prompts.train, ())
    for spec in config.scored:
        if spec.when and train and not any(matches(p, spec.when) for p in train):
            use = "trained" if spec.weight else "watched"
            wanted = ", ".join(f"{key}: {values}" for key, values in spec.when.items())
            said.append(
                f"rewards.{spec.key}: is {use}, but its when ({wanted}) matches none of the {len(train)} prompts of "
                f"{config.prompts.train}; {_metadata(train, spec.when)}"
            )
    guided = cls.guides(config.model)
    for source, prompts in sources.items():
        negatives = sum(p.negative is not None for p in prompts)
        if negatives and not guided:
            setting = cls.branch_setting()
            reason = (
                f"{cls.name} has no negative branch"
                if setting == "true_cfg" and not cls.takes_true_cfg
                else f"model.{setting} {getattr(config.model, setting):g} is not above {cls.unguided_scale:g}"
            )
            said.append(f"{source}: {negatives} of {len(prompts)} prompts have a negative prompt, unused: {reason}")
        said += _pictures_stretched(source, prompts, config.model)
    return said + _cut(config, cls, sources)


def _metadata(prompts: Sequence[Prompt], keys: Mapping[str, Any]) -> str:
    """What the prompts' metadata has under these keys."""
    parts = []
    for key in keys:
        there = list(dict.fromkeys(str(p.metadata[key]) for p in prompts if key in p.metadata))
        few = ", ".join(there[:6]) + (", …" if len(there) > 6 else "")
        parts.append(f"their {key} is {few}" if there else f"none has {key}")
    return "; ".join(parts)


def _pictures_stretched(source: str, prompts: Sequence[Prompt], model: Model) -> list[str]:
    own = [p for p in prompts if p.image is not None and not p.image.startswith(DRAWN)]
    if not own:
        return []
    sizes, _ = open_pictures(own)
    wanted = model.width / model.height
    off = [p for p in own if p.image in sizes and abs(sizes[p.image][0] / sizes[p.image][1] / wanted - 1) > 0.02]
    if not off:
        return []
    return [
        f"{source}: {len(off)} of {len(prompts)} images are not of the shape {model.width}:{model.height} and "
        f"will be stretched, such as {off[0].image} ({sizes[off[0].image or ''][0]}×{sizes[off[0].image or ''][1]})"
    ]


def _cut(config: Config, cls: type[ModelFamily], sources: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """A line for each source with prompts that are longer than the longest of the text encoders takes."""
    folder = Path(resolve_path(config.model.path))
    loaded = [_tokenizer(folder / name) for name in cls.encoders if name.startswith("tokenizer")]
    limits = [(_limit(tokenizer, config.model), tokenizer) for tokenizer in loaded if tokenizer is not None]
    if not limits:
        return []
    limit, tokenizer = max(limits, key=lambda pair: pair[0])
    said = []
    for source, prompts in sources.items():
        # A word is a token at least: short texts are not asked about.
        texts = list(dict.fromkeys(p.text for p in prompts if len(p.text) > limit))
        special = not any(name in type(tokenizer).__name__ for name in ("Llama", "Qwen"))
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=special)["input_ids"]] if texts else []
        over = {text: count for text, count in zip(texts, lengths, strict=True) if count > limit}
        if over:
            many = sum(p.text in over for p in prompts)
            said.append(
                f"{source}: {many} of {len(prompts)} prompts are longer than the {limit} tokens that the text encoder "
                f"takes and will be cut, the longest of {max(over.values())}: '{next(iter(over)):.40}…'"
            )
    return said


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a pipeline's directory; None where there is none, or it is still on the hub."""
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    # What is wrong with it, the family says when it loads.
    except Exception:
        return None


def _limit(tokenizer: Any, model: Model) -> int:
    return CLIP_TOKENS if tokenizer.model_max_length == CLIP_TOKENS else model.max_sequence_length
