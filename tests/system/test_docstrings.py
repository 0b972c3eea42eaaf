"""Docstrings of public names are in Google style, name what the signature has, and hold examples that run."""

from __future__ import annotations

import builtins
import dataclasses
import doctest
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator

import docstring_parser
import pytest
import torch
from torch import Tensor

import rewardops
from rewardops.core.families import FAMILIES

MODULES = (
    "rewardops",
    *(f"rewardops.{family}" for family in FAMILIES),
    "rewardops.viz",
    "rewardops.recipes",
    "rewardops.testing",
    "rewardops.testing.strategies",
    "rewardops.testing.verify",
    "rewardops.integrations.adapters",
)


def public() -> dict[str, type | Callable]:
    """Public functions and classes by ``<module>.<name>``; no constants, and no aliases of types."""
    modules = [importlib.import_module(module) for module in MODULES]
    values = [getattr(module, name) for module in modules for name in module.__all__]
    return {
        f"{value.__module__}.{value.__name__}".removeprefix("rewardops."): value
        for value in values
        if isinstance(value, (type, types.FunctionType))
    }


PUBLIC = public()


def parameters(function: Callable) -> Iterator[str]:
    """Names of the arguments, those of ``**options: Unpack[...]`` one by one."""
    for parameter in inspect.signature(function).parameters.values():
        if options := re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation)):
            yield from function.__globals__[options[1]].__annotations__
        else:
            yield parameter.name


def fields(cls: type) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "_fields", ()))


def problems_of_class(cls: type, doc: docstring_parser.Docstring) -> Iterator[str]:
    named = [entry.arg_name for entry in doc.params]
    for name in fields(cls):
        if name not in named:
            yield f"Attributes: {name} is missing"
    for name in named:
        if name not in fields(cls) and not hasattr(cls, name):
            yield f"Attributes: {name} is not an attribute"


def problems_of_function(function: Callable, doc: docstring_parser.Docstring) -> Iterator[str]:
    text, annotations = inspect.getdoc(function) or "", dict(function.__annotations__)
    named, wanted = [entry.arg_name.lstrip("*") for entry in doc.params], list(parameters(function))
    if sorted(named) != sorted(wanted):
        yield f"Args: got {named}, want {wanted}"
    if annotations.pop("return", "None") != "None":
        first = text.partition("\nReturns:\n")[2].partition("\n")[0].strip()
        if not first:
            yield "Returns: missing"
        # Sphinx takes what stands before a colon, code aside, for the type of the result.
        if ":" in re.sub(r"(:\w+:)?`+[^`]+`+", "", first):
            yield f"Returns: a colon in {first!r}"
    if any("Tensor" in str(hint) for hint in annotations.values()) and not doc.raises:
        yield "Raises: missing"
    if ">>> " not in text.partition("\nExample:\n")[2]:
        yield "Example: missing"


def problems(value: type | Callable) -> list[str]:
    """What a docstring lacks, or has too much."""
    text = inspect.getdoc(value) or ""
    doc = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    found = list((problems_of_class if isinstance(value, type) else problems_of_function)(value, doc))
    if not re.match(r"\S[^\n]*[.:](\n\n|$)", text):
        found.append("summary: not a sentence on a line of its own")
    for entry in doc.params:
        if not entry.description:
            found.append(f"{entry.arg_name}: no description")
    for entry in doc.raises:
        module, _, name = (entry.type_name or "").rpartition(".")
        places = [importlib.import_module(module)] if module else [builtins, rewardops]
        errors = [getattr(place, name) for place in places if hasattr(place, name)]
        if not any(isinstance(error, type) and issubclass(error, BaseException) for error in errors):
            found.append(f"Raises: got {entry.type_name!r}, want the name of an exception")
        if re.search(r"\w(Error|Unavailable): ", entry.description or ""):
            found.append(f"Raises: several exceptions in one entry, {entry.description!r}")
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    value = PUBLIC[name]
    found = problems(value)
    assert not found, "\n".join(found)
    globs = {"torch": torch, "ro": rewardops}
    text, file = inspect.getdoc(value), inspect.getsourcefile(value)
    example = doctest.DocTestParser().get_doctest(text, globs, name, file, lineno=0)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not runner.run(example, out=report.append).failed, "".join(report)


class Pair:
    """Two numbers.

    Attributes:
        first: the first.
        third: there is none.
    """

    _fields = ("first", "second")


def one_line(a: Tensor, b: int) -> Tensor:
    """Add them."""


def careless(a: Tensor, *, b: int = 0) -> Tensor:
    """Add them
    to each other.

    Args:
        a, b: numbers.

    Returns:
        float32: the sum.

    Raises:
        TypeError: no tensor. ValueError: no number.
        Whatever: else.
    """


def test_faults_are_found():
    assert problems(Pair) == ["Attributes: second is missing", "Attributes: third is not an attribute"]
    assert problems(one_line) == [
        "Args: got [], want ['a', 'b']",
        "Returns: missing",
        "Raises: missing",
        "Example: missing",
    ]
    assert [found.partition(":")[0] for found in problems(careless)] == [
        "Args", "Returns", "Example", "summary", "Raises", "Raises",
    ]  # fmt: skip
