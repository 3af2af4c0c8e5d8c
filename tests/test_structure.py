"""The house: imports run downhill, the kernels stand alone, nothing is unpickled."""

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
PACKAGE, KERNELS = ROOT / "fastgrpo", ROOT / "kernels" / "fastgrpo_kernels"

# Each room is a folder (or one file), and imports from itself and from those before it in this list.
ROOMS = (
    "errors",
    "registry",
    "config",
    "shapes",
    "data",
    "distributed",
    "algorithms",
    "observe",
    "checkpoints",
    "models",
    "rewards",
    "rollout",
    "evaluation",
    "preflight",
    "training",
    "planning",
    "commands",
    "__main__",
)
# What `import fastgrpo` gives, it loads when it is asked for.
PUBLIC = "__init__"


def room_of(module: str) -> str:
    """The room of a module: `algorithms` of `fastgrpo.algorithms.schedule`."""
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, lazily too; relative imports are of its own package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            is_package = node.module == "fastgrpo"
            found |= names if is_package else {node.module}
    return found


FILES = sorted(p for folder in (PACKAGE, KERNELS) for p in folder.rglob("*.py"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down_the_list_of_rooms(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == PUBLIC:
        return
    assert room in ROOMS, f"give {room} a place in ROOMS"
    for module in imports_of(path):
        if not module.startswith("fastgrpo.") or module.split(".")[1].startswith("__"):
            continue
        other = room_of(module)
        assert ROOMS.index(other) <= ROOMS.index(room), f"{room} imports {module}, which comes after it"


def test_every_room_is_there_and_no_file_lies_beside_them():
    there = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert there | files == {*ROOMS, PUBLIC}


def code_lines(path: Path) -> int:
    """Lines that hold code: no docstrings, comments or blanks."""
    text, skipped = path.read_text(encoding="utf-8"), {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    layout = {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {n for t in tokens if t.type not in skipped | layout for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_what_is_read_first_stays_short():
    """One iteration, what a family is, and the core: whoever makes them longer moves something out."""
    assert len((PACKAGE / "training" / "trainer.py").read_text(encoding="utf-8").splitlines()) <= 220
    assert len((PACKAGE / "models" / "protocol.py").read_text(encoding="utf-8").splitlines()) <= 150
    core = [path for room in ("algorithms", "rollout", "training") for path in (PACKAGE / room).rglob("*.py")]
    assert 1000 < sum(map(code_lines, core)) <= 2700


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda p: str(p.relative_to(KERNELS)))
def test_the_kernels_import_torch_triton_and_the_standard_library_only(path):
    allowed = {"torch", "triton", "fastgrpo_kernels"} | set(sys.stdlib_module_names)
    if path.stem.startswith("reference") or path.stem.endswith("reference"):
        allowed.add("numpy")
    assert {module.split(".")[0] for module in imports_of(path)} <= allowed


def test_the_tests_mirror_the_rooms():
    rooms = {room for room in ROOMS if (PACKAGE / room).is_dir()}
    assert rooms <= {path.parent.name for path in TESTS.glob("*/test_*.py")}


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda p: str(p.relative_to(TESTS)))
def test_tests_share_what_is_in_support_alone(path):
    for module in imports_of(path):
        assert not any(part.startswith("test_") or part == "conftest" for part in module.split(".")), module
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        # What a test does to sys.path, monkeypatch takes back.
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert not re.match(r"sys\.path\.(append|insert|extend)", ast.unparse(node.func))


def test_the_planner_overrides_nothing_private_and_counts_by_no_list():
    """What it changes of the trainer is public there, so that an edit of the trainer cannot pass it by unseen."""
    for path in (PACKAGE / "planning").glob("*.py"):
        module = importlib.import_module(f"fastgrpo.planning.{path.stem}")
        for cls in (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__):
            assert not issubclass(cls, (list, dict, set)), cls
            base = {
                name for other in cls.__mro__[1:] if other.__module__.startswith("fastgrpo.") for name in vars(other)
            }
            assert not {n for n in base & set(vars(cls)) if n.startswith("_") and not n.startswith("__")}, cls


# Names that said nothing to who greps for them.
EMPTY_NAMES = {"Visitor", "Teller", "told", "Judged", "settled", "_aside", "how"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_say_what_they_are(path):
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    assert not EMPTY_NAMES & {token.string for token in tokens if token.type == tokenize.NAME}


def test_no_folder_shadows_the_package_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_pickled(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if path.name == "convert.py":
                continue
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("np", "load")}, path
    # convert-reward names the error of an archive that holds more than tensors; it unpickles with weights_only alone.
    if path.name == "convert.py":
        text = path.read_text(encoding="utf-8")
        assert text.count("torch.load(") == text.count("weights_only=True)") == 1
        assert "pickle.load" not in text
        return
    assert not {"pickle", "dill", "joblib", "cloudpickle"} & {m.split(".")[0] for m in imports_of(path)}


BLOCKED = """
import sys
for name in ("triton", "diffusers", "transformers", "pydantic", "fastgrpo"):
    sys.modules[name] = None
import {module}
for name in {module}.__all__:
    getattr({module}, name)
"""


@pytest.mark.parametrize("module", ["fastgrpo_kernels", "fastgrpo_kernels.compat"])
def test_other_trainers_need_torch_alone(module):
    code = BLOCKED.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
