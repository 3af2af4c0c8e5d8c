"""Reads a pipeline from a directory, the hub or `shapes:<name>`: its configs first, then its weights.

Whatever a library raises over a directory that it cannot load becomes one line.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastgrpo.algorithms.schedule import NoiseLevels
from fastgrpo.config import Model
from fastgrpo.config.dtypes import DTYPES
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models.embeddings import model_digest
from fastgrpo.models.nf4 import check_quantization
from fastgrpo.models.sharded_load import empty_component, weight_files
from fastgrpo.models.trainable import check_targets, without_weights
from fastgrpo.models.weight_files import UNUSED, check_files, check_index, damaged_files, stored_names

if TYPE_CHECKING:
    from fastgrpo.models.protocol import ModelFamily

# What transformers call the channels of a head that each axis of a position turns.
ROPE_AXES = {"rope_axes_dim", "axes_dims_rope"}


def from_config(cls: type[ModelFamily], config: Model, device: torch.device, sharded: bool = False) -> ModelFamily:
    """Loads the pipeline at model.path as a family.

    Args:
        cls: The family.
        config: The model section of a run.
        device: Where the components go.
        sharded: The trained components stay without weights; `weight_files` says what `load_shards` is to read.

    Raises:
        ConfigError: Before any weight is loaded, where it can be told by then.
    """
    check_quantization(config)
    path = resolve_path(config.path)
    parts = read_configs(cls, config)
    with one_line(config, cls.pipeline_classes):
        cls.check(config, parts)
    if config.lora and config.lora.targets:
        with one_line(config, cls.pipeline_classes):
            for name in parts.keys() & cls.trained:
                check_targets(config.lora.targets, without_weights(parts[name]))
    cache = None
    if config.embedding_cache is not None:
        settings = {"family": cls.name, "dtype": config.dtype, "max_sequence_length": config.max_sequence_length}
        cache = Path(config.embedding_cache).expanduser() / model_digest(path, cls.encoders, settings)
    # With a cache the encoders wait until a prompt is missing from it.
    given: dict[str, Any] = cls.own_parts(config) | (dict.fromkeys(cls.encoders) if cache is not None else {})
    files = {name: weight_files(path, name, config.variant) for name in cls.trained if name in parts} if sharded else {}
    with one_line(config, cls.pipeline_classes):
        given |= {name: empty_component(parts[name], torch.float32) for name in files}
    pipeline = load_pipeline(config, cls.pipeline_classes, cls.trained, given)
    with one_line(config, cls.pipeline_classes):
        family = cls(pipeline, config, device, cache)
    family.weight_files = files
    return family


def read_configs(cls: type[ModelFamily], config: Model) -> dict[str, Mapping[str, Any]]:
    """Returns the configs of the pipeline's scheduler, VAE and trained components, by name.

    Raises:
        ConfigError: For a directory that holds another kind of pipeline, or none.
    """
    import diffusers

    path = resolve_path(config.path)
    with one_line(config, cls.pipeline_classes):
        index = cast(dict[str, Any], diffusers.DiffusionPipeline.load_config(path))
        if index["_class_name"] not in cls.pipeline_classes:
            wanted = " or ".join(cls.pipeline_classes)
            raise ConfigError(f"model.path: '{config.path}' is a {index['_class_name']}, not a {wanted}")
        check_index(config.path, index, cls.trained, cls.encoders, cls.optional_encoders)
        readers = {"scheduler": diffusers.DDIMScheduler, "vae": diffusers.AutoencoderKL}
        readers |= dict.fromkeys(cls.trained, diffusers.AutoencoderKL)
        for name in ("scheduler", "vae", cls.trained[0]):
            entry = index.get(name)
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
                raise ConfigError(
                    f"model.path: the model_index.json of '{config.path}' has no {name} ([library, class]), which "
                    "training needs"
                )
        found: dict[str, Mapping[str, Any]] = {
            name: cast(dict[str, Any], reader.load_config(path, subfolder=name))
            for name, reader in readers.items()
            if index.get(name, (None,))[0] is not None
        }
        # Published schedulers carry settings of other classes, near to their own.
        for name in found.keys() - {"scheduler"}:
            check_component(f"{config.path}/{name}/config.json", getattr(diffusers, index[name][1], None), found[name])
        return found


def check_component(file: str, kind: Any, settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for what diffusers would notice at the first forward, or never: a setting that it passes over,
    with a default in place of one that it is near; axes of rotary positions that are not a head's."""
    if kind is None:
        return
    known = {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    for key in (key for key in settings if key not in known and not key.startswith("_")):
        if meant := difflib.get_close_matches(key, known.keys() - settings.keys(), 1, 0.9):
            raise ConfigError(f"model.path: {file} has '{key}', which {kind.__name__} does not take; is it {meant[0]}?")
    for key in known.keys() & ROPE_AXES:
        axes, head = (settings.get(name, known.get(name)) for name in (key, "attention_head_dim"))
        whole = isinstance(axes, list | tuple) and all(isinstance(axis, int) for axis in axes)
        if head is not None and not (whole and sum(axes) == head):
            raise ConfigError(f"model.path: {file}: {key} {axes} does not add up to attention_head_dim, {head}")


def load_pipeline(
    config: Model, pipeline_classes: Sequence[str], trained: Sequence[str], given: Mapping[str, Any]
) -> Any:
    """The diffusers pipeline at model.path in the dtypes that training has it.

    given: components that are not read: None for one to go without, or a module. Raises ConfigError.
    """
    import diffusers

    path, compute = resolve_path(config.path), DTYPES[config.dtype]
    # Full fine-tuning keeps float32 masters; a LoRA's frozen base stays in the compute dtype.
    master = compute if config.lora else torch.float32
    dtypes = {**dict.fromkeys(trained, master), "default": compute}
    if compute == torch.float16:
        # Activations of VAEs leave its range.
        dtypes["vae"] = torch.float32
    with one_line(config, pipeline_classes):
        index = cast(dict[str, Any], diffusers.DiffusionPipeline.load_config(path))
        # Components that the directory goes without (SD 3's T5) must be given as None.
        absent = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
        parts = {**dict.fromkeys(absent), **{name: part for name, part in given.items() if name in index}}
        reading = {"variant": config.variant, "use_safetensors": True}
        folder = Path(path)
        if not folder.is_dir():
            folder = Path(diffusers.DiffusionPipeline.download(path, **reading, **parts))
        check_files(folder, index, config.variant, parts)
        check_encoders(config.path, folder, index, config.variant, parts)
        if UNUSED in index and not (folder / UNUSED).is_dir():
            parts[UNUSED] = None
        pipeline = diffusers.DiffusionPipeline.from_pretrained(str(folder), dtype=dtypes, **reading, **parts)
        check_tokenizers(config.path, pipeline.components)
        read = {name: part for name, part in pipeline.components.items() if name not in parts}
        check_whole_components(config.path, folder, read)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_encoders(
    path: str, folder: Path, index: Mapping[str, Any], variant: str | None, without: Iterable[str] = ()
) -> None:
    """Raises ConfigError for a transformers component whose config asks for other weights than its files hold, or for
    more: transformers makes those up at random. Reads headers alone, and takes no memory.

    Args:
        path: model.path, for errors.
        folder: The pipeline's directory.
        index: Its model_index.json.
        variant: model.variant.
        without: Components that are not read from here.
    """
    import transformers

    for name, entry in index.items():
        listed = isinstance(entry, list) and entry[0] == "transformers" and name not in {UNUSED, *without}
        kind = getattr(transformers, entry[1], None) if listed else None
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            continue
        settings = cast(Any, kind.config_class).from_pretrained(folder / name)
        # Files of quantized weights have shapes that their own loader knows.
        if getattr(settings, "quantization_config", None) is not None:
            continue
        of_variant = any((folder / name).glob(f"*.{variant}[.-]*"))
        _, info = cast(Any, kind).from_pretrained(
            folder / name,
            config=settings,
            dtype=torch.float32,
            device_map="meta",
            variant=variant if of_variant else None,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        file, asks = f"{path}/{name}", "which its config.json asks for"
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(f"model.path: {file} has no weights for {missing[0]} ({len(missing)} in all), {asks}")
        if other := sorted(info["mismatched_keys"]):
            key, there, wanted = other[0]
            shapes = f"{list(there)} where its config.json asks for {list(wanted)}"
            raise ConfigError(f"model.path: {file}: the weights of {key} are {shapes} ({len(other)} such in all)")


def check_whole_components(path: str, folder: Path, components: Mapping[str, Any]) -> None:
    """Raises ConfigError for a component whose config asks for weights that its files lack, which diffusers leaves
    without values, or for fewer blocks than they hold, which it drops."""
    from diffusers import ModelMixin

    for name, component in components.items():
        if not isinstance(component, ModelMixin):
            continue
        empty = [key for key, tensor in component.state_dict(keep_vars=True).items() if tensor.is_meta]
        if empty:
            raise ConfigError(
                f"model.path: {path}/{name} has no weights for {empty[0]} ({len(empty)} in all), which its "
                "config.json asks for"
            )
        # Names of before are a layer's; a block has layers.
        modules = dict(component.named_modules())
        blocks = {key.rpartition(".")[0].rpartition(".")[0] for key in stored_names(folder / name)}
        if dropped := sorted(blocks - modules.keys()):
            raise ConfigError(
                f"model.path: {path}/{name} has weights of {dropped[0]}, which its config.json does not ask for"
            )


def check_tokenizers(path: str, components: Mapping[str, Any]) -> None:
    """Raises ConfigError where a CLIP's tokenizer does not cut texts to what its text encoder has positions for.

    Pipelines pad and cut to `model_max_length`, which transformers sets to 1e30 where a tokenizer has none.
    """
    for name, encoder in components.items():
        settings, of = getattr(encoder, "config", None), name.replace("text_encoder", "tokenizer")
        tokenizer = components.get(of)
        if tokenizer is None or getattr(settings, "model_type", None) != "clip_text_model":
            continue
        length, positions = tokenizer.model_max_length, cast(Any, settings).max_position_embeddings
        # A start, an end and at least a token between them.
        if type(length) is not int or not 3 <= length <= positions:
            raise ConfigError(
                f"model.path: the {of} of '{path}' has model_max_length {length!r}, but its text encoder takes "
                f"{positions} tokens; set it in tokenizer_config.json"
            )


@contextmanager
def one_line(config: Model, pipeline_classes: Sequence[str]) -> Iterator[None]:
    """Turns whatever a library raises over a directory that it cannot load into one line, which names the file that is
    damaged where one is."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    # diffusers, transformers, safetensors and their dependencies each have errors of their own.
    except Exception as error:
        folder = Path(resolve_path(config.path))
        if folder.is_dir() and (damaged := damaged_files(folder)):
            raise ConfigError(*damaged) from None
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = said if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: {said}"
        wanted = " or ".join(pipeline_classes)
        raise ConfigError(f"model.path: '{config.path}' does not load as a {wanted}: {reason}") from None


def levels_of(family: ModelFamily, steps: int, shift: float | str) -> NoiseLevels:
    """The family's noise levels. Raises ConfigError, in one line, where its scheduler's config does not give them."""
    with one_line(family.config, family.pipeline_classes):
        return family.noise_levels(steps, shift)


def resolve_path(path: str) -> str:
    """model.path with shapes:<name> replaced by the shipped directory. Raises ConfigError for an unknown one."""
    if not path.startswith("shapes:"):
        if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            raise ConfigError(f"model.path: there is no directory '{path}'")
        return str(Path(path).expanduser()) if path.startswith("~") else path
    from fastgrpo.shapes import weights_path

    try:
        return str(weights_path(path.removeprefix("shapes:")))
    except ValueError as error:
        raise ConfigError(f"model.path: '{path}' is not shipped: {error}") from None
