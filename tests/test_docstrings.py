"""Docstrings of the public API, Google style: what each argument is, what comes back, what is raised."""

import importlib
import inspect
import re

import pytest

# What users import: of `fastgrpo`, the kernels' wheel, and what extensions are written against.
ROOMS = ("fastgrpo", "fastgrpo_kernels", "fastgrpo_kernels.compat")


def documented():
    """Every public function, and every public method that a public class defines, by its name."""
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                members = {n: m for n, m in vars(thing).items() if not n.startswith("_") or n == "__init__"}
                plain = {n: getattr(m, "__func__", m) for n, m in members.items()}
                for n, member in plain.items():
                    if inspect.isfunction(member) and "<string>" not in member.__code__.co_filename:
                        # A constructor is told of in the class's own docstring.
                        yield f"{room}.{name}.{n}", member, inspect.getdoc(thing if n == "__init__" else member) or ""
            elif inspect.isfunction(thing):
                yield f"{room}.{name}", thing, inspect.getdoc(thing) or ""


def lacks(function, doc: str) -> list[str]:
    """What a docstring leaves out."""
    signature = inspect.signature(function)
    names = [n for n, p in signature.parameters.items() if n not in ("self", "cls", "trainer")]
    found = [] if doc else ["a docstring"]
    arguments = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE)
    for name in names:
        if not arguments or not re.search(rf"(?:^|[\s,*`]){re.escape(name)}(?:[,`]|\b.*:)", arguments[1]):
            found.append(f"the argument {name}")
    returns = signature.return_annotation
    says_returns = re.search(r"\breturns?\b|^Yields", doc, re.IGNORECASE | re.MULTILINE)
    if function.__name__ != "__init__" and returns not in (None, "None", inspect.Signature.empty) and not says_returns:
        found.append("what it returns")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_public_docstrings_tell_arguments_and_results(room):
    short = {n: said for n, f, doc in documented() if n.rpartition(".")[0].startswith(room) and (said := lacks(f, doc))}
    assert short == {}


def test_what_is_left_out_is_seen():
    def half(a: int, b: int) -> int:
        """Adds.

        Args:
            a: A number.
        """
        return a + b

    assert lacks(half, inspect.getdoc(half) or "") == ["the argument b", "what it returns"]
