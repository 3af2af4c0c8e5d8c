"""Wheels, versions and extras; and (full) that the built wheel installs into an empty environment and runs."""

import email
import importlib
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

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


def tracked(folder: Path) -> set[str]:
    """Paths of a package's files in the checkout, as a wheel names them."""
    listed = subprocess.run(["git", "ls-files", str(folder)], cwd=ROOT, capture_output=True, text=True).stdout
    assert listed, "no git checkout to compare with"
    return {str((ROOT / line).relative_to(folder.parent)) for line in listed.splitlines()}


def test_the_wheel_holds_every_file_of_fastgrpo_and_nothing_else(wheel):
    files = contents(wheel)
    assert tracked(ROOT / "fastgrpo") <= files
    assert {name.split("/")[0] for name in files} == {"fastgrpo", f"fastgrpo-{fastgrpo.__version__}.dist-info"}


def test_the_kernels_wheel_holds_every_file_of_the_kernels_and_needs_torch_and_triton_only(kernels_wheel):
    files, information = contents(kernels_wheel), f"fastgrpo_kernels-{KERNELS['version']}.dist-info"
    assert tracked(ROOT / "kernels" / "fastgrpo_kernels") <= files
    assert {name.split("/")[0] for name in files} == {"fastgrpo_kernels", information}
    assert requirements(kernels_wheel) == {"torch", "triton"}
    assert f"{information}/licenses/LICENSE" in files
    assert (ROOT / "kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_kernels_wheel_tells_its_public_names(kernels_wheel):
    with zipfile.ZipFile(kernels_wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = str(email.message_from_bytes(archive.read(name)).get_payload())
    rows = dict(re.findall(r"^\| `(fastgrpo_kernels[\w.]*)` \| (.*) \|$", text, re.MULTILINE))
    named = {module: re.findall(r"`(\w+)`", names) for module, names in rows.items()}
    assert len(named) == 9
    for module, names in named.items():
        found = importlib.import_module(module)
        own = [n for n, o in vars(found).items() if n[0] != "_" and callable(o) and o.__module__ == module]
        assert names == sorted(getattr(found, "__all__", own)), module


def test_uninstalling_either_wheel_leaves_the_other_whole(wheel, kernels_wheel, tmp_path):
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "venv"]

    def files() -> set[str]:
        return {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    def run(*command):
        done = subprocess.run([*pip, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    wheels = {"fastgrpo": wheel, "fastgrpo-kernels": kernels_wheel}
    for removed, kept in (tuple(wheels), tuple(wheels)[::-1]):
        run("install", "--no-deps", "--no-index", *wheels.values())
        assert contents(wheels[removed]) | contents(wheels[kept]) <= files()
        run("uninstall", "--yes", removed)
        assert contents(wheels[kept]) <= files()
        assert not contents(wheels[removed]) & files()


def test_versions_agree(wheel):
    assert KERNELS["version"] == fastgrpo.__version__
    assert wheel.name.startswith(f"fastgrpo-{fastgrpo.__version__}-")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {fastgrpo.__version__}" in changelog
    assert [d for d in KERNELS["dependencies"] if d.startswith("torch")] == [
        d for d in PROJECT["dependencies"] if d.startswith("torch")
    ]
    (needed,) = (Requirement(d) for d in PROJECT["dependencies"] if d.startswith("fastgrpo-kernels"))
    assert needed.specifier.contains(fastgrpo.__version__)


def test_the_base_install_is_small(wheel):
    assert requirements(wheel) == {"torch", "numpy", "pydantic", "typer", "rich", "pyyaml", "fastgrpo-kernels"}


def test_every_extra_that_an_error_names_exists_and_brings_the_package():
    extras = PROJECT["optional-dependencies"]
    distributions = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "flash_attn": "flash-attn"}
    distributions["prometheus_client"] = "prometheus-client"
    for package, extra in EXTRAS.items():
        names = {re.match(r"[\w-]+", r)[0] for r in extras[extra]}  # pyright: ignore[reportOptionalSubscript]
        assert distributions.get(package, package) in names, f"fastgrpo[{extra}] does not bring {package}"


def test_constraints_are_within_the_ranges_of_the_project():
    listed = [*PROJECT["dependencies"], *KERNELS["dependencies"]]
    listed += [r for group in PROJECT["optional-dependencies"].values() for r in group]
    ranges = {(r := Requirement(text)).name: r.specifier for text in listed}
    for name, version in CONSTRAINTS.items():
        assert ranges[name].contains(version), f"{name}=={version} is outside {ranges[name]}"


def test_the_range_is_tested_at_its_promised_lower_end():
    (line,) = re.findall(r"^RANGE_oldest = (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    tested = dict(part.split("==") for part in line.split() if "==" in part)
    promised = {r.name: r.specifier for r in map(Requirement, KERNELS["dependencies"])}
    for name in ("torch", "triton"):
        oldest = ".".join(tested[name].split(".")[:2])
        assert str(promised[name]) == f">={oldest}"


def test_every_pip_call_of_the_makefile_has_the_constraints():
    makefile = (ROOT / "Makefile").read_text()
    # The ends of the promised range are what `make test-range` installs.
    calls = [line for line in makefile.splitlines() if "pip install" in line and "$(RANGE_" not in line]
    assert calls
    assert all("-c constraints.txt" in line for line in calls)


def test_every_line_that_installs_a_checkout_names_both_of_its_folders():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    texts = [ROOT / name for name in listed if Path(name).suffix in ("", ".md", ".py", ".sh", ".toml", ".yaml")]
    calls = [
        (path, line)
        for path in texts
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"(pip install|PIP_INSTALL\)).* (-e )?['\"]?\.(\[|['\" ]|$)", line)
    ]
    assert {path.name for path, _ in calls} >= {"Makefile", "README.md"}
    for path, line in calls:
        assert re.search(r"(-e )?\./kernels (-e )?['\"]?\.", line), f"{path.relative_to(ROOT)}: {line.strip()}"


def test_the_environment_is_set_up_again_when_either_project_changes():
    (rule,) = re.findall(r"^\$\(STAMP\): (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(rule.split()) == {"pyproject.toml", "kernels/pyproject.toml", "constraints.txt"}


def test_pre_commit_runs_the_linters_of_the_constraints_in_environments_of_its_own():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pins = {repo["repo"].rpartition("/")[2]: repo.get("rev") for repo in repos}
    hooks = {hook["id"]: hook for repo in repos for hook in repo["hooks"]}
    assert pins["ruff-pre-commit"] == f"v{CONSTRAINTS['ruff']}"
    assert hooks["pyright"]["additional_dependencies"] == [f"pyright@{CONSTRAINTS['pyright']}"]
    assert {"ruff-check", "ruff-format", "check-added-large-files"} <= set(hooks)
    assert not [hook for hook in hooks.values() if hook.get("language") in ("system", "unsupported")]
    assert ".venv" not in str(hooks)


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
def test_both_install_into_an_empty_environment_and_run(wheel, kernels_wheel, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command, code=0):
        command = [str(part) for part in command]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    constraints = ["-c", ROOT / "constraints.txt"]
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", *constraints, kernels_wheel)
    run(python, "-c", "import fastgrpo_kernels.compat")
    run(python, "-c", "import fastgrpo", code=1)
    run(python, "-m", "pip", "install", *constraints, wheel)
    run(python, "-c", "import fastgrpo, fastgrpo_kernels")
    fastgrpo_command = python.with_name("fastgrpo")
    assert "Usage: fastgrpo" in run(fastgrpo_command, "--help")
    assert "fastgrpo[train]" in run(fastgrpo_command, "doctor")
    said = run(fastgrpo_command, "train", ROOT / "configs" / "shapes-flux.yaml", code=2)
    assert re.fullmatch(r"error: fastgrpo train: needs .*pip install 'fastgrpo\[train\]'\n", said)
    # What that error tells to do, with fastgrpo installed and on no index.
    assert "Would install av" in run(python, "-m", "pip", "install", "--dry-run", "fastgrpo[video]")
    assert "no wheel carries it" in run(fastgrpo_command, "bench", "static", code=2)

    # The line of the Makefile, over what the wheels installed; then each half taken away.
    run(python, "-m", "pip", "install", *constraints, "-e", ROOT / "kernels", "-e", ROOT)
    assert str(ROOT / "kernels") in run(python, "-c", "import fastgrpo_kernels; print(fastgrpo_kernels.__file__)")
    assert "Usage: fastgrpo bench" in run(fastgrpo_command, "bench", "--help")
    run(python, "-m", "pip", "uninstall", "--yes", "fastgrpo")
    run(python, "-c", "import fastgrpo_kernels.compat")
    run(python, "-c", "import fastgrpo", code=1)
    run(python, "-m", "pip", "uninstall", "--yes", "fastgrpo-kernels")
    run(python, "-c", "import fastgrpo_kernels", code=1)
