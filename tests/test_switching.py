"""docs/switching.md names settings that exist, and every flag of the trainers it speaks of once."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from fastgrpo.config import Config, SubsetSteps, WindowSteps
from fastgrpo.config.sections import Section

PAGE = (Path(__file__).parents[1] / "docs/switching.md").read_text(encoding="utf-8")


def rows() -> list[tuple[str, str, str]]:
    """Section, flags and our answer of every row of every table."""
    found, section = [], ""
    for line in PAGE.splitlines():
        section = line.removeprefix("## ") if line.startswith("## ") else section
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| ") and len(cells) == 2 and cells[0] not in ("flag", "key", "---"):
            found.append((section, *cells))
    return found


def is_setting(path: str) -> bool:
    kind: type[BaseModel] = Config
    for part in path.split("."):
        if part not in kind.model_fields:
            return False
        options = [kind.model_fields[part].annotation]
        while options and not (isinstance(options[0], type) and issubclass(options[0], BaseModel)):
            options += getattr(options.pop(0), "__args__", ())
        kind = options[0] if options else Section
    return True


def test_every_setting_exists():
    named = {key for _, _, ours in rows() for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", ours) if "torch" not in key}
    assert len(named) > 50
    assert [key for key in sorted(named) if not is_setting(key)] == []
    assert not is_setting("rollout.setps")
    given = " ".join(part for _, _, ours in rows() for part in re.findall(r"\{(.*?)\}", ours))
    assert set(re.findall(r"[a-z]+", given)) - {"window", "subset", "random"} <= {
        *WindowSteps.model_fields,
        *SubsetSteps.model_fields,
    }


def test_every_flag_has_one_row_and_an_answer():
    seen: dict[tuple[str, str], int] = {}
    for section, flags, ours in rows():
        assert ours, flags
        # What is not supported says what to use.
        if "not supported" in ours and "is not supported" not in ours:
            assert "not supported: " in ours, flags
        for flag in re.findall(r"`(--[a-z0-9_]+)`", flags):
            seen[section, flag] = seen.get((section, flag), 0) + 1
    assert [flag for flag, times in seen.items() if times > 1] == []
    assert len([flag for section, flag in seen if section == "DanceGRPO"]) == 85


@pytest.mark.parametrize("row", [r for r in rows() if "not needed" in r[2]], ids=lambda r: r[1][:30])
def test_what_is_not_needed_says_why(row):
    assert "not needed because " in row[2]
