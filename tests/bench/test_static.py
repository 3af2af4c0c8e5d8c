"""What the compiler makes of every kernel: within the limits, and no worse than the committed table."""

import subprocess
import sys

import pytest

from fastgrpo.commands.bench import load

static = load("static")
TABLE = {tuple(row[k] for k in static.KEY): row for row in static.read_table()}
NONE_OF = ("stack_bytes", "fp64", "local")
REGISTERS, REGISTERS_WITH_NOISE = 40, 80
# Every latent at once, none of them noise from a key, on MI300X: docs/kernels.md tells what was tried.
REGISTERS_ON_MI300X = {
    "nft_loss/stored": 43,
    "grpo_loss/all step": 48,
    "grpo_loss/all stored": 48,
    "gaussian_step/all stored": 42,
}

# One target and dtype for each kernel, in the forms that take most; `make test-full` compiles the whole matrix.
FORMS = [
    "clipped_loss/several", "gaussian_step/all", "gaussian_step/all stored", "grpo_loss/all step", "grpo_loss/key",
    "grpo_loss/masked", "log_prob", "nft_loss/key", "normal", "on_policy_gradient/key", "shift_moments/key",
]  # fmt: skip
SMALL = (["sm_90"], FORMS, ["bfloat16"])

# Every kernel of the package, by name; in a process of its own, for the interpreter replaces them.
KERNELS = """
import importlib, pkgutil, fastgrpo_kernels as package
from triton.runtime.jit import JITFunction
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    for name, value in vars(importlib.import_module(module.name)).items():
        if name.endswith("_kernel") and isinstance(value, JITFunction):
            print(name)
"""


@pytest.fixture(scope="module")
def rows():
    return static.compile_rows(*SMALL)


def check(row):
    makes_noise = load("static_cases").CASES[row["case"]].makes_noise
    limit = REGISTERS_WITH_NOISE if makes_noise else REGISTERS
    if row["target"] == "gfx942":
        limit = REGISTERS_ON_MI300X.get(row["case"], limit)
    assert row["registers"] <= limit, row
    assert all(row[column] == 0 for column in NONE_OF), row
    if row["bytes_per_element"] == "":
        return
    # A token's byte of a mask is read by each of its elements.
    narrow = {row["load_bits"]} if "masked" in row["case"] else set()
    assert {row["load_bits"], row["store_bits"]} - narrow <= {128, ""}, row
    assert row["bytes_per_element"] <= 1.01 * row["least_bytes_per_element"], row


def check_against_table(rows):
    for row in rows:
        committed = TABLE.get(tuple(row[k] for k in static.KEY))
        assert committed, (
            f"{row['case']} has no row for {row['target']}: run fastgrpo bench static --case {row['case']}"
        )
        if row["triton"] == committed["triton"]:
            assert not static.worse(row, committed), row


def test_every_kernel_is_within_the_limits(rows):
    for row in rows:
        check(row)


def test_no_kernel_got_worse_than_the_table(rows):
    check_against_table(rows)


def test_every_kernel_of_the_package_is_in_the_table(rows):
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], capture_output=True, text=True, env=static.compiler_environment(), check=True
    )
    kernels = set(done.stdout.split())
    assert len(kernels) >= 5
    assert kernels == {row["kernel"] for row in rows}
    assert {row["target"] for row in TABLE.values()} == set(static.DEVICES)
    assert kernels == {row["kernel"] for row in TABLE.values()}


def test_the_committed_table_is_within_the_limits():
    for row in TABLE.values():
        check(row)


def test_a_worse_row_is_noticed():
    row = next(r for r in TABLE.values() if r["load_bits"] == 128)
    assert static.worse(row, row) == []
    for column in (*static.COSTS, *static.WIDTHS):
        if row[column] != "":
            step = -64 if column in static.WIDTHS else 1
            assert static.worse(row | {column: row[column] + step}, row) == [
                f"{column}: {row[column]} -> {row[column] + step}"
            ]


def test_the_document_shows_the_committed_table():
    assert static.document() == static.DOCUMENT.read_text(encoding="utf-8")


def test_launches_of_a_training_loss(rows):
    launches = {(r["case"], r["pass"]): r["launches"] for r in rows}
    assert {("grpo_loss/key", "forward"), ("grpo_loss/key", "backward")} <= launches.keys()
    assert set(launches.values()) == {1}


def test_an_unknown_name_is_one_line_with_the_nearest():
    from fastgrpo.errors import UserError

    with pytest.raises(UserError, match=r"^bench static: unknown target 'sm_91'; did you mean 'sm_9?0'"):
        static.compile_rows(["sm_91"])


@pytest.mark.full
def test_the_whole_matrix():
    rows = static.compile_rows()
    assert {tuple(row[k] for k in static.KEY) for row in rows} == set(TABLE)
    for row in rows:
        check(row)
    check_against_table(rows)
