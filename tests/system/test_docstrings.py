"""Docstrings of public names are in Google style, say what the signature has, and hold examples that run."""

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

import rewardops
from rewardops.core.families import FAMILIES

MODULES = (
    "rewardops",
    *(f"rewardops.{family}" for family in FAMILIES),
    "rewardops.viz",
    "rewardops.testing",
    "rewardops.integrations.adapters",
)


def public() -> dict[str, type | Callable]:
    """Functions and classes that are public, by ``<module>.<name>``; constants and types of hints left out."""
    values = [
        getattr(module, name) for module in map(importlib.import_module, MODULES) for name in module.__all__
    ]
    return {
        f"{value.__module__}.{value.__name__}".removeprefix("rewardops."): value
        for value in values
        if isinstance(value, (type, types.FunctionType))
    }


PUBLIC = public()


def parameters(function: Callable) -> Iterator[str]:
    """Names of the arguments, those of ``**options: Unpack[...]`` one by one."""
    for parameter in inspect.signature(function).parameters.values():
        options = re.fullmatch(r"Unpack\[(\w+)\]", str(parameter.annotation))
        if options:
            yield from function.__globals__[options[1]].__annotations__
        else:
            yield parameter.name


def fields(cls: type) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    return list(getattr(cls, "_fields", ()))


def problems_of_class(cls: type, named: list[str]) -> Iterator[str]:
    for field in fields(cls):
        if field not in named:
            yield f"Attributes: {field} is missing"
    for name in named:
        if name not in fields(cls) and not hasattr(cls, name):
            yield f"Attributes: {name} is not an attribute"


def problems_of_function(function: Callable, doc: docstring_parser.Docstring, named: list[str]) -> Iterator[str]:
    wanted, annotations = list(parameters(function)), function.__annotations__
    if sorted(named) != sorted(wanted):
        yield f"Args: got {named}, want {wanted}"
    if doc.returns is None and annotations.get("return") not in (None, "None"):
        yield "Returns: missing"
    takes_tensors = any("Tensor" in str(hint) for name, hint in annotations.items() if name != "return")
    if takes_tensors and not doc.raises:
        yield "Raises: missing"


def problems(value: type | Callable) -> Iterator[str]:
    """What a docstring lacks, or has too much."""
    text = inspect.getdoc(value) or ""
    doc = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    if not re.match(r"\S[^\n]*[.:](\n\n|$)", text):
        yield "summary: not a sentence on a line of its own"
    for meta in doc.params:
        if not meta.description:
            yield f"{meta.args[0]}: {meta.arg_name} has no description"
    named = [meta.arg_name.lstrip("*") for meta in doc.params]
    if isinstance(value, type):
        yield from problems_of_class(value, named)
    else:
        yield from problems_of_function(value, doc, named)
    for entry in doc.raises:
        error = getattr(builtins, entry.type_name or "", getattr(rewardops, entry.type_name or "", None))
        if not (isinstance(error, type) and issubclass(error, Exception)):
            yield f"Raises: got {entry.type_name!r}, want the name of an exception"
        if re.search(r"\w(Error|Unavailable): ", entry.description or ""):
            yield f"Raises: a line of its own for each exception, not {entry.description!r}"
    if ">>> " not in text.partition("\nExample:\n")[2]:
        yield "Example: missing"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring(name):
    value = PUBLIC[name]
    found = list(problems(value))
    assert not found, "\n".join(found)
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(value), {"torch": torch, "ro": rewardops}, name, inspect.getsourcefile(value), 0
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert not runner.run(example, out=report.append).failed, "".join(report)
