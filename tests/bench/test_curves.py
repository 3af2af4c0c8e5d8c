"""What grows with what: FLOPs and collectives of the plans behind the cost curves, exactly."""

import pytest

from fastgrpo.commands.bench import load

# Twelve plans: half a minute.
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def cost():
    curves = load("curves")
    known: dict = {}

    def of(axis: str, value: int) -> dict[str, tuple[int, int]]:
        if (axis, value) not in known:
            phases = curves.counted(axis, value).phases
            known[axis, value] = {p.name: (p.cost.flops, sum(p.cost.bytes.values())) for p in phases}
        return known[axis, value]

    return of


def flops(costs) -> int:
    return sum(f for f, _ in costs.values())


def test_twice_the_samples_are_twice_the_work(cost):
    one, two, four = (cost("samples", n) for n in (32, 64, 128))
    for phase in one:
        assert two[phase][0] == 2 * one[phase][0], phase
        assert four[phase][0] == 4 * one[phase][0], phase


def test_every_step_more_costs_as_much(cost):
    few, some, many = (flops(cost("steps", n)) for n in (4, 8, 16))
    assert (many - some) == 2 * (some - few)


def test_tokens_cost_a_little_more_than_their_number(cost):
    """Attention is the square of it, and here little beside the rest; text and modulation are there anyway."""
    small, middle, large = (cost("tokens", n)["rollout"][0] for n in (64, 256, 576))
    each, later = (middle - small) / (256 - 64), (large - middle) / (576 - 256)
    assert each < later < 1.3 * each
    assert cost("tokens", 256)["decode"][0] == pytest.approx(4 * cost("tokens", 64)["decode"][0], rel=0.05)


def test_ranks_share_the_work_and_each_gathers_every_weight(cost):
    one, two, four = (cost("ranks", n) for n in (1, 2, 4))
    for phase in ("decode", "rollout", "update"):
        assert one[phase][0] == 2 * two[phase][0] == 4 * four[phase][0], phase
    moved = [sum(b for _, b in costs.values()) for costs in (two, four)]
    assert moved[1] <= moved[0]
