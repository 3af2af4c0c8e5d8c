"""All that a run needs beside its config: the model, rewards and prompts, where each is, its size, and how to get it.

`fastgrpo assets CONFIG` prints it; `fastgrpo train CONFIG --check` tells what is missing. Nothing here asks the hub
but `download`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastgrpo.config import Config, RewardSpec
from fastgrpo.config.paths import expand_user
from fastgrpo.data.prompts import is_named
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models.architectures import architecture, known
from fastgrpo.models.weight_files import WEIGHTS, check_files, check_whole, damaged_files
from fastgrpo.rewards.published import CONVERTED, HUB_BYTES, SERVED, inner, places
from fastgrpo.rewards.weights import HUB_ID, PICKLED

HERE, ABSENT, PARTIAL, ELSEWHERE = "here", "absent", "partial", "elsewhere"
# What a pipeline's components have beside weights.
TEXTS = (".json", ".txt", ".model")


@dataclass(frozen=True)
class Asset:
    """One thing that a run needs.

    setting: which names it (model.path, rewards.hps, prompts.train). source: as the config names it. state: here,
    absent, partial (some of its files), elsewhere (a server's). where: the path that is read. size: bytes, of what is
    here or of the download; None: not known. note: what is wrong, or how to get it. hub: the repository that
    `download` gets it from, and which of its files (a suffix, or a name).
    """

    setting: str
    source: str
    state: str
    where: str = ""
    size: float | None = None
    note: str = ""
    hub: tuple[str, tuple[str, ...]] | None = None

    @property
    def missing(self) -> bool:
        return self.state in (ABSENT, PARTIAL)

    @property
    def line(self) -> str:
        """What is missing and how to get it, in one line."""
        size = f", {shown(self.size)}" if self.size else ""
        return f"{self.setting}: {self.source} is {self.state}{size}; {self.note}"


def shown(size: float) -> str:
    """1.97e9 as `2.0 GB`."""
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def find_assets(config: Config) -> list[Asset]:
    """Everything that a config needs, each once, found without the network."""
    found = [_model(config)]
    lora = config.model.lora
    if lora is not None and lora.path is not None:
        found.append(_place("model.lora.path", lora.path, True))
    for spec in (one for listed in config.scored for one in inner(listed)):
        found += _reward(spec)
    for setting, source in (("prompts.train", config.prompts.train), ("prompts.heldout", config.prompts.heldout)):
        if source is not None:
            found.append(_prompts(setting, source))
    return list({(a.source, a.hub): a for a in reversed(found)}.values())[::-1]


def _model(config: Config) -> Asset:
    path, variant = config.model.path, config.model.variant
    if path.startswith("shapes:"):
        return Asset("model.path", path, HERE, "in this package")
    facts: dict[str, Any] = architecture(path).get("files", {}) if path in known() else {}
    licence = f"licence: {facts['licence']}" if facts else ""
    folder = Path(expand_user(path))
    if not folder.is_dir() and not _is_hub_id(path):
        return Asset("model.path", path, ABSENT, note="there is no such directory; docs/video.md says how one is made"
                     if path in known() else "there is no such directory")  # fmt: skip
    local = folder if folder.is_dir() else snapshot(path)
    size = facts["gigabytes"] * 1e9 if "gigabytes" in facts else None
    hub = None if folder.is_dir() else (path, (*TEXTS, ".safetensors"))
    if local is None:
        return Asset("model.path", path, ABSENT, size=size, note=_how(path, licence, bool(facts.get("gated"))), hub=hub)
    if problems := pipeline_problems(local, variant):
        return Asset("model.path", path, PARTIAL, str(local), size, problems[0].removeprefix("model.path: "), hub)
    return Asset("model.path", path, HERE, str(local), _size(local), licence, hub)


def pipeline_problems(folder: Path, variant: str | None) -> list[str]:
    """What a pipeline's directory lacks, or what of it is damaged, a line each."""
    if not (folder / "model_index.json").is_file():
        return [f"model.path: there is no {folder / 'model_index.json'}"]
    if damaged := damaged_files(folder):
        return damaged
    try:
        check_files(folder, json.loads((folder / "model_index.json").read_text(encoding="utf-8")), variant)
    except ConfigError as error:
        return list(error.problems)
    return []


def _reward(spec: RewardSpec) -> list[Asset]:
    setting = f"rewards.{spec.key}"
    if spec.name in SERVED:
        urls = spec.options.get("url", "")
        url = ", ".join(urls) if isinstance(urls, list) else str(urls)
        return [Asset(setting, url, ELSEWHERE, note=f"a server of {spec.options.get('reward', 'a model')}")]
    if ":" in spec.name:
        where = spec.name.rpartition(":")[0]
        if not where.endswith(".py"):
            return [Asset(setting, spec.name, HERE, "among what is installed")]
        there = Path(expand_user(where)).is_file()
        return [Asset(setting, where, HERE if there else ABSENT, where, note="" if there else "there is no such file")]
    try:
        needed = places(spec)
    except UserError:
        # An extra that is not installed, which the check of the reward says.
        return []
    found = [_place(setting, source, weights) for source, weights in needed.values()]
    return [_convertible(spec, asset) for asset in found]


def _convertible(spec: RewardSpec, asset: Asset) -> Asset:
    """A reward's file that is absent, with the two commands that make it where it is published as a pickle archive."""
    if asset.state != ABSENT or asset.hub is not None or spec.name not in CONVERTED or asset.source != spec.path:
        return asset
    repository, file, size = CONVERTED[spec.name]
    folder = Path(asset.source).parent
    note = (
        f"hf download {repository} {file} --local-dir {folder} && fastgrpo convert-reward {folder / file} "
        f"{asset.source}"
    )
    return replace(asset, size=size, note=note)


def _place(setting: str, source: str, weights: bool) -> Asset:
    """A file, a directory or a hub id of weights (`weights`) or of the small files beside them."""
    if source.startswith("shapes:"):
        return Asset(setting, source, HERE, "in this package")
    local = Path(expand_user(source))
    if local.suffix in PICKLED:
        return Asset(
            setting, source, ABSENT, note=f"a pickle archive: fastgrpo convert-reward {source} OUT.safetensors"
        )
    hub = (source, (TEXTS if not weights else (*TEXTS, ".safetensors"))) if _is_hub_id(source) else None
    found = local if local.exists() else snapshot(source) if hub else None
    if found is None:
        note = _how(source) if hub else f"there is nothing at {source}"
        return Asset(setting, source, ABSENT, size=HUB_BYTES.get(source), note=note, hub=hub)
    problem = _damage(found, weights)
    if problem:
        return Asset(setting, source, PARTIAL, str(found), HUB_BYTES.get(source), problem, hub)
    return Asset(setting, source, HERE, str(found), _size(found), hub=hub)


def _damage(found: Path, weights: bool) -> str:
    """What is wrong with files of a reward; nothing more is read than headers."""
    files = [found] if found.is_file() else sorted(found.rglob("*.safetensors"))
    if found.is_dir() and not (any(found.glob("*.json")) or files):
        return f"{found} is empty"
    if weights and not files:
        return f"{found} holds no .safetensors"
    try:
        for file in files if weights else ():
            if file.suffix == ".safetensors":
                check_whole(file)
    except ConfigError as error:
        return str(error).removeprefix("model.path: ")
    return ""


def _prompts(setting: str, source: str) -> Asset:
    if source.startswith("hf:"):
        return Asset(setting, source, ELSEWHERE, note="a dataset of the hub, which its library downloads and keeps")
    if is_named(source):
        return Asset(setting, source, HERE, "among what is installed")
    path = Path(expand_user(source))
    if path.suffix and not path.is_file():
        return Asset(setting, source, ABSENT, note="there is no such file; set:images and set:videos are shipped")
    return Asset(setting, source, HERE, str(path), path.stat().st_size if path.is_file() else None)


def _is_hub_id(path: str) -> bool:
    """Whether a path that is not here may be a repository's name: two words, and no folder of that name's first."""
    named = re.fullmatch(HUB_ID, path) is not None and not path.startswith(".")
    return named and Path(path).suffix not in (".safetensors", ".txt") and not Path(path).parent.is_dir()


def _how(repository: str, licence: str = "", gated: bool = False) -> str:
    """How a repository of the hub is got."""
    steps = []
    if gated:
        steps.append(f"accept its licence at https://huggingface.co/{repository}")
        if not _token():
            steps.append("hf auth login")
    steps.append("fastgrpo assets CONFIG --download")
    return ", then ".join(steps) + (f" ({licence})" if licence else "")


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def snapshot(repository: str) -> Path | None:
    """The directory that the hub's local cache has of a repository, whole or not."""
    from huggingface_hub import constants

    root = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        folder = root / "snapshots" / (root / "refs" / "main").read_text().strip()
    except OSError:
        return None
    return folder if folder.is_dir() and any(folder.iterdir()) else None


def _size(path: Path) -> int:
    files = [path] if path.is_file() else (p for p in path.rglob("*") if p.is_file())
    return sum(file.stat().st_size for file in files)


def download(assets: Sequence[Asset], variant: str | None, note: Callable[[str], None]) -> list[str]:
    """Downloads what is missing and on the hub, into the hub's cache; goes on where one fails.

    Args:
        assets: As `find_assets` returns them.
        variant: model.variant: of weights that a pipeline has in several.
        note: Told each repository and size before its download begins.

    Returns:
        A line for each that could not be had: gated, unknown, or no connection.
    """
    from huggingface_hub import HfApi, snapshot_download

    endpoint = os.environ.get("HF_ENDPOINT")
    failed = []
    for asset in assets:
        if not asset.missing or asset.hub is None:
            continue
        repository, suffixes = asset.hub
        try:
            said = HfApi(endpoint=endpoint).model_info(repository, files_metadata=True)
            files = {f.rfilename: f.size or 0 for f in said.siblings or ()}
            wanted = list(wanted_files(files, suffixes, variant, asset.setting == "model.path"))
            size = sum(files[name] for name in wanted)
            free = shutil.disk_usage(_existing(Path(_cache()))).free
            if size > free:
                failed.append(
                    f"{asset.setting}: {repository} takes {shown(size)}, and {_cache()} has {shown(free)} free"
                )
                continue
            note(f"{asset.setting}: downloads {repository}, {shown(size)} in {len(wanted)} files")
            snapshot_download(repository, allow_patterns=wanted, endpoint=endpoint)
        # The hub's client has many errors, and its connection others.
        except Exception as error:
            failed.append(f"{asset.setting}: {repository}: {refusal(error, repository)}")
    return failed


def wanted_files(files: Iterable[str], suffixes: Sequence[str], variant: str | None, pipeline: bool) -> Iterable[str]:
    """Of a repository's files, those to download: of a pipeline its components' folders, in the variant wanted where a
    component has it; never a pickle archive."""
    names = [name for name in files if name.endswith(tuple(suffixes))]
    if not pipeline:
        return [name for name in names if "/" not in name]
    chosen = ["model_index.json"] if "model_index.json" in names else []
    weights: dict[str, dict[str | None, list[str]]] = {}
    for name in names:
        folder, slash, file = name.rpartition("/")
        if not slash or "/" in folder:
            continue
        match = WEIGHTS.fullmatch(file)
        if match is None:
            chosen.append(name)
        else:
            weights.setdefault(folder, {}).setdefault(match["variant"], []).append(name)
    for by_variant in weights.values():
        chosen += by_variant.get(variant, by_variant.get(None, []))
    return chosen


def refusal(error: Exception, repository: str) -> str:
    """Why the hub did not give a repository, and what to do, in one line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        login = "" if _token() else ", then hf auth login"
        return f"is gated: accept its licence at https://huggingface.co/{repository}{login}"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private: hf auth login"
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"the hub did not give it: {said}"


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
