"""The Dockerfile's steps, run by script: Debian's packages exist, pip installs what is copied, its command answers."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def steps(kind: str) -> list[str]:
    """What stands behind an instruction, lines that continue joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.removeprefix(kind).strip() for line in text.splitlines() if line.startswith(f"{kind} ")]


def test_it_takes_debians_packages_and_pip_alone():
    assert steps("FROM") == ["debian:12-slim"]
    programs = {part.split()[0] for step in steps("RUN") for part in step.split("&&")}
    assert programs == {"apt-get", "rm", "python3", "/opt/venv/bin/pip"}
    assert not re.search(r"curl|wget|https?://", "".join(steps("RUN")))


@pytest.mark.full
@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="no Debian")
def test_its_packages_are_debians():
    (packages,) = [step.split("--no-install-recommends ")[1].split(" &&")[0].split() for step in steps("RUN")[:1]]
    assert "python3-venv" in packages
    for package in packages:
        shown = subprocess.run(["apt-cache", "show", package], capture_output=True, text=True)
        assert f"Package: {package}" in shown.stdout, f"{package}: {shown.stderr}"


@pytest.mark.full
def test_pip_installs_what_is_copied_and_the_command_answers(tmp_path):
    """As in the image, at another place; what comes from an index is this environment's own."""
    venv, copy = tmp_path / "venv", tmp_path / "fastgrpo"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    site = next(path for path in sys.path if path.endswith("site-packages"))
    for step in steps("RUN")[1:]:
        command = step.replace("/opt/venv", str(venv)).replace("python3 -m venv", f"{sys.executable} -m venv")
        if "pip install" in command:
            command += " --no-deps --no-build-isolation --no-index"
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": site}
        done = subprocess.run(["bash", "-euc", command], cwd=copy, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    (entry,) = steps("ENTRYPOINT")
    program = entry.strip('[]"')
    done = subprocess.run([venv / "bin" / program, "--help"], capture_output=True, text=True, env={"PYTHONPATH": site})
    assert done.returncode == 0, done.stderr
    assert "reward-test" in done.stdout
