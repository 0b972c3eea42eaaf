"""Kinds of tensors: the dtype and the shape that an op's kernels expect of each argument, checked before any runs.

Kernels take addresses. A tensor of another dtype would be read as what it is not, a shorter one beyond its end; and
``torch.ops.rewardops`` is open to any caller. The fields of an argument record are annotated with a kind
(``rewards: RealTokens``); :func:`.dispatch.define` names those of an op's other tensors.

A kind is ``Annotated[Tensor, dtype, *shape]``. Dtypes are keys of ``DTYPES``; ``"real"`` tensors of a call have one
dtype, ``"either"`` ones any of the two. A shape is a list of sizes: numbers, names (equal names are equal sizes,
that of an integer argument if one has the name; ``"2B"`` and ``"B+1"`` follow from ``"B"``), and ``"..."`` for any
sizes, the same wherever it stands. An integer argument ``size`` is the last of them.
``"or"`` separates two shapes. Where an op has ``cu_seqlens``, ``"..."`` is the shape of the tokens, ``[B, T]`` or
packed ``[N]``, and ``"B"`` the number of rows.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .precision import has_float64

DTYPES = {
    "real": (torch.float32, torch.float64),
    "either": (torch.float32, torch.float64),
    "float": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "float64": (torch.float64,),
    "bool": (torch.bool,),
    "int64": (torch.int64,),
    "offsets": (torch.int32, torch.int64),
    "integer": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    "markers": (torch.bool, torch.int64),
}

Real = Annotated[Tensor, "real"]
RealTokens = Annotated[Tensor, "real", "..."]
RealRows = Annotated[Tensor, "real", "B"]
WideTokens = Annotated[Tensor, "float64", "..."]
Flags = Annotated[Tensor, "bool", "..."]
Markers = Annotated[Tensor, "markers", "..."]
Offsets = Annotated[Tensor, "offsets", "B+1"]
Factors = Annotated[Tensor, "float64", "...", "or", "B", "1"]
Records = Annotated[Tensor, "float64", "...", "14"]  # of token statistics
Coefficients = Annotated[Tensor, "float", "..."]
IdTokens = Annotated[Tensor, "int64", "..."]
IdRows = Annotated[Tensor, "int64", "B"]


class Kind(NamedTuple):
    """The accepted dtypes, and the sizes; None: any."""

    dtype: str | None
    shape: tuple[str, ...] | None

    @staticmethod
    def of(annotation: Any) -> Kind | None:
        """The kind in an annotation, also in ``kind | None``; None where there is none."""
        for part in (annotation, *typing.get_args(annotation)):
            if hasattr(part, "__metadata__"):
                dtype, *shape = part.__metadata__
                return Kind(dtype, tuple(shape) or None)
        return None


def kinds_of(record: type[NamedTuple] | None) -> dict[str, Kind]:
    """The kinds of a record's fields."""
    hints = typing.get_type_hints(record, include_extras=True) if record is not None else {}
    return {name: kind for name, hint in hints.items() if (kind := Kind.of(hint)) is not None}


def _show(sizes: Sequence[object]) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"


