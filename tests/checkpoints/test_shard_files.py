"""Checkpoints' tensors: bits come back whatever ranks wrote and read them, from safetensors and JSON alone."""

import json
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fastgrpo.checkpoints.shard_files import flatten, part_of, read_shards, write_index, write_shard
from fastgrpo.checkpoints.store import FORMAT, CheckpointStore
from fastgrpo.errors import UserError

SHAPES = {"rows": (7, 3), "one": (1, 5), "scalar": (), "long": (13,), "cube": (4, 3, 5)}
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)


def made(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        str(dtype): {name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        for dtype in DTYPES
    }


def test_every_dtype_and_shape_comes_back_and_is_plain_safetensors(tmp_path):
    tensors = made()
    write_shard(tmp_path / "shard-00000.safetensors", [part_of(*named) for named in flatten(tensors)])
    assert write_index(tmp_path) == []
    empty = {dtype: {name: torch.zeros_like(t) for name, t in group.items()} for dtype, group in tensors.items()}
    read_shards(tmp_path, empty)
    stored = load_file(tmp_path / "shard-00000.safetensors")
    for name, tensor in flatten(tensors):
        assert torch.equal(dict(flatten(empty))[name], tensor), name
        assert torch.equal(stored[name], tensor), name
        assert stored[name].dtype == tensor.dtype


def test_what_does_not_fit_is_named(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"w": torch.ones(3), "x": torch.ones(2)}}, {}, 2)
    with pytest.raises(UserError, match=r"000001: does not fit this model and config: it holds no 'model/v'"):
        store.load(1, {"model": {"v": torch.ones(3)}})
    with pytest.raises(UserError, match=r"'model/w' is \[3\] in it, and should be \[4\]"):
        store.load(1, {"model": {"w": torch.ones(4)}})


def test_another_format_is_refused_in_one_line(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"w": torch.ones(3)}}, {"format": 1}, 2)
    with pytest.raises(UserError, match=rf"another version of fastgrpo \(format 1, not {FORMAT}\)") as raised:
        store.state(1)
    assert "\n" not in str(raised.value)


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"model": {"w": torch.ones(3)}}, {}, 2, background=True)
    store.wait()
    names = {path.name for path in store.path(1).iterdir()}
    assert names == {"shard-00000.safetensors", "index.json", "state.json", "manifest.json"}
    for path in store.path(1).iterdir():
        with pytest.raises(ValueError):
            list(pickletools.genops(path.read_bytes()))


def test_the_latest_finite_checkpoint_stays_and_is_told(tmp_path):
    store = CheckpointStore(tmp_path)
    for iteration in range(1, 6):
        weight = torch.ones(3) if iteration < 3 else torch.tensor([1.0, torch.nan, 1.0])
        store.save(iteration, {"model": {"w": weight, "x": torch.ones(2)}}, {}, 1)
    assert store.iterations() == [2, 5]
    assert store.last_finite() == 2
    assert store.state(5)["not_finite"] == ["model/w"]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, capsys):
    store = CheckpointStore(tmp_path)
    rename = type(tmp_path).rename

    def immutable(path, target):
        if path.name == "000001":
            raise PermissionError(1, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", immutable)
    for iteration in range(1, 5):
        store.save(iteration, {"model": {"w": torch.ones(3)}}, {}, 1)
    assert store.iterations() == [1, 4]
    assert capsys.readouterr().err.count("000001: cannot remove this old checkpoint: Operation not permitted") == 1


def write_and_read(folder: Path, placement: str) -> None:
    """What two ranks do: write a checkpoint, read it, and read that of one rank."""
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    places = [Replicate()] if placement == "replicate" else [Shard(0)]
    whole = {"rows": (7, 3), "one": (1, 5), "wide": (2, 64)}

    def made(fill: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        drawn = {n: torch.randn(s, generator=generator) * fill for n, s in whole.items()}
        return {n: distribute_tensor(t, mesh, places) for n, t in drawn.items()}

    store = CheckpointStore(folder, rank == 0)
    own = f"own {rank}"
    tensors: dict[str, Any] = {
        "model": made(1), "step": {"rows": torch.tensor(float(rank))}, own: {"x": torch.arange(3) + rank},
    }  # fmt: skip
    store.save(1, tensors, {}, 2, background=placement == "shard")
    store.wait()
    again: dict[str, Any] = {
        "model": made(0), "step": {"rows": torch.zeros(())}, own: {"x": torch.zeros(3, dtype=torch.int64)},
    }  # fmt: skip
    store.load(1, again)
    assert all(torch.equal(again["model"][n].full_tensor(), t.full_tensor()) for n, t in tensors["model"].items())
    assert again["step"]["rows"] == 0
    assert torch.equal(again[own]["x"], torch.arange(3) + rank)
    # Bits that one rank wrote alone.
    store.load(0, {"model": again["model"]})
    full = {n: t.full_tensor() for n, t in again["model"].items()}
    if rank == 0:
        CheckpointStore(folder).verify(1)
        (folder / "sums.json").write_text(json.dumps({n: t.double().sum().item() for n, t in full.items()}))


@pytest.mark.parametrize("placement", ["shard", "replicate"])
def test_ranks_read_what_other_numbers_of_ranks_wrote(tmp_path, placement):
    """One rank writes, two read; two write, one reads: the same bits. What both have is written once."""
    generator = torch.Generator().manual_seed(5)
    alone = {
        name: torch.randn(s, generator=generator)
        for name, s in {"rows": (7, 3), "one": (1, 5), "wide": (2, 64)}.items()
    }
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(0, {"model": alone}, {}, 2)
    run_ranks(tmp_path, write_and_read, tmp_path / "checkpoints", placement)
    sums = json.loads((tmp_path / "checkpoints" / "sums.json").read_text())
    assert sums == {name: tensor.double().sum().item() for name, tensor in alone.items()}
    # And on one rank, what two wrote.
    generator = torch.Generator().manual_seed(3)
    written = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in alone.items()}
    read = {name: torch.zeros_like(tensor) for name, tensor in alone.items()}
    store.load(1, {"model": read})
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    index = json.loads((store.path(1) / "index.json").read_text())
    assert index["step/rows"]["parts"] == [{"file": "shard-00000.safetensors", "offset": [], "size": []}]
    assert len(index["model/rows"]["parts"]) == (2 if placement == "shard" else 1)
    assert len(index["model/one"]["parts"]) == 1
