"""Every command and snippet of the documents runs, in a folder where the documents' paths hold.

A comment above a block changes how it is run:

    <!-- test: args="train.iterations=2" -->            appended to each fastgrpo, torchrun or make command of the block
    <!-- test: full -->                                 only in make test-full
    <!-- test: standins -->                             with tiny stand-ins of what is published (support/standins.py)
    <!-- test: background -->                           while the blocks below it run
    <!-- test: exit=2 -->                               ends with this code
    <!-- test: skip reason="needs a GPU" -->            not run; only for a reason of SKIPS
"""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.processes import command_line, run_ranks
from support.standins import stand_ins

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kernels").glob("*.md")])
LANGUAGES = {"bash", "python"}
# Fenced text that nobody is meant to run.
SHOWN = {"", "text", "yaml", "json"}
# Why a block may be skipped. What installs packages is tested in test_packaging; the suite itself is running now.
SKIPS = {
    "needs a GPU", "needs the hub", "needs an account", "installs packages", "runs this suite", "serves until Ctrl-C",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its first line of code, in its document."""

    language: str
    line: int
    code: str
    args: str = ""
    full: bool = False
    skip: str | None = None
    standins: bool = False
    background: bool = False
    exit: int = 0

    def commands(self) -> list[str]:
        """The commands of a bash block, each with the block's extra arguments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        plain = [not re.search(r"[|$]", line) for line in lines]
        commands = [
            shlex.join(shlex.split(line, comments=True)) if p else line for line, p in zip(lines, plain, strict=True)
        ]
        return [
            f"{c} {self.args}".strip() if re.match(r"fastgrpo|torchrun|sbatch|make", c) else c for c in commands if c
        ]


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a Markdown text in one of LANGUAGES, with the marker above each."""
    found, lines, number = [], text.split("\n"), 0
    marker: dict[str, Any] = {}
    while number < len(lines):
        line = lines[number].strip()
        if match := re.fullmatch(r"<!-- test: (.*) -->", line):
            marker = dict(_marks(match[1]))
        elif line.startswith("```"):
            language, start = line[3:].strip(), number + 1
            number = start
            while not lines[number].strip().startswith("```"):
                number += 1
            assert language in LANGUAGES | SHOWN, f"line {start}: a block in an unknown language, {language!r}"
            if language in LANGUAGES:
                found.append(Block(language, start + 1, "\n".join(lines[start:number]), **marker))
            marker = {}
        elif line:
            assert not marker, f"line {number + 1}: a test marker stands above no block"
        number += 1
    return found


def _marks(text: str):
    """`full`, `args="…"`, `skip reason="…"` as keyword arguments of Block."""
    words = shlex.split(text)
    if words[0] == "skip":
        (reason,) = words[1:]
        assert reason.removeprefix("reason=") in SKIPS, f"not a reason to skip: {reason}"
        yield "skip", reason.removeprefix("reason=")
        return
    for word in words:
        name, _, value = word.partition("=")
        assert name in ("full", "args", "standins", "background", "exit"), f"unknown marker {name!r}"
        yield name, value if name == "args" else int(value) if name == "exit" else True


def documents(full: bool) -> list:
    """Those with a block that runs."""
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for path in DOCUMENTS
        if any(b.full == full and not b.skip for b in blocks_of(path.read_text(encoding="utf-8")))
    ]


def run_document(path: Path, folder: Path, full: bool) -> None:
    """Runs a document's blocks in their order; a full block only where `full`, the others before it too."""
    for name in ("configs", "docs", "bench", "kernels", "Makefile", "constraints.txt", "pyproject.toml", "fastgrpo"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    namespace: dict = {"__name__": "__main__"}
    blocks = [b for b in blocks_of(path.read_text(encoding="utf-8")) if not b.skip and (full or not b.full)]
    with ExitStack() as after:
        if any(block.standins for block in blocks):
            patch = after.enter_context(pytest.MonkeyPatch.context())
            after.enter_context(stand_ins(folder / "stand-ins", patch))
        run_blocks(blocks, path, folder, namespace, after)


def run_blocks(blocks: list[Block], path: Path, folder: Path, namespace: dict, after: ExitStack) -> None:
    for block in blocks:
        where = f"{path.relative_to(ROOT)}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.code, str(path), "exec"), namespace)
            continue
        for command in block.commands():
            if block.standins:
                # Two processes stand for eight GPUs.
                command = re.sub(r"--nproc-per-node \d+", "--nproc-per-node 2", command)
            if block.background:
                after.enter_context(in_background(command, folder))
            else:
                run_command(command, folder, where, block.exit, block.standins)


@contextmanager
def in_background(command: str, folder: Path, port: int = 8917):
    """A server's command, once it listens at its port, until the context ends."""
    program = f"exec {sys.executable} -m {command}"
    with subprocess.Popen(["bash", "-c", program], cwd=folder, env=environment_of()) as server:
        try:
            limit = time.monotonic() + 120
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None, f"{command} ended"
                assert time.monotonic() < limit, f"{command} never listens"
                time.sleep(0.2)
            yield
        finally:
            server.terminate()


def environment_of() -> dict[str, str]:
    return dict(os.environ, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def run_command(command: str, folder: Path, where: str, code: int = 0, standins: bool = False) -> None:
    """A shell command that ends with `code`. `fastgrpo` itself runs in this process, which has imported what takes
    seconds, and asks the hub for nothing unless it is told to download; so do ranks, but where files stand in for a
    hub's, of which a process has to know before it imports."""
    # `|| echo "…"`: it ends with 0 whatever the command found.
    if given := re.match(r'(fastgrpo\b[^|&;<>$`]*)(\|\| echo "[^"|&;<>$`]*")?$', command):
        from fastgrpo.commands.main import main

        with pytest.MonkeyPatch.context() as patch:
            if "--download" in command:
                patch.setattr(constants, "HF_HUB_OFFLINE", False)
            found = main(shlex.split(given[1])[1:])
            assert given[2] or found == code, f"{where}: {command}"
        return
    if (given := re.match(r"torchrun --nproc-per-node (\d+) -m fastgrpo ([^|&;<>$`]*)$", command)) and not standins:
        run_ranks(folder, command_line, *shlex.split(given[2]), ranks=int(given[1]))
        return
    environment = environment_of()
    if command.startswith("make "):
        # This environment, as it is: its set-up would be that of another folder.
        venv = Path(sys.executable).parents[1]
        command += f" VENV={venv} -o {venv}/.setup-done"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, f"{where}: {command}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("path", documents(full=False))
def test_the_commands_and_snippets_of_a_document_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_document(path, tmp_path, full=False)


@pytest.mark.full
@pytest.mark.parametrize("path", documents(full=True))
def test_the_long_commands_of_a_document_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_document(path, tmp_path, full=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which does not exist"


def test_blocks_and_their_markers_are_read():
    text = (
        'before\n<!-- test: args="train.iterations=2 a=b" -->\n```bash\nfastgrpo train x \\\n  y=1  # why\nls\n```\n'
        "```text\nnothing\n```\n<!-- test: full -->\n\n```python\nx = 1\n```\n"
        '<!-- test: skip reason="needs a GPU" -->\n```bash\nnvidia-smi\n```\n'
    )
    first, second, third = blocks_of(text)
    assert first.commands() == ["fastgrpo train x y=1 train.iterations=2 a=b", "ls"]
    assert first.line == 4
    assert (second.language, second.full, second.skip) == ("python", True, None)
    assert third.skip == "needs a GPU"


@pytest.mark.parametrize(
    "text, words",
    [
        ('<!-- test: skip reason="too slow" -->\n```bash\nls\n```', "not a reason to skip"),
        ("<!-- test: fulll -->\n```bash\nls\n```", "unknown marker"),
        ("<!-- test: full -->\nprose\n```bash\nls\n```", "above no block"),
        ("```sh\nls\n```", "unknown language"),
    ],
)
def test_a_block_cannot_slip_out_by_a_typo(text, words):
    with pytest.raises(AssertionError, match=words):
        blocks_of(text)


def test_a_failing_command_fails(tmp_path):
    with pytest.raises(AssertionError, match=r"README\.md:3: false"):
        run_command("false", tmp_path, "README.md:3")
    with pytest.raises(AssertionError):
        run_command("fastgrpo train none.yaml", tmp_path, "README.md:3")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_folders_that_a_document_names_are_there(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for named in re.findall(r"`((?:fastgrpo|kernels|tests|bench|configs|examples)/[\w./-]+)`", text):
        assert (ROOT / named).exists(), f"{path.name} names {named}, which is not there"


def test_the_first_screen_is_forty_lines():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert next(number for number, line in enumerate(lines) if line.startswith("## ")) <= 40