class _Call:
    """What the tensors of one call have in common, known from those that were seen."""

    def __init__(self, device: torch.device, sizes: dict[str, int], dims: int | None) -> None:
        self.device = device
        self.sizes = sizes
        self.dims = dims  # of the tokens; None for any
        self.leading: tuple[int, ...] | None = None
        self.real: tuple[str, torch.dtype] | None = None

    def dtype(self, name: str, tensor: Tensor, kind: Kind) -> None:
        if kind.dtype is not None:
            self._check_dtype(name, tensor, kind)
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: got layout {tensor.layout}, want torch.strided")
        if tensor.device != self.device:
            raise ValueError(f"{name}: got device {tensor.device}, want {self.device}")

    def _check_dtype(self, name: str, tensor: Tensor, kind: Kind) -> None:
        narrow = kind.dtype == "float64" and not has_float64(self.device.type)
        dtypes = DTYPES["real" if narrow else str(kind.dtype)]
        if tensor.dtype not in dtypes:
            want = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name}: got dtype {tensor.dtype}, want {want}")
        if kind.dtype == "real":
            if self.real is None:
                self.real = name, tensor.dtype
            elif tensor.dtype is not self.real[1]:
                raise TypeError(
                    f"{name}: got dtype {tensor.dtype}, want {self.real[1]} (that of {self.real[0]})"
                )

    def _size(self, symbol: str) -> int | None:
        """The size that a symbol stands for; None if no tensor with it was seen."""
        if symbol.isdecimal():
            return int(symbol)
        rows = self.sizes.get("B")
        if symbol in ("2B", "B+1"):
            return None if rows is None else 2 * rows if symbol == "2B" else rows + 1
        return self.sizes.get(symbol)

    def _wanted(self, shape: tuple[int, ...], symbols: tuple[str, ...]) -> list[object]:
        """The sizes that ``symbols`` stand for; symbols that were not seen before have the tensor's own size."""
        if "..." in symbols:
            at = symbols.index("...")
            end = len(shape) - (len(symbols) - at - 1)
            if self.leading is None and self.dims in (None, max(end - at, 0)):
                self.leading = shape[at : max(end, at)]
                if "size" in self.sizes:
                    self.leading = (*self.leading[:-1], self.sizes["size"])
                if self.dims == 2:
                    self.sizes.setdefault("B", self.leading[0])
            if self.leading is None:
                tokens: tuple[object, ...] = ("N",) if self.dims == 1 else ("B", "T")
            else:
                tokens = self.leading
            before, after = (
                self._wanted(shape[:at], symbols[:at]),
                self._wanted(shape[end:], symbols[at + 1 :]),
            )
            return [*before, *tokens, *after]
        wanted: list[object] = []
        for place, symbol in enumerate(symbols):
            size = self._size(symbol)
            if size is None and len(shape) == len(symbols):
                size = shape[place]
                if symbol == "2B":
                    self.sizes["B"], size = size // 2, size // 2 * 2
                elif symbol == "B+1":
                    self.sizes["B"], size = max(size - 1, 0), max(size, 1)
                else:
                    self.sizes[symbol] = size
            wanted.append(symbol if size is None else size)
        return wanted

    def shape(self, name: str, tensor: Tensor, symbols: tuple[str, ...]) -> None:
        shape, other = tuple(tensor.shape), None
        if "or" in symbols:
            at = symbols.index("or")
            symbols, other = symbols[:at], symbols[at + 1 :]
            if shape == tuple(self._wanted(shape, other)):
                return
        wanted = self._wanted(shape, symbols)
        if shape != tuple(wanted):
            raise ValueError(f"{name}: got shape {_show(shape)}, want {_show(wanted)}")


_REMEMBERED = 4096  # calls whose dtypes and shapes were found right; then they are forgotten


def _described(value: Any, device: bool) -> Any:
    """What decides about an argument: of a tensor its dtype and shape, and its device if that may differ."""
    if isinstance(value, Tensor):
        return (
            (value.dtype, value.shape, value.device, value.layout) if device else (value.dtype, value.shape)
        )
    return tuple([_described(v, device) for v in value]) if isinstance(value, list) else value


def checker(schema: torch.FunctionSchema, kinds: Mapping[str, Kind]) -> Callable[..., None]:
    """The check of an op's arguments; it raises where a tensor is not of its kind.

    Where the dispatcher has seen to it that all tensors are dense ones of the CPU, ``on_cpu`` says so.
    """
    names = [argument.name for argument in schema.arguments]
    tensors = [a.name for a in schema.arguments if "Tensor" in str(a.type) and a.name != "numbers"]
    kinds = {name: kinds.get(name, Kind(None, None)) for name in tensors}
    # Shapes that others refer to come first.
    tensors.sort(key=lambda name: kinds[name].shape != ("...",))
    entries = [(names.index(name), name, kinds[name]) for name in tensors]
    numbers = [(k, a.name) for k, a in enumerate(schema.arguments) if str(a.type) == "int"]
    offsets = names.index("cu_seqlens") if "cu_seqlens" in names else None
    places = [k for k, _, _ in entries] + [k for k, _ in numbers]
    right: set[Any] = set()

    def look(args: Sequence[Any]) -> None:
        present: list[tuple[str, Tensor, Kind]] = []
        for k, name, kind in entries:
            value = args[k]
            if isinstance(value, Tensor):
                present.append((name, value, kind))
            elif value is not None:
                present += [(f"{name}[{i}]", t, kind) for i, t in enumerate(value) if t is not None]
        sizes, dims = {name: args[k] for k, name in numbers}, None
        if offsets is not None:
            cu_seqlens = args[offsets]
            dims = 2 if cu_seqlens is None else 1
            if cu_seqlens is not None and cu_seqlens.dim() == 1:
                sizes["B"] = max(len(cu_seqlens) - 1, 0)
        call = _Call(present[0][1].device, sizes, dims)
        if dims == 1 and "num_tokens" in sizes:
            call.leading = (sizes["num_tokens"],)
        for name, tensor, kind in present:
            call.dtype(name, tensor, kind)
            if kind.shape is not None:
                call.shape(name, tensor, kind.shape)

    def check(args: Sequence[Any], on_cpu: bool = False) -> None:
        # Training repeats few shapes: most calls are found among those that were right before.
        described: list[Any] = []
        for k in places:
            value = args[k]
            if value is None:
                described.append(None)
            elif on_cpu and type(value) is Tensor:
                described += (value.dtype, value.shape)
            else:
                described.append(_described(value, not on_cpu))
        key = tuple(described)
        if key not in right:
            look(args)
            if len(right) >= _REMEMBERED:
                right.clear()
            right.add(key)

    return check
