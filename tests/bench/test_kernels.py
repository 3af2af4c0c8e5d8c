"""The benchmark's harness on tiny latents: rows, upsert by key, memory, launches; and that its providers agree."""

import time

import pytest
import torch

from fastgrpo.commands.bench import load
from fastgrpo.errors import UserError

kernels, providers, device_time = load("kernels"), load("providers"), load("device_time")
CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(providers.SHAPES, "flux", (2, 16, 64))
    monkeypatch.setattr(kernels, "COPY_BYTES", 1 << 16)


def test_ours_and_eager_agree_in_float32():
    inputs = providers.Inputs((3, 16, 64), torch.float32, CPU)

    def result(operation, provider, mode):
        return providers.prepare(operation, provider, mode, inputs)()

    for operation in ("log_prob", "loss"):
        ours, eager = result(operation, "ours", "no_grad"), result(operation, "eager", "no_grad")
        assert float(ours) == pytest.approx(float(eager), rel=1e-5)
    inputs.v_old = inputs.v.detach().clone()
    inputs.y = providers.fk.gaussian_step(inputs.x, inputs.v_old, inputs.a, inputs.b, inputs.s, inputs.noise)
    inputs.old_log_prob = providers.step_eager(inputs.x, inputs.v_old, inputs.y)[2]
    (eager,) = result("loss", "eager", "full")
    for ours in (result("on_policy", "ours", "full"), *result("loss", "ours", "full")):
        assert (ours - eager).abs().max() <= 1e-4 * eager.abs().max()


@pytest.mark.parametrize("operation", list(providers.OPERATIONS))
def test_a_row_for_each_mode_and_provider(operation, tiny):
    rows = list(kernels.measure([operation], ["flux"], ["ours", "eager"], None, 3))
    modes = providers.OPERATIONS[operation].modes
    assert [(r["mode"], r["provider"]) for r in rows] == [(m, p) for m in modes for p in ("ours", "eager")]
    for row in rows:
        assert set(row) == set(kernels.COLUMNS)
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] > 0
        if row["mode"] != "backward":
            assert row["peak_mib"] > 0
        if row["provider"] == "eager":
            assert row["launches"] > 10 or row["mode"] == "backward"


def test_peak_memory_counts_what_lives_at_once():
    def work():
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.int8)
        return torch.empty(1 << 22, dtype=torch.int8)

    assert 1 << 22 <= kernels.peak_bytes(work, CPU) < (1 << 22) + (1 << 16)


def test_rows_are_upserted_by_key_and_plotted(tmp_path, tiny):
    table = tmp_path / "device.csv"
    rows = list(kernels.measure(["log_prob"], ["flux"], ["ours", "eager"], ["forward"], 3))
    for given in (rows, [rows[0] | {"p50_ms": 1.5}]):
        kernels.tables.upsert(table, given, kernels.KEY, kernels.COLUMNS)
    stored = kernels.read(table)
    assert len(stored) == 2
    assert {r["provider"]: r["p50_ms"] for r in stored}["ours"] == "1.5"
    kernels.plot(stored, tmp_path / "device.png")
    assert (tmp_path / "device.png").read_bytes()[:4] == b"\x89PNG"


def test_the_document_shows_the_committed_table(tmp_path, tiny, monkeypatch):
    assert kernels.document() == kernels.DOCUMENT.read_text(encoding="utf-8")
    # A run adds its rows to table and document.
    monkeypatch.setattr(kernels, "DATA", tmp_path)
    monkeypatch.setattr(kernels, "SHOWN", tmp_path / f"kernels-{kernels.device_slug()}.csv")
    document = tmp_path / "results.md"
    document.write_text("before\n" + "".join(kernels.MARKS) + "after\n")
    monkeypatch.setattr(kernels, "DOCUMENT", document)
    kernels.run(["log_prob"], ["flux"], ["ours", "eager"], ["forward"], 3)
    (row,) = [line for line in document.read_text().splitlines() if line.startswith("| flux | log prob, forward |")]
    assert row.count("/") == 6
    assert row.count("×") == 3


def test_rows_are_written_when_they_are_measured(tmp_path, tiny, monkeypatch):
    """What ends the measurement leaves the rows before it, in a copy without a git repository too."""
    prepare = kernels.prepare

    def ends_at_eager(operation, provider, mode, inputs):
        work = prepare(operation, provider, mode, inputs)
        if mode == "full":
            raise KeyboardInterrupt
        return work

    monkeypatch.setattr(kernels, "prepare", ends_at_eager)
    monkeypatch.setattr(kernels, "DATA", tmp_path)
    monkeypatch.setattr(kernels.tables, "ROOT", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        kernels.run(["log_prob"], ["flux"], ["ours", "eager"], ["forward", "full"], 3)
    (table,) = tmp_path.glob("*.csv")
    assert [(r["mode"], r["provider"], r["commit"]) for r in kernels.read(table)] == [
        ("forward", "eager", "none"),
        ("forward", "ours", "none"),
    ]


def test_a_table_from_before_a_column_was_there_is_kept(tmp_path):
    table = tmp_path / "device.csv"
    table.write_text("op,p50_ms\nloss,1.5\n")
    kernels.tables.upsert(table, [{"op": "step", "p50_ms": 2.0, "host_us": 3.0}], ["op"], ["op", "p50_ms", "host_us"])
    assert table.read_text() == "op,p50_ms,host_us\nloss,1.5,\nstep,2.0,3.0\n"


def test_host_time_is_that_of_one_call():
    calls = []
    times = device_time.host_times(lambda: (calls.append(0), time.sleep(1e-3)), calls=4, rounds=3)
    assert len(calls) == 3 + 3 * 4
    assert len(times) == 3
    # Of a round it would be four times that, and what disturbs the machine does not disturb every round.
    assert 1e-3 <= min(times) < 4e-3


def test_unknown_names_and_refs_are_one_line():
    with pytest.raises(UserError, match=r"^bench kernels: unknown op 'los'; did you mean 'loss'"):
        kernels.measure(["los"], None, None, None, 3)
    with pytest.raises(UserError, match=r"^bench compare: .*no-such-ref"):
        kernels.compare("no-such-ref", ["loss"], ["sd"], 3)


@pytest.mark.full
def test_this_tree_beside_a_git_ref(capsys):
    kernels.compare("HEAD", ["on_policy"], ["sd"], 3)
    printed = capsys.readouterr().out
    assert "p50 at base" in printed
    (row,) = [line for line in printed.splitlines() if "on_policy" in line]
    assert float(row.split("│")[-2]) > 0
