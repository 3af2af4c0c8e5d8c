"""Other libraries' chatter: as quiet from Python as on the command line, unless the user has asked for it."""

import importlib

import pytest
import torch

from fastgrpo import load_family
from fastgrpo.config import Model

PACKAGES = ("diffusers", "transformers")


@pytest.fixture
def messages():
    """The logging modules of both packages, with loading bars on."""
    found = [importlib.import_module(f"{package}.utils.logging") for package in PACKAGES]
    before = [(module.get_verbosity(), module.is_progress_bar_enabled()) for module in found]
    for module in found:
        module.enable_progress_bar()
    yield found
    for module, (verbosity, bars) in zip(found, before, strict=True):
        module.set_verbosity(verbosity)
        (module.enable_progress_bar if bars else module.disable_progress_bar)()


# "error" is what an earlier call of ours has left there, before the package was imported.
@pytest.mark.parametrize("verbosity, quiet", [(None, True), ("error", True), ("info", False)])
def test_loading_a_family_shows_no_bars(messages, monkeypatch, capfd, tiny_flux, verbosity, quiet):
    for package in PACKAGES:
        monkeypatch.delenv(f"{package.upper()}_VERBOSITY", raising=False)
        if verbosity is not None:
            monkeypatch.setenv(f"{package.upper()}_VERBOSITY", verbosity)
    load_family(Model(family="flux", path=str(tiny_flux), height=32, width=32), torch.device("cpu"))
    assert [module.is_progress_bar_enabled() for module in messages] == [not quiet] * 2
    assert ("Loading" in capfd.readouterr().err) is not quiet
