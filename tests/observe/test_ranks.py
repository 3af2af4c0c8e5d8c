"""What ranks tell of an iteration, and what NVML says of a GPU, by a driver of this file's."""

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastgrpo.observe.metrics import RankMonitor, RankReport, rank_metrics
from fastgrpo.observe.nvml import Board, Reading, board_of


class FakeError(Exception):
    pass


@pytest.fixture
def driver(monkeypatch):
    """A pynvml of one GPU: 700 W, 1755 MHz, held back by its power cap and by nothing that counts as idle."""
    module: Any = ModuleType("pynvml")
    board = SimpleNamespace(millijoules=5_000_000, reasons=0x04 | 0x01)
    handles = {"GPU-1234": board}
    module.NVMLError = FakeError
    module.NVML_CLOCK_SM = 1
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: handles[uuid]
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: handle.millijoules
    module.nvmlDeviceGetPowerUsage = lambda handle: 700_000
    module.nvmlDeviceGetClockInfo = lambda handle, clock: {1: 1755}[clock]
    module.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: handle.reasons
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return SimpleNamespace(module=module, board=board)


def test_a_board_tells_energy_power_clock_and_limits(driver):
    board = Board(torch.device("cuda"))
    reading = board.read()
    assert reading == Reading(5000.0, 700.0, 1755.0, 5)
    assert reading.limits == ["power cap"]
    driver.board.reasons = 0x01
    assert board.read().limits == []


def test_a_board_that_counts_no_energy_says_so(driver, monkeypatch):
    def unsupported(handle):
        raise FakeError("Not Supported")

    monkeypatch.setattr(driver.module, "nvmlDeviceGetTotalEnergyConsumption", unsupported)
    assert math.isnan(Board(torch.device("cuda")).read().joules)


def test_a_cpu_has_no_board():
    assert board_of(torch.device("cpu")) is None


def test_a_device_that_nvml_does_not_know_has_no_board(driver, monkeypatch):
    def unknown(uuid):
        raise FakeError("Not Found")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: driver.module)
    assert board_of(torch.device("cuda")) is not None
    monkeypatch.setattr(driver.module, "nvmlDeviceGetHandleByUUID", unknown)
    assert board_of(torch.device("cuda")) is None


def test_a_gpu_without_nvml_has_no_board(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert board_of(torch.device("cuda")) is None


def test_energy_is_of_one_iteration_and_not_of_what_lies_between(driver, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: driver.module)
    monitor = RankMonitor(torch.device("cuda"))
    assert math.isnan(monitor.report({}, {}, 0).joules)
    driver.board.millijoules += 3_000
    assert monitor.report({}, {}, 0).joules == pytest.approx(3.0)
    driver.board.millijoules += 50_000
    monitor.skip()
    driver.board.millijoules += 4_000
    assert monitor.report({}, {}, 0).joules == pytest.approx(4.0)


def vector(rollout: float, joules: float = math.nan, reading: Reading | None = None) -> np.ndarray:
    seconds = {"rollout": rollout, "update": 1.0, "other": 0.0, "total": 4.0}
    return RankReport(seconds, {"rollout": int(100 * rollout), "update": 400}, 500, joules, reading).vector()


def test_the_last_rank_is_named_with_what_it_costs_the_others():
    metrics = rank_metrics(np.stack([vector(2.0), vector(2.1), vector(2.9), vector(2.1)]), 8)
    assert metrics["ranks/last"] == 2
    assert metrics["ranks/behind_seconds"] == pytest.approx(0.8)
    assert (metrics["time/rollout"], metrics["time/total"]) == (2.0, 4.0)
    assert (metrics["memory/rollout_bytes"], metrics["memory/peak_bytes"]) == (290.0, 500.0)
    # What no rank has, a phase or a GPU, is no metric.
    assert not {name for name in metrics if name.startswith("gpu/") or "decode" in name}


def test_one_rank_is_behind_nobody():
    assert not {name for name in rank_metrics(vector(2.0)[None], 8) if name.startswith("ranks/")}


def test_power_is_of_all_gpus_and_the_clock_of_the_slowest():
    fast, slow = Reading(0.0, 600.0, 1980.0, 0x01), Reading(0.0, 700.0, 1410.0, 0x40)
    metrics = rank_metrics(np.stack([vector(2.0, 2000.0, fast), vector(2.0, 2800.0, slow)]), 8)
    assert metrics["gpu/power_w"] == 1200
    assert metrics["gpu/joules_per_sample"] == 600
    assert metrics["gpu/clock_mhz"] == 1410
    assert metrics["gpu/limited"] == 0.5
