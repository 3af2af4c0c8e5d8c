"""`fastgrpo plan --scaling 8,16,…`: the same iteration on more and more GPUs, planned: strong scaling.

Of every number of GPUs two meshes: the config's own, and the best that was found, which shards over as few nodes as fit
and keeps copies of that (HSDP), and whose forward batch is not larger than a rank's samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgrpo.config import Config
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.observe.charts import strong_scaling_chart
from fastgrpo.planning.gpus import GIB, Gpu
from fastgrpo.planning.links import link_bytes, seconds_by_limit
from fastgrpo.planning.plan import Plan, overridden, plan, total_seconds


@dataclass(frozen=True)
class Point:
    """An iteration on `world` GPUs.

    Attributes:
        world: GPUs in all.
        mesh: Copies of the model × ranks that each is sharded over.
        batch: Rows of a forward (rollout.forward_batch).
        seconds: Of an iteration without rewards.
        efficiency: Of this mesh, GPU-seconds of the smallest number of GPUs that fits divided by those here.
        node: Bytes that a GPU receives over the links of its node.
        network: Bytes that an adapter receives from other nodes; a node has one for each GPU.
        memory: Bytes of a GPU at most.
        fits: Whether that leaves enough of the device free.
        limit: What most of the seconds are spent on: compute, node links or network.
    """

    world: int
    mesh: str
    batch: int
    seconds: float
    efficiency: float
    node: float
    network: float
    memory: int
    fits: bool
    limit: str


@dataclass(frozen=True)
class Scaling:
    """given, best: of each number of GPUs, a point; a line that says why there is none."""

    samples: int
    gpu: str
    given: list[Point | str]
    best: list[Point | str]


def sizes_of(text: str) -> list[int]:
    """The numbers of GPUs of `8,16,32`, or of `8,16,…,512` (or `8,16,...,512`), which goes on by the last factor.

    Raises UserError for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    sizes: list[int] = []
    for place, part in enumerate(parts):
        if part in ("…", "...") and len(sizes) > 1 and place == len(parts) - 2 and parts[-1].isdigit():
            factor = sizes[-1] / sizes[-2]
            while factor > 1 and sizes[-1] * factor < int(parts[-1]):
                sizes.append(round(sizes[-1] * factor))
        elif part.isdigit() and int(part) > (sizes[-1] if sizes else 0):
            sizes.append(int(part))
        else:
            raise UserError(f"--scaling: '{text}' is not growing numbers of GPUs, such as 8,16,32 or 8,16,…,512")
    return sizes


def scaling(
    config: Config, gpu: Gpu, sizes: Sequence[int], node: int = 8, note: Callable[[str], None] = lambda _: None
) -> Scaling:
    """Plans an iteration of the same samples on each number of GPUs.

    Args:
        config: Its samples an iteration stay; what cannot be shared by so many ranks is a line.
        gpu: Of every rank.
        sizes: Numbers of GPUs, growing.
        node: GPUs of a node.
        note: Is told what is planned, which takes up to minutes each.

    Returns:
        Points of the config's mesh and of the best one.
    """
    given: list[Point | str] = []
    best: list[Point | str] = []
    for world in sizes:
        local = min(node, world)
        note(f"plans {world} GPUs, as given")
        own = _planned(config, gpu, world, local)
        fitting = [] if isinstance(own, str) or not own.fits else [(total_seconds(own, gpu), own)]
        for settings in _meshes(config, world, local):
            note(f"plans {world} GPUs, {_shown(settings)}")
            other = _planned(overridden(config, settings), gpu, world, local)
            if not isinstance(other, str) and other.fits:
                fitting.append((total_seconds(other, gpu), other))
                break
        given.append(_line(world, own) if isinstance(own, str) else _point(own, gpu, given))
        fastest = min(fitting, key=lambda pair: pair[0], default=None)
        best.append(_line(world, "no mesh that was tried fits") if fastest is None else _point(fastest[1], gpu, best))
    samples = config.rollout.prompts_per_iteration * config.rollout.candidates
    return Scaling(samples, gpu.name, given, best)


