"""Wheels, versions and extras; and (full) that the built wheel installs into an empty environment and runs."""

import email
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import fastgrpo
from fastgrpo.errors import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KERNELS = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)


def build(folder: Path, out: Path) -> Path:
    """A wheel of a project folder, by its own build backend."""
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def kernels_wheel(tmp_path_factory):
    return build(ROOT / "kernels", tmp_path_factory.mktemp("kernels_wheel"))


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def requirements(wheel: Path) -> set[str]:
    """Names of what a wheel needs without extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    return {re.match(r"[\w-]+", line)[0] for line in lines if "extra ==" not in line}  # pyright: ignore


def test_the_wheel_holds_both_packages_and_every_file_of_them(wheel):
    files = contents(wheel)
    for folder in (ROOT / "fastgrpo", ROOT / "kernels" / "fastgrpo_kernels"):
        tracked = subprocess.run(["git", "ls-files", str(folder)], cwd=ROOT, capture_output=True, text=True).stdout
        expected = {str((ROOT / line).relative_to(folder.parent)) for line in tracked.split()}
        assert expected, "no git checkout to compare with"
        assert expected <= files
    assert {name.split("/")[0] for name in files} == {
        "fastgrpo",
        "fastgrpo_kernels",
        f"fastgrpo-{fastgrpo.__version__}.dist-info",
    }


def test_the_kernels_wheel_needs_torch_and_triton_only(kernels_wheel):
    files = contents(kernels_wheel)
    assert requirements(kernels_wheel) == {"torch", "triton"}
    assert {name.split("/")[0] for name in files} == {
        "fastgrpo_kernels",
        f"fastgrpo_kernels-{KERNELS['version']}.dist-info",
    }
    assert "fastgrpo_kernels/LICENSE" in files
    sources = (ROOT / "kernels" / "fastgrpo_kernels").rglob("*.py")
    assert {str(path.relative_to(ROOT / "kernels")) for path in sources} <= files


def test_versions_agree(wheel):
    assert KERNELS["version"] == fastgrpo.__version__
    assert wheel.name.startswith(f"fastgrpo-{fastgrpo.__version__}-")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {fastgrpo.__version__}" in changelog
    assert KERNELS["dependencies"] == [d for d in PROJECT["dependencies"] if d.startswith(("torch", "triton"))]


def test_the_base_install_is_small(wheel):
    assert requirements(wheel) == {"torch", "numpy", "pydantic", "typer", "rich", "pyyaml", "triton"}


def test_every_extra_that_an_error_names_exists_and_brings_the_package():
    extras = PROJECT["optional-dependencies"]
    distributions = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "flash_attn": "flash-attn"}
    distributions["prometheus_client"] = "prometheus-client"
    for package, extra in EXTRAS.items():
        names = {re.match(r"[\w-]+", r)[0] for r in extras[extra]}  # pyright: ignore[reportOptionalSubscript]
        assert distributions.get(package, package) in names, f"fastgrpo[{extra}] does not bring {package}"


def test_constraints_are_within_the_ranges_of_the_project():
    from packaging.requirements import Requirement

    listed = [*PROJECT["dependencies"], *(r for group in PROJECT["optional-dependencies"].values() for r in group)]
    ranges = {(r := Requirement(text)).name: r.specifier for text in listed}
    for name, version in CONSTRAINTS.items():
        assert ranges[name].contains(version), f"{name}=={version} is outside {ranges[name]}"


def test_every_pip_call_of_the_makefile_has_the_constraints():
    makefile = (ROOT / "Makefile").read_text()
    calls = [line for line in makefile.splitlines() if "pip install" in line]
    assert calls
    assert all("-c constraints.txt" in line for line in calls)


def test_without_any_extra_the_doctor_answers_and_training_names_its_extra():
    """What an environment with the base dependencies alone can do."""
    extras = PROJECT["optional-dependencies"]
    names = {re.match(r"[\w-]+", r)[0] for group in ("train", "rewards", "serve", "datasets") for r in extras[group]}  # pyright: ignore[reportOptionalSubscript]
    modules = sorted({"PIL" if name == "pillow" else name.replace("-", "_") for name in names})
    code = (
        f"import sys\nfor name in {modules}: sys.modules[name] = None\n"
        "from fastgrpo.commands.main import main\n"
        "assert main(['--help']) == 0\nassert main(['doctor']) == 0\n"
        "sys.exit(main(['train', 'configs/shapes-flux.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "fastgrpo[train]" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 2
    assert re.fullmatch(r"error: fastgrpo train: needs .*pip install 'fastgrpo\[train\]'\n", done.stderr)


@pytest.mark.full
def test_the_wheel_installs_into_an_empty_environment_and_runs(wheel, kernels_wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command, code=0):
        command = [str(part) for part in command]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    run(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel)
    run(python, "-c", "import fastgrpo, fastgrpo_kernels")
    fastgrpo_command = python.with_name("fastgrpo")
    assert "Usage: fastgrpo" in run(fastgrpo_command, "--help")
    assert "fastgrpo[train]" in run(fastgrpo_command, "doctor")
    said = run(fastgrpo_command, "train", ROOT / "configs" / "shapes-flux.yaml", code=2)
    assert re.fullmatch(r"error: fastgrpo train: needs .*pip install 'fastgrpo\[train\]'\n", said)

    venv.create(tmp_path / "other", with_pip=True)
    other = tmp_path / "other" / "bin" / "python"
    run(other, "-m", "pip", "install", "-c", ROOT / "constraints.txt", kernels_wheel)
    run(other, "-c", "import fastgrpo_kernels")
    run(other, "-c", "import fastgrpo", code=1)
