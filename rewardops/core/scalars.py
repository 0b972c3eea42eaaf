"""Numbers of an op under compilation: a graph that is compiled once serves every value of a temperature or a beta.

An op's ``float`` arguments are constants of a graph, which would be compiled anew for each value. Where a value is
not constant, all floats of the call travel in one more argument: ``numbers``, a float64 tensor on the CPU, which is
read when the op runs. Elsewhere it is None, and the floats hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value


def with_numbers(schema: str) -> str:
    """The schema of an op, with ``numbers`` as its last argument if it has floats."""
    arguments, arrow, results = schema.partition(") -> ")
    floats = any(argument.split()[0] == "float" for argument in arguments.partition("(")[2].split(", "))
    return f"{arguments}{', Tensor? numbers=None' if floats else ''}{arrow}{results}"


class Carried(float):
    """A number that a tensor holds, while a graph is traced; the float itself is NaN."""

    tensor: Tensor

    @staticmethod
    def by(tensor: Tensor) -> Carried:
        number = Carried("nan")
        number.tensor = tensor
        return number


def _as_tensor(name: str, number: Any, one: Tensor) -> Tensor:
    """``[1]``; a product with a tensor, as tracing keeps the number symbolic in one."""
    if isinstance(number, Carried):
        number = number.tensor
    if isinstance(number, Tensor):
        if number.is_meta:
            raise ValueError(f"{name}: got a number on the device meta, want one that has a value")
        return number.detach().to(one).reshape(1)
    return one * number


class Floats:
    """The places of the floats among an op's arguments, the last of which is ``numbers``."""

    def __init__(self, schema: torch.FunctionSchema) -> None:
        self.places = [k for k, a in enumerate(schema.arguments) if str(a.type) == "float"]
        self.names = [a.name for a in schema.arguments][: -1 if self.places else None]

    def caller(self, overload: torch._ops.OpOverload) -> Callable[..., Any]:
        """The op as a function of its arguments without ``numbers``; each float may be a tensor of one element."""
        places = self.places
        if not places:
            return overload

        def call(*args: Any) -> Any:
            constant = all([type(args[k]) is float for k in places])
            if torch.compiler.is_compiling():
                # To a graph that is traced, a symbolic number is a float.
                constant = constant and all([has_static_value(args[k]) for k in places])
            if constant:
                return overload(*args)
            one = torch.ones(1, dtype=torch.float64, device="cpu")
            numbers = torch.cat([_as_tensor(self.names[k], args[k], one) for k in places])
            return overload(*self._with(args, [0.0] * len(places)), numbers)

        return call

    def _with(self, args: Sequence[Any], floats: Sequence[float]) -> list[Any]:
        out = list(args)
        for k, number in zip(self.places, floats, strict=True):
            out[k] = number
        return out

    def read(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments without ``numbers``, whose values are in the places of the floats."""
        count = len(self.names)
        return args if len(args) == count else self._with(args[:count], args[count].tolist())

    def carried(self, args: Sequence[Any]) -> Sequence[Any]:
        """As :meth:`read` for a backward pass that is traced: nothing is read, the floats refer to the tensor."""
        count = len(self.names)
        if len(args) == count or args[count] is None:
            return args[:count]
        return self._with(args[:count], [Carried.by(t) for t in args[count].unbind(0)])


# ---- numbers among tensors ---------------------------------------------------------------------------------
# ``clamp`` and ``full`` take a number as a constant of the graph; a product with a tensor does not.


def filled(like: Tensor, number: float | Tensor) -> Tensor:
    """The number as a tensor without dimensions, in the dtype of another and on its device."""
    if isinstance(number, Tensor):
        return number.to(like)
    return like.new_ones(()) * number


def listed(numbers: Tensor | Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor of one dimension, without a gradient."""
    if isinstance(numbers, Tensor):
        return numbers.detach().to(device, dtype)
    if not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)
    one = torch.ones(1, dtype=dtype, device=device)
    return torch.cat([one[:0], *(one * number for number in numbers)])


def smaller(x: Tensor, number: float | Tensor) -> Tensor:
    """``min(x, number)``; NaN stays."""
    return torch.minimum(x, filled(x, number))


def larger(x: Tensor, number: float | Tensor) -> Tensor:
    """``max(x, number)``; NaN stays."""
    return torch.maximum(x, filled(x, number))