def _meshes(config: Config, world: int, local: int) -> Iterator[dict[str, Any]]:
    """The fewest ranks a copy first, from a node's on, with a forward batch of at most a rank's samples."""
    samples = config.rollout.prompts_per_iteration * config.rollout.candidates
    share = max(1, samples * config.parallel.context // world)
    batch = min(config.rollout.forward_batch, share)
    shard = local
    while shard <= world:
        settings = {"parallel.shard": "auto", "parallel.replicate": world // shard, "rollout.forward_batch": batch}
        same = (config.parallel.replicate, config.rollout.forward_batch) == (world // shard, batch)
        if world % shard == 0 and not same:
            yield settings
        shard *= 2


def _shown(settings: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items() if value != "auto")


def _line(world: int, why: str) -> str:
    return f"{world}: {why}"


def _planned(config: Config, gpu: Gpu, world: int, local: int) -> Plan | str:
    try:
        return plan(config, gpu, world, local)
    except ConfigError as error:
        return str(error)


def _point(found: Plan, gpu: Gpu, before: Sequence[Point | str]) -> Point:
    seconds = total_seconds(found, gpu)
    first = next((point for point in before if isinstance(point, Point)), None)
    efficiency = 1.0 if first is None else first.seconds * first.world / (seconds * found.world)
    spent = seconds_by_limit(found.run.phases, found.config, gpu, found.local)
    node, network = link_bytes(found.run.phases, found.local)
    copies, context = found.config.parallel.replicate, found.config.parallel.context
    mesh = f"{copies} × {found.world // copies}" + (f", context {context}" if context > 1 else "")
    return Point(
        found.world, mesh, found.config.rollout.forward_batch, seconds, efficiency, node, network, found.need,
        found.fits, max(spent, key=lambda name: spent[name]),
    )  # fmt: skip


def curves(found: Scaling) -> dict[str, dict[str, list[float]]]:
    """What a picture shows: of each mesh its columns, of the numbers of GPUs that it has a plan for."""
    columns = ("world", "seconds", "efficiency", "node", "network")
    shown = {}
    for name, points in (("as given", found.given), ("best found", found.best)):
        known = [point for point in points if isinstance(point, Point)]
        if known:
            shown[name] = {column: [float(getattr(point, column)) for point in known] for column in columns}
    return shown


def draw(found: Scaling, path: Path) -> None:
    """Writes the picture, a PNG. Raises UserError where nothing could be planned."""
    shown = curves(found)
    if not shown:
        raise UserError("--picture: there is no plan to draw")
    strong_scaling_chart(path, shown, f"Planned, not measured: {found.samples} samples an iteration on {found.gpu}")


def as_json(found: Scaling) -> dict[str, Any]:
    """Both lists of points, in bytes and seconds; a line where there is no plan."""
    meshes = (("given", found.given), ("best", found.best))
    points = {name: [p if isinstance(p, str) else vars(p) for p in of] for name, of in meshes}
    return {"planned": True, "samples": found.samples, "gpu": found.gpu, **points}


HEAD = ("GPUs", "mesh", "rows", "seconds", "efficiency", "node GB", "network GB", "GiB", "limited by")


def as_markdown(found: Scaling) -> str:
    """Two tables, planned and said so."""
    lines = [
        f"Planned, not measured: {found.samples} samples an iteration on {found.gpu}, without rewards. A mesh is "
        "copies × ranks of each. Rows: of a forward. GB: received in an iteration, by a GPU over its node's links and "
        "by an adapter from other nodes."
    ]
    for title, points in (("The config's mesh", found.given), ("The best mesh found", found.best)):
        lines += ["", f"{title}:", "", f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
        for point in points:
            lines.append(f"| {' | '.join(_cells(point))} |")
    return "\n".join(lines)


def _cells(point: Point | str) -> list[str]:
    if isinstance(point, str):
        world, _, why = point.partition(": ")
        return [world, *["–"] * (len(HEAD) - 2), why]
    return [
        str(point.world), point.mesh, str(point.batch), f"{point.seconds:,.1f}", f"{point.efficiency:.0%}",
        f"{point.node / 1e9:,.1f}", f"{point.network / 1e9:,.1f}", f"{point.memory / GIB:.1f}",
        point.limit if point.fits else "memory: does not fit",
    ]  # fmt: skip
