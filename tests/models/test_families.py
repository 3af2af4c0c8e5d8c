"""What is found by name, and what a family may leave out: one line each, never a traceback."""

from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from support.tiny import tiny_config

from fastgrpo import models
from fastgrpo.errors import ConfigError
from fastgrpo.models import ModelFamily, check_parts, family_class, load_family
from fastgrpo.models.families.flux import Flux
from fastgrpo.planning.dry_run import dry_run

CPU = torch.device("cpu")
LEFT_OUT = ("encoded_shapes", "token_lengths", "word_tokenizers", "encode_images")


class Silent(Flux):
    """A FLUX that leaves out whatever a family may."""

    name = "silent"


for part in LEFT_OUT:
    setattr(Silent, part, vars(ModelFamily)[part])


class Unfinished(ModelFamily):
    name = "unfinished"
    pipeline_classes = ("FluxPipeline",)

    @classmethod
    def check(cls, config, parts):
        pass


@pytest.fixture
def offered(monkeypatch):
    """Makes entry points look installed: `offered(name="module:attribute")`."""

    def offer(**named: str) -> None:
        points = [EntryPoint(name, value, "fastgrpo.families") for name, value in named.items()]

        def installed(group: str, name: str | None = None) -> list[EntryPoint]:
            return [p for p in points if p.group == group and name in (None, p.name)]

        monkeypatch.setattr("fastgrpo.registry.entry_points", installed)

    return offer


def test_families_are_listed_with_those_of_packages(offered):
    assert models.available() == sorted(models.FAMILIES.built_in)
    offered(silent="test_families:Silent", flux="test_families:Silent")
    assert models.available() == sorted([*models.FAMILIES.built_in, "silent"])
    assert family_class("silent") is Silent
    # None replaces one of ours.
    assert family_class("flux") is Flux


@pytest.mark.parametrize("name", list(models.FAMILIES.built_in))
def test_every_family_of_ours_says_what_it_is(name):
    cls: Any = family_class(name)
    assert cls.name == name
    # The ABC's own would raise.
    assert cls.encoded_shapes is not ModelFamily.encoded_shapes
    assert cls.word_tokenizers.__func__ is not ModelFamily.word_tokenizers.__func__
    if cls.context_kinds:
        assert cls.token_lengths.__func__ is not ModelFamily.token_lengths.__func__


def test_an_unknown_family_is_one_line():
    with pytest.raises(ConfigError, match=r"model\.family: unknown family 'wann'; did you mean 'wan'\? \(one of: flux"):
        family_class("wann")


@pytest.mark.parametrize(
    "value, said",
    [
        ("test_families:Unfinished", "does not define decode, encode_prompts, encoders, guidance_style, latent_shape"),
        ("test_families:CPU", "is not a subclass of fastgrpo.models.ModelFamily"),
        ("test_families:Nothing", "cannot be imported: AttributeError: module 'test_families' has no attribute"),
        ("no_such_module:Family", "of the package no_such_module:Family cannot be imported: ModuleNotFoundError"),
    ],
    ids=["unfinished", "not a family", "no attribute", "no module"],
)
def test_a_family_that_is_none_is_one_line(offered, value, said):
    offered(theirs=value)
    with pytest.raises(ConfigError, match=r"^model\.family: 'theirs'") as caught:
        family_class("theirs")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_family_leaves_out_is_one_line_where_it_is_needed(tiny_flux, offered):
    offered(silent="test_families:Silent")
    config = tiny_config(tiny_flux, model={"family": "silent"})
    with pytest.raises(ConfigError, match=r"^model\.family: 'silent' has no `encoded_shapes`, which a plan needs$"):
        dry_run(config)
    with pytest.raises(ConfigError, match=r"'silent' has no `token_lengths`, which parallel\.context needs"):
        check_parts(tiny_config(tiny_flux, model={"family": "silent"}, parallel={"context": 2}), "cpu")
    with pytest.raises(ConfigError, match="'silent' has no `word_tokenizers`, which a pipeline with random weights"):
        family_class("silent").word_tokenizers(8)
    with pytest.raises(ConfigError, match="'silent' has no `encode_images`, which pretraining needs"):
        load_family(config.model, CPU).encode_images(torch.zeros(1, 3, 32, 32))
