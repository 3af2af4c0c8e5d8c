"""The documents' site: a page for every command and public name, no link that leads nowhere."""

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fastgrpo
import fastgrpo_kernels.compat

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "_site" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_has_a_page_with_all_that_it_takes(pages):
    from typer.main import get_command

    from fastgrpo.commands.main import app

    made = pages.generated()
    commands = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert {f"commands/{name}.md" for name in commands} | {"commands/index.md"} == {p for p in made if "commands/" in p}
    for name, command in commands.items():
        text = made[f"commands/{name}.md"]
        assert f"[`fastgrpo {name}`]({name}.md)" in made["commands/index.md"]
        for param in command.params:
            assert param.name in ("help", "context") or pages.shown(param) in text, (name, param.name)
    assert "| `--images IMAGES` | Images of each model. | `480` |" in made["commands/eval.md"]
    assert "| `CONFIG` | A YAML file, such as those of configs/. | required |" in made["commands/train.md"]


def test_every_public_name_is_in_the_interface(pages):
    named = [name for _, names in pages.INTERFACE.values() for name in names]
    for name in named:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name
    ours = {getattr(fastgrpo, name) for name in fastgrpo.__all__ if name not in ("__version__", "Config")}
    documented = {getattr(importlib.import_module(n.rpartition(".")[0]), n.rpartition(".")[2], None) for n in named}
    assert ours <= documented
    # A page of a module has all that it defines; what is told twice fails the strict build.
    assert [name for name in named if name.rpartition(".")[0] in named] == []
    for wheel in (fastgrpo_kernels, fastgrpo_kernels.compat):
        of = {name: getattr(wheel, name) for name in wheel.__all__}
        things = {name: thing for name, thing in of.items() if inspect.isclass(thing) or inspect.isfunction(thing)}
        assert [n for n, thing in things.items() if thing.__module__ not in named and thing not in documented] == []


def test_links_stay_within_the_site(pages):
    text = "[a](docs/training.md#b) ![p](docs/images/x.png) [`c`](configs/c.yaml) [d](CONTRIBUTING.md) [e](https://x.y)"
    assert pages.within_documents(text, "") == (
        "[a](training.md#b) ![p](images/x.png) `c` (`configs/c.yaml`) [d](contributing.md) [e](https://x.y)"
    )
    assert pages.within_documents("![p](../bench/p.png)", "docs") == "`bench/p.png`"
    assert pages._outward("[x](scale.md) ![p](../bench/p.png)") == "[x](scale.md) `bench/p.png`"


def test_every_document_has_its_place(pages):
    nav = pages.navigation(pages.generated())
    listed = [
        path for entry in nav for paths in entry.values() for path in ([paths] if isinstance(paths, str) else paths)
    ]
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in (ROOT / "docs").glob("*.md")} | set(pages.generated())


@pytest.mark.full
def test_the_site_builds_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="needs fastgrpo[docs]")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), NO_MKDOCS_2_WARNING="1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("index.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)"', page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|/", target):
                there = page.parent / target
                assert there.exists(), f"{page.relative_to(tmp_path)}: {target}"


def test_workflows_run_what_the_makefile_has():
    makefile = (ROOT / "Makefile").read_text()
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    steps = [step for flow in workflows.values() for job in flow["jobs"].values() for step in job["steps"]]
    asked = {target for step in steps for target in re.findall(r"make ([\w-]+)", step.get("run", ""))}
    assert asked == {"check", "docs", "browser-check", "dist"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in asked)
    assert workflows["ci"]["jobs"]["check"]["strategy"]["matrix"]["python"] == ["3.11", "3.13"]
    # Pinned to a version, and without secrets of our own.
    assert all("@" in step["uses"] for step in steps if "uses" in step)
    assert "secrets." not in "".join(path.read_text() for path in (ROOT / ".github").rglob("*.yml"))
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert form.stem == "config" or {"name", "description", "body"} <= set(yaml.safe_load(form.read_text()))
