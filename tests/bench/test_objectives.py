"""Curves of objectives: when a run has gained its points, a page of them, and a run that replaces one of before."""

import pytest

from fastgrpo.commands.bench import load

objectives = load("objectives")
tables = objectives.tables


def curve(seed: int, points: list[tuple[int, float, float]]) -> list[dict[str, str]]:
    """Rows of (iteration, processor seconds, score)."""
    known = dict.fromkeys(objectives.COLUMNS, "0") | {"config": "tiny", "setting": "grpo", "seed": str(seed)}
    return [
        known | {"iteration": str(i), "processor_seconds": str(s), "samples": str(64 * i), "score": str(score)}
        for i, s, score in points
    ]


def test_a_curve_is_there_where_it_first_crosses_its_goal():
    risen = curve(0, [(0, 0.0, 0.4), (10, 20.0, 0.5), (20, 40.0, 0.54), (30, 60.0, 0.5)])
    assert objectives.reached(risen, 0.12, "processor_seconds") == pytest.approx(30.0)
    assert objectives.reached(risen, 0.12, "samples") == pytest.approx(960)
    assert objectives.reached(risen, 0.15, "samples") is None


def test_a_page_says_what_each_seed_took():
    rows = curve(0, [(0, 0.0, 0.4), (10, 20.0, 0.52)]) + curve(1, [(0, 0.0, 0.4), (9, 20.0, 0.41)])
    *_, line = objectives.page(rows).splitlines()
    assert [cell.strip() for cell in line.split("|")][1:9] == [
        "tiny", "grpo", "2", "+12.0 +1.0", "+6.5", "20 –", "640 –", "20"
    ]  # fmt: skip


def test_a_run_replaces_the_whole_curve_of_one_before(tmp_path):
    table = tmp_path / "curves.csv"
    first, other = curve(0, [(0, 0.0, 0.4), (11, 20.0, 0.5), (20, 41.0, 0.6)]), curve(1, [(0, 0.0, 0.4)])
    again = curve(0, [(0, 0.0, 0.4), (10, 20.0, 0.5)])
    for rows in (first + other, again):
        tables.upsert(table, rows, objectives.KEY, objectives.COLUMNS, series=objectives.KEY[:3])
    kept = [(row["seed"], row["iteration"]) for row in tables.read(table)]
    assert sorted(kept) == [("0", "0"), ("0", "10"), ("1", "0")]
