"""What `import fastgrpo` gives: these names, without loading torch; no name is hidden by a folder."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import fastgrpo

NAMES = {
    "Callback", "Config", "Prompt", "Scores", "Trainer", "UserError", "__version__", "evaluate", "export",
    "load_config", "load_family", "train",
}  # fmt: skip


def test_the_public_names_are_these():
    assert set(fastgrpo.__all__) == NAMES
    assert set(fastgrpo.__all__) <= set(dir(fastgrpo))
    for name in NAMES:
        assert name == "__version__" or getattr(fastgrpo, name).__module__.startswith("fastgrpo.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastgrpo.nothing


HEAVY = "assert not {'torch', 'diffusers', 'transformers', 'pydantic'} & set(sys.modules), sorted(sys.modules)"


@pytest.mark.parametrize(
    "code",
    [
        f"import sys, fastgrpo; {HEAVY}",
        "import sys, io, contextlib\nfrom fastgrpo.commands.main import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()): assert main(['--help']) == 0\n{HEAVY}",
    ],
    ids=["import", "help"],
)
def test_importing_and_help_load_no_heavy_package(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_submodule_hides_a_public_name():
    """Importing `fastgrpo.x` sets the attribute `x` of the package: no room is called as a public name."""
    for info in pkgutil.walk_packages(fastgrpo.__path__, "fastgrpo."):
        if "__main__" not in info.name:
            importlib.import_module(info.name)
    assert callable(fastgrpo.train)
    assert callable(fastgrpo.evaluate)
    assert not NAMES & {info.name for info in pkgutil.iter_modules(fastgrpo.__path__)}
