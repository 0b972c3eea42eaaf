"""Argument records: one named tuple per family, written once, from which schemas and calls are derived.

The fields of a record that are tensors come first, then the numbers and names, in the order of the C++ struct.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str",
    Sequence[str]: "str[]",
}  # fmt: skip


@functools.cache
def tensor_count(record: Any) -> int:
    """The number of leading fields that are tensors, or None."""
    return sum(kind in (Tensor, Tensor | None) for kind in get_type_hints(record).values())


def schema_of(record: type[NamedTuple]) -> str:
    """The record's fields as arguments of a ``torch.library`` schema."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(record).items())


def packer(names: Sequence[str], record: type[NamedTuple] | None) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """The function that gathers the record's fields among an op's arguments ``names`` into one record."""
    if record is None:
        return lambda args: args
    first = names.index(record._fields[0])
    end = first + len(record._fields)
    if tuple(names[first:end]) != record._fields:
        raise ValueError(f"schema: got {names[first:end]}, want the fields of {record.__name__}")
    make = functools.partial(tuple.__new__, record)  # ``_make`` without its check of the length
    if first == 0 and end == len(names):
        return lambda args: (make(args),)
    if first == 0:
        return lambda args: (make(args[:end]), *args[end:])
    return lambda args: (*args[:first], make(args[first:end]), *args[end:])


# ---- records across a backward pass ------------------------------------------------------------------------


def save_record(ctx: Any, args: Any, *results: Tensor | None) -> None:
    """Save a record, and results of the forward pass, for the backward pass."""
    record: Any = type(args)
    count = tensor_count(record)
    ctx.save_for_backward(*args[:count], *results)
    ctx.record, ctx.scalars = record, args[count:]


def saved_record(ctx: Any) -> tuple[Any, list[Any]]:
    """The record and the results that :func:`save_record` saved."""
    tensors = ctx.saved_tensors
    count = tensor_count(ctx.record)
    return ctx.record(*tensors[:count], *ctx.scalars), list(tensors[count:])
