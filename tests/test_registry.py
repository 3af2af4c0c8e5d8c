"""Parts found by name: built in first, then by the entry points of installed packages; each failure is one line."""

import sys
from pathlib import Path

import pytest

from fastgrpo.data import prompts
from fastgrpo.errors import ConfigError, UserError
from fastgrpo.models import FAMILIES
from fastgrpo.registry import Registry
from fastgrpo.rewards import REWARDS

GROUP = "fastgrpo.shades"
SHADES = Registry("shade", GROUP, {"red": "colorsys:rgb_to_hls", "late": "no_such_module:late"}, also="module:Class")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package: its code, and `name = module:attribute` lines of one entry point group."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, code: str, points: str) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        folder: Path = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[{GROUP}]\n{points}\n")

    return install


def test_a_name_of_ours_is_found_without_a_look_at_what_is_installed(monkeypatch):
    monkeypatch.setattr("fastgrpo.registry.entry_points", None)
    assert SHADES.load("red", "shade").__name__ == "rgb_to_hls"
    assert "red" in SHADES
    for registry in (FAMILIES, REWARDS, prompts.SOURCES):
        for name in registry.built_in:
            assert registry.load(name, "setting").__name__


def test_a_package_adds_a_part_and_replaces_none_of_ours(install):
    assert SHADES.available() == ["late", "red"]
    install("teals", "def teal():\n    return 3\n", "teal = teals:teal\nred = teals:teal")
    assert SHADES.available() == ["late", "red", "teal"]
    assert SHADES.load("teal", "shade")() == 3
    assert SHADES.load("red", "shade").__name__ == "rgb_to_hls"


@pytest.mark.parametrize(
    "code, said",
    [
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise RuntimeError('needs a GPU\\nand more')\n", "RuntimeError: needs a GPU"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("def teal(:\n", "SyntaxError: "),
        ("", "AttributeError: module 'broken' has no attribute 'teal'"),
    ],
    ids=["missing module", "exception", "exit", "syntax", "missing attribute"],
)
def test_a_package_that_fails_to_import_is_one_line_that_names_it(install, monkeypatch, code, said):
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    install("broken", code, "teal = broken:teal")
    with pytest.raises(ConfigError, match=r"^run\.shade: 'teal' of the package broken cannot be imported: ") as caught:
        SHADES.load("teal", "run.shade")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_packages_may_not_offer_one_name(install):
    install("first", "teal = 1\n", "teal = first:teal")
    install("second", "teal = 2\n", "teal = second:teal")
    with pytest.raises(ConfigError, match="'teal' is offered by the packages first and second; uninstall one"):
        SHADES.load("teal", "shade")


def test_what_is_unknown_or_not_installed_is_one_line(monkeypatch):
    with pytest.raises(ConfigError, match=r"^run\.shade: unknown shade 'rad'; did you mean 'red'\? \(one of: late"):
        SHADES.load("rad", "run.shade")
    with pytest.raises(ConfigError, match=r"or module:Class\)$"):
        SHADES.load("rad", "run.shade")
    with pytest.raises(ConfigError, match=r"^run\.shade: 'late' cannot be imported: No module named 'no_such_module'"):
        SHADES.load("late", "run.shade")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    needs = Registry("shade", GROUP, {"blue": "diffusers:DiffusionPipeline"})
    with pytest.raises(UserError, match=r"^run\.shade: blue: needs the package 'diffusers'; .*fastgrpo\[train\]"):
        needs.load("blue", "run.shade")
