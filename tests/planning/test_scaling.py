"""Strong scaling by plans: what crosses nodes, what limits, and the meshes that are tried."""

import json

import pytest
from PIL import Image
from support.tiny import tiny_config
from typer.testing import CliRunner

from fastgrpo.commands.main import app
from fastgrpo.config import dump
from fastgrpo.errors import UserError
from fastgrpo.planning.dry_run import Phase
from fastgrpo.planning.gpus import GPUS
from fastgrpo.planning.links import link_bytes, seconds, seconds_by_limit
from fastgrpo.planning.meter import Collective, Cost
from fastgrpo.planning.scaling import Point, as_markdown, draw, scaling, sizes_of

H100 = GPUS["h100"]


def test_numbers_of_gpus_are_read():
    assert sizes_of("8,16,64") == [8, 16, 64]
    assert sizes_of("8, 16, …, 512") == [8, 16, 32, 64, 128, 256, 512]
    assert sizes_of("8,16,...,100") == [8, 16, 32, 64, 100]
    for wrong in ("", "8,4", "8,x", "8,…,64", "8,16,…", "8,8"):
        with pytest.raises(UserError, match="--scaling"):
            sizes_of(wrong)


def phase(flops: int = 0, **bytes_of: int) -> Phase:
    """A phase with collectives; names say kind, size and distance: `gather_8_1`."""
    cost = Cost(flops)
    for name, size in bytes_of.items():
        kind, group, apart = name.split("_")
        key = Collective({"gather": "all_gather", "reduce": "all_reduce"}[kind], int(group), int(apart))
        cost.count[key] += 1
        cost.bytes[key] += size
    return Phase("update", cost, {})


def test_bytes_are_of_the_links_that_they_take():
    # Within a node of 8; over two nodes, by all of their adapters at once; one rank of each of four nodes.
    assert link_bytes([phase(gather_8_1=800)], 8) == (700, 0)
    assert link_bytes([phase(gather_16_1=1600)], 8) == (1500, 1500 / 8)
    assert link_bytes([phase(reduce_4_8=400)], 8) == (0, 600)
    assert link_bytes([phase(reduce_4_4=400)], 8) == (600, 600 / 2)
    assert link_bytes([phase(gather_8_1=800), phase(gather_8_1=800)], 8) == (1400, 0)


def test_a_group_of_one_rank_a_node_has_one_adapter(tiny_flux):
    config = tiny_config(tiny_flux)
    size = 10**12
    within, over, apart = (
        seconds(phase(**{name: size}), config, H100, 8)[1] for name in ("gather_8_1", "gather_16_1", "gather_8_8")
    )
    assert within == pytest.approx(size * 7 / 8 / H100.link / 0.7)
    assert over == pytest.approx(size * 15 / 16 / min(H100.link, 8 * H100.nic) / 0.7)
    assert apart == pytest.approx(size * 7 / 8 / H100.nic / 0.7)


def test_what_limits_is_what_phases_wait_for(tiny_flux):
    config = tiny_config(tiny_flux)
    busy, local, far = phase(10**16, gather_8_1=10), phase(1, gather_8_1=10**12), phase(1, gather_2_8=10**12)
    spent = seconds_by_limit([busy, local, far], config, H100, 8)
    assert spent["compute"] == pytest.approx(seconds(busy, config, H100, 8)[0])
    assert spent["node links"] == pytest.approx(seconds(local, config, H100, 8)[1])
    assert spent["network"] == pytest.approx(seconds(far, config, H100, 8)[1])


def test_the_same_samples_are_planned_on_more_gpus_and_copies_save_traffic(tiny_flux, tmp_path):
    config = tiny_config(tiny_flux, rollout={"prompts_per_iteration": 4, "group_size": 2, "forward_batch": 4})
    notes = []
    found = scaling(config, H100, [1, 2, 4, 16], 2, notes.append)
    one, two, four, none = found.given
    assert isinstance(one, Point)
    assert isinstance(two, Point)
    assert isinstance(four, Point)
    assert (one.efficiency, one.node, one.network) == (1.0, 0.0, 0.0)
    assert (two.network, four.mesh) == (0.0, "1 × 4")
    assert two.node > 0
    assert four.network > 0
    assert isinstance(none, str)
    assert "8 samples an iteration do not divide over 16 ranks" in none
    for point, base in ((two, one), (four, one)):
        assert point.efficiency == pytest.approx(base.seconds / (point.seconds * point.world))
    best = found.best[2]
    assert isinstance(best, Point)
    assert (best.mesh, best.batch) == ("2 × 2", 2)
    assert best.network < four.network
    assert best.seconds < four.seconds
    assert any("parallel.replicate=2 rollout.forward_batch=2" in text for text in notes)
    text = as_markdown(found)
    assert text.startswith("Planned, not measured: 8 samples an iteration on h100")
    assert "| 16 | – | – | – | – | – | – | – | rollout.prompts_per_iteration: 8 samples" in text
    draw(found, tmp_path / "scaling.png")
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 1000


@pytest.mark.full
def test_the_command_prints_tables_and_json(tiny_flux, tmp_path):
    (tmp_path / "config.yaml").write_text(dump(tiny_config(tiny_flux)))
    command = ["plan", str(tmp_path / "config.yaml"), "--scaling", "1,2"]
    done = CliRunner().invoke(app, command)
    assert "The best mesh found:" in done.output
    done = CliRunner().invoke(app, [*command, "--json"])
    assert [point["world"] for point in json.loads(done.stdout)["given"]] == [1, 2]
