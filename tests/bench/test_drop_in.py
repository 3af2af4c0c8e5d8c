"""The before-and-after of docs/drop-in.md: how other projects' functions are taken, and what is measured of them."""

import pytest
import torch

from fastgrpo.commands.bench import load

drop_in = load("drop_in")


def test_functions_are_taken_without_importing_their_file(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(
        "import a_package_that_is_not_here\n"
        "class Scheduler:\n    def step(self, x: Tensor) -> a_package_that_is_not_here.Output:\n"
        "        return helper(x) + math.pi\n"
        "def helper(x): return offset * x\n"
    )
    found = drop_in.functions_of(file, "step", "helper", offset=2.0)
    assert found["step"](None, 1.0) == 2.0 + drop_in.math.pi


def test_distances_and_operations_are_those_of_the_functions(monkeypatch):
    monkeypatch.setattr(drop_in, "REPEATS", 3)

    def log_prob(scale):
        return lambda v, x, y: (-scale * (y - x - 0.1 * v) ** 2).mean((1, 2))

    row = drop_in.measure((2, 8, 4), log_prob(1.001), log_prob(1.0), log_prob(1.0))
    assert row["before_to_float64"] == pytest.approx(1e-3, rel=0.1)
    assert row["after_to_float64"] < 1e-5
    assert row["between"] == pytest.approx(1e-3, rel=0.1)
    # Forward: two products, two differences, a power, a product, a mean; backward as many again, or more.
    assert 10 <= row["operations"] <= 30
    assert row["before"] > 0
    assert row["after"] > 0


def test_lines_of_a_training_loop_are_taken_as_they_stand(tmp_path):
    file = tmp_path / "theirs.py"
    file.write_text(
        "def main():\n    for x in data:\n        before = 1\n        a = 2 * x\n        b = a + 1\n        c = 0\n"
    )
    lines = drop_in.ast.Module(drop_in.statements_of(file, "a", "b"), [])
    space = {"x": 3}
    exec(compile(drop_in.ast.fix_missing_locations(lines), "theirs", "exec"), space)
    assert space["b"] == 7
    assert not {"before", "c"} & set(space)
    with pytest.raises(ValueError, match="has no block that assigns a, then nothing"):
        drop_in.statements_of(file, "a", "nothing")


def test_distances_of_whole_losses(monkeypatch):
    monkeypatch.setattr(drop_in, "REPEATS", 3)

    def loss(scale):
        return lambda v, old, x0, noise, mixed: (scale * (v - old) ** 2).mean()

    row = drop_in.measure_loss((4, 2, 3, 3), loss(1.001), loss(1.0), loss(1.0))
    assert row["before_to_float64"] == pytest.approx(1e-3, rel=0.1)
    assert row["after_to_float64"] < 1e-5
    assert row["operations"] > 3


def test_the_loss_is_clipped_as_these_trainers_write_it():
    old = torch.zeros(2)
    # Advantages are 1 and 0.
    assert float(drop_in.loss(torch.tensor([0.5, 0.5]), old)) == pytest.approx(-(1 + drop_in.CLIP) / 2)
    assert float(drop_in.loss(torch.tensor([-0.5, 0.0]), old)) == pytest.approx(-(drop_in.math.exp(-0.5)) / 2)


def test_a_clone_at_another_commit_is_refused(tmp_path, monkeypatch):
    done = drop_in.subprocess.CompletedProcess([], 0, stdout="0123456789\n")
    monkeypatch.setattr(drop_in.subprocess, "run", lambda *arguments, **options: done)
    with pytest.raises(SystemExit, match="DanceGRPO: expected a clone at 15cc71d, got 0123456"):
        drop_in.main(tmp_path)
